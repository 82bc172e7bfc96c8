"""Turbulence in an open channel: no-slip bed, stress-free top, periodic along the flow (x) and across it (z).

    du/dt + div(u u) = -grad p + e_x + viscosity lap u,    div u = 0,    viscosity = 1 / Re_tau

in units of the channel's height and the friction velocity. Uniform staggered grid; the advection conserves kinetic
energy (Harlow and Welch, Phys. Fluids 8, 1965; Morinishi et al., J. Comput. Phys. 143, 1998, section 3); time steps by
a third-order Runge-Kutta method, every stage projected exactly (Shu and Osher, J. Comput. Phys. 77, 1988, eq. 2.18).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from data.layout import Trajectory
from shodh.fields import DomainSpec, FieldSpec, Grid
from shodh.physics.exterior import curl_of_edges, divergence_of_faces
from shodh.physics.helmholtz import remove_divergence, solve_poisson

DOMAIN = DomainSpec(
    name="open_channel",
    velocity_space="solenoidal",
    boundary=("periodic", "wall", "periodic"),
    velocity=FieldSpec(name="flux", units="1", location="face", long_name="volume flux through the lower faces"),
    pressure=FieldSpec(name="pressure", units="1", location="cell", long_name="kinematic pressure, zero mean"),
    medium=FieldSpec(name="wall_distance", units="1", location="cell", long_name="distance from the bed"),
    parameters=("dt", "viscosity"),
)

_PEAK_SPEED = (25.0, 2.0, 3.0)  # per axis, in friction velocities: what time steps are made for, see _count_steps
_COURANT = 1.1  # of 1.73, the limit: gusts exceed the peak speeds by up to 1.4 (see the card)
_COARSEST = 16  # cells per axis that turbulence is spun up on first
_MARCH = 0.25  # longest time between two reports of progress


@dataclass(frozen=True, kw_only=True)
class OpenChannelConfig:
    """Independent turbulent runs; lengths in channel heights, times in heights per friction velocity."""

    num_trajectories: int = 24
    num_snapshots: int = 25
    snapshot_interval: float = 0.0125
    resolution: int = 32  # cells per axis
    seed: int = 0
    friction_reynolds: tuple[float, float] = (100.0, 200.0)  # Re_tau, drawn uniformly per trajectory
    length: float = 2 * math.pi  # along the flow
    width: float = math.pi
    spinup_time: float = 10.0  # on the coarsest grid; half as long on every finer one

    def __post_init__(self) -> None:
        for name in ("num_trajectories", "num_snapshots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1. Raise it.")
        for name in ("snapshot_interval", "length", "width", "spinup_time"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive and finite. Change it.")
        if self.resolution < 8:
            raise ValueError(f"resolution={self.resolution}: too coarse for a turbulent channel. Take 16 or more.")
        span = self.friction_reynolds
        if not 0 < span[0] <= span[1] < math.inf:
            raise ValueError(f"friction_reynolds={span}: not a range. Write [low, high] with 0 < low <= high.")


class March(NamedTuple):
    """A stretch of spin-up on one grid."""

    grid: Grid
    duration: float


class Channel(NamedTuple):
    """What drives and resists the flow, for a batch of channels on one grid."""

    grid: Grid
    viscosity: Float[Tensor, "b"]
    force: float = 1.0  # along x, per unit mass


def simulate(
    config: OpenChannelConfig,
    indices: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Trajectory]]:
    """Developed turbulence for each wanted trajectory index; ``progress`` counts time steps of one channel.

    Trajectory i depends on (config.seed, i) alone, not on which others are wanted. Raises RuntimeError on blow-up.
    """
    device = torch.device(device)
    cells = 2**24 if device.type == "cuda" else 2**18  # what GPU memory, or a CPU's cache, holds with all temporaries
    size = max(1, cells // config.resolution**3)
    for start in range(0, len(indices), size):
        yield from _simulate_batch(config, indices[start : start + size], device, progress or (lambda steps: None))


def total_work(config: OpenChannelConfig, num: int) -> int:
    """Time steps that ``num`` trajectories take, spin-up included: the sum of what ``progress`` is told."""
    spinup = sum(_count_steps(config, march.grid, march.duration) for march in _plan_spinup(config))
    between_snapshots = _count_steps(config, _make_grid(config, config.resolution), config.snapshot_interval)
    return num * (spinup + (config.num_snapshots - 1) * between_snapshots)


def advance(
    velocity: Float[Tensor, "b 3 x y z"], channel: Channel, dt: float, num_steps: int
) -> Float[Tensor, "b 3 x y z"]:
    """The solenoidal velocity ``num_steps`` steps of ``dt`` later."""

    def project_step(now: Tensor) -> Tensor:
        return remove_divergence(now + dt * momentum_tendency(now, channel), channel.grid)

    for _ in range(num_steps):
        first = project_step(velocity)
        second = 0.75 * velocity + 0.25 * project_step(first)
        velocity = (velocity + 2 * project_step(second)) / 3
    return velocity


def momentum_tendency(velocity: Float[Tensor, "b 3 x y z"], channel: Channel) -> Float[Tensor, "b 3 x y z"]:
    """force - div(u u - 2 viscosity S) on lower faces, S the strain rate; the pressure's gradient is left out.

    For a solenoidal velocity div(2 S) = lap u holds discretely, so one symmetric momentum flux per pair of axes serves
    both of its components: in cells for i = j, on edges otherwise.
    """
    ghosted = add_ghosts(velocity)
    spacing, shape = channel.grid.spacing, channel.grid.shape
    viscosity = rearrange(channel.viscosity, "b -> b 1 1 1")
    tendency = torch.zeros_like(velocity)
    tendency[:, 0] = channel.force

    def window(component: int, start: list[int], size: list[int]) -> Tensor:
        x, y, z = (slice(first, first + count) for first, count in zip(start, size, strict=True))
        return ghosted[:, component, x, y, z]

    def shifted(origin: Sequence[int], axis: int, by: int) -> list[int]:
        return [value + by * (a == axis) for a, value in enumerate(origin)]

    for i in range(3):
        j = (i + 1) % 3
        size = shifted(shape, i, 1)
        lower, upper = window(i, shifted((1, 1, 1), i, -1), size), window(i, [1, 1, 1], size)
        flux = (lower + upper).square_().mul_(0.25).addcmul_(viscosity, upper - lower, value=-2 / spacing[i])
        tendency[:, i].sub_(flux.diff(dim=i - 3), alpha=1 / spacing[i])

        size = shifted(size, j, 1)
        u, u_below = window(i, [1, 1, 1], size), window(i, shifted((1, 1, 1), j, -1), size)
        v, v_below = window(j, [1, 1, 1], size), window(j, shifted((1, 1, 1), i, -1), size)
        strain = ((u - u_below) / spacing[j]).add_(v - v_below, alpha=1 / spacing[i])
        flux = (u + u_below).mul_(v + v_below).mul_(0.25).addcmul_(viscosity, strain, value=-1)
        tendency[:, i].sub_(flux.diff(dim=j - 3).narrow(i - 3, 0, shape[i]), alpha=1 / spacing[j])
        tendency[:, j].sub_(flux.diff(dim=i - 3).narrow(j - 3, 0, shape[j]), alpha=1 / spacing[i])
    tendency[:, 1, :, 0] = 0
    return tendency


def add_ghosts(velocity: Float[Tensor, "b 3 x y z"]) -> Float[Tensor, "b 3 x+2 y+2 z+2"]:
    """The velocity with a layer around it: periodic in x and z, odd below the bed, even above the top."""
    ghosted = torch.nn.functional.pad(velocity, (1, 1, 1, 1, 1, 1), mode="circular")
    ghosted[:, 0::2, :, 0] = -ghosted[:, 0::2, :, 1]
    ghosted[:, 0::2, :, -1] = ghosted[:, 0::2, :, -2]
    ghosted[:, 1, :, 0] = 0
    ghosted[:, 1, :, -1] = 0
    return ghosted


def solve_pressure(velocity: Float[Tensor, "b 3 x y z"], channel: Channel) -> Float[Tensor, "b x y z"]:
    """The kinematic pressure, zero mean, that keeps this velocity solenoidal: div grad p = div(momentum tendency)."""
    spacing = torch.tensor(channel.grid.spacing, dtype=velocity.dtype, device=velocity.device).reshape(3, 1, 1, 1)
    tendency = momentum_tendency(velocity, channel)
    return solve_poisson(divergence_of_faces(tendency / spacing, channel.grid.boundary), channel.grid)


def refine(velocity: Float[Tensor, "b 3 x y z"], fine: Grid) -> Float[Tensor, "b 3 x2 y2 z2"]:
    """The velocity on a grid of twice as many cells per axis: interpolated linearly, then projected."""
    components = []
    for component, values in enumerate(add_ghosts(velocity).unbind(1)):
        for axis in range(3):
            dim = axis - 3
            count = values.shape[dim] - 2
            below, here, above = (values.narrow(dim, first, count) for first in range(3))
            if axis == component:
                halves = here, (here + above) / 2
            else:
                halves = 0.75 * here + 0.25 * below, 0.75 * here + 0.25 * above
            values = torch.stack(halves, axis + 2).flatten(axis + 1, axis + 2)
        components.append(values)
    return remove_divergence(torch.stack(components, 1), fine)


def mean_velocity_law(height: Float[np.ndarray, "y"], friction_reynolds: float) -> Float[np.ndarray, "y"]:
    """Mean velocity over a smooth bed, in friction velocities (Reichardt, Z. angew. Math. Mech. 31, 1951)."""
    wall = height * friction_reynolds
    return np.log1p(0.4 * wall) / 0.4 + 7.8 * (1 - np.exp(-wall / 11) - wall / 11 * np.exp(-wall / 3))


def make_initial_velocity(config: OpenChannelConfig, index: int, grid: Grid) -> tuple[Float[Tensor, "3 x y z"], float]:
    """Mean law plus large random eddies, and Re_tau: what trajectory ``index`` starts from, in FP64.

    The eddies are the curl of a random potential of 0-3 waves in x and z and 1-4 half-waves in y; an rms of one
    friction velocity trips turbulence at once.
    """
    rng = np.random.default_rng([config.seed, index])
    friction_reynolds = rng.uniform(*config.friction_reynolds)
    nx, ny, nz = grid.shape
    amplitude = rng.standard_normal((3, 8, 4, 8))
    half_waves = np.sin(np.pi * np.arange(1, 5)[:, None] * np.arange(ny) / ny)
    potential = np.einsum("fklm,kx,ly,mz->fxyz", amplitude, _waves(nx), half_waves, _waves(nz))
    circulation = potential * np.reshape(grid.spacing, (3, 1, 1, 1))
    area = torch.tensor(grid.face_area, dtype=torch.float64).reshape(3, 1, 1, 1)
    velocity = curl_of_edges(torch.from_numpy(circulation), grid.boundary) / area
    velocity = velocity / velocity.square().mean().sqrt()
    height = (np.arange(ny) + 0.5) / ny
    velocity[0] += rearrange(torch.from_numpy(mean_velocity_law(height, friction_reynolds)), "y -> y 1")
    return velocity, friction_reynolds


def _simulate_batch(
    config: OpenChannelConfig, indices: Sequence[int], device: torch.device, progress: Callable[[int], None]
) -> Iterator[tuple[int, Trajectory]]:
    spinup = _plan_spinup(config)
    grid = spinup[0].grid
    starts, numbers = zip(*(make_initial_velocity(config, index, grid) for index in indices), strict=True)
    velocity = remove_divergence(torch.stack(starts).to(device, torch.float32), grid)
    viscosity = torch.tensor([1 / number for number in numbers], device=device, dtype=torch.float32)
    time = -sum(march.duration for march in spinup)

    def march_on(now: Tensor, march: March) -> Tensor:
        nonlocal time
        time += march.duration
        num_steps = _count_steps(config, march.grid, march.duration)
        now = advance(now, Channel(march.grid, viscosity), march.duration / num_steps, num_steps)
        _require_finite(now, indices, time)
        progress(num_steps * len(indices))
        return now

    for march in spinup:
        if march.grid != grid:
            grid = march.grid
            velocity = refine(velocity, grid)
        velocity = march_on(velocity, march)
    area = torch.tensor(grid.face_area, device=device).reshape(3, 1, 1, 1)
    fluxes, pressures = [], []
    for snapshot in range(config.num_snapshots):
        if snapshot > 0:
            velocity = march_on(velocity, March(grid, config.snapshot_interval))
        fluxes.append((velocity * area).cpu().numpy())
        pressures.append(solve_pressure(velocity, Channel(grid, viscosity)).cpu().numpy())
    wall_distance = (np.arange(grid.shape[1], dtype=np.float32) + 0.5) * np.float32(grid.spacing[1])
    for b, index in enumerate(indices):
        trajectory = Trajectory(
            velocity=np.stack([flux[b] for flux in fluxes]),
            pressure=np.stack([pressure[b] for pressure in pressures]),
            medium=repeat(wall_distance, "y -> x y z", x=grid.shape[0], z=grid.shape[2]),
            time=np.arange(config.num_snapshots) * config.snapshot_interval,
            parameters={"dt": config.snapshot_interval, "viscosity": 1 / numbers[b]},
            seed=config.seed,
            grid=grid,
        )
        yield index, trajectory


def _require_finite(velocity: Tensor, indices: Sequence[int], time: float) -> None:
    finite = torch.isfinite(velocity).flatten(1).all(1).tolist()
    for index, sound in zip(indices, finite, strict=True):
        if not sound:
            raise RuntimeError(
                f"open_channel trajectory {index}: blew up by t = {time:g} (spin-up is t < 0). Lower friction_reynolds."
            )


def _waves(n: int) -> Float[np.ndarray, "k n"]:
    """cos and sin of 0-3 waves over n cells."""
    angle = 2 * np.pi * np.arange(4)[:, None] * np.arange(n) / n
    return np.concatenate([np.cos(angle), np.sin(angle)])


def _make_grid(config: OpenChannelConfig, cells: int) -> Grid:
    spacing = (config.length / cells, 1 / cells, config.width / cells)
    return Grid(shape=(cells, cells, cells), spacing=spacing, boundary=DOMAIN.boundary)


def _plan_spinup(config: OpenChannelConfig) -> list[March]:
    """Marches on the coarsest grid, then half as long on every finer one up to the recorded resolution."""
    cells = [config.resolution]
    while cells[0] % 2 == 0 and cells[0] // 2 >= _COARSEST:
        cells.insert(0, cells[0] // 2)
    marches = []
    for n in cells:
        duration = config.spinup_time if n == cells[0] else config.spinup_time / 2
        count = math.ceil(duration / _MARCH)
        marches += [March(_make_grid(config, n), duration / count)] * count
    return marches


def _count_steps(config: OpenChannelConfig, grid: Grid, duration: float) -> int:
    """Steps that divide ``duration`` evenly and are stable for every Re_tau of the config.

    The Courant number sum |u_i| dt / h_i may reach sqrt(3), the diffusion number 4 viscosity dt sum 1 / h_i^2 may reach
    2.5 (limits of third-order Runge-Kutta on the imaginary and the negative real axis). The count does not look at the
    flow, so that a trajectory does not depend on those it is batched with.
    """
    courant_rate = sum(speed / h for speed, h in zip(_PEAK_SPEED, grid.spacing, strict=True)) / _COURANT
    diffusion_rate = sum(4 / h**2 for h in grid.spacing) / config.friction_reynolds[0] / 2
    return math.ceil(duration * max(courant_rate, diffusion_rate))
