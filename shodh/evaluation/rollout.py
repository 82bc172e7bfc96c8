"""How well the model predicts: one step ahead in latents, and many steps ahead in the fields they decode to."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from shodh.fields import Boundary, LatentBatch
from shodh.physics.spectra import band_energy, vrmse

Predict = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # previous, current, medium, parameters -> next latent
Decode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # latent, medium latent -> velocity, pressure

SILENT = 1e-3  # of a trajectory's largest standard deviation: a quieter field has no relative error worth averaging


class TrueTrajectory(NamedTuple):
    """One trajectory that the model should follow, from its first two states; all of it on one device."""

    latents: Float[Tensor, "t c x y z"]
    medium: Float[Tensor, "m x y z"]
    parameters: Float[Tensor, "q"]
    velocity: Float[Tensor, "t 3 X Y Z"]
    pressure: Float[Tensor, "t 1 X Y Z"]
    boundary: tuple[Boundary, Boundary, Boundary]


@torch.no_grad()
def roll_out(
    predict: Predict,
    previous: Float[Tensor, "b c x y z"],
    current: Float[Tensor, "b c x y z"],
    medium: Float[Tensor, "b m x y z"],
    parameters: Float[Tensor, "b q"],
    num_steps: int,
) -> Float[Tensor, "b t c x y z"]:
    """The next ``num_steps`` latents, each predicted from the two before it."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: there is nothing to predict. Give at least 1.")
    states = []
    for _ in range(num_steps):
        previous, current = current, predict(previous, current, medium, parameters)
        states.append(current)
    return torch.stack(states, 1)


@torch.no_grad()
def measure_one_step(predict: Predict, batches: LatentBatch | Iterable[LatentBatch]) -> dict[str, float]:
    """Mean squared error of the next latent over all batches, and of two guesses that need no model.

    ``persistence_mse``: the state stays; ``extrapolation_mse``: it goes on as it went; ``ratio`` is over persistence.
    """
    errors = torch.zeros(3, dtype=torch.float64)
    num_values = 0
    for batch in [batches] if isinstance(batches, LatentBatch) else batches:
        guesses = (
            predict(batch.previous, batch.current, batch.medium, batch.parameters),
            batch.current,
            2 * batch.current - batch.previous,
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


@torch.no_grad()
def measure_rollout(predict: Predict, decode: Decode, truth: TrueTrajectory) -> dict[str, Any]:
    """VRMSE of the decoded rollout at steps 1, 2-5 and the last; beside it persistence, and the tokenizer's floor.

    Persistence is the last given true field, kept; the floor decodes the true latents. At the last
    step, ``energy_drift`` is predicted over true kinetic energy less 1 and ``band_error`` that ratio in every octave.
    Steps at which the true field is silent (a wave that has not started), or the predicted latent no longer finite,
    enter no mean; a span without a step is None.
    """
    num_steps = len(truth.latents) - 2
    if num_steps < 1:
        raise ValueError(f"latents: {len(truth.latents)} states leave nothing to predict. Give at least 3.")
    latents = rearrange(truth.latents, "t c x y z -> t 1 c x y z")
    medium, parameters = truth.medium.unsqueeze(0), truth.parameters.unsqueeze(0)
    predicted = roll_out(predict, latents[0], latents[1], medium, parameters, num_steps)[0]
    sane = predicted.isfinite().all(dim=(1, 2, 3, 4))
    velocity, pressure = _decode_each(decode, predicted.where(sane.reshape(-1, 1, 1, 1, 1), 0.0), medium)
    velocity[~sane], pressure[~sane] = math.nan, math.nan  # a rollout that blew up has no error, and says so by None
    floor_velocity, floor_pressure = _decode_each(decode, truth.latents[2:], medium)
    result = _measure_field("", velocity, floor_velocity, truth.velocity)
    result |= _measure_field("_pressure", pressure, floor_pressure, truth.pressure)
    return result | _measure_energy(velocity[-1:], truth.velocity[-1:], truth.boundary) | {"num_steps": num_steps}


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


def _decode_each(decode: Decode, latents: Tensor, medium: Tensor) -> tuple[Tensor, Tensor]:
    """One state at a time, because a whole trajectory's decoder activations may not fit in memory."""
    velocity, pressure = zip(*(decode(latent.unsqueeze(0), medium) for latent in latents), strict=True)
    return torch.cat(velocity), torch.cat(pressure)


def _measure_field(suffix: str, predicted: Tensor, floor: Tensor, truth: Tensor) -> dict[str, Any]:
    following = truth[2:]
    deviation = following.double().std(dim=(-3, -2, -1), correction=0).square().sum(1).sqrt()
    silent = deviation <= SILENT * deviation.max()
    rows = {
        "vrmse": vrmse(predicted, following),
        "persistence_vrmse": vrmse(truth[1:2].expand_as(following), following),
        "decoded_truth_vrmse": vrmse(floor, following),
    }
    result: dict[str, Any] = {}
    for name, row in rows.items():
        steps = [
            error if math.isfinite(error) and not quiet else None
            for error, quiet in zip(row.tolist(), silent.tolist(), strict=True)
        ]
        result[name + suffix] = {"1": steps[0], "2-5": average_present(steps[1:5]), "last": steps[-1]}
        result[f"{name}{suffix}_per_step"] = steps
    return result


def _measure_energy(
    predicted: Tensor, truth: Tensor, boundary: tuple[Boundary, Boundary, Boundary]
) -> dict[str, float | list[float] | None]:
    energy, true_energy = (reduce(u.double() ** 2, "b f x y z -> b", "sum").item() for u in (predicted, truth))
    if true_energy == 0 or not math.isfinite(energy):
        return {"energy_drift": None, "band_error": None}
    num_bands = max(1, int(math.log2(min(truth.shape[-3:]))) - 1)
    bands, true_bands = (band_energy(u.double(), boundary, num_bands)[0] for u in (predicted, truth))
    floor = 1e-14 * true_bands.sum()  # below FP32 round-off, squared: a band without energy of its own
    return {"energy_drift": energy / true_energy - 1, "band_error": (bands / true_bands.clamp_min(floor)).tolist()}
