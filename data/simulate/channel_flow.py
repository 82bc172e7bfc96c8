"""Flow over a no-slip bed, below a stress-free top or a second wall, periodic along it (x) and across it (z).

    du/dt + div(u u) = -grad p + e_x + viscosity lap u,    div u = 0

Staggered grid, uniform or stretched away from the walls; second order in space with advection that does no work
(``data.simulate.momentum_flux``, ``data.simulate.wide_momentum_flux``); time steps by a third-order Runge-Kutta
method, every stage projected exactly (``data.simulate.momentum``).
"""

from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from data.simulate import momentum
from data.simulate.momentum_flux import momentum_flux_divergence
from data.simulate.wide_momentum_flux import friction_correction, wide_flux_divergence
from shodh.fields import Grid
from shodh.physics.helmholtz import remove_divergence

Top = Literal["free", "wall"]
Stencil = Literal["narrow", "wide"]


class Channel(NamedTuple):
    """What drives and resists the flow, for a batch of channels on one grid."""

    grid: Grid
    viscosity: Float[Tensor, "b"]
    force: float = 1.0  # along x, per unit mass
    top: Top = "free"
    stencil: Stencil = "narrow"  # along x and z; "wide": a fraction of the error at twice the time
    drift: float = 0.0  # speed along x of the frame that the grid rests in; velocities stay those of the bed's frame


def advance(
    velocity: Float[Tensor, "b 3 x y z"], channel: Channel, dt: float, num_steps: int
) -> Float[Tensor, "b 3 x y z"]:
    """The solenoidal velocity ``num_steps`` steps of ``dt`` later."""

    return momentum.advance(velocity, lambda now: momentum_tendency(now, channel), channel.grid, dt, num_steps)


def momentum_tendency(velocity: Float[Tensor, "b 3 x y z"], channel: Channel) -> Float[Tensor, "b 3 x y z"]:
    """force - div((u - drift) u - 2 viscosity S) on lower faces; the pressure's gradient is left out."""
    ghosted = add_ghosts(velocity, channel.top)
    ghosted[:, 0] -= channel.drift
    if channel.stencil == "narrow":
        tendency = momentum_flux_divergence(ghosted, channel.viscosity, channel.grid)
    else:
        tendency = momentum_flux_divergence(ghosted, channel.viscosity * (8 / 9), channel.grid).mul_(9 / 8)
        tendency.sub_(wide_flux_divergence(ghosted, channel.grid), alpha=1 / 8)
        viscosity = rearrange(channel.viscosity, "b -> b 1 1 1 1")
        tendency.addcmul_(friction_correction(velocity, channel.grid), viscosity)
    tendency[:, 0] += channel.force
    tendency[:, 1, :, 0] = 0
    return tendency


def add_ghosts(velocity: Float[Tensor, "b 3 x y z"], top: Top) -> Float[Tensor, "b 3 x+2 y+2 z+2"]:
    """The velocity with a layer around it: periodic in x and z, odd beyond a wall, even above a free top."""
    ghosted = torch.nn.functional.pad(velocity, (1, 1, 1, 1, 1, 1), mode="circular")
    ghosted[:, 0::2, :, 0] = -ghosted[:, 0::2, :, 1]
    ghosted[:, 0::2, :, -1] = ghosted[:, 0::2, :, -2] if top == "free" else -ghosted[:, 0::2, :, -2]
    ghosted[:, 1, :, 0] = 0
    ghosted[:, 1, :, -1] = 0
    return ghosted


def solve_pressure(velocity: Float[Tensor, "b 3 x y z"], channel: Channel) -> Float[Tensor, "b x y z"]:
    """The kinematic pressure, zero mean, that keeps this velocity solenoidal: div grad p = div(momentum tendency)."""
    return momentum.solve_pressure(momentum_tendency(velocity, channel), channel.grid)


def courant_rate(velocity: Float[Tensor, "b 3 x y z"], channel: Channel) -> float:
    """Largest sum of |u_i| / distance_i at any index, drift taken off: a Courant number per unit of time step."""
    distance = torch.from_numpy(channel.grid.face_distance).to(velocity.device, velocity.dtype)
    relative = velocity.clone()
    relative[:, 0] -= channel.drift
    return relative.abs_().div_(distance).sum(1).max().item()


def refine(velocity: Float[Tensor, "b 3 x y z"], fine: Grid, top: Top) -> Float[Tensor, "b 3 x2 y2 z2"]:
    """The velocity on a grid of twice as many cells per axis: interpolated linearly, then projected.

    Linear in the cell index: second order as long as both grids sample one smooth stretching.
    """
    components = []
    for component, values in enumerate(add_ghosts(velocity, top).unbind(1)):
        for axis in range(3):
            finer = momentum.refine_axis(values.movedim(axis - 3, -1), on_faces=axis == component)
            values = finer.movedim(-1, axis - 3)
        components.append(values)
    return remove_divergence(torch.stack(components, 1), fine)
