"""Developed turbulence in an open or a closed channel: no-slip bed, stress-free top or a second wall, driven along x.

    du/dt + div(u u) = -grad p + e_x + viscosity lap u,    div u = 0,    viscosity = 1 / Re_tau

in units of the friction velocity and of the channel's height (half the height where both ends are walls), periodic
along the flow (x) and across it (z). Solver: ``data.simulate.channel_flow``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from data.layout import Trajectory
from data.simulate.channel_flow import Channel, Stencil, Top, advance, courant_rate, refine, solve_pressure
from data.simulate.forecast import Forecast, interpolate_cost
from data.simulate.momentum import STABLE_COURANT, March
from shodh.fields import DomainSpec, FieldSpec, Grid
from shodh.physics.exterior import curl_of_edges
from shodh.physics.helmholtz import remove_divergence

DOMAIN = DomainSpec(
    name="open_channel",
    velocity_space="solenoidal",
    boundary=("periodic", "wall", "periodic"),
    velocity=FieldSpec(name="flux", units="1", location="face", long_name="volume flux through the lower faces"),
    pressure=FieldSpec(name="pressure", units="1", location="cell", long_name="kinematic pressure, zero mean"),
    medium=FieldSpec(name="wall_distance", units="1", location="cell", long_name="distance from the nearest wall"),
    parameters=("dt", "viscosity"),
)

_PEAK_SPEED = (25.0, 2.0, 3.0)  # per axis, in friction velocities: what time steps are made for, see _count_steps
_COURANT = 1.1  # of 1.73, the limit: gusts exceed the peak speeds by up to 1.4 (see the card)
_CALM_LAYER = 15.0  # in wall units: below this height the velocity off the wall is taken to peak in proportion to it
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
    top: Top = "free"  # "wall": a closed channel of height 2
    stretching: float = 0.0  # of the tanh that makes cells finer at the walls; 0: uniform
    stencil: Stencil = "narrow"  # "wide": several times more accurate along x and z at twice the time
    spinup_time: float = 10.0  # on the coarsest grid; half as long on every finer one

    def __post_init__(self) -> None:
        for name in ("num_trajectories", "num_snapshots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1. Raise it.")
        for name in ("snapshot_interval", "length", "width", "spinup_time"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive and finite. Change it.")
        if not 0 <= self.stretching <= 4:
            raise ValueError(f"stretching={self.stretching}: must be 0 (uniform) to 4. Take about 1.7.")
        if self.resolution < 8:
            raise ValueError(f"resolution={self.resolution}: too coarse for a turbulent channel. Take 16 or more.")
        span = self.friction_reynolds
        if not 0 < span[0] <= span[1] < math.inf:
            raise ValueError(f"friction_reynolds={span}: not a range. Write [low, high] with 0 < low <= high.")


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
    size = _batch_size(config, device.type)
    for start in range(0, len(indices), size):
        yield from _simulate_batch(config, indices[start : start + size], device, progress or (lambda steps: None))


def total_work(config: OpenChannelConfig, num: int) -> int:
    """Time steps that ``num`` trajectories take, spin-up included: the sum of what ``progress`` is told."""
    spinup = sum(_count_steps(config, march.grid, march.duration) for march in _plan_spinup(config))
    between_snapshots = _count_steps(config, make_grid(config, config.resolution), config.snapshot_interval)
    return num * (spinup + (config.num_snapshots - 1) * between_snapshots)


def mean_velocity_law(height: Float[np.ndarray, "y"], friction_reynolds: float) -> Float[np.ndarray, "y"]:
    """Mean velocity over a smooth bed, in friction velocities (Reichardt, Z. angew. Math. Mech. 31, 1951)."""
    wall = height * friction_reynolds
    return np.log1p(0.4 * wall) / 0.4 + 7.8 * (1 - np.exp(-wall / 11) - wall / 11 * np.exp(-wall / 3))


def forecast(config: OpenChannelConfig) -> Forecast:
    """Cost from the card's table: seconds per cell and step on each grid of the spin-up and the recording."""
    recording = [March(make_grid(config, config.resolution), config.snapshot_interval)] * (config.num_snapshots - 1)
    seconds, factor = 0.0, _WIDE_STENCIL if config.stencil == "wide" else 1.0
    for march in _plan_spinup(config) + recording:
        cells = math.prod(march.grid.shape)
        seconds += _count_steps(config, march.grid, march.duration) * cells * interpolate_cost(cells, _SECONDS_PER_CELL)
    snapshots = 16 * config.num_snapshots * config.resolution**3
    size, size_on_cuda = _batch_size(config, "cpu"), _batch_size(config, "cuda")
    return Forecast(
        seconds_per_trajectory=seconds * factor,
        peak_bytes=size * (_BYTES_PER_CELL * config.resolution**3 + snapshots),
        cuda_bytes=size_on_cuda * _BYTES_PER_CELL * config.resolution**3,
        cuda_host_bytes=size_on_cuda * snapshots,
    )


# One Runge-Kutta step, by cells of the box; measured, see the card.
_SECONDS_PER_CELL = {16**3: 1.2e-7, 32**3: 1.1e-7, 64**3: 1.05e-7, 128**3: 1.45e-7}
_WIDE_STENCIL = 2.0  # times that
_BYTES_PER_CELL = 250


def wall_distance(grid: Grid, top: Top) -> Float[np.ndarray, "y"]:
    """Distance of the cells' centres from the nearest wall."""
    widths = grid.widths(1)
    height = np.cumsum(widths) - widths / 2
    return height if top == "free" else np.minimum(height, widths.sum() - height)


def make_initial_velocity(config: OpenChannelConfig, index: int, grid: Grid) -> tuple[Float[Tensor, "3 x y z"], float]:
    """Mean law plus large random eddies, and Re_tau: what trajectory ``index`` starts from, in FP64.

    The eddies are the curl of a random potential of 0-3 waves in x and z and 1-4 half-waves in y; an rms of one
    friction velocity trips turbulence at once.
    """
    rng = np.random.default_rng([config.seed, index])
    friction_reynolds = rng.uniform(*config.friction_reynolds)
    nx, ny, nz = grid.shape
    amplitude = rng.standard_normal((3, 8, 4, 8))
    faces = np.concatenate([[0.0], np.cumsum(grid.widths(1))])
    half_waves = np.sin(np.pi * np.arange(1, 5)[:, None] * faces[:-1] / faces[-1])
    potential = np.einsum("fklm,kx,ly,mz->fxyz", amplitude, _waves(nx), half_waves, _waves(nz))
    circulation = torch.from_numpy(potential * grid.edge_length)
    velocity = curl_of_edges(circulation, grid.boundary) / torch.from_numpy(grid.face_area)
    velocity = velocity / velocity.square().mean().sqrt()
    mean = mean_velocity_law(wall_distance(grid, config.top), friction_reynolds)
    velocity[0] += rearrange(torch.from_numpy(mean), "y -> y 1")
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
        channel = Channel(march.grid, viscosity, top=config.top, stencil=config.stencil)
        now = advance(now, channel, march.duration / num_steps, num_steps)
        require_stable(now, channel, march.duration / num_steps, indices, time)
        progress(num_steps * len(indices))
        return now

    for march in spinup:
        if march.grid != grid:
            grid = march.grid
            velocity = refine(velocity, grid, config.top)
        velocity = march_on(velocity, march)
    area = torch.from_numpy(grid.face_area).to(device, torch.float32)
    channel = Channel(grid, viscosity, top=config.top, stencil=config.stencil)
    flux = np.empty((len(indices), config.num_snapshots, 3, *grid.shape), np.float32)
    pressure = np.empty((len(indices), config.num_snapshots, *grid.shape), np.float32)
    for snapshot in range(config.num_snapshots):
        if snapshot > 0:
            velocity = march_on(velocity, March(grid, config.snapshot_interval))
        flux[:, snapshot] = (velocity * area).cpu().numpy()
        pressure[:, snapshot] = solve_pressure(velocity, channel).cpu().numpy()
    medium = repeat(wall_distance(grid, config.top), "y -> x y z", x=grid.shape[0], z=grid.shape[2])
    for b, index in enumerate(indices):
        trajectory = Trajectory(
            velocity=flux[b],
            pressure=pressure[b],
            medium=medium.astype(np.float32),
            time=np.arange(config.num_snapshots) * config.snapshot_interval,
            parameters={"dt": config.snapshot_interval, "viscosity": 1 / numbers[b]},
            seed=config.seed,
            grid=grid,
        )
        yield index, trajectory


def _batch_size(config: OpenChannelConfig, device: str) -> int:
    # a CPU's cache holds 2^18 cells with all temporaries; a GPU is busy with 2^21, one trajectory at 128^3, whose bits
    # then do not depend on where a run was interrupted
    cells = 2**21 if device == "cuda" else 2**18
    return max(1, cells // config.resolution**3)


def require_stable(
    velocity: Float[Tensor, "b 3 x y z"], channel: Channel, dt: float, indices: Sequence[int], time: float
) -> None:
    """Raise RuntimeError naming the first trajectory that blew up, or is faster than its time step is stable for."""
    limit = STABLE_COURANT / _largest_eigenvalues(channel.stencil)[0]
    for index, flow in zip(indices, velocity.split(1), strict=True):
        where = f"open_channel trajectory {index}"
        if not torch.isfinite(flow).all():
            raise RuntimeError(f"{where}: blew up by t = {time:g} (spin-up is t < 0). Lower friction_reynolds.")
        number = courant_rate(flow, channel) * dt
        if number > limit:
            raise RuntimeError(
                f"{where}: Courant number {number:.3g} at t = {time:g} (spin-up is t < 0) exceeds {limit:.3g}. "
                "Lower friction_reynolds."
            )


def _largest_eigenvalues(stencil: Stencil) -> tuple[float, float]:
    """Of advection, (9 + 1/3) / 8 for the wide stencil, and of friction, over those of the narrow one."""
    return (7 / 6, 4 / 3) if stencil == "wide" else (1.0, 1.0)


def _waves(n: int) -> Float[np.ndarray, "k n"]:
    """cos and sin of 0-3 waves over n cells."""
    angle = 2 * np.pi * np.arange(4)[:, None] * np.arange(n) / n
    return np.concatenate([np.cos(angle), np.sin(angle)])


def make_grid(config: OpenChannelConfig, cells: int) -> Grid:
    """The config's box in ``cells`` cells per axis; stretched as y ~ tanh, symmetric if both ends are walls."""
    height, walls = (1.0, 1) if config.top == "free" else (2.0, 2)
    spacing_y = height / cells
    if config.stretching > 0:
        index = np.linspace(-1, walls - 1, cells + 1)
        faces = height / walls * np.tanh(config.stretching * index) / math.tanh(config.stretching)
        spacing_y = tuple(np.diff(faces).tolist())
    spacing = (config.length / cells, spacing_y, config.width / cells)
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
        marches += [March(make_grid(config, n), duration / count)] * count
    return marches


def _count_steps(config: OpenChannelConfig, grid: Grid, duration: float) -> int:
    """Steps that divide ``duration`` evenly and are stable for every Re_tau of the config.

    The Courant number sum |u_i| dt / h_i may reach sqrt(3), the diffusion number 4 viscosity dt sum 1 / h_i^2 may reach
    2.5 (limits of third-order Runge-Kutta on the imaginary and the negative real axis). The count does not look at the
    flow, so that a trajectory does not depend on those it is batched with; ``require_stable`` does.
    """
    advection, friction = _largest_eigenvalues(config.stencil)
    hx, hz, widths = config.length / grid.shape[0], config.width / grid.shape[2], grid.widths(1)
    wall = wall_distance(grid, config.top) * config.friction_reynolds[1]
    v_rate = float(np.max(_PEAK_SPEED[1] * np.minimum(1, wall / _CALM_LAYER) / widths))
    advection_rate = (_PEAK_SPEED[0] / hx + v_rate + _PEAK_SPEED[2] / hz) * advection / _COURANT
    diffusion = 4 * friction * (1 / hx**2 + 1 / hz**2) + 4 / widths.min() ** 2
    diffusion_rate = diffusion / config.friction_reynolds[0] / 2
    return math.ceil(duration * max(advection_rate, diffusion_rate))
