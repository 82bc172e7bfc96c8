"""Sound through drawn rock in 3-D (``data.simulate.rock``), recorded in a box that waves from outside keep crossing.

    (1 / c^2) phi_tt = laplace(phi) + s(x, t),    p = -rho phi_t,    v = grad phi

for a velocity potential phi in a fluid of constant density: particle velocity is a gradient and has no curl. The box is
cut out of a larger one whose margin holds the sources, inside absorbing layers; within the box the equation is
homogeneous, and what enters it enters through its faces.

Fields are nondimensional (the equation is linear, so the potential's scale is free): the potential such that the direct
wave of a source has an amplitude of 0.5 to 1 times `WAVE_AMPLITUDE` in the middle of the box, circulation in units of
the potential, time in `TIME_UNIT`, pressure in rho · potential / `TIME_UNIT`. Wave speed stays in m/s. Axis z is depth.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.layout import Trajectory
from data.simulate.forecast import Forecast
from data.simulate.rock import Medium, RockRanges, draw_rock, torus_edge
from data.simulate.wave import ABSORBING_CELLS, Observation, Solver, Sources, propagate, ricker
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
CELLS_PER_WAVELENGTH = 7  # at least, in the slowest rock at twice the peak frequency (97 % of the energy of p is below)
LARGEST_STEP = 1e-3  # s
COURANT = 0.59  # c dt sqrt(3) / h; deepwave would subdivide steps from 0.6 on
ONSET = 1.2  # peak periods from the start of a Ricker wavelet (2e-5 of its peak) to its peak
MAX_SOURCES = 3
CELLS_PER_BATCH = 2**22
DOMAIN_ARRAYS = 4  # stored per snapshot: three of circulation, one of pressure
SECONDS_PER_CELL_STEP = 1.3e-8  # measured: 1.2e-8 to 1.6e-8 at 32^3 and 64^3 on a busy core
BYTES_STEPPING, BYTES_DRAWING = 70, 40  # per simulated cell


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
    media: tuple[Medium, ...] = ("folded",)  # each trajectory draws one
    correlation_length: tuple[float, float] = (30.0, 120.0)  # m, of random media
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_trajectories", "num_snapshots", "snapshot_interval", "spacing"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive and finite. Change it.")
        if self.resolution < 8:
            raise ValueError(f"resolution={self.resolution}: fewer than 8 cells per axis. Use 16, 32, 64 or 128.")
        if not self.media:
            raise ValueError(
                "media=(): no rock to draw. Name at least one of layered, curved, faulted, folded, random."
            )
        for name in ("speed", "frequency", "num_layers", "correlation_length"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name}={(low, high)}: not an ascending range above 0. Write [low, high].")
        rock = self.rock_cells * self.spacing
        if "random" in self.media and self.correlation_length[1] > rock:
            raise ValueError(
                f"correlation_length={self.correlation_length}: longer than the rock of {rock:g} m. Take less."
            )
        if self.highest_frequency(self.speed[0]) < self.frequency[0]:
            raise ValueError(
                f"frequency={self.frequency}: {self.frequency[0]} Hz at {self.speed[0]} m/s is under-resolved. "
                f"Use spacing <= {self.spacing * self.highest_frequency(self.speed[0]) / self.frequency[0]:.3g} m."
            )

    def highest_frequency(self, slowest: float) -> float:
        """The highest peak frequency [Hz] that the grid resolves where sound travels at ``slowest`` m/s."""
        return slowest / (2 * CELLS_PER_WAVELENGTH * self.spacing)

    @property
    def rock_cells(self) -> int:
        """Per axis of the recorded box and its margin."""
        return self.resolution + 2 * MARGIN

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
    def simulated_cells(self) -> int:
        """Of one trajectory: box, margin and absorbing layers."""
        return (self.rock_cells + 2 * ABSORBING_CELLS) ** 3

    @property
    def batch_size(self) -> int:
        """Trajectories simulated at once."""
        return max(1, min(CELLS_PER_BATCH // self.simulated_cells, self.num_trajectories))

    @property
    def solver(self) -> Solver:
        return Solver(
            spacing=self.spacing,
            time_step=self.snapshot_interval / self.steps_per_snapshot,
            steps_per_observation=self.steps_per_snapshot,
            fastest=self.speed[1],
            frequency=math.sqrt(self.frequency[0] * self.frequency[1]),
        )


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
    for first in range(0, len(indices), config.batch_size):
        batch = indices[first : first + config.batch_size]
        yield from _simulate_batch(config, batch, torch.device(device), progress)


def total_work(config: AcousticsConfig, num: int) -> int:
    """What the arguments of ``progress`` sum up to over ``num`` trajectories: their snapshot intervals."""
    return num * (config.num_silent_intervals + config.num_snapshots)


def forecast(config: AcousticsConfig) -> Forecast:
    """What a trajectory will cost on one CPU core, from runs at 16^3 to 128^3 (see data/cards/fwi.md)."""
    steps = total_work(config, 1) * config.steps_per_snapshot
    stored = 4 * config.num_snapshots * (DOMAIN_ARRAYS * config.resolution**3)
    one_at_a_time = BYTES_DRAWING * max(config.simulated_cells, _largest_torus(config))
    together = config.batch_size * (stored + BYTES_STEPPING * config.simulated_cells)
    return Forecast(SECONDS_PER_CELL_STEP * config.simulated_cells * steps, one_at_a_time + together)


def _largest_torus(config: AcousticsConfig) -> int:
    """Cells of the largest torus that random rock is drawn on; 0 where none is."""
    if "random" not in config.media:
        return 0
    return torus_edge(config.rock_cells, config.correlation_length[1] / config.spacing) ** 3


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
    """Rock of one of ``config.media``, in the recorded box and its margin; float32 (x, y, z) [m/s]."""
    medium = config.media[0] if len(config.media) == 1 else config.media[int(rng.integers(len(config.media)))]
    shortest, longest = config.correlation_length
    lengths = (shortest / config.spacing, longest / config.spacing)
    return draw_rock(medium, config.rock_cells, RockRanges(config.speed, config.num_layers, lengths), rng)


def _draw_locations(config: AcousticsConfig, rng: np.random.Generator) -> np.ndarray:
    """Cells in the margin, each right beyond another side of the recorded box, so no two coincide."""
    last = config.rock_cells - 1
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
    n, h = config.resolution, config.spacing
    times: list[float] = []
    velocity = np.empty((len(batch), config.num_snapshots, 3, n, n, n), np.float32)
    pressure = np.empty((len(batch), config.num_snapshots, n, n, n), np.float32)
    start = (config.num_silent_intervals + 0.5) * config.snapshot_interval

    def record(wave: Observation) -> None:
        _refuse_non_finite(wave, batch)
        if wave.time > start:
            velocity[:, len(times)] = _circulation(wave.potential[:, with_ghosts, with_ghosts, with_ghosts]).cpu()
            pressure[:, len(times)] = (wave.pressure[:, inside, inside, inside] * TIME_UNIT).cpu()
            times.append(wave.time)
        if progress is not None:
            progress(len(batch))

    sources = Sources(
        torch.from_numpy(np.stack([shot.location for shot in shots])).to(device),
        torch.from_numpy(np.stack([shot.amplitude for shot in shots])).to(device),
    )
    wave_speed = torch.from_numpy(np.stack([shot.wave_speed for shot in shots])).to(device)
    propagate(wave_speed, sources, config.solver, record)
    grid = Grid(shape=(n, n, n), spacing=(h, h, h), boundary=DOMAIN.boundary)
    for b, (index, shot) in enumerate(zip(batch, shots, strict=True)):
        yield (
            index,
            Trajectory(
                velocity=velocity[b],
                pressure=pressure[b],
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
