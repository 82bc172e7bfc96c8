"""Sound through random layered, faulted rock in 3-D, recorded in a box that waves from outside keep crossing.

    (1 / c^2) phi_tt = laplace(phi) + s(x, t),    p = -rho phi_t,    v = grad phi

for a velocity potential phi in a fluid of constant density: particle velocity is a gradient and has no curl. The box is
cut out of a larger one whose margin holds the sources, inside absorbing layers; within the box the equation is
homogeneous, and what enters it enters through its faces.

Fields are nondimensional (the equation is linear, so the potential's scale is free): the potential such that the direct
wave of a source has an amplitude of 0.5 to 1 times `WAVE_AMPLITUDE` in the middle of the box, circulation in units of
the potential, time in `TIME_UNIT`, pressure in rho · potential / `TIME_UNIT`. Wave speed stays in m/s. Axis z is depth.
Solver: deepwave (A. Richardson, doi:10.5281/zenodo.3829886), leapfrog, 4th order in space, convolutional PML.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import deepwave
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.layout import Trajectory
from shodh.fields import DomainSpec, FieldSpec, Grid
from shodh.physics.exterior import gradient_of_cells
from shodh.physics.helmholtz import Potentials, snap_potentials

DOMAIN = DomainSpec(
    name="fwi",
    velocity_space="irrotational",
    boundary=("open", "open", "open"),
    velocity=FieldSpec(
        name="circulation", units="1", location="face", long_name="particle velocity times distance between cells"
    ),
    pressure=FieldSpec(name="pressure", units="1", location="cell", long_name="acoustic pressure"),
    medium=FieldSpec(name="wave_speed", units="m s-1", location="cell", long_name="speed of sound"),
    parameters=("dt", "frequency"),
)
TIME_UNIT = 0.01  # s
WAVE_AMPLITUDE = 4.0  # of the potential; the rms of pressure is then near 1.4, that of circulation near 0.3
MARGIN = 10  # cells between the recorded box and the absorbing layer on each side
SOURCE_DISTANCE = (5, 9)  # cells that a source lies outside the box, on one side of it
ABSORBING_CELLS = 10
CELLS_PER_WAVELENGTH = 7  # at least, in the slowest rock at twice the peak frequency (97 % of the energy of p is below)
LARGEST_STEP = 1e-3  # s
COURANT = 0.59  # c dt sqrt(3) / h; deepwave would subdivide steps from 0.6 on
ONSET = 1.2  # peak periods from the start of a Ricker wavelet (2e-5 of its peak) to its peak
MAX_SOURCES = 3
CELLS_PER_BATCH = 2**22


@dataclass(frozen=True, kw_only=True)
class AcousticsConfig:
    """What is simulated; ranges are drawn from uniformly, once per trajectory."""

    num_trajectories: int = 24
    num_snapshots: int = 25
    snapshot_interval: float = 0.005  # s
    resolution: int = 32  # cells per axis of the recorded box
    spacing: float = 10.0  # m; a larger resolution is a larger box
    speed: tuple[float, float] = (1500.0, 4500.0)  # m/s
    frequency: tuple[float, float] = (8.0, 15.0)  # Hz, peak of the wavelet; capped where slow rock demands it
    num_layers: tuple[int, int] = (3, 7)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_trajectories", "num_snapshots", "snapshot_interval", "spacing"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive. Give a larger value.")
        if self.resolution < 8:
            raise ValueError(f"resolution={self.resolution}: fewer than 8 cells per axis. Use 16, 32, 64 or 128.")
        for name in ("speed", "frequency", "num_layers"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}={(low, high)}: not an ascending range above 0. Write [low, high].")
        if self.highest_frequency(self.speed[0]) < self.frequency[0]:
            raise ValueError(
                f"frequency={self.frequency}: {self.frequency[0]} Hz at {self.speed[0]} m/s is under-resolved. "
                f"Use spacing <= {self.spacing * self.highest_frequency(self.speed[0]) / self.frequency[0]:.3g} m."
            )

    def highest_frequency(self, slowest: float) -> float:
        """The highest peak frequency [Hz] that the grid resolves where sound travels at ``slowest`` m/s."""
        return slowest / (2 * CELLS_PER_WAVELENGTH * self.spacing)

    @property
    def steps_per_snapshot(self) -> int:
        stable = COURANT * self.spacing / (math.sqrt(3) * self.speed[1])
        return math.ceil(self.snapshot_interval / min(stable, LARGEST_STEP) * (1 - 1e-9))

    @property
    def window(self) -> float:
        """Length of the recording [s]."""
        return self.num_snapshots * self.snapshot_interval

    @property
    def num_silent_intervals(self) -> int:
        """Snapshot intervals before the recording: the wavelet's onset and its way from the margin into the box."""
        flight = (self.resolution / 2 + MARGIN) * self.spacing / math.sqrt(self.speed[0] * self.speed[1])
        return math.ceil((ONSET / self.frequency[0] + flight) / self.snapshot_interval)

    @property
    def solver(self) -> "Solver":
        return Solver(
            spacing=self.spacing,
            time_step=self.snapshot_interval / self.steps_per_snapshot,
            steps_per_observation=self.steps_per_snapshot,
            fastest=self.speed[1],
            frequency=math.sqrt(self.frequency[0] * self.frequency[1]),
        )


@dataclass(frozen=True, kw_only=True)
class Solver:
    """How a wave is stepped. All shots share it, so a shot's result does not depend on its batch."""

    spacing: float  # m
    time_step: float  # s
    steps_per_observation: int
    fastest: float  # m/s, bounds every wave speed
    frequency: float  # Hz, where the absorbing layer works best
    space_order: Literal[2, 4, 6, 8] = 4


class Sources(NamedTuple):
    """Point sources s(x, t) = amplitude(t) · delta(x - x_s), of each shot; sample n holds time n · time_step."""

    location: Int[Tensor, "b s 3"]  # cell
    amplitude: Float[Tensor, "b s t"]


class Observation(NamedTuple):
    """The wave at one time, second-order accurate in the time step."""

    time: float  # s
    potential: Float[Tensor, "b x y z"]
    pressure: Float[Tensor, "b x y z"]  # -phi_t, per unit density


class Shot(NamedTuple):
    """One drawn trajectory on the simulated box, recorded box and margin."""

    wave_speed: np.ndarray  # float32 (x, y, z) [m/s]
    frequency: float  # Hz
    location: np.ndarray  # int64 (MAX_SOURCES, 3)
    amplitude: np.ndarray  # float32 (MAX_SOURCES, steps); absent sources are silent


def simulate(
    config: AcousticsConfig,
    indices: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Trajectory]]:
    """Trajectories ``indices``, each decided by (config.seed, index) alone.

    Raises RuntimeError naming the trajectory and the time if a wave is not finite.
    """
    simulated_cells = (config.resolution + 2 * (MARGIN + ABSORBING_CELLS)) ** 3
    batch_size = max(1, CELLS_PER_BATCH // simulated_cells)
    for first in range(0, len(indices), batch_size):
        batch = indices[first : first + batch_size]
        yield from _simulate_batch(config, batch, torch.device(device), progress)


def total_work(config: AcousticsConfig, num: int) -> int:
    """What the arguments of ``progress`` sum up to over ``num`` trajectories: their snapshot intervals."""
    return num * (config.num_silent_intervals + config.num_snapshots)


def propagate(
    wave_speed: Float[Tensor, "b x y z"], sources: Sources, solver: Solver, observe: Callable[[Observation], None]
) -> None:
    """Step the wave from rest through ``sources``, handing ``observe`` the model region every so many steps.

    Two successive potentials give their mean and, by difference, the pressure, both centred half a step before the
    later one: observation k is at time (k · steps_per_observation - 1/2) · time_step, k = 1, 2, ...
    """
    cell_volume = solver.spacing**3

    def hand_over(state: deepwave.CallbackState) -> None:
        if state.step == 0:
            return
        if state.internal_dt != state.dt:
            stable = state.internal_dt
            raise ValueError(f"time_step={solver.time_step}: unstable on this grid. Use at most {stable:.3g} s.")
        now, before = state.get_wavefield("wavefield_0", mode="read"), state.get_wavefield("wavefield_m1", mode="read")
        time = state.time - solver.time_step / 2
        observe(Observation(time, (now + before) / 2, (before - now) / solver.time_step))

    with torch.no_grad():
        deepwave.scalar(
            wave_speed,
            solver.spacing,
            solver.time_step,
            source_amplitudes=-sources.amplitude / cell_volume,  # deepwave has its source on the left-hand side
            source_locations=sources.location,
            accuracy=solver.space_order,
            pml_width=ABSORBING_CELLS,
            pml_freq=solver.frequency,
            max_vel=solver.fastest,
            forward_callback=hand_over,
            callback_frequency=solver.steps_per_observation,
            check_output_finite=False,  # checked at every observation, where trajectory and time are known
        )


def ricker(time: np.ndarray, frequency: float) -> np.ndarray:
    """The Ricker wavelet (1 - 2 a) exp(-a), a = (pi f t)^2, centred at time 0, peak 1."""
    a = (math.pi * frequency * time) ** 2
    return (1 - 2 * a) * np.exp(-a)


def draw_shot(config: AcousticsConfig, index: int) -> Shot:
    """Wave speed, frequency and sources of trajectory ``index``, from (config.seed, index) alone."""
    rng = np.random.default_rng([config.seed, index])
    wave_speed = draw_wave_speed(config, rng)
    low, high = config.frequency
    frequency = rng.uniform(low, max(low, min(high, config.highest_frequency(float(wave_speed.min())))))
    num_sources = int(rng.integers(1, MAX_SOURCES + 1))
    location = _draw_locations(config, rng)
    num_steps = (config.num_silent_intervals + config.num_snapshots) * config.steps_per_snapshot + 1
    time = np.arange(num_steps) * config.solver.time_step
    amplitude = np.zeros((MAX_SOURCES, num_steps), np.float32)
    for source in range(num_sources):
        share = (source + rng.uniform(0.4, 0.9)) / num_sources
        arrival = config.num_silent_intervals * config.snapshot_interval + share * config.window
        distance, flight = _path_to_middle(wave_speed, location[source], config.spacing)
        peak = max(arrival - flight, ONSET / frequency)
        strength = WAVE_AMPLITUDE * 4 * math.pi * distance * rng.uniform(0.5, 1.0) * rng.choice([-1, 1])
        amplitude[source] = strength * ricker(time - peak, frequency)
    return Shot(wave_speed, frequency, location, amplitude)


def draw_wave_speed(config: AcousticsConfig, rng: np.random.Generator) -> np.ndarray:
    """Gently curved layers, faster with depth on the whole, cut by up to two faults; float32 (x, y, z) [m/s].

    A cell that an interface crosses gets the volume mean of the compressibility 1 / c^2.
    """
    cells = config.resolution + 2 * MARGIN
    x, y, z = np.meshgrid(*[(np.arange(cells) + 0.5) / cells] * 3, indexing="ij")
    depth = z + _fault_throw(x, y, z, rng)
    num_layers = int(rng.integers(config.num_layers[0], config.num_layers[1] + 1))
    speeds = _layer_speeds(config.speed, num_layers, rng)
    thickness = rng.uniform(0.5, 1.5, num_layers)
    interfaces = np.cumsum(thickness)[:-1] / thickness.sum()
    fold, fading = _fold(x, y, rng), rng.uniform()
    compressibility = np.full_like(z, speeds[0] ** -2)
    for upper, lower, interface in zip(speeds[:-1], speeds[1:], interfaces, strict=True):
        below = np.clip((depth - interface - fold * (1 - fading * interface)) * cells + 0.5, 0, 1)
        compressibility += below * (lower**-2 - upper**-2)
    return (compressibility**-0.5).clip(*config.speed).astype(np.float32)


def _layer_speeds(limits: tuple[float, float], num_layers: int, rng: np.random.Generator) -> np.ndarray:
    low, high = limits
    top, bottom = low + (high - low) * rng.uniform([0.0, 0.5], [0.5, 1.0])
    scatter = 0.1 * (high - low) * rng.standard_normal(num_layers)
    return (np.linspace(top, bottom, num_layers) + scatter).clip(low, high)


def _fold(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A smooth undulation of a few percent of the box."""
    fold = np.zeros_like(x)
    for _ in range(3):
        wave_x, wave_y = rng.uniform(-1.5, 1.5, 2)
        fold += 0.04 * rng.standard_normal() * np.cos(2 * math.pi * (wave_x * x + wave_y * y + rng.uniform()))
    return fold


def _fault_throw(x: np.ndarray, y: np.ndarray, z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How far rock has slipped along up to two steep planes of random strike, as a share of the box."""
    throw = np.zeros_like(x)
    for _ in range(rng.integers(0, 3)):
        strike, dip = rng.uniform(0, 2 * math.pi), rng.uniform(math.radians(50), math.radians(85))
        along = math.cos(strike) * (x - rng.uniform(0.3, 0.7)) + math.sin(strike) * (y - rng.uniform(0.3, 0.7))
        throw += np.where(along * math.tan(dip) > z - 0.5, rng.uniform(-0.15, 0.15), 0.0)
    return throw


def _draw_locations(config: AcousticsConfig, rng: np.random.Generator) -> np.ndarray:
    """Cells in the margin, each right beyond another side of the recorded box, so no two coincide."""
    last = config.resolution + 2 * MARGIN - 1
    location = rng.integers(MARGIN, last + 1 - MARGIN, (MAX_SOURCES, 3))
    sides = rng.permutation(6)[:MAX_SOURCES]
    for source, (axis, upper) in enumerate(zip(sides % 3, sides // 3, strict=True)):
        from_edge = MARGIN - rng.integers(SOURCE_DISTANCE[0], SOURCE_DISTANCE[1] + 1)
        location[source, axis] = last - from_edge if upper else from_edge
    return location


def _path_to_middle(wave_speed: np.ndarray, location: np.ndarray, spacing: float) -> tuple[float, float]:
    """Length [m] and travel time [s] of the straight ray from a cell to the middle of the box."""
    middle = (np.array(wave_speed.shape) - 1) / 2
    distance = float(np.linalg.norm(middle - location)) * spacing
    points = np.rint(location + np.linspace(0, 1, 64)[:, None] * (middle - location)).astype(int)
    return distance, distance * float((1 / wave_speed[tuple(points.T)]).mean())


def _simulate_batch(
    config: AcousticsConfig, batch: Sequence[int], device: torch.device, progress: Callable[[int], None] | None
) -> Iterator[tuple[int, Trajectory]]:
    shots = [draw_shot(config, index) for index in batch]
    inside = slice(MARGIN, MARGIN + config.resolution)
    with_ghosts = slice(MARGIN - 1, MARGIN + config.resolution)
    times: list[float] = []
    velocities: list[np.ndarray] = []
    pressures: list[np.ndarray] = []
    start = (config.num_silent_intervals + 0.5) * config.snapshot_interval

    def record(wave: Observation) -> None:
        _refuse_non_finite(wave, batch)
        if wave.time > start:
            times.append(wave.time)
            velocities.append(_circulation(wave.potential[:, with_ghosts, with_ghosts, with_ghosts]).cpu().numpy())
            pressures.append((wave.pressure[:, inside, inside, inside] * TIME_UNIT).cpu().numpy())
        if progress is not None:
            progress(len(batch))

    sources = Sources(
        torch.from_numpy(np.stack([shot.location for shot in shots])).to(device),
        torch.from_numpy(np.stack([shot.amplitude for shot in shots])).to(device),
    )
    wave_speed = torch.from_numpy(np.stack([shot.wave_speed for shot in shots])).to(device)
    propagate(wave_speed, sources, config.solver, record)
    n, h = config.resolution, config.spacing
    grid = Grid(shape=(n, n, n), spacing=(h, h, h), boundary=DOMAIN.boundary)
    for b, (index, shot) in enumerate(zip(batch, shots, strict=True)):
        yield (
            index,
            Trajectory(
                velocity=np.stack([velocity[b] for velocity in velocities]),
                pressure=np.stack([pressure[b] for pressure in pressures]),
                medium=shot.wave_speed[inside, inside, inside].copy(),
                time=np.array(times),
                parameters={"dt": config.snapshot_interval / TIME_UNIT, "frequency": shot.frequency * TIME_UNIT},
                seed=config.seed,
                grid=grid,
            ),
        )


def _circulation(potential: Float[Tensor, "b x y z"]) -> Float[Tensor, "b 3 x-1 y-1 z-1"]:
    """Exact differences of the snapped potential, which comes with a layer of ghost cells below each axis."""
    b = len(potential)
    none = torch.zeros(b, 3, 1, 1, 1, device=potential.device)
    snapped = snap_potentials(Potentials(none, potential, none.new_zeros(b, 3))).scalar
    return gradient_of_cells(snapped, DOMAIN.boundary)[..., 1:, 1:, 1:].contiguous()


def _refuse_non_finite(wave: Observation, batch: Sequence[int]) -> None:
    finite = torch.isfinite(wave.pressure).flatten(1).all(1).tolist()
    if not all(finite):
        raise RuntimeError(f"trajectory {batch[finite.index(False)]}: the wave is not finite at {wave.time:.4g} s.")
