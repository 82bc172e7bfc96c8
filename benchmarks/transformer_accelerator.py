"""How much of a GPU's peak the base transformer reaches, dense and as a mixture, and whether the host ever waits.

    python benchmarks/transformer_accelerator.py [--quick]

Forward and backward of the pretraining loss in bfloat16, the sizes of configs/pretrain/base.yaml. The dense model has
one feed-forward network as wide as the shared and the routed expert together and no router; both have one linear
expert, so that active operations are equal. MFU counts products (shodh/model/cost.py) over the device's peak. Without
CUDA it is rehearsed on a CPU with small sizes, which says nothing of speed.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from figures import ROOT, Figure, at_least, at_most, control, report, stated, time_interleaved
from random_latents import make_latents
from tokenizer_accelerator import measure_peak, synchronised
from torch import Tensor, nn

sys.path.append(str(ROOT / "launch"))

from settings import Pretraining  # noqa: E402 - beside the launch scripts

from shodh.config import load_config  # noqa: E402
from shodh.device import find_peak  # noqa: E402
from shodh.fields import LatentBatch, Routing  # noqa: E402
from shodh.model.cost import count_operations  # noqa: E402
from shodh.model.experts import SharedExpert  # noqa: E402
from shodh.model.transformer import LatentTransformer, TransformerConfig  # noqa: E402
from shodh.training.engine import distributed  # noqa: E402
from shodh.training.objectives import ForecastConfig, ForecastObjective  # noqa: E402

GRID = (16, 16, 16)
REHEARSAL = {"width": 64, "num_heads": 2, "depth": 2, "hidden": 128, "patch": 4}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    num_rounds = 3 if parser.parse_args(arguments).quick else 21
    config = load_config(Pretraining, ROOT / "configs/pretrain/base.yaml")
    model, batch_size = config.model, config.engine.batch_size
    with distributed(threads_per_rank=1) as group:  # balance is of all ranks
        if group.device.type != "cuda":
            model, batch_size = replace(model, **REHEARSAL), 2
        return report("transformer_accelerator", measure_transformer(model, batch_size, group.device, num_rounds))


def measure_transformer(
    config: TransformerConfig, batch_size: int, device: torch.device, num_rounds: int
) -> list[Figure]:
    """MFU dense and sparse, their ratio, waits of the host, what recomputation costs and compilation gains."""
    batch = LatentBatch(*(values.to(device) for values in make_latents(config, batch_size, 1, GRID)))
    config = replace(config, num_kernels=1)
    works = {
        "dense": passing(config, batch, device, densify),
        "mixture": passing(config, batch, device),
        "recomputed": passing(replace(config, recompute=True), batch, device),
    }
    kinds = list(works)
    works["again"] = works["mixture"]
    times = time_interleaved({name: synchronised(work, device) for name, work in works.items()}, num_rounds)
    figures = [
        *(stated(f"{name}: forward + backward", times[name], "s") for name in kinds),
        control("mixture over itself", times["again"] / times["mixture"]),
    ]
    ratio = times["mixture"] / times["dense"]
    if device.type != "cuda":
        return [*figures, stated(f"rehearsed: {config.num_experts} experts over dense, which means nothing", ratio)]
    figures += [
        *(stated(f"{name}: peak memory", measure_peak(works[name], device) / 1e9, "GB") for name in kinds),
        at_most("passes in which the host waits, of one", count_waits(works["mixture"]), 0),
        at_most(f"{config.num_experts} experts over dense", ratio, 1.25),
        *compare_compiled(config, batch, device, works["mixture"], num_rounds),
    ]
    if peak := find_peak(device):
        operations = batch_size * count_operations(config, GRID).train()
        for name, bound in (("dense", 0.40), ("mixture", 0.34)):
            figures.append(
                at_least(f"{name}: MFU, of {peak / 1e12:.0f} TFLOP/s", operations / times[name] / peak, bound)
            )
    return figures


class DenseFeedForward(nn.Module):
    """In the place of a mixture: one network for every token, and the routing of a single expert."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.network = SharedExpert(width, hidden)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Routing]:
        num_tokens = tokens.shape[0] * tokens.shape[1]
        expert = torch.zeros(num_tokens, 1, dtype=torch.long, device=tokens.device)
        one = torch.ones(num_tokens, 1, device=tokens.device)
        return self.network(tokens.flatten(0, 1)).reshape(tokens.shape), Routing(expert, one, one, one)


def densify(model: LatentTransformer) -> None:
    """Give every block a dense network of as many active operations."""
    for block in model.blocks:
        block.mixture = DenseFeedForward(model.config.width, 2 * model.config.hidden)


def compile_blocks(model: LatentTransformer) -> None:
    """Compile each block by itself."""
    for block in model.blocks:
        block.compile()


def passing(
    config: TransformerConfig,
    batch: LatentBatch,
    device: torch.device,
    change: Callable[[LatentTransformer], None] = lambda model: None,
) -> Callable[[], None]:
    """Forward and backward of a changed model's pretraining loss under autocast."""
    torch.manual_seed(0)
    model, objective = LatentTransformer(config), ForecastObjective(ForecastConfig(information_weight=0.1))
    change(model)
    model.to(device)

    def work() -> None:
        objective.begin_step(0)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            losses, _ = objective(model, batch)
        losses["total"].backward()
        model.zero_grad()

    return work


def count_waits(work: Callable[[], None]) -> int:
    """1 where anything in a pass makes the host wait for the device, which CUDA is told to refuse."""
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
    try:
        works = {"eager": eager, "compiled": passing(config, batch, device, compile_blocks)}
        times = time_interleaved({name: synchronised(work, device) for name, work in works.items()}, num_rounds)
    except Exception as error:  # whatever a compiler raises, it must not cost the figures above
        print(f"torch.compile: {type(error).__name__}: {str(error).splitlines()[0]}. Not measured.")
        return []
    return [stated("compiled blocks over eager", times["compiled"] / times["eager"])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
