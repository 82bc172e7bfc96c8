"""Forecasts of latents: one step ahead with its errors, and many steps ahead, each from the forecasts before it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shodh.fields import NUM_GIVEN, LatentBatch

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # given states, medium, parameters -> next latent
Decode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # latent, medium latent -> velocity, pressure

SPANS = {"1": range(1, 2), "2-20": range(2, 21), "20": range(20, 21), "21-60": range(21, 61)}
LONGEST, SHORT = 60, 20  # steps predicted from the first given states, and from later ones
NUM_STARTS = 3
STRUCTURE_STEPS = (1, 2, 5, 10, 15, 20, 30, 40, 50, 60)  # a spectrum costs more than an error, and changes slowly
SILENT = 1e-3  # of a trajectory's largest standard deviation: a quieter field has no relative error worth averaging


class TrueTrajectory(NamedTuple):
    """One trajectory that the model should follow, from a few of its states; all of it on one device."""

    latents: Float[Tensor, "t c x y z"]
    medium: Float[Tensor, "m x y z"]
    parameters: Float[Tensor, "q"]
    velocity: Float[Tensor, "t 3 X Y Z"]
    pressure: Float[Tensor, "t 1 X Y Z"]


class Steps(NamedTuple):
    """What is measured of a trajectory: pairs of a start and a predicted step."""

    starts: tuple[int, ...]  # all of them, the first 0
    num_steps: int  # predicted from start 0
    start: Int[Tensor, "p"]
    step: Int[Tensor, "p"]

    @property
    def given(self) -> Int[Tensor, "p"]:
        """Number of the last snapshot that is given: a start is the first of them."""
        return self.start + NUM_GIVEN - 1

    @property
    def time(self) -> Int[Tensor, "p"]:
        """Number of the snapshot that a pair predicts."""
        return self.given + self.step


@torch.no_grad()
def roll_out(
    predict: Predict,
    given: Float[Tensor, "b h c x y z"],
    medium: Float[Tensor, "b m x y z"],
    parameters: Float[Tensor, "b q"],
    num_steps: int,
) -> Float[Tensor, "b t c x y z"]:
    """The next ``num_steps`` latents, each predicted from the NUM_GIVEN before it."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: there is nothing to predict. Give at least 1.")
    states = list(given.unbind(1))
    for _ in range(num_steps):
        states.append(predict(torch.stack(states[-given.shape[1] :], 1), medium, parameters))
    return torch.stack(states[given.shape[1] :], 1)


def plan_steps(num_states: int) -> Steps:
    """From the first given states up to 60 steps, every second one beyond the 20th; 20 steps from later states.

    Up to two later starts leave 20 steps each, spread evenly and at least 3 apart: from one start, how far a pulsating
    flow has moved after 20 steps is the chance of its phase. From them only ``STRUCTURE_STEPS`` are measured. What is
    left out changes slowly, and would cost as much to decode as the rest. Raises ValueError with nothing to predict.
    """
    left = num_states - NUM_GIVEN
    if left < 1:
        raise ValueError(f"latents: {num_states} states leave nothing to predict. Give at least {NUM_GIVEN + 1}.")
    num_steps, last = min(LONGEST, left), max(0, left - SHORT)
    num_starts = min(NUM_STARTS, 1 + last // 3)
    starts = tuple(i * last // max(1, num_starts - 1) for i in range(num_starts))
    pairs = [(0, step) for step in range(1, num_steps + 1) if step <= SHORT or step % 2 == 0]
    pairs += [(start, step) for start in starts[1:] for step in STRUCTURE_STEPS if step <= SHORT]
    start, step = torch.tensor(pairs).unbind(1)
    return Steps(starts, num_steps, start, step)


def forecast_steps(predict: Predict, truth: TrueTrajectory, steps: Steps) -> Float[Tensor, "p c x y z"]:
    """The predicted latent of each pair; starts are predicted side by side."""
    starts = torch.tensor(steps.starts)
    medium, parameters = (value.expand(len(starts), *value.shape) for value in (truth.medium, truth.parameters))
    first = min(SHORT, steps.num_steps)
    given = truth.latents[starts[:, None] + torch.arange(NUM_GIVEN)]
    states = roll_out(predict, given, medium, parameters, first)
    by_start = dict(zip(steps.starts, states, strict=True))
    if steps.num_steps > first:
        further = steps.num_steps - first
        reached = torch.cat([given[:1], states[:1]], 1)[:, -NUM_GIVEN:]
        rest = roll_out(predict, reached, medium[:1], parameters[:1], further)
        by_start[0] = torch.cat([states[0], rest[0]])
    pairs = zip(steps.start.tolist(), steps.step.tolist(), strict=True)
    return torch.stack([by_start[start][step - 1] for start, step in pairs])


def join_successive(
    latents: Float[Tensor, "t c x y z"], medium: Float[Tensor, "m x y z"], parameters: Float[Tensor, "q"], index: int
) -> LatentBatch:
    """All given states of a trajectory, each with the one that follows, as one batch of domain number ``index``."""
    num = len(latents) - NUM_GIVEN
    return LatentBatch(
        states=latents.unfold(0, NUM_GIVEN + 1, 1).movedim(-1, 1),
        medium=medium.expand(num, *medium.shape),
        parameters=parameters.expand(num, -1),
        domain=torch.full((num,), index, device=latents.device),
    )


@torch.no_grad()
def measure_one_step(predict: Predict, batches: LatentBatch | Iterable[LatentBatch]) -> dict[str, float]:
    """Mean squared error of the next latent over all batches, and of two guesses that need no model.

    ``persistence_mse``: the state stays; ``extrapolation_mse``: it goes on as it went; ``ratio`` is over persistence.
    """
    errors = torch.zeros(3, dtype=torch.float64)
    num_values = 0
    for batch in [batches] if isinstance(batches, LatentBatch) else batches:
        guesses = (
            predict(batch.given, batch.medium, batch.parameters),
            batch.current,
            2 * batch.current - batch.given[:, -2],
        )
        truth = batch.following.double()
        errors += torch.stack([(guess.double() - truth).square().sum() for guess in guesses]).cpu()
        num_values += truth.numel()
    if num_values == 0:
        raise ValueError("batches: hold no sample, so no error can be measured. Check the validation split.")
    model, persistence, extrapolation = (errors / num_values).tolist()
    return {
        "latent_mse": model,
        "persistence_mse": persistence,
        "ratio": model / max(persistence, 1e-300),
        "extrapolation_mse": extrapolation,
    }


def average_present(measurements: Sequence[Any]) -> Any:
    """The mean of measurements, number by number; None entries count for nothing, and of nothing it is None."""
    present = [m for m in measurements if m is not None]
    if not present:
        return None
    if isinstance(present[0], dict):
        return {key: average_present([m.get(key) for m in present]) for key in present[0]}
    if isinstance(present[0], list):
        longest = max(map(len, present))
        return [average_present([m[i] for m in present if i < len(m)]) for i in range(longest)]
    return sum(present) / len(present)
