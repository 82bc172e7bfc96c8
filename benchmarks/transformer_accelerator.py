"""How much of a GPU's peak the base transformer reaches, dense and as a mixture, and whether the host ever waits.

    python benchmarks/transformer_accelerator.py [--quick]

Forward and backward of the training loss's model in bfloat16, the sizes of configs/pretrain/base.yaml. The dense model
has one expert where the mixture has eight: equal active operations. MFU counts products (shodh/model/cost.py) over the
device's peak. Without CUDA it is rehearsed on a CPU with small sizes, which says nothing of speed.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from figures import ROOT, Figure, at_least, at_most, control, report, stated, time_interleaved
from random_latents import make_latents
from tokenizer_accelerator import measure_peak, synchronised

sys.path.append(str(ROOT / "launch"))

from settings import Pretraining  # noqa: E402 - beside the launch scripts

from shodh.config import load_config  # noqa: E402
from shodh.device import find_device, find_peak  # noqa: E402
from shodh.fields import LatentBatch  # noqa: E402
from shodh.model.cost import count_operations  # noqa: E402
from shodh.model.transformer import LatentTransformer, TransformerConfig  # noqa: E402

GRID = (16, 16, 16)
REHEARSAL = {"width": 64, "num_heads": 2, "depth": 2, "hidden": 128, "patch": 4}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    num_rounds = 3 if parser.parse_args(arguments).quick else 21
    config, device = load_config(Pretraining, ROOT / "configs/pretrain/base.yaml"), find_device()
    model, batch_size = config.model, config.engine.batch_size
    if device.type != "cuda":
        model, batch_size = replace(model, **REHEARSAL), 2
    return report("transformer_accelerator", measure_transformer(model, batch_size, device, num_rounds))


def measure_transformer(
    config: TransformerConfig, batch_size: int, device: torch.device, num_rounds: int
) -> list[Figure]:
    """MFU dense and sparse, their ratio, waits of the host, what recomputation costs and compilation gains."""
    batch = LatentBatch(*(values.to(device) for values in make_latents(config, batch_size, 1, GRID)))
    dense = replace(config, num_experts=1, num_kernels=1)
    kinds = {"dense": dense, "mixture": config, "recomputed": replace(config, recompute=True)}
    works = {name: passing(kind, batch, device) for name, kind in kinds.items()}
    works["again"] = works["mixture"]
    times = time_interleaved({name: synchronised(work, device) for name, work in works.items()}, num_rounds)
    experts = f"{config.num_experts} experts"
    figures = [
        *(stated(f"{name}: forward + backward", times[name], "s") for name in kinds),
        *(stated(f"{name}: peak memory", measure_peak(works[name], device) / 1e9, "GB") for name in kinds),
        control("mixture over itself", times["again"] / times["mixture"]),
        at_most("times that the host waits in a forward and backward pass", count_waits(works["mixture"], device), 0),
        *compare_compiled(config, batch, device, works["mixture"], num_rounds),
    ]
    peak = find_peak(device)
    if peak is None:
        return [
            *figures,
            stated(f"rehearsed: {experts} over dense, which means nothing", times["mixture"] / times["dense"]),
        ]
    for name, bound in (("dense", 0.40), ("mixture", 0.34)):
        operations = batch_size * count_operations(kinds[name], GRID).train()
        figures.append(at_least(f"{name}: MFU, of {peak / 1e12:.0f} TFLOP/s", operations / times[name] / peak, bound))
    return [*figures, at_most(f"{experts} over dense", times["mixture"] / times["dense"], 1.25)]


def passing(
    config: TransformerConfig, batch: LatentBatch, device: torch.device, compiled: bool = False
) -> Callable[[], None]:
    """Forward and backward of a model's forecast error under autocast."""
    torch.manual_seed(0)
    model = LatentTransformer(config).to(device)
    if compiled:
        for block in model.blocks:
            block.compile()

    def work() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            forecast = model(batch.given, batch.medium, batch.parameters)
        (forecast.latent - batch.following).float().square().mean().backward()
        model.zero_grad()

    return work


def count_waits(work: Callable[[], None], device: torch.device) -> int:
    """1 where anything in a pass makes the host wait for the device, which CUDA then refuses; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        print(f"the host waits: {str(error).splitlines()[0]}")
        return 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0


def compare_compiled(
    config: TransformerConfig, batch: LatentBatch, device: torch.device, eager: Callable[[], None], num_rounds: int
) -> list[Figure]:
    """Compiled blocks over eager ones; nothing, and a line that says so, where they do not compile."""
    if device.type != "cuda":
        return []
    try:
        works = {"eager": eager, "compiled": passing(config, batch, device, compiled=True)}
        times = time_interleaved({name: synchronised(work, device) for name, work in works.items()}, num_rounds)
    except Exception as error:  # whatever a compiler raises, it must not cost the figures above
        print(f"torch.compile: {type(error).__name__}: {str(error).splitlines()[0]}. Not measured.")
        return []
    return [stated("compiled blocks over eager", times["compiled"] / times["eager"])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
