"""Incompressible flow on a staggered grid whose axes are periodic or end in no-slip walls.

    du/dt = -div(u u - 2 viscosity S) - grad p + forces,    div u = 0,    S the strain rate

Fluxes that conserve kinetic energy, see ``data.simulate.momentum_flux``; time steps by a third-order Runge-Kutta
method, every stage projected exactly (Shu and Osher, J. Comput. Phys. 77, 1988, eq. 2.18).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from data.simulate.momentum_flux import momentum_flux_divergence
from shodh.fields import Boundary, Grid
from shodh.physics.helmholtz import divergence_of_velocity, remove_divergence, solve_poisson

STABLE_COURANT = math.sqrt(3)  # dt sum |u_i| / h_i, of third-order Runge-Kutta on the imaginary axis


class March(NamedTuple):
    """A stretch of time on one grid."""

    grid: Grid
    duration: float


def momentum_tendency(
    velocity: Float[Tensor, "b 3 x y z"], viscosity: Float[Tensor, "b"], grid: Grid
) -> Float[Tensor, "b 3 x y z"]:
    """-div(u u - 2 viscosity S) on lower faces, 0 on walls; the pressure's gradient is left out."""
    tendency = momentum_flux_divergence(add_velocity_ghosts(velocity, grid.boundary), viscosity, grid)
    for axis in range(3):
        if grid.boundary[axis] == "wall":
            tendency[:, axis].narrow(axis - 3, 0, 1).zero_()
    return tendency


def add_velocity_ghosts(
    velocity: Float[Tensor, "b 3 x y z"], boundary: Sequence[Boundary]
) -> Float[Tensor, "b 3 x+2 y+2 z+2"]:
    """The velocity with a layer around it: periodic, or odd beyond a wall, where nothing slips and nothing crosses."""
    ghosted = torch.nn.functional.pad(velocity, (1, 1, 1, 1, 1, 1), mode="circular")
    for axis in range(3):
        if boundary[axis] == "wall":
            layers = ghosted.movedim(axis - 3, 2)
            for component in range(3):
                normal = component == axis  # lives on the walls themselves
                layers[:, component, 0] = 0.0 if normal else -layers[:, component, 1]
                layers[:, component, -1] = 0.0 if normal else -layers[:, component, -2]
    return ghosted


def advance(
    state: Float[Tensor, "b s x y z"],
    tendency: Callable[[Tensor], Tensor],
    grid: Grid,
    dt: float,
    num_steps: int,
) -> Float[Tensor, "b s x y z"]:
    """The state ``num_steps`` steps of ``dt`` later; its first three fields are the velocity, kept solenoidal."""

    def step(now: Tensor) -> Tensor:
        later = tendency(now).mul_(dt).add_(now)
        velocity = remove_divergence(later[:, :3], grid)
        return velocity if later.shape[1] == 3 else torch.cat([velocity, later[:, 3:]], 1)

    for _ in range(num_steps):
        second = step(step(state)).mul_(0.25).add_(state, alpha=0.75)
        state = step(second).mul_(2).add_(state).div_(3)
    return state


def solve_pressure(tendency: Float[Tensor, "b 3 x y z"], grid: Grid) -> Float[Tensor, "b x y z"]:
    """The kinematic pressure, zero mean, of the flow with this tendency: div grad p = div(tendency)."""
    return solve_poisson(divergence_of_velocity(tendency, grid), grid)


def refine_axis(ghosted: Float[Tensor, "*s n"], on_faces: bool) -> Float[Tensor, "*s m"]:
    """Values on half as wide cells along the last axis, linearly, from values with one ghost at either end."""
    below, here, above = ghosted[..., :-2], ghosted[..., 1:-1], ghosted[..., 2:]
    halves = (here, (here + above) / 2) if on_faces else (0.75 * here + 0.25 * below, 0.75 * here + 0.25 * above)
    return torch.stack(halves, -1).flatten(-2)


def count_steps(duration: float, peak_speed: float, courant: float, largest_diffusivity: float, grid: Grid) -> int:
    """Steps that divide ``duration`` evenly and are stable while sum |u_i| / h_i <= peak_speed sum 1 / h_i.

    The Courant number dt sum |u_i| / h_i may reach sqrt(3), the diffusion number 4 diffusivity dt sum 1 / h_i^2 may
    reach 2.5 (limits of third-order Runge-Kutta on the imaginary and the negative real axis). The count does not look
    at the flow, so that a trajectory does not depend on those it is batched with.
    """
    courant_rate = sum(peak_speed / h for h in grid.mean_spacing) / courant
    diffusion_rate = sum(4 / h**2 for h in grid.mean_spacing) * largest_diffusivity / 2
    return math.ceil(duration * max(courant_rate, diffusion_rate))


def require_stable(
    domain: str, state: Float[Tensor, "b s x y z"], dt: float, grid: Grid, indices: Sequence[int], time: float
) -> None:
    """Raise RuntimeError naming the first trajectory that blew up, or is faster than its time step is stable for."""
    finite = torch.isfinite(state).flatten(1).all(1).tolist()
    speeds = state[:, :3].abs().unbind(1)
    rate = sum(speed / h for speed, h in zip(speeds, grid.mean_spacing, strict=True))
    courant = (dt * torch.as_tensor(rate).flatten(1).amax(1)).tolist()
    for index, sound, number in zip(indices, finite, courant, strict=True):
        if not sound:
            raise RuntimeError(f"{domain} trajectory {index}: blew up by t = {time:g}. Take gentler parameters.")
        if number > STABLE_COURANT:
            raise RuntimeError(
                f"{domain} trajectory {index}: Courant number {number:.3g} at t = {time:g} exceeds "
                f"{STABLE_COURANT:.3g}. Take gentler parameters."
            )
