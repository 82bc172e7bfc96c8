"""Convection between a hot floor and a cold ceiling: Boussinesq fluid, no-slip walls, periodic in x and z.

    du/dt + div(u u) = -grad p + viscosity lap u + T e_y,    div u = 0,    viscosity = sqrt(Pr / Ra)
    dT/dt + div(u T) = diffusivity lap T,    T = 1/2 at y = 0 and -1/2 at y = 1,    diffusivity = 1 / sqrt(Ra Pr)

in free-fall units: the height, the temperature difference of the walls, and the speed that a parcel as warm as the
floor gains over the height (Rayleigh, Phil. Mag. 32, 1916; Ahlers, Grossmann and Lohse, Rev. Mod. Phys. 81, 2009). The
advection conserves the mean and the variance of T, and the work of buoyancy is the convected heat, to round-off.
Solver of the flow: ``data.simulate.momentum``.
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
from data.simulate.forecast import Forecast, interpolate_cost
from data.simulate.momentum import (
    March,
    add_velocity_ghosts,
    advance,
    count_steps,
    momentum_tendency,
    refine_axis,
    require_stable,
    solve_pressure,
)
from shodh.fields import DomainSpec, FieldSpec, Grid
from shodh.physics.helmholtz import remove_divergence

DOMAIN = DomainSpec(
    name="convection",
    velocity_space="solenoidal",
    boundary=("periodic", "wall", "periodic"),
    velocity=FieldSpec(name="flux", units="1", location="face", long_name="volume flux through the lower faces"),
    pressure=FieldSpec(name="pressure", units="1", location="cell", long_name="kinematic pressure, zero mean"),
    medium=FieldSpec(name="height", units="1", location="cell", long_name="height above the hot floor"),
    scalars=(
        FieldSpec(name="temperature", units="1", location="cell", long_name="temperature, 1/2 on floor, -1/2 on top"),
    ),
    parameters=("dt", "viscosity", "diffusivity"),
)

_PEAK_SPEED = 0.6  # mean of |u|, |v| and |w| at the fastest place and time, in free-fall speeds, see the card
_COURANT = 1.4  # of 1.73, the limit
_COARSEST = 16  # cells per axis that convection is spun up on first
_MARCH = 1.0  # longest time between two reports of progress
_LAYER_CELLS = 1.5  # least cells in a thermal boundary layer that are simulated
_RESOLVED = 0.75  # least half the cells / Kolmogorov or Batchelor wavenumber, the coarsest axis counting
_LONGEST_CELL = 4.0  # times the height of a cell
_PRANDTL = (0.5, 2.0)  # where time steps and grids were measured


@dataclass(frozen=True, kw_only=True)
class ConvectionConfig:
    """Independent layers of developed convection; lengths in heights, times in free-fall times."""

    num_trajectories: int = 24
    num_snapshots: int = 25
    snapshot_interval: float = 0.5
    resolution: int = 32  # cells per axis
    seed: int = 0
    rayleigh: tuple[float, float] = (3e4, 3e5)  # drawn log-uniformly per trajectory
    prandtl: tuple[float, float] = (0.5, 2.0)  # likewise
    length: float = 2.0  # along x
    width: float = 2.0  # along z
    spinup_time: float = 80.0  # on the coarsest grid; a quarter of it on every finer one

    def __post_init__(self) -> None:
        for name in ("num_trajectories", "num_snapshots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1. Raise it.")
        for name in ("snapshot_interval", "length", "width", "spinup_time"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive and finite. Change it.")
        if self.resolution < 8:
            raise ValueError(f"resolution={self.resolution}: too coarse for plumes. Take 16 or more.")
        for name in ("rayleigh", "prandtl"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name}={low, high}: not a range. Write [low, high] with 0 < low <= high.")
        if self.prandtl[0] < _PRANDTL[0] or self.prandtl[1] > _PRANDTL[1]:
            raise ValueError(f"prandtl={self.prandtl}: measured between {_PRANDTL} only. Stay between them.")
        for name in ("length", "width"):
            if getattr(self, name) > _LONGEST_CELL:
                raise ValueError(
                    f"{name}={getattr(self, name)}: cells would be more than {_LONGEST_CELL:g} times as long as high. "
                    f"Take {_LONGEST_CELL:g} or less."
                )
        needed = max(least_resolution(self.rayleigh[1], prandtl, self.longest) for prandtl in self.prandtl)
        if self.resolution < needed:
            raise ValueError(
                f"rayleigh={self.rayleigh}: {self.resolution} cells do not hold its plumes and wall layers. "
                f"Take resolution={needed} or more, or a lower Rayleigh number."
            )

    @property
    def longest(self) -> float:
        """The box's longest edge, whose cells are the coarsest."""
        return max(1.0, self.length, self.width)


class Layer(NamedTuple):
    """What moves and resists the fluid and its heat, for a batch of layers on one grid."""

    grid: Grid
    viscosity: Float[Tensor, "b"]
    diffusivity: Float[Tensor, "b"]


def simulate(
    config: ConvectionConfig,
    indices: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Trajectory]]:
    """Developed convection for each wanted trajectory index; ``progress`` counts time steps of one layer.

    Trajectory i depends on (config.seed, i) alone, not on which others are wanted. Raises RuntimeError on blow-up.
    """
    device = torch.device(device)
    size = _batch_size(config, device.type)
    for start in range(0, len(indices), size):
        yield from _simulate_batch(config, indices[start : start + size], device, progress or (lambda steps: None))


def total_work(config: ConvectionConfig, num: int) -> int:
    """Time steps that ``num`` trajectories take, spin-up included: the sum of what ``progress`` is told."""
    return num * sum(_count_steps(config, march) for march in _plan(config))


def forecast(config: ConvectionConfig) -> Forecast:
    """Cost from the card's table: a step's time per cell, and bytes per cell of a batch with all its temporaries."""
    seconds = 0.0
    for march in _plan(config):
        cells = math.prod(march.grid.shape)
        seconds += _count_steps(config, march) * cells * interpolate_cost(cells, _SECONDS_PER_CELL)
    cells, snapshots = config.resolution**3, 20 * config.num_snapshots
    on_cuda = cells * _batch_size(config, "cuda")
    return Forecast(
        seconds_per_trajectory=seconds,
        peak_bytes=cells * _batch_size(config, "cpu") * (_BYTES_PER_CELL + snapshots),
        cuda_bytes=on_cuda * _BYTES_PER_CELL,
        cuda_host_bytes=on_cuda * snapshots,
    )


# One step, by cells of the box; measured, see the card.
_SECONDS_PER_CELL = {16**3: 2.2e-7, 32**3: 2.0e-7, 64**3: 1.8e-7, 128**3: 2.8e-7}
_BYTES_PER_CELL = 200  # on top of 20 per recorded snapshot


def least_resolution(rayleigh: float, prandtl: float, longest: float) -> int:
    """Cells per axis below which convection in a box of this longest edge is not simulated.

    A thermal boundary layer is 1 / (2 Nu) thick with Nu = 0.186 Ra^0.276 (Kerr, J. Fluid Mech. 310, 1996: Pr = 0.7,
    wide box). The eddies: the mean dissipation is (Nu - 1) / sqrt(Ra Pr) (Shraiman and Siggia, 1990, eq. 2), so
    Kolmogorov's length is (Pr^2 / (Ra (Nu - 1)))^(1/4), and temperature varies over 1 / sqrt(Pr) of it where Pr > 1.
    """
    nusselt = 0.186 * rayleigh**0.276
    eddy = (rayleigh * max(nusselt - 1, 0.0) / prandtl**2) ** 0.25 * max(1.0, math.sqrt(prandtl))  # per height
    return math.ceil(max(_LAYER_CELLS * 2 * nusselt, _RESOLVED * longest * eddy / math.pi))


def state_tendency(state: Float[Tensor, "b 4 x y z"], layer: Layer) -> Float[Tensor, "b 4 x y z"]:
    """d/dt of velocity (3) and temperature, the pressure's gradient left out."""
    velocity, temperature = state[:, :3], state[:, 3]
    ghosted = add_temperature_ghosts(temperature)
    tendency = torch.empty_like(state)
    tendency[:, :3] = momentum_tendency(velocity, layer.viscosity, layer.grid)
    tendency[:, 1, :, 1:].add_(temperature[:, :, 1:], alpha=0.5).add_(temperature[:, :, :-1], alpha=0.5)
    tendency[:, 3] = _temperature_tendency(velocity, ghosted, layer)
    return tendency


def _temperature_tendency(velocity: Tensor, ghosted: Tensor, layer: Layer) -> Tensor:
    """-div(u T - diffusivity grad T) in cells, T on a face the mean of its two cells."""
    diffusivity = rearrange(layer.diffusivity, "b -> b 1 1 1")
    tendency = torch.zeros_like(velocity[:, 0])
    for axis, h in enumerate(layer.grid.mean_spacing):
        dim = axis - 3
        line = ghosted
        for other in range(3):
            line = line if other == axis else line.narrow(other - 3, 1, layer.grid.shape[other])
        below, above = line.narrow(dim, 0, line.shape[dim] - 1), line.narrow(dim, 1, line.shape[dim] - 1)
        speed = velocity[:, axis]
        speed = torch.cat([speed, speed.narrow(dim, 0, 1)], dim)  # of the first face again, or 0 in the upper wall
        flux = (below + above).mul_(speed).mul_(0.5).addcmul_(diffusivity, above - below, value=-1 / h)
        tendency.sub_(flux.diff(dim=dim), alpha=1 / h)
    return tendency


def add_temperature_ghosts(temperature: Float[Tensor, "b x y z"]) -> Float[Tensor, "b x+2 y+2 z+2"]:
    """The temperature with a layer around it: periodic in x and z, 1/2 on the floor and -1/2 on the ceiling."""
    ghosted = torch.nn.functional.pad(temperature[:, None], (1, 1, 1, 1, 1, 1), mode="circular")[:, 0]
    ghosted[:, :, 0] = 1 - ghosted[:, :, 1]
    ghosted[:, :, -1] = -1 - ghosted[:, :, -2]
    return ghosted


def nusselt_numbers(state: Float[Tensor, "b 4 x y z"], layer: Layer) -> dict[str, Float[Tensor, "b"]]:
    """Heat over conducted heat, measured four ways whose means over time agree (Shraiman and Siggia, 1990, eq. 2-3).

    ``volume``: 1 + <v T> / diffusivity; ``walls``: slope of T at floor and ceiling, averaged; ``temperature``:
    <|grad T|^2>; ``velocity``: 1 + <viscosity |grad u|^2> / diffusivity. In a steady state they are equal to round-off.
    """
    state = state.double()
    still = layer._replace(viscosity=layer.viscosity.double(), diffusivity=layer.diffusivity.double())
    velocity, temperature, h = state[:, :3], state[:, 3], layer.grid.mean_spacing[1]
    on_faces = (temperature[:, :, 1:] + temperature[:, :, :-1]) / 2
    convected = (velocity[:, 1, :, 1:] * on_faces).sum(2).mean((1, 2)) * h
    slopes = (1 - 2 * temperature[:, :, 0]).mean((1, 2)) / h, (2 * temperature[:, :, -1] + 1).mean((1, 2)) / h
    conduction = _temperature_tendency(torch.zeros_like(velocity), add_temperature_ghosts(temperature), still)
    # <|grad T|^2> by parts: what the walls give, less what diffusion takes from the variance
    gradient = (slopes[0] + slopes[1]) / 2 - (temperature * conduction).mean((1, 2, 3)) / still.diffusivity
    friction = -(velocity * momentum_tendency(velocity, still.viscosity, layer.grid)).sum(1).mean((1, 2, 3))
    return {
        "volume": 1 + convected / still.diffusivity,
        "walls": (slopes[0] + slopes[1]) / 2,
        "temperature": gradient,
        "velocity": 1 + friction / still.diffusivity,
    }


def solve_total_pressure(state: Float[Tensor, "b 4 x y z"], layer: Layer) -> Float[Tensor, "b x y z"]:
    """The kinematic pressure of this instant, zero mean, with the part that carries the fluid's weight."""
    return solve_pressure(state_tendency(state, layer)[:, :3], layer.grid)


def refine(state: Float[Tensor, "b 4 x y z"], fine: Grid) -> Float[Tensor, "b 4 x2 y2 z2"]:
    """The state on a grid of twice as many cells per axis: interpolated linearly, its velocity then projected."""
    velocity = add_velocity_ghosts(state[:, :3], fine.boundary)
    fields = []
    for field, values in enumerate([*velocity.unbind(1), add_temperature_ghosts(state[:, 3])]):
        for axis in range(3):
            values = refine_axis(values.movedim(axis + 1, -1), on_faces=field == axis).movedim(-1, axis + 1)
        fields.append(values)
    refined = torch.stack(fields, 1)
    return torch.cat([remove_divergence(refined[:, :3], fine), refined[:, 3:]], 1)


def draw_layer(config: ConvectionConfig, index: int) -> tuple[float, float, np.random.Generator]:
    """Viscosity and diffusivity of trajectory ``index``, and the generator that draws its first disturbance."""
    rng = np.random.default_rng([config.seed, index])
    rayleigh, prandtl = (math.exp(rng.uniform(*np.log(span))) for span in (config.rayleigh, config.prandtl))
    return math.sqrt(prandtl / rayleigh), 1 / math.sqrt(rayleigh * prandtl), rng


def make_initial_state(rng: np.random.Generator, grid: Grid) -> Float[Tensor, "4 x y z"]:
    """Fluid at rest with the conducted temperature and warm and cold spots of rms 0.05 in the middle, FP64.

    The spots are random sums of 0-3 waves in x and z and 1-2 half-waves in y.
    """
    nx, ny, nz = grid.shape
    height = (np.arange(ny) + 0.5) / ny
    half_waves = np.sin(np.pi * np.arange(1, 3)[:, None] * height)
    spots = np.einsum("klm,kx,ly,mz->xyz", rng.standard_normal((8, 2, 8)), _waves(nx), half_waves, _waves(nz))
    state = np.zeros((4, nx, ny, nz))
    state[3] = 0.5 - height[:, None] + 0.05 * spots / np.sqrt(np.mean(spots**2))
    return torch.from_numpy(state)


def make_grid(config: ConvectionConfig, cells: int) -> Grid:
    """The box with ``cells`` cells along every axis."""
    spacing = (config.length / cells, 1 / cells, config.width / cells)
    return Grid(shape=(cells, cells, cells), spacing=spacing, boundary=DOMAIN.boundary)


def _simulate_batch(
    config: ConvectionConfig, indices: Sequence[int], device: torch.device, progress: Callable[[int], None]
) -> Iterator[tuple[int, Trajectory]]:
    spinup = _plan_spinup(config)
    grid, time = spinup[0].grid, -sum(march.duration for march in spinup)
    viscosities, diffusivities, generators = zip(*(draw_layer(config, index) for index in indices), strict=True)
    state = torch.stack([make_initial_state(rng, grid) for rng in generators]).to(device, torch.float32)
    resistance = [torch.tensor(values, device=device, dtype=torch.float32) for values in (viscosities, diffusivities)]

    def march_on(now: Tensor, march: March) -> Tensor:
        nonlocal time
        time += march.duration
        num_steps, layer = _count_steps(config, march), Layer(march.grid, *resistance)
        dt = march.duration / num_steps
        now = advance(now, lambda state: state_tendency(state, layer), march.grid, dt, num_steps)
        require_stable(DOMAIN.name, now, dt, march.grid, indices, time)
        progress(num_steps * len(indices))
        return now

    for march in spinup:
        if march.grid != grid:
            grid = march.grid
            state = refine(state, grid)
        state = march_on(state, march)
    area = torch.from_numpy(grid.face_area).to(device, torch.float32)
    flux = np.empty((len(indices), config.num_snapshots, 3, *grid.shape), np.float32)
    temperature, pressure = (np.empty((len(indices), config.num_snapshots, *grid.shape), np.float32) for _ in range(2))
    for snapshot in range(config.num_snapshots):
        if snapshot > 0:
            state = march_on(state, March(grid, config.snapshot_interval))
        flux[:, snapshot] = (state[:, :3] * area).cpu().numpy()
        temperature[:, snapshot] = state[:, 3].cpu().numpy()
        pressure[:, snapshot] = solve_total_pressure(state, Layer(grid, *resistance)).cpu().numpy()
    height = (np.arange(grid.shape[1], dtype=np.float32) + 0.5) * np.float32(grid.mean_spacing[1])
    for b, index in enumerate(indices):
        trajectory = Trajectory(
            velocity=flux[b],
            pressure=pressure[b],
            medium=repeat(height, "y -> x y z", x=grid.shape[0], z=grid.shape[2]),
            scalars={"temperature": temperature[b]},
            time=np.arange(config.num_snapshots) * config.snapshot_interval,
            parameters={"dt": config.snapshot_interval, "viscosity": viscosities[b], "diffusivity": diffusivities[b]},
            seed=config.seed,
            grid=grid,
        )
        yield index, trajectory


def _waves(n: int) -> Float[np.ndarray, "k n"]:
    """cos and sin of 0-3 waves over n cells."""
    angle = 2 * np.pi * np.arange(4)[:, None] * (np.arange(n) + 0.5) / n
    return np.concatenate([np.cos(angle), np.sin(angle)])


def _plan_spinup(config: ConvectionConfig) -> list[March]:
    """Marches on the coarsest grid, then a quarter as long on every finer one up to the recorded resolution."""
    cells = [config.resolution]
    while cells[0] % 2 == 0 and cells[0] // 2 >= _COARSEST:
        cells.insert(0, cells[0] // 2)
    marches = []
    for n in cells:
        duration = config.spinup_time if n == cells[0] else config.spinup_time / 4
        count = math.ceil(duration / _MARCH)
        marches += [March(make_grid(config, n), duration / count)] * count
    return marches


def _plan(config: ConvectionConfig) -> list[March]:
    """All marches of a trajectory, recorded snapshots included."""
    recorded = March(make_grid(config, config.resolution), config.snapshot_interval)
    return _plan_spinup(config) + [recorded] * (config.num_snapshots - 1)


def _batch_size(config: ConvectionConfig, device_type: str) -> int:
    """Layers side by side: what GPU memory, or a CPU's cache, holds with all temporaries."""
    cells = 2**24 if device_type == "cuda" else 2**18
    return min(config.num_trajectories, max(1, cells // config.resolution**3))


def _count_steps(config: ConvectionConfig, march: March) -> int:
    (rayleigh, _), (low, high) = config.rayleigh, config.prandtl
    largest = max(math.sqrt(high / rayleigh), 1 / math.sqrt(rayleigh * low))
    return count_steps(march.duration, _PEAK_SPEED, _COURANT, largest, march.grid)
