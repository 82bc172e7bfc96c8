"""What each rank of benchmarks/expert_parallel.py does; run by it under DeepSpeed's launcher with a list of tasks.

deepspeed --num_accelerators 2 benchmarks/expert_parallel_ranks.py TASKS.json
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, see figures.py

from data.latents import open_latents  # noqa: E402
from data.mixture import LatentMixture, MixtureConfig, stream  # noqa: E402
from shodh.config import load_config  # noqa: E402
from shodh.model import exchange  # noqa: E402
from shodh.model.transformer import LatentTransformer, TransformerConfig, find_stacks  # noqa: E402
from shodh.training.checkpoint import collect_state, read_checkpoint, restore_state, write_checkpoint  # noqa: E402
from shodh.training.engine import EngineConfig, build_engine, create_expert_group, distributed  # noqa: E402
from shodh.training.loop import LoopConfig, StepRecord, train  # noqa: E402
from shodh.training.objectives import ForecastConfig, ForecastObjective  # noqa: E402
from shodh.training.optimizers import OptimizerName  # noqa: E402
from shodh.training.schedule import ScheduleConfig  # noqa: E402
from shodh.training.upcycling import TrainAsOne  # noqa: E402

MODEL = TransformerConfig(width=32, depth=2, num_heads=2, num_experts=8, hidden=48, semantic_width=8, medium_channels=4)
NUM_STEPS = 50  # of the schedule, however few of them a task takes


@dataclass(frozen=True, kw_only=True)
class Task:
    """Train from step ``first`` to ``last``, from the state in ``read`` or from the start."""

    seed: int
    first: int
    last: int
    expert_parallel: int
    zero_stage: int
    read: str = ""  # a checkpoint folder, step-N
    restored: str = ""  # folder for the state as it is after it has been restored, before any step
    write: str = ""  # folder for the state after the last step
    recompute: bool = False
    optimizer: OptimizerName = "adamw"
    as_one: int = 0  # steps for which all experts are one


@dataclass(kw_only=True)
class Outcome:
    """What a task saw; ``samples`` are sums over the states that each step took, in the order of the global batch."""

    losses: list[float] = field(default_factory=list)
    samples: list[list[float]] = field(default_factory=list)
    bytes_sent: int = 0  # to other ranks, by all ranks
    bytes_by_formula: int = 0


@dataclass(frozen=True, kw_only=True)
class TaskList:
    """The file that this program is given."""

    latents: str
    tasks: tuple[Task, ...]
    outcomes: str


class Watch:
    """Hook that keeps losses and stops after a step; objective around ``ForecastObjective`` that keeps its samples."""

    def __init__(self, outcome: Outcome, last: int, ranks: dist.ProcessGroup | None) -> None:
        self.outcome, self.last, self.ranks = outcome, last, ranks
        self.objective = ForecastObjective(ForecastConfig(information_weight=0.1, balance_weight=0.01))

    def begin_step(self, step: int) -> None:
        self.objective.begin_step(step)

    def __call__(self, engine: Any, batch: Any) -> Any:
        mine = batch.states.sum((1, 2, 3, 4, 5))
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        self.outcome.samples.append(torch.cat(everyone).tolist())
        losses, routed = self.objective(engine, batch)
        if self.ranks is not None:
            self.outcome.bytes_by_formula += count_bytes([r.expert for r in routed.routings], self.ranks)
        return losses, routed

    def after_step(self, record: StepRecord) -> None:
        self.outcome.losses.append(record.scalars["loss"])
        if record.step == self.last:
            raise StopIteration


def count_bytes(experts: list[Tensor], ranks: dist.ProcessGroup) -> int:
    """Of one micro-batch, forward and backward, to other ranks: rows of FP32 in 4 journeys, and how many will come.

    In a journey back each rank sends what it received; over all ranks that is what was sent there.
    """
    own = MODEL.num_experts // ranks.size()
    rows = sum(int((expert // own != ranks.rank()).sum()) for expert in experts)
    counts = len(experts) * (ranks.size() - 1) * own
    return 4 * rows * MODEL.width * 4 + counts * 8


@contextmanager
def counted(outcome: Outcome) -> Iterator[None]:
    """Every all-to-all adds what it sends to other ranks to ``bytes_sent``."""
    send = dist.all_to_all_single

    def count(output: Tensor, rows: Tensor, received: Any = None, sent: Any = None, **options: Any) -> Any:
        group = options["group"]
        sent = sent or [len(rows) // group.size()] * group.size()
        remote = sum(sent) - sent[group.rank()]
        outcome.bytes_sent += remote * rows[:1].numel() * rows.element_size() if len(rows) else 0
        return send(output, rows, received, sent if received else None, **options)

    with mock.patch.object(exchange, "all_to_all_single", count):
        yield


def carry_out(task: Task, mixture: LatentMixture, group: Any) -> Outcome:
    """Build the engine that a task asks for, restore, train, and keep its state."""
    torch.manual_seed(task.seed)
    outcome, ranks = Outcome(), create_expert_group(task.expert_parallel)
    config = EngineConfig(
        batch_size=mixture.config.batch_size,
        accumulation=mixture.config.accumulation,
        zero_stage=task.zero_stage,  # pyright: ignore[reportArgumentType]
        expert_parallel=task.expert_parallel,
        gradient_clipping=0.5,
        optimizer=task.optimizer,
    )
    model_config = TransformerConfig(**{**asdict(MODEL), "recompute": task.recompute})
    model = LatentTransformer(model_config, ranks)
    as_one = TrainAsOne(find_stacks(model), task.as_one)
    engine = build_engine(model, config, group.device)
    if task.read:
        restore_state(engine, read_checkpoint(Path(task.read))[0])
    keep_state(engine, task.restored, task.first)
    watch = Watch(outcome, task.last, ranks)
    schedule = ScheduleConfig(num_steps=NUM_STEPS, learning_rate=1e-3, num_warmup_steps=5)
    with counted(outcome):
        try:
            train(
                engine,
                watch,
                lambda step: stream(mixture, step, group.device, group.rank, group.size),
                LoopConfig(schedule=schedule, seed=task.seed),
                [as_one, watch],
                task.first,
            )
        except StopIteration:
            pass
    keep_state(engine, task.write, task.last)
    total = torch.tensor([outcome.bytes_sent, outcome.bytes_by_formula])
    dist.all_reduce(total)
    outcome.bytes_sent, outcome.bytes_by_formula = total.tolist()
    return outcome


def keep_state(engine: Any, folder: str, step: int) -> None:
    """Write a checkpoint of the engine into a folder, if there is one to write into."""
    if folder:
        state = collect_state(engine)
        if dist.get_rank() == 0:
            write_checkpoint(Path(folder), step, state, {"record": {"config": {}}})
        dist.barrier()


def main(path: str) -> None:
    tasks = load_config(TaskList, path)
    with distributed(threads_per_rank=1) as group:
        mixtures = {}
        for task in tasks.tasks:
            mixtures[task.seed] = LatentMixture(
                [open_latents(Path(tasks.latents))], MixtureConfig(batch_size=8, accumulation=2, seed=task.seed)
            )
        outcomes = [asdict(carry_out(task, mixtures[task.seed], group)) for task in tasks.tasks]
        if group.rank == 0:
            Path(tasks.outcomes).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[-1])
