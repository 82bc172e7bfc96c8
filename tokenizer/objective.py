"""What the tokenizer minimises."""

from dataclasses import dataclass
from typing import Any

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from shodh.fields import FieldBatch
from tokenizer.autoencoder import Decoded


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Weights beside the velocity error, whose weight is 1."""

    pressure_weight: float = 0.1
    gradient_weight: float = 0.1
    variance_floor: float = 0.1  # of the normalised field; keeps nearly silent snapshots from dominating


class ReconstructionObjective:
    """Objective of tokenizer training, for the training loop."""

    def __init__(self, config: ReconstructionConfig) -> None:
        self.config = config

    def begin_step(self) -> None:
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
    total = velocity + config.pressure_weight * pressure + config.gradient_weight * gradient
    return {"total": total, "velocity": velocity, "pressure": pressure, "gradient": gradient}


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
