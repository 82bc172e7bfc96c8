"""What shodh.planning forecasts of a training over what is measured of it: memory, operations, checkpoint.

    python benchmarks/plan.py [--quick]

Each case is a real engine that takes real steps of the pretraining loss on CPU, in FP32: alone, and as two ranks under
the deepspeed launcher for ZeRO 1 and 2. Memory is counted in storages: those of parameters, those that the optimizer
holds beside them, and those that autograd and telemetry keep after the loss beside parameters and batch; operations by
PyTorch's counter; the peak by the profiler, over one step with everything that lies in memory before it. Seconds, of
the CPU, have no target: they depend on the machine, of which configs/plan_run/laptop.yaml says little. Nothing was
fitted: the formulas are those of shodh/model/cost.py and shodh/planning.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would announce its start and stop

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from figures import ROOT, Figure, at_most, report, stated
from plan_measures import Measurement, measure
from ranks import run_ranks

sys.path.append(str(ROOT / "launch"))

from settings import RunPlanning  # noqa: E402 - beside the launch scripts

from shodh.config import load_config, parse_config  # noqa: E402
from shodh.model.transformer import TransformerConfig  # noqa: E402
from shodh.planning.arrangement import Workload  # noqa: E402
from shodh.planning.cluster import ClusterConfig  # noqa: E402
from shodh.planning.memory import forecast_memory  # noqa: E402
from shodh.planning.plan import count_checkpoint_bytes  # noqa: E402
from shodh.planning.step_time import forecast_step, step_operations  # noqa: E402
from shodh.training.engine import EngineConfig, distributed  # noqa: E402
from shodh.training.objectives import ForecastConfig  # noqa: E402
from shodh.training.optimizers import OptimizerName  # noqa: E402
from shodh.training.schedule import ScheduleConfig  # noqa: E402

MOST = 0.15
TARGETS = ("parameters", "optimizer", "activations", "operations", "checkpoint")  # must be within MOST
SMALL = {"width": 64, "depth": 2, "num_heads": 4, "num_experts": 4, "hidden": 128, "medium_channels": 4}


class Case(NamedTuple):
    """What differs from the small model, and how it is trained."""

    name: str
    model: dict[str, Any]
    side: int = 4  # cells of the latent grid along each axis
    batch_size: int = 4
    zero_stage: Literal[0, 1, 2] = 0
    optimizer: OptimizerName = "adamw"
    expert_parallel: int = 1
    num_predicted: int = 1


ALONE = (
    Case("small", {}),
    Case("small, ZeRO 1", {}, zero_stage=1),
    Case("wide", {"width": 192, "num_heads": 6, "hidden": 384}, optimizer="muon"),
    Case("narrow and deep", {"width": 48, "depth": 8, "num_heads": 3, "hidden": 96}, zero_stage=1),
    Case("16 experts", {"num_experts": 16, "expert_hidden": 64}),
    Case("16 experts, one linear", {"num_experts": 16, "num_kernels": 1}, optimizer="muon"),
    Case("top 2", {"top_k": 2}, batch_size=6),
    Case("top 3 of 8, narrow experts", {"top_k": 3, "num_experts": 8, "expert_hidden": 40}, zero_stage=1),
    Case("hidden 4 widths", {"hidden": 256}, batch_size=8),
    Case("patch 2", {"patch": 2}, side=8),
    Case("patch 2, 512 tokens", {"patch": 2, "width": 96, "hidden": 192}, side=16, batch_size=2),
    Case("512 tokens", {"depth": 3}, side=8, batch_size=2, zero_stage=2),
    Case("two forecasts in a row", {}, side=8, batch_size=2, num_predicted=2),
    Case("quickstart", {"width": 192, "depth": 4, "num_heads": 6, "num_experts": 8, "hidden": 384}, batch_size=6),
)
AS_TWO = (
    Case("two ranks, ZeRO 0", {}, batch_size=8),
    Case("two ranks, ZeRO 1", {"width": 96, "hidden": 192}, batch_size=8, zero_stage=1),
    Case("two ranks, ZeRO 2", {"num_experts": 8, "depth": 4}, batch_size=8, zero_stage=2),
    Case("two ranks, Muon", {"top_k": 2}, batch_size=4, optimizer="muon"),
    Case("experts over two ranks", {"num_experts": 8}, batch_size=8, expert_parallel=2),
    Case("experts over two, ZeRO 1", {"num_experts": 8}, batch_size=8, zero_stage=1, expert_parallel=2),
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one rank only")
    parser.add_argument("--rank-of-two", type=Path, help=argparse.SUPPRESS)  # where rank 0 writes what it measured
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank_of_two is not None:
        measured = measure_cases(AS_TWO)
        if os.environ["RANK"] == "0":
            options.rank_of_two.write_text(json.dumps(measured))
        return 0
    rows = compare(ALONE, measure_cases(ALONE), num_ranks=1)
    if not options.quick:
        rows |= compare(AS_TWO, measure_as_two_ranks(), num_ranks=2)
    print_table(rows)
    return report("plan", summarise(rows))


def measure_as_two_ranks() -> list[Measurement]:
    """The cases of two ranks, of which rank 0's memory counts: this script under the launcher."""
    with tempfile.TemporaryDirectory(prefix="shodh-plan-") as folder:
        result = Path(folder) / "measured.json"
        run_ranks(Path(__file__), ["--rank-of-two", str(result)], 2)
        return json.loads(result.read_text())


def measure_cases(cases: Sequence[Case]) -> list[Measurement]:
    """What each is seen to need, on this rank."""
    with distributed(threads_per_rank=1) as group:
        return [measure(workload_of(case), group.device, group.size) for case in cases]


def workload_of(case: Case) -> Workload:
    """A training of one step or more of a case."""
    return Workload(
        model=parse_config(TransformerConfig, SMALL | case.model, source=case.name),
        objective=ForecastConfig(unroll=((0, case.num_predicted),)),
        engine=EngineConfig(
            batch_size=case.batch_size,
            zero_stage=case.zero_stage,
            optimizer=case.optimizer,
            expert_parallel=case.expert_parallel,
        ),
        schedule=ScheduleConfig(num_steps=4, learning_rate=1e-4, num_warmup_steps=0),
        checkpoint_interval=4,
        grid=(case.side, case.side, case.side),
    )


def compare(cases: Sequence[Case], measured: Sequence[Measurement], num_ranks: int) -> dict[str, Measurement]:
    """Of each case, the forecast over what was measured."""
    laptop = load_config(RunPlanning, ROOT / "configs/plan_run/laptop.yaml").cluster
    cluster = replace(laptop, gpus_per_node=num_ranks)
    rows = {}
    for case, found in zip(cases, measured, strict=True):
        expected = forecast_case(workload_of(case), cluster)
        rows[case.name] = {kind: expected[kind] / found[kind] for kind in expected}
    return rows


def forecast_case(workload: Workload, cluster: ClusterConfig) -> Measurement:
    """The same quantities from the formulas alone."""
    memory = forecast_memory(workload, cluster)
    return {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "operations": step_operations(workload, cluster),
        "checkpoint": count_checkpoint_bytes(workload),
        "peak": memory.total,
        "seconds": forecast_step(workload, cluster).total,
    }


def print_table(rows: dict[str, Measurement]) -> None:
    """Every ratio, a line for each case."""
    kinds = list(next(iter(rows.values())))
    print(f"{'forecast over measured':28}" + "".join(f"{kind:>13}" for kind in kinds))
    for name, row in rows.items():
        print(f"{name:28}" + "".join(f"{row[kind]:13.4f}" for kind in kinds))


def summarise(rows: dict[str, Measurement]) -> list[Figure]:
    """The worst and the median error over all cases."""
    figures = [stated("configurations", len(rows))]
    for kind in TARGETS:
        errors = np.abs(np.array([row[kind] for row in rows.values()]) - 1)
        figures.append(at_most(f"{kind}: worst error", float(errors.max()), MOST))
        figures.append(at_most(f"{kind}: median error", float(np.median(errors)), MOST))
    for kind in ("peak", "seconds"):
        figures.append(stated(f"{kind}: forecast over measured", [row[kind] for row in rows.values()]))
    return figures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
