"""Run by test_over_ranks.py under the DeepSpeed launcher: trains routers on shares of the same batches.

train_over_ranks.py FILE writes JSON: scalars of every step, biases, and what each rank was seen to route.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from shodh.evaluation.telemetry import MeasureRouting
from shodh.fields import CONDITIONS, NUM_GIVEN, LatentBatch
from shodh.model.router import find_routers
from shodh.model.transformer import LatentTransformer, TransformerConfig
from shodh.training.balance import AdjustBias
from shodh.training.engine import EngineConfig, Membership, build_engine, distributed
from shodh.training.linear_start import SolveLinearExperts
from shodh.training.loop import LoopConfig, train
from shodh.training.objectives import ForecastConfig, ForecastObjective
from shodh.training.schedule import ScheduleConfig

NUM_STEPS, BATCH, ACCUMULATION = 4, 8, 2
SMALL = TransformerConfig(latent_channels=4, medium_channels=2, width=24, depth=2, num_heads=2, num_experts=4, hidden=8)


class Keep:
    def __init__(self, routing: MeasureRouting) -> None:
        self.routing, self.steps, self.ranks = routing, [], []

    def after_step(self, record) -> None:
        self.steps.append(dict(record.scalars))
        self.ranks.append(self.routing.measured.choices.tolist())


def share(step: int, group: Membership) -> Iterator[LatentBatch]:
    """This rank's part of every micro-batch; the first half of each is of one domain, the second of the other."""
    for micro_step in range(ACCUMULATION * step, 1000):
        torch.manual_seed(micro_step)
        states, medium = torch.randn(BATCH, NUM_GIVEN + 2, 4, 2, 2, 2), torch.randn(BATCH, 2, 2, 2, 2)
        whole = LatentBatch(states, medium, torch.randn(BATCH, len(CONDITIONS)), torch.arange(BATCH) // (BATCH // 2))
        size = BATCH // group.size
        yield LatentBatch(*(values[group.rank * size : (group.rank + 1) * size] for values in whole))


def main(file: Path) -> None:
    with distributed(threads_per_rank=1) as group:
        torch.manual_seed(0)
        model = LatentTransformer(SMALL)
        engine = build_engine(
            model, EngineConfig(batch_size=BATCH, accumulation=ACCUMULATION, zero_stage=0), group.device
        )
        config = ForecastConfig(
            information_weight=0.3,
            bias_rate=0.05,
            solve_at=2,
            solve_batches=4,
            refine_steps=2,
            refine_batches=4,
            unroll=((2, 2),),
        )
        routing = MeasureRouting(("a", "b"), interval=1)
        keep = Keep(routing)
        loop = LoopConfig(schedule=ScheduleConfig(num_steps=NUM_STEPS, learning_rate=0.01, num_warmup_steps=1))
        solve = SolveLinearExperts(engine, lambda step: share(step, group), config)
        hooks = [solve, AdjustBias(find_routers(model), 0.05), routing, keep]
        train(engine, ForecastObjective(config), lambda step: share(step, group), loop, hooks)
        biases = [router.bias.tolist() for router in find_routers(model)]
        if group.rank == 0:
            file.write_text(json.dumps({"steps": keep.steps, "ranks": keep.ranks, "biases": biases}))


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
