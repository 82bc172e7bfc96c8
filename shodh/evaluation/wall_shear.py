"""Shear at no-slip walls: what a decoder has to get right for drag and for anything that the bed does to the flow."""

from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from shodh.fields import Grid

SLIPS = 0.9  # of the rms speed in the first cell, extrapolated to the wall: faster is no layer that the grid resolves
MEAN_COUNTS = 0.01  # of the rms: a smaller mean shear is none, and has no relative error


class WallShear(NamedTuple):
    """Two tangential components of du/dn at one wall, n away from the wall, per snapshot."""

    axis: int
    side: str  # "lower" or "upper"
    truth: Float[Tensor, "b 2 n"]  # in units of the velocity per unit of the grid's length
    decoded: Float[Tensor, "b 2 n"]
    slip: Float[Tensor, "b 2"]  # mean squares of the true velocity at the wall, extrapolated, and in the first cell


def sample_wall_shear(
    truth: Float[Tensor, "b 3 x y z"], decoded: Float[Tensor, "b 3 x y z"], grid: Grid
) -> list[WallShear]:
    """Shear at both walls of every walled axis: u / half the first cell, which is exact for a linear profile."""
    walls = [(axis, side) for axis in range(3) if grid.boundary[axis] == "wall" for side in ("lower", "upper")]
    return [_sample(truth, decoded, grid, axis, side) for axis, side in walls]


def summarise_wall_shear(chunks: list[list[WallShear]]) -> list[dict[str, Any]]:
    """One entry per wall that the true flow sticks to; ``chunks`` as ``sample_wall_shear`` gave them.

    ``mean`` and ``rms`` pool all snapshots; ``mean_error``: relative error of a snapshot's mean shear vector, averaged
    (None without a mean shear); ``pattern_vrmse``: rms error of the pattern on the wall over the deviation of the true
    one. A wall that the truth slips along, or whose layer the grid does not resolve, is left out.
    """
    return [entry for wall in zip(*chunks, strict=True) if (entry := _summarise(wall)) is not None]


def _sample(truth: Tensor, decoded: Tensor, grid: Grid, axis: int, side: str) -> WallShear:
    first, second = (0, 1) if side == "lower" else (-1, -2)
    near, next_to_it = grid.widths(axis)[first] / 2, grid.widths(axis)[second] / 2
    tangential = [i for i in range(3) if i != axis]

    def plane(velocity: Tensor, index: int) -> Tensor:
        return rearrange(velocity[:, tangential].select(axis - 3, index).double(), "b f p q -> b f (p q)")

    inner, outer = plane(truth, first), plane(truth, second)
    at_wall = inner - (outer - inner) * near / (near + next_to_it)
    slip = torch.stack([reduce(u.square(), "b f n -> b", "mean") for u in (at_wall, inner)], 1)
    return WallShear(axis, side, inner / near, plane(decoded, first) / near, slip)


def _summarise(wall: tuple[WallShear, ...]) -> dict[str, Any] | None:
    truth, decoded, slip = (torch.cat([getattr(part, name) for part in wall]) for name in ("truth", "decoded", "slip"))
    at_wall, inner = slip.sum(0).tolist()
    if inner == 0 or at_wall > SLIPS**2 * inner:
        return None
    mean, decoded_mean = (reduce(shear, "b f n -> b f", "mean") for shear in (truth, decoded))
    pooled, decoded_pooled = mean.mean(0), decoded_mean.mean(0)
    rms = truth.square().sum(1).mean().sqrt()
    size = mean.norm(dim=1)
    counted = size > MEAN_COUNTS * truth.square().sum(1).mean(1).sqrt()
    errors = ((decoded_mean - mean).norm(dim=1) / size)[counted]
    deviation = (truth - mean[:, :, None]).square().sum((1, 2))
    pattern = (decoded - truth).square().sum((1, 2))
    varied = deviation > 1e-12 * truth.square().sum((1, 2))  # a uniform shear has no pattern but round-off
    return {
        "axis": "xyz"[wall[0].axis],
        "side": wall[0].side,
        "mean": {"truth": pooled.norm().item(), "decoded": decoded_pooled.norm().item()},
        "rms": {"truth": rms.item(), "decoded": decoded.square().sum(1).mean().sqrt().item()},
        "mean_error": errors.mean().item() if len(errors) else None,
        "pattern_vrmse": (pattern[varied] / deviation[varied]).sqrt().mean().item() if bool(varied.any()) else None,
    }
