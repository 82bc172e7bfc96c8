"""What the tokenizer minimises."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from shodh.fields import Boundary, FieldBatch
from shodh.physics.spectra import fourier_modes, mode_wavenumbers, octave_of
from tokenizer.autoencoder import Decoded

NEGLIGIBLE = 1e-3  # share of the energy below which an octave is not worth having


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Weights beside the velocity error, whose weight is 1."""

    pressure_weight: float = 0.1
    gradient_weight: float = 0.1
    spectrum_weight: float = 0.08
    variance_floor: float = 0.1  # of the normalised field; keeps nearly silent snapshots from dominating


class ReconstructionObjective:
    """Objective of tokenizer training, for the training loop."""

    def __init__(self, config: ReconstructionConfig) -> None:
        self.config = config

    def begin_step(self, step: int) -> None:
        """Nothing is carried from step to step."""

    def __call__(self, engine: Any, batch: FieldBatch) -> tuple[dict[str, Tensor], None]:
        return reconstruction_loss(engine(batch), batch, self.config), None


def reconstruction_loss(decoded: Decoded, batch: FieldBatch, config: ReconstructionConfig) -> dict[str, Tensor]:
    """Terms by name, ``total`` their weighted sum, each a ``relative_error``: what VRMSE measures, squared.

    A weak snapshot counts as much as a strong one, down to the floor.
    """
    velocity = relative_error(decoded.velocity, batch.velocity, config.variance_floor)
    pressure = relative_error(decoded.pressure, batch.pressure, config.variance_floor)
    gradient = torch.stack(
        [
            relative_error(decoded.velocity.diff(dim=dim), batch.velocity.diff(dim=dim), config.variance_floor)
            for dim in (-3, -2, -1)
        ]
    ).mean()
    spectrum = octave_error(decoded.velocity, batch.velocity, batch.grid.boundary, config.variance_floor)
    total = velocity + config.pressure_weight * pressure + config.gradient_weight * gradient
    total = total + config.spectrum_weight * spectrum
    return {"total": total, "velocity": velocity, "pressure": pressure, "gradient": gradient, "spectrum": spectrum}


def octave_error(
    prediction: Float[Tensor, "b 3 x y z"],
    truth: Float[Tensor, "b 3 x y z"],
    boundary: Sequence[Boundary],
    variance_floor: float,
) -> Float[Tensor, ""]:
    """Mean square of log(decoded / true energy) over octaves of wavenumber, those beyond Nyquist one more.

    Squared errors alone leave out what cannot be told from the latents, which are the small scales. An octave with
    less than ``NEGLIGIBLE`` of the energy, or of what a field of variance ``variance_floor`` has, counts as if it had
    that much: otherwise a field at rest, of which any error is infinitely many times too much, outweighs all others.
    """
    predicted, true = (octave_energy(velocity, boundary) for velocity in (prediction, truth))
    floor = NEGLIGIBLE * (reduce(true, "b k -> b 1", "sum") + variance_floor * truth.shape[1])
    return torch.log((predicted + floor) / (true + floor)).square().mean()


def octave_energy(velocity: Float[Tensor, "b 3 x y z"], boundary: Sequence[Boundary]) -> Float[Tensor, "b k"]:
    """Energy of the fluctuations in each octave of wavenumber, and beyond Nyquist; in FP32, differentiable."""
    with torch.autocast(velocity.device.type, enabled=False):
        modes = fourier_modes(velocity.float(), tuple(boundary), on_faces=True)
        energy = reduce(modes.abs().square() if modes.is_complex() else modes.square(), "b f x y z -> b (x y z)", "sum")
        shape = (velocity.shape[2], velocity.shape[3], velocity.shape[4])
        num_octaves = int(math.log2(min(shape))) - 1
        octave = octave_of(mode_wavenumbers(shape, tuple(boundary), velocity.device), num_octaves)
        return energy.new_zeros(len(energy), num_octaves + 1).index_add(1, octave.flatten(), energy)


def relative_error(
    prediction: Float[Tensor, "b f x y z"], truth: Float[Tensor, "b f x y z"], floor: float
) -> Float[Tensor, ""]:
    """Squared error of the fluctuations over their variance, plus that of the mean over the mean square, averaged.

    The two are kept apart because a channel's mean flow is many times its fluctuations: together, its error would drown
    every other domain's at the start of training.
    """
    error = prediction - truth
    mean, mean_error = (reduce(field, "b f x y z -> b f 1 1 1", "mean") for field in (truth, error))
    variance = reduce((truth - mean) ** 2, "b f x y z -> b", "mean") + floor
    mean_square = variance + reduce(mean**2, "b f 1 1 1 -> b", "mean")
    fluctuation = reduce((error - mean_error) ** 2, "b f x y z -> b", "mean") / variance
    return (fluctuation + reduce(mean_error**2, "b f 1 1 1 -> b", "mean") / mean_square).mean()
