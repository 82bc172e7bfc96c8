"""What the tokenizer minimises, and the linear baseline it has to beat."""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from shodh.fields import FieldBatch
from tokenizer.autoencoder import Decoded


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Weights beside the velocity error, whose weight is 1."""

    pressure_weight: float = 0.1
    gradient_weight: float = 0.1
    variance_floor: float = 0.05  # of the normalised field; keeps nearly silent snapshots from dominating


class ReconstructionObjective:
    """Objective of tokenizer training, for the training loop."""

    def __init__(self, config: ReconstructionConfig) -> None:
        self.config = config

    def begin_step(self) -> None:
        """Nothing is carried from step to step."""

    def __call__(self, engine: Any, batch: FieldBatch) -> tuple[dict[str, Tensor], None]:
        return reconstruction_loss(engine(batch), batch, self.config), None


def reconstruction_loss(decoded: Decoded, batch: FieldBatch, config: ReconstructionConfig) -> dict[str, Tensor]:
    """Terms by name, ``total`` their weighted sum: squared errors relative to each sample's own variance.

    Relative errors are what VRMSE measures, so a weak snapshot counts as much as a strong one, down to the floor.
    """
    error = decoded.velocity - batch.velocity
    velocity = _relative(error, batch.velocity, config.variance_floor)
    pressure = _relative(decoded.pressure - batch.pressure, batch.pressure, config.variance_floor)
    gradient = sum(
        _relative(error.diff(dim=dim), batch.velocity.diff(dim=dim), config.variance_floor) for dim in (-3, -2, -1)
    ) / 3
    total = velocity + config.pressure_weight * pressure + config.gradient_weight * gradient
    return {"total": total, "velocity": velocity, "pressure": pressure, "gradient": torch.as_tensor(gradient)}


def _relative(error: Tensor, truth: Tensor, floor: float) -> Tensor:
    centred = truth - reduce(truth, "b f x y z -> b f 1 1 1", "mean")
    variance = reduce(centred**2, "b f x y z -> b", "mean")
    return (reduce(error**2, "b f x y z -> b", "mean") / (variance + floor)).mean()


class BlockKLT:
    """Principal components of 8x8x8 blocks of velocity, one basis for all domains: the best linear block code."""

    def __init__(self, blocks: Float[Tensor, "s v"], num_values: int) -> None:
        blocks = blocks.double()
        self.mean = blocks.mean(0)
        centred = blocks - self.mean
        covariance = centred.T @ centred
        values, vectors = torch.linalg.eigh(covariance)
        self.basis = vectors[:, values.argsort(descending=True)[:num_values]]

    def reconstruct(self, velocity: Float[Tensor, "b 3 x y z"]) -> Float[Tensor, "b 3 x y z"]:
        """The field after coding each block by ``num_values`` coefficients."""
        blocks = to_blocks(velocity).double() - self.mean
        coded = (blocks @ self.basis) @ self.basis.T + self.mean
        _, _, x, y, z = velocity.shape
        return rearrange(
            coded, "(b x y z) (f i j k) -> b f (x i) (y j) (z k)", x=x // 8, y=y // 8, z=z // 8, f=3, i=8, j=8, k=8
        ).to(velocity)


def to_blocks(velocity: Float[Tensor, "b 3 x y z"]) -> Float[Tensor, "s v"]:
    """Non-overlapping 8x8x8 blocks as rows of 1536 values."""
    return rearrange(velocity, "b f (x i) (y j) (z k) -> (b x y z) (f i j k)", i=8, j=8, k=8)
