"""Divergence of the momentum flux on staggered grids, uniform or stretched, with advection that does no work.

The kinetic energy is sum(volume of the velocity's own cell * u_i^2 / 2). On a stretched axis the advecting velocity is
weighted with the areas that it fills (so that what enters a velocity's cell leaves it), the advected one is the plain
mean of its two neighbours (so that the operator is skew-symmetric): Verstappen and Veldman, J. Comput. Phys. 187,
2003, section 3; on a uniform grid this is the scheme of Harlow and Welch, Phys. Fluids 8, 1965.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from shodh.fields import Grid

Length = float | Tensor  # a tensor broadcasts along its stretched axis


def momentum_flux_divergence(
    ghosted: Float[Tensor, "b 3 gx gy gz"], viscosity: Float[Tensor, "b"], grid: Grid
) -> Float[Tensor, "b 3 x y z"]:
    """-div(u u - 2 viscosity S) on lower faces, S the strain rate, of a velocity that has a ghost layer around it.

    For a solenoidal velocity div(2 S) = lap u holds discretely, stretched axes included: one viscous flux per pair of
    axes serves both of its components, in cells for i = j, on edges otherwise. Faces in a lower wall are not zeroed.
    """
    shape = grid.shape
    axes = axis_lengths(grid, ghosted.dtype, ghosted.device)
    viscosity = rearrange(viscosity, "b -> b 1 1 1")
    tendency = ghosted.new_zeros(len(ghosted), 3, *shape)

    def window(component: int, start: Sequence[int], size: Sequence[int]) -> Tensor:
        x, y, z = (slice(first, first + count) for first, count in zip(start, size, strict=True))
        return ghosted[:, component, x, y, z]

    for i in range(3):
        j = (i + 1) % 3
        size = _shifted(shape, i, 1)
        lower, upper = window(i, _shifted((1, 1, 1), i, -1), size), window(i, (1, 1, 1), size)
        flux = (upper - lower).mul_(-2 / axes[i].width_from_ghost).mul_(viscosity)
        flux.addcmul_(half_sum := torch.add(lower, upper).mul_(0.5), half_sum)
        tendency[:, i] -= flux.diff(dim=i - 3).div_(axes[i].distance)

        size = _shifted(size, j, 1)
        u, u_below = window(i, (1, 1, 1), size), window(i, _shifted((1, 1, 1), j, -1), size)
        v, v_below = window(j, (1, 1, 1), size), window(j, _shifted((1, 1, 1), i, -1), size)
        viscous = ((u - u_below) / axes[j].distance_to_end).add_((v - v_below).div_(axes[i].distance_to_end))
        viscous.mul_(-viscosity)
        u_mean, v_mean = (u + u_below).mul_(0.5), (v + v_below).mul_(0.5)
        flux = torch.addcmul(viscous, u_mean, axes[i].weigh(v, v_below, v_mean))
        tendency[:, i] -= flux.diff(dim=j - 3).narrow(i - 3, 0, shape[i]).div_(axes[j].width)
        if not (grid.is_uniform(i) and grid.is_uniform(j)):
            flux = torch.addcmul(viscous, axes[j].weigh(u, u_below, u_mean), v_mean)
        tendency[:, j] -= flux.diff(dim=i - 3).narrow(j - 3, 0, shape[j]).div_(axes[i].width)
    return tendency


class AxisLengths(NamedTuple):
    """Lengths along one axis: a number where it is uniform, else shaped to broadcast."""

    width: Length  # of cells 0 to n - 1
    width_from_ghost: Length  # of cells -1 to n - 1
    distance: Length  # between the centres at lower faces 0 to n - 1
    distance_to_end: Length  # at faces 0 to n
    share_above: Length  # of the distance at faces 0 to n, the part that lies in the upper cell

    def weigh(self, above: Tensor, below: Tensor, mean: Tensor) -> Tensor:
        """Mean over the distance at each face of a quantity that is constant in each cell."""
        return mean if isinstance(self.share_above, float) else torch.lerp(below, above, self.share_above)


@functools.lru_cache(maxsize=16)
def axis_lengths(grid: Grid, dtype: torch.dtype, device: torch.device) -> tuple[AxisLengths, ...]:
    """Lengths along the three axes, as tensors where they vary."""
    lengths = []
    for axis in range(3):
        widths = grid.widths(axis)
        if grid.is_uniform(axis):
            lengths.append(AxisLengths(*[float(widths[0])] * 4, share_above=0.5))
            continue
        ghosted = np.pad(widths, 1, mode="edge")  # a ghost mirrors the cell inside
        distance = (ghosted[1:] + ghosted[:-1]) / 2
        arrays = widths, ghosted[:-1], distance[:-1], distance, ghosted[1:] / (2 * distance)
        shape = [-1 if a == axis else 1 for a in range(3)]
        lengths.append(AxisLengths(*(torch.tensor(a.reshape(shape), dtype=dtype, device=device) for a in arrays)))
    return tuple(lengths)


def _shifted(origin: Sequence[int], axis: int, by: int) -> list[int]:
    return [value + by * (a == axis) for a, value in enumerate(origin)]
