"""Short real trainings on three and more kinds of made-up physics, whose routers tests damage while they run."""

import json
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shodh.evaluation.alarm_hook import RaiseAlarms
from shodh.evaluation.telemetry import MeasureRouting
from shodh.fields import CONDITIONS, NUM_GIVEN, LatentBatch
from shodh.model.router import SemanticRouter
from shodh.model.transformer import Block, LatentTransformer, TransformerConfig
from shodh.training.alarm_log import FILE, AlarmLog
from shodh.training.balance import AdjustBias
from shodh.training.engine import EngineConfig, build_engine
from shodh.training.loop import Hook, LoopConfig, Objective, StepRecord, train
from shodh.training.objectives import ForecastConfig, ForecastObjective
from shodh.training.schedule import ScheduleConfig

CHANNELS, CELLS, NUM_WARMUP_STEPS = 4, 3, 10
Damage = Callable[[LatentTransformer, int], None]  # model and completed steps


@dataclass(frozen=True, kw_only=True)
class LiveRun:
    """A small training: how many of what it has, and how long it lasts."""

    seed: int
    num_steps: int
    weights: tuple[int, ...] = (1, 1, 1)  # samples of each domain in a batch, in proportion
    num_experts: int = 4
    depth: int = 2
    top_k: int = 1
    batch_size: int = 12
    objective: ForecastConfig = ForecastConfig()
    zero_stage: Literal[0, 1] = 0
    reversed_from: int | None = None  # step from which on imbalance is rewarded


class DamageModel:
    """Hook that lets a test tamper with the model after every step."""

    def __init__(self, model: LatentTransformer, damage: Damage) -> None:
        self.model, self.damage = model, damage

    @torch.no_grad()
    def after_step(self, record: StepRecord) -> None:
        self.damage(self.model, record.step)


class Keep:
    """Hook that keeps every step's scalars."""

    def __init__(self) -> None:
        self.scalars: list[dict[str, float]] = []

    def after_step(self, record: StepRecord) -> None:
        self.scalars.append(record.scalars)


def train_live(run: LiveRun, folder: Path, damage: Damage | None = None) -> tuple[list[dict[str, Any]], Keep]:
    """The lines of alarms.jsonl of a real training, damaged as it runs, and its scalars."""
    torch.manual_seed(run.seed)
    sizes = {"width": 32, "num_heads": 2, "hidden": 32, "semantic_width": 8}
    model = LatentTransformer(
        TransformerConfig(
            latent_channels=CHANNELS,
            medium_channels=1,
            depth=run.depth,
            num_experts=run.num_experts,
            top_k=run.top_k,
            **sizes,
        )
    )
    config = EngineConfig(batch_size=run.batch_size, zero_stage=run.zero_stage)
    engine = build_engine(model, config, torch.device("cpu"))
    names = [f"physics{index}" for index in range(len(run.weights))]
    routing, keep = MeasureRouting(names, interval=1), Keep()
    bias = AdjustBias([router_of(model, layer) for layer in range(run.depth)], run.objective.bias_rate)
    alarms = RaiseAlarms(routing, engine, AlarmLog(folder, "pretrain"), run.top_k, settle=NUM_WARMUP_STEPS)
    hooks: list[Hook] = [bias, routing, alarms, keep, *([DamageModel(model, damage)] if damage else [])]
    schedule = ScheduleConfig(num_steps=run.num_steps, learning_rate=2e-3, num_warmup_steps=NUM_WARMUP_STEPS)
    objective: Objective = ForecastObjective(run.objective)
    if run.reversed_from is not None:
        objective = ReverseBalance(objective, run.reversed_from)
    train(engine, objective, lambda step: draw(run, step), LoopConfig(schedule=schedule), hooks)
    return read_lines(folder), keep


def read_lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw(run: LiveRun, first_step: int) -> Generator[LatentBatch, None, None]:
    """Batches in which domain g drifts along its own axis at its own roughness and with its own parameters."""
    turns = torch.tensor([g for g, weight in enumerate(run.weights) for _ in range(weight)])
    domain = turns.repeat(-(-run.batch_size // len(turns)))[: run.batch_size]
    step = first_step
    while True:
        generator = torch.Generator().manual_seed(100_003 * run.seed + step)
        states = torch.stack([draw_states(int(g), generator) for g in domain])
        parameters = (domain[:, None] + torch.zeros(len(CONDITIONS))).float()
        yield LatentBatch(states, states[:, 0, :1].clone(), parameters, domain)
        step += 1


def draw_states(domain: int, generator: torch.Generator) -> Tensor:
    """The given states and one more (t c x y z)."""
    field = torch.randn(CHANNELS, CELLS, CELLS, CELLS, generator=generator)
    axis = 1 + domain % 3
    field = (field + domain * field.roll(1, axis)) / (1 + domain**2) ** 0.5 + 0.5 * (domain - 1)
    return torch.stack([field.roll(step, axis) for step in range(NUM_GIVEN + 1)])


def press(layer: int, expert: int, first: int, per_step: float = 100.0) -> Damage:
    """From step ``first`` on a router's bias for one expert grows by so much a step; below 0 it is shunned."""

    def damage(model: LatentTransformer, step: int) -> None:
        if step >= first:
            router_of(model, layer).bias[expert] = per_step * (step - first + 1)

    return damage


def swamp(layer: int, expert: int, first: int) -> Damage:
    """At step ``first`` a sample's context swamps its tokens and points to one expert, as after a burst of gradient."""

    def damage(model: LatentTransformer, step: int) -> None:
        if step == first:
            router = router_of(model, layer)
            direction = torch.nn.functional.normalize(router.prototype[expert], dim=0)
            router.context.weight[:, router.token.in_features :] = 10 * direction[:, None]  # of the tokens' spread

    return damage


def spoil(first: int) -> Damage:
    """The gradient of the step after ``first`` is not finite, though its loss is."""
    hooks = []

    def damage(model: LatentTransformer, step: int) -> None:
        if step == first:
            hooks.append(model.out.weight.register_hook(lambda gradient: gradient * math.inf))
        elif hooks:
            hooks.pop().remove()

    return damage


def router_of(model: LatentTransformer, layer: int) -> SemanticRouter:
    """The router of a layer."""
    block = model.blocks[layer]
    assert isinstance(block, Block)
    return block.mixture.router


class ReverseBalance:
    """Objective that rewards imbalance from a step on, as a wrong sign would."""

    def __init__(self, objective: ForecastObjective, first: int) -> None:
        self.objective, self.first, self.step = objective, first, 0

    def begin_step(self, step: int) -> None:
        self.step = step
        self.objective.begin_step(step)

    def __call__(self, engine: Any, batch: LatentBatch) -> tuple[dict[str, Tensor], Any]:
        terms, output = self.objective(engine, batch)
        return (terms | {"total": terms["total"] - terms["balance"]} if self.step >= self.first else terms), output
