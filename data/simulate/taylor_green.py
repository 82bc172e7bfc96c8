"""Taylor-Green vortices in a periodic box: they stretch, break up into turbulence and decay.

    du/dt + div(u u) = -grad p + viscosity lap u,    div u = 0,    viscosity = 1 / Re

in units of the inverse wavenumber (the box is 2 pi long) and of the velocity V0 of the first vortices (Taylor and
Green, Proc. R. Soc. A 158, 1937; Brachet et al., J. Fluid Mech. 130, 1983). Solver: ``data.simulate.momentum``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.layout import Trajectory
from data.simulate.forecast import Forecast, interpolate_cost
from data.simulate.momentum import (
    advance,
    count_steps,
    momentum_tendency,
    require_stable,
    solve_pressure,
)
from shodh.fields import DomainSpec, FieldSpec, Grid

DOMAIN = DomainSpec(
    name="taylor_green",
    velocity_space="solenoidal",
    boundary=("periodic", "periodic", "periodic"),
    velocity=FieldSpec(name="flux", units="1", location="face", long_name="volume flux through the lower faces"),
    pressure=FieldSpec(name="pressure", units="1", location="cell", long_name="kinematic pressure, zero mean"),
    medium=FieldSpec(name="fluid_fraction", units="1", location="cell", long_name="fluid fraction: 1 everywhere"),
    parameters=("dt", "viscosity"),
)

_PEAK_SPEED = 1.1  # mean of |u|, |v| and |w| at the fastest place and time, see the card
_COURANT = 1.4  # of 1.73, the limit
_RESOLVED = 0.75  # least half the cells / Kolmogorov wavenumber at the peak of dissipation; what it errs: the card
_PEAK_DISSIPATION = 0.0127  # of Re = 1600, in V0^3 / L, see the card


@dataclass(frozen=True, kw_only=True)
class TaylorGreenConfig:
    """Independent decays from t = 0; lengths in box lengths / 2 pi, times in lengths per V0."""

    num_trajectories: int = 24
    num_snapshots: int = 25
    snapshot_interval: float = 0.5
    resolution: int = 32  # cells per axis
    seed: int = 0
    reynolds: tuple[float, float] = (50.0, 200.0)  # V0 L / viscosity, drawn log-uniformly per trajectory
    start: Literal["family", "canonical"] = "family"  # vortices of any phase and place, or those of Re alone

    def __post_init__(self) -> None:
        for name in ("num_trajectories", "num_snapshots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1. Raise it.")
        if not 0 < self.snapshot_interval < math.inf:
            raise ValueError(f"snapshot_interval={self.snapshot_interval}: must be positive and finite. Change it.")
        if self.resolution < 8:
            raise ValueError(f"resolution={self.resolution}: too coarse for vortices that break up. Take 16 or more.")
        low, high = self.reynolds
        if not 0 < low <= high < math.inf:
            raise ValueError(f"reynolds={self.reynolds}: not a range. Write [low, high] with 0 < low <= high.")
        needed = least_resolution(high)
        if self.resolution < needed:
            raise ValueError(
                f"reynolds={self.reynolds}: {self.resolution} cells do not hold the eddies of Re = {high:g}. "
                f"Take resolution={needed} or more, or a lower Reynolds number."
            )


class Vortices(NamedTuple):
    """Which of the Taylor-Green flows: u_i = 2 / sqrt(3) sin(phase + 2 pi i / 3) sin x_i cos x_j cos x_k, moved.

    i = 1, 2, 0 along x, y, z; phase 0 is the classical flow without velocity along z.
    """

    phase: float
    shift: tuple[float, float, float]


def simulate(
    config: TaylorGreenConfig,
    indices: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Trajectory]]:
    """The decay of each wanted trajectory index from its first vortices; ``progress`` counts time steps of one box.

    Trajectory i depends on (config.seed, i) alone, not on which others are wanted. Raises RuntimeError on blow-up.
    """
    device = torch.device(device)
    size = _batch_size(config, device.type)
    for start in range(0, len(indices), size):
        yield from _simulate_batch(config, indices[start : start + size], device, progress or (lambda steps: None))


def total_work(config: TaylorGreenConfig, num: int) -> int:
    """Time steps that ``num`` trajectories take: the sum of what ``progress`` is told."""
    return num * (config.num_snapshots - 1) * _steps_between_snapshots(config)


def forecast(config: TaylorGreenConfig) -> Forecast:
    """Cost from the card's table: a step's time per cell, and bytes per cell of a batch with all its temporaries."""
    cells = config.resolution**3
    seconds = total_work(config, 1) * cells * interpolate_cost(cells, _SECONDS_PER_CELL)
    snapshots, on_cuda = 16 * config.num_snapshots, cells * _batch_size(config, "cuda")
    return Forecast(
        seconds_per_trajectory=seconds,
        peak_bytes=cells * _batch_size(config, "cpu") * (_BYTES_PER_CELL + snapshots),
        cuda_bytes=on_cuda * _BYTES_PER_CELL,
        cuda_host_bytes=on_cuda * snapshots,
    )


# One step, by cells of the box; measured, see the card.
_SECONDS_PER_CELL = {16**3: 1.7e-7, 32**3: 1.6e-7, 64**3: 1.6e-7, 128**3: 2.2e-7}
_BYTES_PER_CELL = 160  # on top of 16 per recorded snapshot


def least_resolution(reynolds: float) -> int:
    """Cells per axis below which the eddies of this Reynolds number are not simulated, by Kolmogorov's length.

    At the peak of dissipation (viscosity^3 / dissipation)^(1/4) times half the cells must reach 0.75. What that and
    finer grids err is in the card.
    """
    kolmogorov = (reynolds**-3 / _PEAK_DISSIPATION) ** 0.25
    return math.ceil(2 * _RESOLVED / kolmogorov)


def draw_flow(config: TaylorGreenConfig, index: int) -> tuple[Vortices, float]:
    """First vortices and Reynolds number of trajectory ``index``."""
    rng = np.random.default_rng([config.seed, index])
    reynolds = math.exp(rng.uniform(*np.log(config.reynolds)))
    phase, x, y, z = rng.uniform(0, 2 * math.pi, 4)
    if config.start == "canonical":
        return Vortices(0.0, (0.0, 0.0, 0.0)), reynolds
    return Vortices(phase, (x, y, z)), reynolds


def make_velocity(vortices: Vortices, grid: Grid) -> Float[Tensor, "3 x y z"]:
    """The vortices on lower faces, FP64; discretely solenoidal because the three amplitudes sum to zero."""
    components = []
    for axis in range(3):
        amplitude = 2 / math.sqrt(3) * math.sin(vortices.phase + 2 * math.pi / 3 * ((axis + 1) % 3))
        values = torch.tensor(amplitude, dtype=torch.float64)
        for other in range(3):
            n, h = grid.shape[other], grid.mean_spacing[other]
            offset = 0.0 if other == axis else h / 2
            angle = torch.arange(n, dtype=torch.float64) * h + offset - vortices.shift[other]
            wave = torch.sin(angle) if other == axis else torch.cos(angle)
            values = values * wave.reshape([-1 if a == other else 1 for a in range(3)])
        components.append(values)
    return torch.stack(components)


def measure_dissipation(
    velocity: Float[Tensor, "b 3 x y z"], viscosity: Float[Tensor, "b"], grid: Grid
) -> Float[Tensor, "b"]:
    """Mean of 2 viscosity S:S, S the staggered strain rate.

    It is at once the work of the discrete viscous term and, the advection doing none, -dE/dt of the mean of |u|^2 / 2
    between time steps.
    """
    work = velocity.double() * momentum_tendency(velocity.double(), viscosity.double(), grid)
    return -work.sum(1).mean((1, 2, 3))


def make_grid(cells: int) -> Grid:
    """The periodic box of side 2 pi."""
    h = 2 * math.pi / cells
    return Grid(shape=(cells, cells, cells), spacing=(h, h, h), boundary=DOMAIN.boundary)


def _simulate_batch(
    config: TaylorGreenConfig, indices: Sequence[int], device: torch.device, progress: Callable[[int], None]
) -> Iterator[tuple[int, Trajectory]]:
    grid = make_grid(config.resolution)
    flows, numbers = zip(*(draw_flow(config, index) for index in indices), strict=True)
    velocity = torch.stack([make_velocity(flow, grid) for flow in flows]).to(device, torch.float32)
    viscosity = torch.tensor([1 / number for number in numbers], device=device, dtype=torch.float32)
    num_steps = _steps_between_snapshots(config)
    dt = config.snapshot_interval / num_steps
    area = torch.from_numpy(grid.face_area).to(device, torch.float32)
    flux = np.empty((len(indices), config.num_snapshots, 3, *grid.shape), np.float32)
    pressure = np.empty((len(indices), config.num_snapshots, *grid.shape), np.float32)

    def tendency(now: Tensor) -> Tensor:
        return momentum_tendency(now, viscosity, grid)

    for snapshot in range(config.num_snapshots):
        if snapshot > 0:
            velocity = advance(velocity, tendency, grid, dt, num_steps)
            require_stable(DOMAIN.name, velocity, dt, grid, indices, snapshot * config.snapshot_interval)
            progress(num_steps * len(indices))
        flux[:, snapshot] = (velocity * area).cpu().numpy()
        pressure[:, snapshot] = solve_pressure(tendency(velocity), grid).cpu().numpy()
    for b, index in enumerate(indices):
        trajectory = Trajectory(
            velocity=flux[b],
            pressure=pressure[b],
            medium=np.ones(grid.shape, np.float32),
            time=np.arange(config.num_snapshots) * config.snapshot_interval,
            parameters={"dt": config.snapshot_interval, "viscosity": 1 / numbers[b]},
            seed=config.seed,
            grid=grid,
        )
        yield index, trajectory


def _batch_size(config: TaylorGreenConfig, device_type: str) -> int:
    """Boxes side by side: what GPU memory, or a CPU's cache, holds with all temporaries."""
    cells = 2**24 if device_type == "cuda" else 2**18
    return min(config.num_trajectories, max(1, cells // config.resolution**3))


def _steps_between_snapshots(config: TaylorGreenConfig) -> int:
    grid, viscosity = make_grid(config.resolution), 1 / config.reynolds[0]
    return count_steps(config.snapshot_interval, _PEAK_SPEED, _COURANT, viscosity, grid)
