"""The Well: HDF5 with groups dimensions, boundary_conditions, scalars, t0_fields, t1_fields (and t2_fields, left out).

Fields are (trajectory, time, x, y, z), vectors with a last axis of 3, in the order of ``dimensions.spatial_dims``;
values are taken for means over uniform cells. Data sets of The Well are compressible or of variable density, so that
a velocity is stored whole (``full``) unless velocity_space=solenoidal is asked for.
Source: https://polymathic-ai.org/the_well/data_format/; Ohana et al., The Well, NeurIPS Datasets and Benchmarks 2024.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np

from data.ingest.continuity import TwoStates, require_axes
from data.ingest.flow import Boundaries, Flow, FlowConfig, Snapshot, make_domain, write_flow
from data.ingest.projection import (
    compressible_share,
    divergence_share,
    faces_between_centres,
    project_flux,
    project_open_flux,
)
from data.ingest.source import (
    Say,
    find_files,
    names_in,
    open_hdf5,
    read_attribute,
    read_part,
    require_dataset,
    require_finite,
    require_group,
    spacing_of,
    verify_files,
)
from data.writer import WrittenStore
from shodh.config import ConfigError
from shodh.fields import Boundary, Grid

BOUNDARIES: dict[str, Boundary] = {"PERIODIC": "periodic", "WALL": "wall", "OPEN": "open"}
POSITIVE = ("density", "pressure", "temperature", "energy")  # never below 0 in any data set of The Well
MAX_DIVERGENCE = 0.3  # of the gradient, for a field to be called solenoidal; 0.58 is what unrelated components have


@dataclass(frozen=True, kw_only=True)
class TheWellConfig(FlowConfig):
    """Which fields of a file make the state."""

    velocity: str = "velocity"  # in t1_fields
    pressure: str | None = None  # in t0_fields: `pressure`, or `density` where there is none
    velocity_space: Literal["full", "solenoidal"] = "full"


class _File(NamedTuple):
    path: Path
    num_trajectories: int
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    boundary: Boundaries
    times: tuple[np.ndarray, ...]  # per trajectory
    scalars: tuple[str, ...]  # t0_fields that vary in time
    left_out: tuple[str, ...]
    parameters: dict[str, Any]  # of the simulation, as the file states them


def ingest(source: Path, store: Path, config: TheWellConfig, say: Say) -> WrittenStore:
    """Write the store of the flow in a file, or in a folder of files on one grid."""
    files = find_files(source, (".hdf5", ".h5"))
    provenance = verify_files(files, source, config.unverified, say)
    parts = [_inspect(path, config) for path in files]
    first = parts[0]
    for part in parts[1:]:
        _require_alike(part, first)
    if first.left_out:
        say(f"{store}: left out, as no store has a place for it: {', '.join(first.left_out)}")
    _require_axes(parts, config, say)
    pressure = _choose_pressure(first, config, say)
    scalars = tuple(name for name in first.scalars if name != pressure)
    if "open" in first.boundary and config.velocity_space == "full":
        raise ConfigError(
            f"velocity_space=full: {first.path} has open sides {first.boundary}, through which no store carries a "
            "compressible flow. Give velocity_space=solenoidal if its velocity has no divergence, or another data set."
        )
    domain = make_domain(
        store.name, config.velocity_space, first.boundary, parameters=("dt",), pressure=pressure, scalars=scalars
    )
    grid = Grid(shape=first.shape, spacing=first.spacing, boundary=first.boundary)
    places = [(part, i) for part in parts for i in range(part.num_trajectories)]
    flow = Flow(
        format="the_well",
        domain=domain,
        grid=grid,
        times=[part.times[i] for part, i in places],
        parameters=[{"dt": float(part.times[i][1])} for part, i in places],
        read=lambda index, time: _read(*places[index], time, grid, config, (pressure, *scalars)),
        notes={
            "simulation_parameters": {part.path.name: part.parameters for part in parts},
            "left_out": list(first.left_out),
            "interpolation": "mean of two cells",
        },
    )
    return write_flow(store, flow, config, provenance, say)


def _inspect(path: Path, config: TheWellConfig) -> _File:
    """What a file says of itself, checked against its arrays."""
    with open_hdf5(path) as file:
        dimensions = require_group(file, "dimensions", path)
        names = _spatial_names(file, dimensions, path)
        velocity = require_dataset(require_group(file, "t1_fields", path), config.velocity, path)
        coordinates = [require_dataset(dimensions, name, path, ndim=1)[...] for name in names]
        num = int(read_attribute(file, "n_trajectories"))
        num_times = require_dataset(dimensions, "time", path).shape[-1]
        shape = (len(coordinates[0]), len(coordinates[1]), len(coordinates[2]))
        if velocity.shape != (num, num_times, *shape, 3):
            raise ConfigError(
                f"source={path}: {config.velocity} is {velocity.shape}, must be (trajectory, time, {', '.join(names)}, "
                "3) "
                f"= {(num, num_times, *shape, 3)}. Check the order of its axes."
            )
        spacing = [spacing_of(c, name, path) for c, name in zip(coordinates, names, strict=True)]
        boundary: list[Boundary] = [_boundary_of(file, name, path) for name in names]
        moving, left_out = _sort_fields(file, config, velocity.shape[:-1], path)
        times = tuple(_times(file, i, num_times, path) for i in range(num))
        listed = read_attribute(file, "simulation_parameters") if "simulation_parameters" in file.attrs else []
        stated = {name: read_attribute(file, name) for name in listed if name in file.attrs}
    box = (spacing[0], spacing[1], spacing[2])
    return _File(path, num, shape, box, (boundary[0], boundary[1], boundary[2]), times, moving, left_out, stated)


def _spatial_names(file: h5py.File, dimensions: h5py.Group, path: Path) -> list[str]:
    num = int(read_attribute(file, "n_spatial_dims"))
    if num != 3:
        raise ConfigError(f"source={path}: {num}-D. Shodh takes 3-D flow: choose a 3-D data set of The Well.")
    kind = read_attribute(file, "grid_type")
    if kind != "cartesian":
        raise ConfigError(f"source={path}: its grid is {kind}. Only cartesian grids fit a store.")
    names = read_attribute(dimensions, "spatial_dims")
    if len(names) != 3:
        raise ConfigError(f"source={path}: spatial_dims={names}, must name three axes. The file contradicts itself.")
    return names


def _boundary_of(file: h5py.File, axis: str, path: Path) -> Boundary:
    """The one boundary condition of an axis."""
    kinds = set()
    for group in require_group(file, "boundary_conditions", path).values():
        if axis in read_attribute(group, "associated_dims"):
            kinds.add(read_attribute(group, "bc_type").upper())
    if len(kinds) != 1 or not kinds <= set(BOUNDARIES):
        raise ConfigError(
            f"source={path}: {axis} has boundaries {sorted(kinds)}; a store takes one of {list(BOUNDARIES)} an axis."
        )
    return BOUNDARIES[kinds.pop()]


def _sort_fields(
    file: h5py.File, config: TheWellConfig, shape: tuple[int, ...], path: Path
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the scalar fields that make the state, and of the fields that no store has a place for."""
    moving, left_out = (
        [],
        [name for name in names_in(require_group(file, "t1_fields", path)) if name != config.velocity],
    )
    left_out += names_in(require_group(file, "t2_fields", path)) if "t2_fields" in file else []
    scalars = require_group(file, "t0_fields", path)
    for name in names_in(scalars):
        dataset = require_dataset(scalars, name, path)
        varies = bool(read_attribute(dataset, "sample_varying")) and bool(read_attribute(dataset, "time_varying"))
        if varies and dataset.shape != shape:
            raise ConfigError(
                f"source={path}: {name} is {dataset.shape}, the velocity {shape}. Check the order of its axes."
            )
        (moving if varies else left_out).append(name)
    return tuple(sorted(moving)), tuple(sorted(left_out))


def _times(file: h5py.File, index: int, num: int, path: Path) -> np.ndarray:
    dataset = require_dataset(require_group(file, "dimensions", path), "time", path)
    values = dataset[...] if dataset.ndim == 1 else dataset[index]
    if num < 2:
        raise ConfigError(f"source={path}: one time only. A trajectory needs two states at least.")
    return np.arange(num) * spacing_of(values, "time", path)


def _choose_pressure(part: _File, config: TheWellConfig, say: Say) -> str:
    for name in [config.pressure] if config.pressure else ["pressure", "density"]:
        if name in part.scalars:
            if name != "pressure":
                say(f"{part.path.name}: the place of the pressure is taken by {name}")
            return name
    raise ConfigError(
        f"pressure={config.pressure}: no such field in t0_fields (there are: {', '.join(part.scalars)}). Name one."
    )


def _require_axes(parts: list[_File], config: TheWellConfig, say: Say) -> None:
    """Verify the order of axes of each file by mass conservation, or say aloud that nothing tells it."""
    for part in parts:
        if "density" not in part.scalars:
            if config.velocity_space == "full":
                say(f"{part.path.name}: order of axes not verified: without a density nothing tells it")
            continue
        with open_hdf5(part.path) as file:
            density = np.stack([read_part(file, "t0_fields/density", (0, time)) for time in (0, 1)])
            vectors = [read_part(file, f"t1_fields/{config.velocity}", (0, time)) for time in (0, 1)]
        velocity = np.stack([np.moveaxis(vector, -1, 0) for vector in vectors])
        require_finite(density, "density", part.path)
        require_finite(velocity, config.velocity, part.path)
        require_axes(TwoStates(density, velocity, part.spacing, float(part.times[0][1])), part.path, say)


def _read(part: _File, index: int, time: int, grid: Grid, config: TheWellConfig, names: tuple[str, ...]) -> Snapshot:
    where = f"of trajectory {index}, time {time},"
    with open_hdf5(part.path) as file:
        vector = read_part(file, f"t1_fields/{config.velocity}", (index, time))
        cells = {name: read_part(file, f"t0_fields/{name}", (index, time)) for name in names}
    require_finite(vector, f"{config.velocity} {where}", part.path)
    for name in cells:
        require_finite(cells[name], f"{name} {where}", part.path)
        if name in POSITIVE and cells[name].min() < 0:
            raise ConfigError(f"source={part.path}: {name} {where} is negative. Check units and file.")
    velocity = np.moveaxis(vector, -1, 0).astype(np.float64)
    fields = {name: np.asarray(values, np.float32) for name, values in cells.items()}
    pressure = fields.pop(names[0])
    if config.velocity_space == "solenoidal":
        _require_solenoidal(velocity, grid, f"{part.path}: {config.velocity} {where}")
        faces = faces_between_centres(velocity, grid)
        open_sides = "open" in grid.boundary
        flux, removed = (
            project_open_flux(_with_upper_sides(faces, velocity, grid), grid)
            if open_sides
            else project_flux(faces, grid)
        )
        return Snapshot(flux, pressure, fields, removed)
    faces = faces_between_centres(velocity, grid)
    share = compressible_share(faces, grid)
    return Snapshot((faces * grid.face_area).astype(np.float32), pressure, fields, share)


def _with_upper_sides(faces: np.ndarray, velocity: np.ndarray, grid: Grid) -> list[np.ndarray]:
    """Velocity on all faces, per component: at an open upper end the cell's own value, in a wall 0."""
    components = []
    for axis, kind in enumerate(grid.boundary):
        last = np.take(velocity[axis], [-1], axis) * (kind == "open")
        components.append(faces[axis] if kind == "periodic" else np.concatenate([faces[axis], last], axis))
    return components


def _require_solenoidal(velocity: np.ndarray, grid: Grid, where: str) -> None:
    share = divergence_share(velocity, grid.mean_spacing)
    if share > MAX_DIVERGENCE:
        raise ConfigError(
            f"source={where} has a divergence of {share:.2f} of its gradient. Its axes are swapped, or use "
            "velocity_space=full."
        )


def _require_alike(part: _File, first: _File) -> None:
    same = part[2:3] == first[2:3] and part.boundary == first.boundary and part.scalars == first.scalars
    if not same or not np.allclose(part.spacing, first.spacing, rtol=1e-5) or len(part.times[0]) != len(first.times[0]):
        raise ConfigError(
            f"source={part.path}: another grid, boundary or fields than {first.path.name}. One store holds one."
        )
