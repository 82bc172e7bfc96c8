"""The only training loop: tokenizer, pretraining, fine-tuning and distillation all run through it."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from shodh.training.engine import set_learning_rate
from shodh.training.schedule import ScheduleConfig, learning_rate_at


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What the loop itself is told."""

    schedule: ScheduleConfig
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative.")


class StepRecord(NamedTuple):
    """What one optimizer step produced; hooks read it. ``step`` counts completed steps, from 1."""

    step: int
    scalars: dict[str, float]  # means over ranks and accumulation, loss terms as "loss/name"
    seconds: float
    outputs: list[Any]  # what the objective returned beside its terms, per micro-step, on this rank


@runtime_checkable
class Objective(Protocol):
    """Turns a batch into named loss terms (``total`` is minimised) and anything the hooks want to see."""

    def begin_step(self, step: int) -> None: ...

    def __call__(self, engine: Any, batch: Any) -> tuple[dict[str, Tensor], Any]: ...


@runtime_checkable
class Hook(Protocol):
    """Called on every rank after every optimizer step."""

    def after_step(self, record: StepRecord) -> None: ...


@runtime_checkable
class EarlyHook(Protocol):
    """Called on every rank before every optimizer step with its number, from 0."""

    def begin_step(self, step: int) -> None: ...


def train(
    engine: Any,
    objective: Objective,
    batches_from: Callable[[int], Generator[Any, None, None]],
    config: LoopConfig,
    hooks: Sequence[Hook | EarlyHook] = (),
    first_step: int = 0,
) -> None:
    """Run steps ``first_step`` to ``num_steps``; everything random in a step depends only on seed, step and rank.

    ``batches_from(step)`` gives this rank's micro-batches in order from a step on. Raises FloatingPointError, naming
    the step, when the loss is not finite: the newest checkpoint is then the state to go back to.
    """
    engine.train()
    with closing(batches_from(first_step)) as batches:
        for step in range(first_step, config.schedule.num_steps):
            for hook in hooks:
                if isinstance(hook, EarlyHook):
                    hook.begin_step(step)
            record = _run_step(engine, objective, batches, config, step)
            for hook in hooks:
                if isinstance(hook, Hook):
                    hook.after_step(record)


def _run_step(engine: Any, objective: Objective, batches: Iterator[Any], config: LoopConfig, step: int) -> StepRecord:
    started = time.perf_counter()
    torch.manual_seed((config.seed * 1_000_003 + step) * 4099 + torch.distributed.get_rank())
    learning_rate = learning_rate_at(step, config.schedule)
    set_learning_rate(engine, learning_rate)
    objective.begin_step(step)
    terms, outputs = [], []
    for _ in range(engine.gradient_accumulation_steps()):
        losses, output = objective(engine, next(batches))
        engine.backward(losses["total"])
        engine.step()
        terms.append({name: value.detach() for name, value in losses.items()})
        outputs.append(output)
    scalars = _mean_over_ranks(terms)
    if not all(math.isfinite(value) for value in scalars.values()):
        raise FloatingPointError(
            f"step={step + 1}: loss is not finite ({scalars}). Lower learning_rate, or find NaN in the data with "
            "`python -m data.layout STORE`; the newest checkpoint is from before."
        )
    return StepRecord(step + 1, scalars | {"learning_rate": learning_rate}, time.perf_counter() - started, outputs)


def _mean_over_ranks(terms: list[dict[str, Tensor]]) -> dict[str, float]:
    names = list(terms[0])
    means = torch.stack([torch.stack([term[name].float() for term in terms]).mean() for name in names])
    torch.distributed.all_reduce(means)
    values = (means / torch.distributed.get_world_size()).tolist()
    return {("loss" if name == "total" else f"loss/{name}"): value for name, value in zip(names, values, strict=True)}
