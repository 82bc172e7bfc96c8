"""What pretraining minimises: the relative forecast error over one or several steps, and what balance.py asks."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from shodh.fields import NUM_GIVEN, LatentBatch, Routing
from shodh.training.balance import GlobalLoad, balance_loss, information_loss, measure_load, sample_probability, z_loss


class Passes(NamedTuple):
    """The forecasts of an optimizer step."""

    num_predicted: int  # in a row, with gradients
    lead: int  # before those, without
    place: float  # of the first among the states of a batch, from 0 to 1


@dataclass(frozen=True, kw_only=True)
class ForecastConfig:
    """Weights beside the forecast error, whose weight is 1, and how many steps are predicted in a row."""

    mean_weight: float = 16.0
    balance_weight: float = 0.01
    information_weight: float = 0.0
    as_one: int = 0  # optimizer steps during which all routed experts are trained as one network (upcycling.py)
    solve_at: int = 0  # optimizer step before which linear experts are solved for (linear_start.py); 0: never
    solve_batches: int = 256  # micro-batches that they are solved of; too few, and rollouts grow
    # Steps that they are then refined to forecast in a row (linear_rollouts.py); 0: not refined. All batches of the run
    # hold as many states, so first and last ones of a trajectory are drawn less often.
    refine_steps: int = 0
    refine_batches: int = 200  # micro-batches for that
    bias_rate: float = 0.0  # loss-free balance: what an expert's bias moves by each step; 0: none
    z_weight: float = 1e-4
    windows: int = 1  # samples of each trajectory that stand side by side in a batch; the information is of all as one
    change_floor: float = 0.02  # of the whitened latent's variance; a nearly still sample counts no more than this
    # From which optimizer step on how many steps are predicted in a row, each from the predictions before; 1 at first.
    unroll: tuple[tuple[int, int], ...] = ()
    # Likewise at most how many steps go before those, without gradient; 0 at first. Each optimizer step takes the
    # smaller of two draws: short leads are cheap, and a model that seldom sees true states forgets the first step.
    lead: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name, fewest in (("unroll", 1), ("lead", 0)):
            stages = getattr(self, name)
            starts = [start for start, _ in stages]
            if starts != sorted(set(starts)) or min(starts, default=0) < 0:
                raise ValueError(f"{name}={stages}: must be pairs of a step, ascending, and how many are predicted.")
            if min((num for _, num in stages), default=1) < fewest:
                raise ValueError(f"{name}={stages}: too few steps. Give at least {fewest}.")
        if self.windows < 1:
            raise ValueError(f"windows={self.windows}: must be at least 1. Raise it.")
        if self.solve_at < 0:
            raise ValueError(
                f"solve_at={self.solve_at}: must not be negative. Use 0 to leave linear experts to training."
            )
        for name in ("solve_batches", "refine_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1. Raise it.")
        if self.refine_steps < 0:
            raise ValueError(f"refine_steps={self.refine_steps}: must not be negative. Use 0 to refine nothing.")
        if self.refine_steps and not self.solve_at:
            raise ValueError(f"refine_steps={self.refine_steps}: solve_at=0. Set it, or refine_steps=0.")
        if self.as_one < 0:
            raise ValueError(f"as_one={self.as_one}: must not be negative. Use 0 to let experts differ from the start.")
        for name in ("mean_weight", "balance_weight", "information_weight", "bias_rate", "z_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative. Use 0 to switch it off.")

    def num_predicted(self, step: int) -> int:
        """How many steps are predicted in a row at an optimizer step."""
        return [1, *(num for start, num in self.unroll if start <= step)][-1]

    def longest_lead(self, step: int) -> int:
        """How many steps at most go before those."""
        return [0, *(num for start, num in self.lead if start <= step)][-1]

    def mean_lead(self, step: int) -> float:
        """How many go before them on the mean: of the smaller of two draws from 0 to m, m (2 m + 1) / 6 (m + 1)."""
        longest = self.longest_lead(step)
        return longest * (2 * longest + 1) / (6 * (longest + 1))

    def draw_passes(self, step: int) -> Passes:
        """What an optimizer step draws: the same on all ranks, and after a resume."""
        draw = random.Random(step)
        place, longest = draw.random(), self.longest_lead(step)
        lead = min(draw.randint(0, longest), draw.randint(0, longest))
        return Passes(self.num_predicted(step), lead, place)

    @property
    def num_states(self) -> int:
        """How many successive states a batch must hold."""
        starts = {0, *(start for start, _ in (*self.unroll, *self.lead))}
        in_a_row = max(self.num_predicted(step) + self.longest_lead(step) for step in starts)
        return NUM_GIVEN + max(in_a_row, self.refine_steps)


class RoutedBatch(NamedTuple):
    """What telemetry needs of a micro-batch: the routings of its first predicted step."""

    routings: tuple[Routing, ...]
    domain: Int[Tensor, "b"]


class ForecastObjective:
    """Objective of pretraining; balance and information see all ranks and the accumulation steps so far."""

    def __init__(self, config: ForecastConfig) -> None:
        self.config = config
        self.num_predicted, self.lead, self.place = 1, 0, 0.0
        self.load: GlobalLoad | None = None  # of the present step

    def begin_step(self, step: int) -> None:
        self.num_predicted, self.lead, self.place = self.config.draw_passes(step)
        self.load = None

    def __call__(self, engine: Any, batch: LatentBatch) -> tuple[dict[str, Tensor], RoutedBatch]:
        spare = batch.states.shape[1] - NUM_GIVEN - self.lead - self.num_predicted
        first = int(self.place * (spare + 1))  # where fewer states are used than there are: else the last ones never
        states = batch.states[:, first : first + NUM_GIVEN]
        with torch.no_grad():
            for _ in range(self.lead):
                states = follow(states, engine(states, batch.medium, batch.parameters).latent)
        terms, routings, probability = [], [], []
        for k in range(first + self.lead, first + self.lead + self.num_predicted):
            forecast = engine(states, batch.medium, batch.parameters)
            before, truth = batch.states[:, NUM_GIVEN + k - 1], batch.states[:, NUM_GIVEN + k]
            error = relative_errors(forecast.latent - truth, truth - before, self.config.change_floor)
            probability.append(sample_probability(forecast.routings, len(states)))
            terms.append(error | self._weigh_routing(forecast.routings, probability[-1]))
            routings.append(forecast.routings)
            states = follow(states, forecast.latent)
        mean = {name: torch.stack([term[name] for term in terms]).mean() for name in terms[0]}
        mean["information"] = self._inform(torch.stack(probability).mean(0))
        detached = tuple(Routing(*(value.detach() for value in routing)) for routing in routings[0])
        return self._total(mean) | mean, RoutedBatch(detached, batch.domain)

    def _weigh_routing(self, routings: Sequence[Routing], probability: Float[Tensor, "layer b e"]) -> dict[str, Tensor]:
        load = measure_load(routings, probability)
        self.load = load if self.load is None else self.load + load
        layers = zip(routings, self.load.choices, strict=True)
        return {
            "balance": torch.stack([balance_loss(routing, choices) for routing, choices in layers]).mean(),
            "z": torch.stack([z_loss(routing) for routing in routings]).mean(),
        }

    def _inform(self, probability: Float[Tensor, "layer b e"]) -> Tensor:
        """Of experts and trajectories, whose probabilities are those of their windows, on the mean."""
        assert self.load is not None, "every step was weighed"
        probability = reduce(probability, "l (b w) e -> l b e", "mean", w=self.config.windows)
        layers = zip(probability, self.load.probability, self.load.choices, strict=True)
        return torch.stack([information_loss(*layer) for layer in layers]).mean()

    def _total(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        config = self.config
        routing = config.balance_weight * terms["balance"] + config.information_weight * terms["information"]
        return {"total": terms["data"] + config.mean_weight * terms["mean"] + routing + config.z_weight * terms["z"]}


def follow(states: Float[Tensor, "b t c x y z"], latent: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b t c x y z"]:
    """The given states one interval later."""
    return torch.cat([states[:, 1:], latent[:, None]], 1)


def relative_errors(
    error: Float[Tensor, "b c x y z"], change: Float[Tensor, "b c x y z"], floor: float
) -> dict[str, Tensor]:
    """Squared errors over the squared change of each sample, averaged: persistence scores 1 (less for still samples).

    "data" is of every cell, "mean" of the box means, which carry the mean flow: an error that all tokens share does not
    average out. The scale comes from the sample alone, so no label is needed to weigh slow and fast physics alike.
    """
    scale = expected_square(change, floor)
    shared = reduce(error.float(), "b c x y z -> b c 1 1 1", "mean")
    return {"data": (mean_square(error.float()) / scale).mean(), "mean": (mean_square(shared) / scale).mean()}


def expected_square(change: Float[Tensor, "b c x y z"], floor: float) -> Float[Tensor, "b"]:
    """What a sample's squared errors are measured in."""
    return mean_square(change) + floor


def mean_square(values: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b"]:
    """Of each sample."""
    return reduce(values**2, "b c x y z -> b", "mean")
