"""Flow through porous rock: unsteady incompressible Navier-Stokes between solid grains, driven by a pulsating force.

    du/dt + div(u u) = -grad p + viscosity lap u + f0 (1 + amplitude sin(2 pi frequency t + phase)) e_x,   div u = 0

in a periodic unit box, u = 0 on the grains. With the pores' hydraulic radius l = pore volume / wetted area, the force
is f0 = viscosity / (2 l)^2: velocity comes in units of f0 (2 l)^2 / viscosity, O(0.1) on average and O(1) in throats.

Rocks: Gaussian blobs, porespy's or our own, packs of spheres, or crops of segmented micro-CT images continued by their
mirror image. The time step is in porous_flow.py; permeabilities come from stokes.py.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data.layout import Trajectory
from data.simulate.forecast import Forecast, interpolate_cost
from data.simulate.micro_ct import draw_crop, mirror, open_source
from data.simulate.pore_space import (
    draw_blobs,
    draw_gaussian,
    draw_percolating,
    draw_sphere_pack,
    place_spheres,
    read_sphere_pack,
)
from data.simulate.porous_flow import PERIODIC, Rock, State, advance, prepare_rock, project, rest
from data.simulate.stokes_system import Walls
from shodh.fields import DomainSpec, FieldSpec, Grid

DOMAIN = DomainSpec(
    name="porous_media",
    velocity_space="solenoidal",
    boundary=PERIODIC,
    velocity=FieldSpec(name="flux", units="1", location="face", long_name="volume flux through lower faces"),
    pressure=FieldSpec(name="pressure", units="1", location="cell", long_name="kinematic pressure, 0 in the solid"),
    medium=FieldSpec(name="pore_space", units="1", location="cell", long_name="1 in pores, 0 in the solid"),
    parameters=("dt", "viscosity", "frequency", "porosity"),
)

STEP_PER_CELL = 0.6  # time step / cell size: Courant number 0.6 at unit velocity
STORED_TOLERANCE = 1e-8  # below FP32 round-off, for stored snapshots (in FP64)
GPU_CELLS_PER_BATCH = 2**21  # one trajectory at 128^3: its bits do not depend on where a run was interrupted

STEP_SECONDS = {16**3: 5.1e-7, 32**3: 2.6e-7, 64**3: 2.4e-7, 128**3: 4.1e-7}  # of one core, per cell, by cells
WORKING_BYTES = 600  # per cell: state, operators and their temporaries, and the same in FP64 while a snapshot is stored
SNAPSHOT_BYTES = 32  # per cell: four FP32 fields, twice while they are put together
FIXED_BYTES = 100_000_000  # porespy and what it imports, beyond the libraries that every simulator needs
SLICE_BYTES = 8  # per voxel of a slice of a micro-CT image: of a crop, one whole slice is read at a time

STEPS_PER_PERIOD = 20  # least of the force: the second-order steps then err by about (2 pi / 20)^2 / 3 = 3 % of it
SNAPSHOTS_PER_PERIOD = 2  # more than these, or the snapshots show a slower force than there is
CELL_REYNOLDS = 10.0  # most of unit velocity, cell size / viscosity: what faster flow errs is in the card
CELLS_PER_SPHERE = 3.0  # least


@dataclass(frozen=True, kw_only=True)
class PorousMediaConfig:
    """Which rocks and flows to simulate; ranges are drawn from per trajectory, uniformly (viscosity: log-uniformly)."""

    num_trajectories: int = 24
    num_snapshots: int = 25
    snapshot_interval: float = 0.2  # in units of box length / velocity
    resolution: int = 32  # cells per axis
    seed: int = 0
    spin_up: float = 2.0  # simulated from rest before the first snapshot
    geometry: Literal["blobs", "gaussian", "spheres", "micro_ct"] = "blobs"  # blobs: porespy's; gaussian: without it
    porosity: tuple[float, float] = (0.45, 0.7)  # of all that is drawn, before unconnected pores are filled
    blobiness: tuple[float, float] = (0.3, 0.5)  # as porespy counts it; grains are about box / (9 blobiness) wide
    diameter: tuple[float, float] = (0.25, 0.4)  # of drawn spheres, per box
    source: str | None = None  # micro_ct: an ingested image; spheres: a pack to use instead of drawing one
    viscosity: tuple[float, float] = (0.01, 0.04)
    frequency: tuple[float, float] = (0.3, 0.5)
    amplitude: tuple[float, float] = (0.6, 1.1)  # of the pulsation, relative to the mean force

    def __post_init__(self) -> None:
        for name in ("num_trajectories", "num_snapshots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1. Raise it.")
        if self.resolution < 8:
            raise ValueError(f"resolution={self.resolution}: pores would be narrower than 2 cells. Use 8 or more.")
        if not 0 < self.snapshot_interval < math.inf:
            raise ValueError(f"snapshot_interval={self.snapshot_interval}: must be positive and finite. Change it.")
        if not 0 <= self.spin_up < math.inf:
            raise ValueError(f"spin_up={self.spin_up}: must be finite, not negative. Use 0 to record from rest.")
        for name in ("porosity", "blobiness", "diameter", "viscosity", "frequency", "amplitude"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name}={low, high}: not a range of positive values. Write it as [low, high].")
        self._require_geometry()
        self._require_resolved_flow()

    def _require_geometry(self) -> None:
        if self.porosity[1] >= 1:
            raise ValueError(f"porosity={self.porosity}: without grains the flow accelerates for ever. Stay below 1.")
        if self.diameter[1] > 0.5:
            raise ValueError(f"diameter={self.diameter}: a sphere would meet its own image. Stay at or below 0.5.")
        drawn = self.geometry == "spheres" and self.source is None
        if drawn and self.diameter[0] * self.resolution < CELLS_PER_SPHERE:
            raise ValueError(
                f"diameter={self.diameter}: less than {CELLS_PER_SPHERE:g} of {self.resolution} cells. "
                f"Take {CELLS_PER_SPHERE / self.resolution:.2g} or more, or a larger resolution."
            )
        if self.geometry == "micro_ct" and self.source is None:
            raise ValueError("source=None: micro_ct needs an image. Name a store that ingest_data digital_rocks wrote.")
        if self.geometry in ("blobs", "gaussian") and self.source is not None:
            raise ValueError(f"source={self.source}: {self.geometry} are drawn, not read. Set geometry or drop it.")
        if self.geometry == "micro_ct" and self.resolution % 2:
            raise ValueError(f"resolution={self.resolution}: half of it is mirrored. Use an even number.")

    def _require_resolved_flow(self) -> None:
        fastest = 1 / (STEPS_PER_PERIOD * self.snapshot_interval / self.num_steps)
        if self.frequency[1] > fastest:
            raise ValueError(
                f"frequency={self.frequency}: fewer than {STEPS_PER_PERIOD} time steps a period. "
                f"Take {fastest:.3g} or less, or a larger resolution."
            )
        if self.frequency[1] * self.snapshot_interval * SNAPSHOTS_PER_PERIOD >= 1:
            raise ValueError(
                f"frequency={self.frequency}: {SNAPSHOTS_PER_PERIOD} snapshots a period or fewer do not show it. "
                f"Stay below {1 / (SNAPSHOTS_PER_PERIOD * self.snapshot_interval):.3g}, or lower snapshot_interval."
            )
        if self.viscosity[0] * self.resolution * CELL_REYNOLDS < 1:
            raise ValueError(
                f"viscosity={self.viscosity}: {self.resolution} cells do not hold the layers at the grains. "
                f"Take {1 / (self.resolution * CELL_REYNOLDS):.2g} or more, or a larger resolution."
            )

    @property
    def grid(self) -> Grid:
        n, size = self.resolution, 1 / self.resolution
        return Grid(shape=(n, n, n), spacing=(size, size, size), boundary=PERIODIC)

    @property
    def walls(self) -> Walls:
        """Voxels of an image are its grains; those of blobs and spheres stand for smooth ones."""
        return "voxel" if self.geometry == "micro_ct" else "smooth"

    @property
    def num_steps(self) -> int:
        """Time steps from one snapshot to the next."""
        return math.ceil(self.snapshot_interval * self.resolution / STEP_PER_CELL)

    @property
    def num_spin_up(self) -> int:
        """Snapshot intervals before the first snapshot."""
        return math.ceil(self.spin_up / self.snapshot_interval)


class Forcing(NamedTuple):
    """Fluid and driving force of each trajectory of a batch; FP64, so that parameters are stored as drawn."""

    viscosity: Float[Tensor, "b"]
    strength: Float[Tensor, "b"]  # f0
    amplitude: Float[Tensor, "b"]
    frequency: Float[Tensor, "b"]
    phase: Float[Tensor, "b"]

    def at(self, time: float) -> Float[Tensor, "b"]:
        """Body force along x."""
        return self.strength * (1 + self.amplitude * torch.sin(2 * math.pi * self.frequency * time + self.phase))


def simulate(
    config: PorousMediaConfig,
    indices: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Trajectory]]:
    """Each wanted trajectory with its index; trajectory i depends only on (config, i): on a CPU, which takes them one
    by one, to the last bit, on CUDA to round-off, as sums over a batch depend on its size.

    ``progress(k)`` is called after every k of the ``total_work(config, len(indices))`` units. Raises RuntimeError where
    a solution blows up or no rock percolates, ValueError where ``source`` cannot be used.
    """
    device = torch.device(device)
    size = 1 if device.type == "cpu" else max(1, GPU_CELLS_PER_BATCH // config.resolution**3)
    for start in range(0, len(indices), size):
        batch = indices[start : start + size]
        pores, forcings = zip(*(_draw_case(config, index) for index in batch), strict=True)
        forcing = Forcing(*torch.tensor(forcings, dtype=torch.float64, device=device).unbind(1))
        rock = prepare_rock(torch.from_numpy(np.stack(pores)).to(device), walls=config.walls)
        state = rest(rock)
        velocity, pressure = [], []
        for k in range(-config.num_spin_up, config.num_snapshots):
            if k >= 0:
                velocity.append(_stored_flux(state.velocity, rock))
                pressure.append(state.pressure.cpu().numpy())
            if k + 1 < config.num_snapshots:
                state = _advance_interval(state, rock, forcing, config, k)
                _refuse_blow_up(state, batch, (k + 1) * config.snapshot_interval)
            if progress:
                progress(len(batch))
        for b, index in enumerate(batch):
            yield (
                index,
                Trajectory(
                    velocity=np.stack([snapshot[b] for snapshot in velocity]),
                    pressure=np.stack([snapshot[b] for snapshot in pressure]),
                    medium=pores[b].astype(np.float32),
                    time=np.arange(config.num_snapshots) * config.snapshot_interval,
                    parameters={
                        "dt": config.snapshot_interval,
                        "viscosity": float(forcing.viscosity[b]),
                        "frequency": float(forcing.frequency[b]),
                        "porosity": float(pores[b].mean()),
                    },
                    seed=config.seed,
                    grid=config.grid,
                ),
            )


def total_work(config: PorousMediaConfig, num: int) -> int:
    """Units of work, one per trajectory and snapshot interval, in ``num`` trajectories."""
    return num * (config.num_spin_up + config.num_snapshots)


def forecast(config: PorousMediaConfig) -> Forecast:
    """Time and memory, as data/cards/porous_media.md measured them. Raises ValueError where ``source`` is unusable."""
    cells = config.resolution**3
    num_steps = (config.num_spin_up + config.num_snapshots - 1) * config.num_steps
    cuda_batch = min(config.num_trajectories, max(1, GPU_CELLS_PER_BATCH // cells)) * cells
    image = 0
    if config.geometry == "micro_ct":
        _, rows, columns = open_source(config.source or "").shape
        image = SLICE_BYTES * rows * columns
    return Forecast(
        seconds_per_trajectory=num_steps * cells * interpolate_cost(cells, STEP_SECONDS),
        peak_bytes=cells * (WORKING_BYTES + SNAPSHOT_BYTES * config.num_snapshots) + image + FIXED_BYTES,
        cuda_bytes=cuda_batch * WORKING_BYTES,
        cuda_host_bytes=SNAPSHOT_BYTES // 2 * config.num_snapshots * (cuda_batch + cells) + image + FIXED_BYTES,
    )


def draw_pore_space(config: PorousMediaConfig, rng: np.random.Generator) -> Bool[np.ndarray, "x y z"]:
    """One rock, True in pores, of which only what percolates along x is kept; drawn again where nothing does.

    A pack read from a file is moved and turned at random, a crop of an image placed at random.
    """
    if config.geometry == "micro_ct":
        rock = open_source(config.source or "")
        return draw_percolating(
            lambda: mirror(draw_crop(rng, rock, config.resolution // 2)),
            f"source={config.source}",
            "Raise resolution, or ingest the image with its other phase as pore.",
        )
    if config.geometry == "spheres":
        return draw_percolating(
            lambda: place_spheres(_sphere_pack(config, rng), config.resolution),
            f"source={config.source}" if config.source else f"porosity={config.porosity}",
            "Raise resolution or porosity.",
        )
    draw = draw_blobs if config.geometry == "blobs" else draw_gaussian
    return draw_percolating(
        lambda: draw(rng, config.resolution, config.porosity, config.blobiness),
        f"porosity={config.porosity}",
        "Raise it.",
    )


def _sphere_pack(config: PorousMediaConfig, rng: np.random.Generator) -> Float[np.ndarray, "n 4"]:
    if config.source is None:
        return draw_sphere_pack(rng, config.porosity, config.diameter)
    spheres = read_sphere_pack(config.source)
    centre = (spheres[:, rng.permutation(3)] + rng.uniform(size=3)) % 1
    return np.column_stack([centre, spheres[:, 3]])


def _draw_case(config: PorousMediaConfig, index: int) -> tuple[np.ndarray, tuple[float, ...]]:
    """Pore space, and the values of ``Forcing``, of one trajectory."""
    rng = np.random.default_rng([config.seed, index])
    pore = draw_pore_space(config, rng)
    viscosity = float(np.exp(rng.uniform(*np.log(config.viscosity))))
    wetted = sum(np.count_nonzero(pore ^ np.roll(pore, 1, axis)) for axis in range(3))
    hydraulic_radius = np.count_nonzero(pore) / (wetted * config.resolution)
    strength = viscosity / (2 * hydraulic_radius) ** 2
    amplitude, frequency = rng.uniform(*config.amplitude), rng.uniform(*config.frequency)
    return pore, (viscosity, strength, amplitude, frequency, rng.uniform(0, 2 * math.pi))


def _advance_interval(state: State, rock: Rock, forcing: Forcing, config: PorousMediaConfig, interval: int) -> State:
    step = config.snapshot_interval / config.num_steps
    for k in range(1, config.num_steps + 1):
        time = interval * config.snapshot_interval + k * step
        state = advance(state, rock, forcing.viscosity, forcing.at(time), step)
    return state


def _stored_flux(velocity: Float[Tensor, "b 3 x y z"], rock: Rock) -> np.ndarray:
    """Flux u * area in FP32, its divergence removed in FP64 to below FP32 round-off."""
    exact = Rock(*(part.double() for part in rock))
    flux = project(velocity.double(), exact, STORED_TOLERANCE)[0] / velocity.shape[-3] ** 2
    return flux.float().cpu().numpy()


def _refuse_blow_up(state: State, indices: Sequence[int], time: float) -> None:
    finite = torch.isfinite(state.velocity).flatten(1).all(1)
    if not bool(finite.all()):
        lost = indices[int(torch.nonzero(~finite)[0])]
        raise RuntimeError(f"trajectory {lost} blew up before time {time:g}: raise viscosity or resolution.")
