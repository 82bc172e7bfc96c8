"""Cut-outs of the Johns Hopkins Turbulence Databases: HDF5, a trajectory a file, collocated points on faces' corners.

New service: /Velocity_0001 (z, y, x, 3), /Pressure_0001 (z, y, x, 1), xcoor, ycoor, zcoor. Older: /u01000, /p01000 with
_start and _size in (t, x, y, z), no coordinates; its names count steps of the simulation, 10 a stored state, its _start
counts stored states. Readers disagree on the order of axes, so it is not believed: of the orders that fit
the coordinates' lengths, the one with the least divergence is taken, and none where that does not decide.
Points become corners of cells (n points along an open axis give n - 1 cells), so that fluxes are means between points.
Source: Li et al., J. Turbulence 9 (2008) N31; Graham et al., J. Turbulence 17 (2016) 181 (channel).
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import h5py
import numpy as np

from data.ingest.flow import Flow, FlowConfig, Snapshot, make_domain, write_flow
from data.ingest.projection import divergence_share, means_between_points, project_open_flux
from data.ingest.source import (
    Say,
    find_files,
    names_in,
    open_hdf5,
    read_part,
    refuse_outliers,
    require_dataset,
    require_finite,
    spacing_of,
    verify_files,
)
from data.writer import WrittenStore
from shodh.config import ConfigError
from shodh.fields import Boundary, Grid, Spacing

AXES = ("x", "y", "z")
MIN_POINTS = 5  # of a cubic spline and a central difference
MAX_DIVERGENCE = 0.3  # of the gradient; resolved turbulence has some 0.02, components of the wrong axes 0.4 to 0.6
BLOCK = 96  # points a side of the middle block in which divergence is measured
CLEARLY = 2.0  # the best order of axes must have so many times less divergence than the next
SPEED_RANGE = 1 / 20, 4.0  # rms of a cut-out over that of the data set, from the viscous sublayer to a strong eddy


class Database(NamedTuple):
    """What JHTDB publishes of one data set, in its own nondimensional units."""

    length: tuple[float, float, float]
    viscosity: float
    time_step: float  # between stored states
    speed: float  # rms velocity, or bulk velocity
    points: int  # along x, for files without coordinates
    walled: bool  # walls at y = -1 and 1


BOX, CHANNEL = (2 * math.pi, 2 * math.pi, 2 * math.pi), (8 * math.pi, 2.0, 3 * math.pi)
DATABASES = {
    "isotropic1024coarse": Database(BOX, 1.85e-4, 0.002, 0.686, 1024, False),
    "isotropic1024fine": Database(BOX, 1.85e-4, 0.0002, 0.686, 1024, False),
    "channel": Database(CHANNEL, 5e-5, 0.0065, 1.0, 2048, True),
}


@dataclass(frozen=True, kw_only=True)
class JHTDBConfig(FlowConfig):
    """Which data set a cut-out is of; ``other`` needs viscosity and time_step, and all its sides are open."""

    dataset: Literal["isotropic1024coarse", "isotropic1024fine", "channel", "other"]
    viscosity: float | None = None
    time_step: float | None = None  # between stored states, whose indices are one apart
    grid: Path | None = None  # HDF5 with x, y, z of the whole data set, for older cut-outs of the channel
    multiple: int = 1  # crop open axes to a multiple of so many cells (8 for the tokenizer)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiple < 1:
            raise ValueError(f"multiple={self.multiple}: must be at least 1. Use 8 for the tokenizer.")
        if self.dataset == "other" and not (self.viscosity and self.time_step):
            raise ValueError("dataset=other: not known here. Give viscosity=VALUE and time_step=VALUE.")

    @property
    def database(self) -> Database | None:
        return DATABASES.get(self.dataset)


class CutOut(NamedTuple):
    """What one file says of itself, checked."""

    path: Path
    names: tuple[tuple[str, str], ...]  # velocity and pressure of each state
    indices: tuple[int, ...]  # of the states among those that the data set stores
    order: str  # which axis each axis of the arrays is, such as zyx
    points: tuple[np.ndarray, np.ndarray, np.ndarray]
    divergence: float  # of the first state, of its gradient


def ingest(source: Path, store: Path, config: JHTDBConfig, say: Say) -> WrittenStore:
    """Write the store of a folder of cut-outs, one trajectory a file."""
    files = find_files(source, (".h5", ".hdf5"))
    provenance = verify_files(files, source, config.unverified, say)
    parts = [inspect_cutout(path, config) for path in files]
    for part in parts:
        say(f"{part.path.name}: axes {part.order}, divergence {part.divergence:.3f} of the gradient")
    grid = make_grid(parts[0], config)
    for part in parts[1:]:
        _require_alike(part, parts[0], make_grid(part, config), grid)
    database = config.database
    step = config.time_step or (database.time_step if database else math.nan)
    viscosity = config.viscosity or (database.viscosity if database else math.nan)
    times = [(np.array(part.indices) - part.indices[0]) * step for part in parts]
    domain = make_domain(store.name, "solenoidal", grid.boundary, parameters=("dt", "viscosity"))
    flow = Flow(
        format="jhtdb",
        domain=domain,
        grid=grid,
        times=times,
        parameters=[{"dt": float(time[1]), "viscosity": viscosity} for time in times],
        read=lambda index, time: read_snapshot(parts[index], time, grid),
        notes={
            "dataset": config.dataset,
            "axes_of_arrays": sorted({part.order for part in parts}),
            "divergence_of_points": [part.divergence for part in parts],
            "corner": [[float(p[0]) for p in part.points] for part in parts],
            "interpolation": "means of cubic splines, Fourier series along periodic axes",
        },
    )
    return write_flow(store, flow, config, provenance, say)


def make_grid(part: CutOut, config: JHTDBConfig) -> Grid:
    """Cells between the points, uniform or stretched; periodic or walled where the cut-out has the whole extent."""
    boundary = _boundary(part, 0, config), _boundary(part, 1, config), _boundary(part, 2, config)
    sizes: list[int] = []
    spacings: list[Spacing] = []
    for axis, points in enumerate(part.points):
        if boundary[axis] == "periodic":
            sizes.append(len(points))
            spacings.append(float(points[-1] - points[0]) / (len(points) - 1))
            continue
        cells = (len(points) - 1) // config.multiple * config.multiple if boundary[axis] == "open" else len(points) - 1
        if cells < MIN_POINTS - 1:
            raise ConfigError(
                f"multiple={config.multiple}: {len(points)} points along {AXES[axis]} are too few. Cut out more."
            )
        widths = np.diff(points[: cells + 1])
        even = float(np.ptp(widths)) < 1e-3 * float(widths.mean())
        sizes.append(cells)
        spacings.append(float(widths.mean()) if even else tuple(float(w) for w in widths))
    return Grid(
        shape=(sizes[0], sizes[1], sizes[2]), spacing=(spacings[0], spacings[1], spacings[2]), boundary=boundary
    )


def read_snapshot(part: CutOut, time: int, grid: Grid) -> Snapshot:
    """One state on the grid: fluxes as means between the points, projected."""
    velocity, pressure = _read_points(part, time)
    keep = tuple(slice(0, n + (b != "periodic")) for n, b in zip(grid.shape, grid.boundary, strict=True))
    points: list[np.ndarray | float] = [
        p[k] if b != "periodic" else 0.0 for p, k, b in zip(part.points, keep, grid.boundary, strict=True)
    ]
    _require_axes(part, time, velocity)
    components = [means_between_points(velocity[i][keep], [a for a in range(3) if a != i], points) for i in range(3)]
    flux, removed = project_open_flux(components, grid)
    cells = means_between_points(pressure[keep], range(3), points)
    return Snapshot(flux, cells.astype(np.float32), {}, removed)


def find_axes(velocity: np.ndarray, points: tuple[np.ndarray, ...], path: Path) -> tuple[str, float]:
    """Which axes the array (., ., ., 3) has, as a word such as zyx, and the divergence that says so.

    Raises ConfigError where no order fits the coordinates' lengths, or divergence does not tell one from the others.
    """
    found = []
    for order in itertools.permutations(range(3)):
        if all(velocity.shape[k] == len(points[axis]) for k, axis in enumerate(order)):
            found.append((_divergence(_in_order(velocity, order), points), "".join(AXES[axis] for axis in order)))
    if not found:
        raise ConfigError(
            f"source={path}: the velocity is {velocity.shape[:3]}, x, y, z have {tuple(map(len, points))} points: axes "
            "are swapped or points are missing. Cut it out again."
        )
    (best, axes), *others = sorted(found)
    if best > MAX_DIVERGENCE:
        raise ConfigError(
            f"source={path}: in every order of axes the divergence is at least {best:.2f} of the gradient. Components "
            "are swapped, or points too far apart: cut out without stride."
        )
    if others and others[0][0] < CLEARLY * best:
        raise ConfigError(
            f"source={path}: axes {axes} and {others[0][1]} have like divergence, {best:.2f} and {others[0][0]:.2f} of "
            "the gradient. Cut out a box with three different lengths."
        )
    return axes, best


def _divergence(velocity: np.ndarray, points: Sequence[np.ndarray]) -> float:
    """Share of the divergence in the gradient, in the middle block."""
    middle = tuple(slice(max(0, (len(p) - BLOCK) // 2), (len(p) + BLOCK) // 2) for p in points)
    return divergence_share(velocity[:, *middle], [p[m] for p, m in zip(points, middle, strict=True)])


def _require_axes(part: CutOut, time: int, velocity: np.ndarray) -> None:
    """ConfigError where a later state does not have the order of axes of the first."""
    share = _divergence(velocity, part.points)
    if share > MAX_DIVERGENCE:
        raise ConfigError(
            f"source={part.path}: with axes {part.order}, those of the first state, {part.names[time][0]} has a "
            f"divergence of {share:.2f} of its gradient. Its axes are swapped: cut it out again."
        )


def inspect_cutout(path: Path, config: JHTDBConfig) -> CutOut:
    """What a file holds and in which order of axes. Raises ConfigError for what is no box, no series or no flow."""
    with open_hdf5(path) as file:
        names, indices = find_states(file, path)
        shape = require_dataset(file, names[0][0], path, ndim=4).shape
        for velocity, pressure in names:
            given = require_dataset(file, velocity, path).shape, require_dataset(file, pressure, path).shape
            if shape[-1] != 3 or given[0] != shape or given[1] not in (shape[:3], (*shape[:3], 1)):
                raise ConfigError(
                    f"source={path}: {velocity} is {given[0]}, {pressure} {given[1]}; must be (z, y, x, 3) and "
                    "(z, y, x, 1)."
                )
        if min(shape[:3]) < MIN_POINTS:
            raise ConfigError(
                f"source={path}: {shape[:3]} points are no box. Cut out at least {MIN_POINTS} along each axis."
            )
        if len(indices) < 2 or len(set(np.diff(indices))) > 1:
            raise ConfigError(f"source={path}: states {indices[:6]} are no even series in time. Cut out two or more.")
        points = _find_points(file, shape, path, config)
        velocity = _read_floats(file, names[0][0], path)
    _require_units(velocity, path, config)
    order, divergence = find_axes(velocity, points, path)
    return CutOut(path, names, indices, order, points, divergence)


def find_states(file: h5py.File, path: Path) -> tuple[tuple[tuple[str, str], ...], tuple[int, ...]]:
    """Names of velocity and pressure per state, and the states' indices in the data set, ascending."""
    found: dict[int, dict[str, str]] = {}
    for name in names_in(file):
        match = re.fullmatch(r"(Velocity_|u|Pressure_|p)(\d+)", name)
        if match:
            kind = "velocity" if match[1] in ("Velocity_", "u") else "pressure"
            found.setdefault(int(match[2]), {})[kind] = name
    if not found:
        there = ", ".join(names_in(file)[:8])
        raise ConfigError(f"source={path}: neither Velocity_0001 nor u00000 (there are: {there}). Check the format.")
    numbers = sorted(found)
    for number in numbers:
        for kind in ("velocity", "pressure"):
            if kind not in found[number]:
                raise ConfigError(f"source={path}: state {number} has no {kind}. Cut out velocity and pressure.")
    names = tuple((found[n]["velocity"], found[n]["pressure"]) for n in numbers)
    return names, _stored_indices(file, numbers, path) if "_start" in file else tuple(numbers)


def _stored_indices(file: h5py.File, numbers: list[int], path: Path) -> tuple[int, ...]:
    """Indices of an older cut-out's states: multiples of them name it, ``_start`` is the first, ``_size`` how many.

    Raises ConfigError where the three contradict one another. From index 0 on no multiple can be told: one apart then.
    """
    start, num = (int(require_dataset(file, name, path, ndim=1)[0]) for name in ("_start", "_size"))
    multiple = numbers[0] // start if start > 0 else max(1, numbers[-1] // max(1, len(numbers) - 1))
    indices = tuple(number // max(1, multiple) for number in numbers)
    if (
        indices[0] != start
        or len(numbers) != num
        or any(n != i * multiple for n, i in zip(numbers, indices, strict=True))
    ):
        raise ConfigError(
            f"source={path}: states are named {numbers[:6]}, _start says that the first is {start}, _size that they "
            f"are {num}. Names must be a multiple of the index. Cut it out again."
        )
    return indices


def _find_points(
    file: h5py.File, shape: tuple[int, ...], path: Path, config: JHTDBConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates of the points along x, y, z; ascending, evenly apart but for the y of a stretched data set."""
    if "xcoor" in file:
        points = [require_dataset(file, f"{axis}coor", path, ndim=1)[...].astype(np.float64) for axis in AXES]
    else:
        points = _points_of_index(file, shape, path, config)
    for axis, values in zip(AXES, points, strict=True):
        if axis == "y" and config.dataset in ("channel", "other"):
            require_finite(values, "ycoor", path)
            if not np.diff(values).min() > 0:
                raise ConfigError(f"source={path}: ycoor does not ascend. Its axis may be reversed; cut it out again.")
        else:
            spacing_of(values.astype(np.float32), f"{axis}coor", path)
    return points[0], points[1], points[2]


def _points_of_index(file: h5py.File, shape: tuple[int, ...], path: Path, config: JHTDBConfig) -> list[np.ndarray]:
    """Coordinates of an older cut-out, which states where it starts and how long it is in (t, x, y, z)."""
    start = require_dataset(file, "_start", path, ndim=1)[...][-3:]
    size = require_dataset(file, "_size", path, ndim=1)[...][-3:]
    if sorted(size) != sorted(shape[:3]):
        raise ConfigError(
            f"source={path}: _size says {tuple(map(int, size))} points, the velocity has {shape[:3]}. Cut it out again."
        )
    if config.grid is not None:
        with open_hdf5(config.grid) as grid:
            whole = [require_dataset(grid, axis, config.grid, ndim=1)[...].astype(np.float64) for axis in AXES]
    elif config.database and not config.database.walled:
        database = config.database
        whole = [np.arange(database.points) * length / database.points for length in database.length]
    else:
        raise ConfigError(
            f"grid=None: {path.name} has no coordinates. Give grid=FILE.h5 with x, y, z of the whole data set."
        )
    parts = [w[s : s + n] for w, s, n in zip(whole, start, size, strict=True)]
    if any(len(p) != n for p, n in zip(parts, size, strict=True)):
        raise ConfigError(f"source={path}: starts at {tuple(map(int, start))}, beyond the data set. Cut it out again.")
    return parts


def _read_points(part: CutOut, time: int) -> tuple[np.ndarray, np.ndarray]:
    """Velocity (3, x, y, z) and pressure (x, y, z) of one state at the points, FP64."""
    names = part.names[time]
    with open_hdf5(part.path) as file:
        velocity, pressure = (_read_floats(file, name, part.path) for name in names)
    order = [AXES.index(letter) for letter in part.order]
    pressure = pressure.reshape(velocity.shape[:3])
    return _in_order(velocity, order), np.transpose(pressure, np.argsort(order))


def _read_floats(file: h5py.File, name: str, path: Path) -> np.ndarray:
    values = require_finite(read_part(file, name, ...), name, path)
    refuse_outliers(values, name, path)
    return values.astype(np.float64)


def _in_order(velocity: np.ndarray, order: Sequence[int]) -> np.ndarray:
    return np.moveaxis(np.transpose(velocity, (*np.argsort(order), 3)), -1, 0)


def _require_units(velocity: np.ndarray, path: Path, config: JHTDBConfig) -> None:
    database = config.database
    if database is None:
        return
    ratio = math.sqrt(float(np.mean(velocity**2))) / database.speed
    if not SPEED_RANGE[0] <= ratio <= SPEED_RANGE[1]:
        raise ConfigError(
            f"source={path}: its rms velocity is {ratio:.2g} times that of {config.dataset}. A unit is wrong (all are "
            "nondimensional), or give the right dataset=NAME."
        )


def _boundary(part: CutOut, axis: int, config: JHTDBConfig) -> Boundary:
    database, points = config.database, part.points[axis]
    if database is None:
        return "open"
    if database.walled and axis == 1:
        return (
            "wall"
            if math.isclose(points[0], -1, abs_tol=1e-5) and math.isclose(points[-1], 1, abs_tol=1e-5)
            else "open"
        )
    whole = len(points) * float(points[-1] - points[0]) / (len(points) - 1)
    return "periodic" if math.isclose(whole, database.length[axis], rel_tol=1e-4) else "open"


def _require_alike(part: CutOut, first: CutOut, grid: Grid, wanted: Grid) -> None:
    widths = (
        [np.allclose(grid.widths(a), wanted.widths(a), rtol=1e-3) for a in range(3)]
        if grid.shape == wanted.shape
        else [False]
    )
    if not all(widths) or grid.boundary != wanted.boundary:
        raise ConfigError(
            f"source={part.path}: {grid.shape} cells, {first.path.name} {wanted.shape}, or other widths. One store "
            "holds one grid."
        )
    if len(part.indices) != len(first.indices):
        raise ConfigError(
            f"source={part.path}: {len(part.indices)} states, {first.path.name} has {len(first.indices)}. Cut out "
            "equally many."
        )
