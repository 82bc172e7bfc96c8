"""PDEBench 3-D compressible flow: HDF5 with density, pressure, Vx, Vy, Vz (n, t, x, y, z) and their coordinates.

Cell centres, float32, nondimensional, gamma = 5/3. Shocks are part of the flow, so it is stored whole (velocity space
``full``), density as a scalar. Boundary and parameters stand in the published file names
(3D_CFD_Rand_M1.0_Eta1e-08_Zeta1e-08_periodic_Train.hdf5) and, in files made with its code, in attributes.
Source: Takamoto et al., PDEBench, NeurIPS Datasets and Benchmarks 2022, appendix D.5.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import h5py
import numpy as np

from data.ingest.continuity import TwoStates, require_axes
from data.ingest.flow import Flow, FlowConfig, Snapshot, make_domain, write_flow
from data.ingest.projection import compressible_share, faces_between_centres
from data.ingest.source import (
    Say,
    find_files,
    open_hdf5,
    read_attribute,
    read_part,
    require_dataset,
    require_finite,
    spacing_of,
    verify_files,
)
from data.writer import WrittenStore
from shodh.config import ConfigError
from shodh.fields import Grid

FIELDS = ("density", "pressure", "Vx", "Vy", "Vz")
ADIABATIC_INDEX = 5 / 3
MACH_RANGE = 10.0  # the stated Mach number is that of the initial field's amplitude, not its rms


@dataclass(frozen=True, kw_only=True)
class PDEBenchConfig(FlowConfig):
    """How PDEBench files are read; what a name or an attribute says need not be given."""

    boundary: Literal["periodic"] | None = None  # where the file's name does not say
    viscosity: float | None = None  # eta
    mach: float | None = None


class _File(NamedTuple):
    path: Path
    shape: tuple[int, ...]  # (n, t, x, y, z)
    spacing: tuple[float, float, float]
    times: np.ndarray
    viscosity: float
    mach: float
    zeta: float | None


def ingest(source: Path, store: Path, config: PDEBenchConfig, say: Say) -> WrittenStore:
    """Write the store of the flow in a file, or in a folder of files on one grid."""
    files = find_files(source, (".hdf5", ".h5"))
    provenance = verify_files(files, source, config.unverified, say)
    parts = [_inspect(path, config) for path in files]
    for part in parts[1:]:
        _require_alike(part, parts[0])
    for part in parts:
        require_axes(_first_states(part), part.path, say)
    _, _, *cells = parts[0].shape
    periodic = ("periodic", "periodic", "periodic")
    grid = Grid(shape=(cells[0], cells[1], cells[2]), spacing=parts[0].spacing, boundary=periodic)
    places = [(part, i) for part in parts for i in range(part.shape[0])]

    def read(index: int, time: int) -> Snapshot:
        return _read(*places[index], time, grid)

    flow = Flow(
        format="pdebench",
        domain=make_domain(store.name, "full", grid.boundary, parameters=("dt", "viscosity"), scalars=("density",)),
        grid=grid,
        times=[part.times for part, _ in places],
        parameters=[{"dt": float(part.times[1]), "viscosity": part.viscosity} for part, _ in places],
        read=read,
        notes={
            "mach": [part.mach for part in parts],
            "zeta": [part.zeta for part in parts],
            "interpolation": "mean of two cells",
        },
    )
    return write_flow(store, flow, config, provenance, say)


def _inspect(path: Path, config: PDEBenchConfig) -> _File:
    """What a file says of itself, checked; its first state's units too."""
    _require_periodic(path, config)
    with open_hdf5(path) as file:
        if "Vz" not in file and "Vx" in file:
            raise ConfigError(
                f"source={path}: has no Vz, so it is 1-D or 2-D. Shodh takes 3-D flow: give a 3D_CFD file."
            )
        fields = {name: require_dataset(file, name, path, ndim=5) for name in FIELDS}
        shape = fields["Vx"].shape
        for name, dataset in fields.items():
            if dataset.shape != shape:
                raise ConfigError(f"source={path}: {name} is {dataset.shape}, Vx is {shape}. Give the published file.")
        spacing = [_spacing(file, axis, shape[2 + i], path) for i, axis in enumerate("xyz")]
        times = _times(file, shape[1], path)
        named = {name: _named_number(file, name, path) for name in ("M", "eta", "zeta")}
    viscosity = _given(config.viscosity, named["eta"], "viscosity", path)
    mach = _given(config.mach, named["M"], "mach", path)
    part = _File(path, shape, (spacing[0], spacing[1], spacing[2]), times, viscosity, mach, named["zeta"])
    _require_units(part)
    return part


def _read(part: _File, index: int, time: int, grid: Grid) -> Snapshot:
    fields = _read_cells(part, index, time)
    velocity = np.stack([fields[name].astype(np.float64) for name in ("Vx", "Vy", "Vz")])
    faces = faces_between_centres(velocity, grid)
    flux = (faces * grid.face_area).astype(np.float32)
    return Snapshot(flux, fields["pressure"], {"density": fields["density"]}, compressible_share(faces, grid))


def _first_states(part: _File) -> TwoStates:
    first, second = (_read_cells(part, 0, time) for time in (0, 1))
    density = np.stack([state["density"] for state in (first, second)])
    velocity = np.stack([[state[name] for name in ("Vx", "Vy", "Vz")] for state in (first, second)])
    return TwoStates(density, velocity, part.spacing, float(part.times[1]))


def _read_cells(part: _File, index: int, time: int) -> dict[str, np.ndarray]:
    """The five fields of one state, finite and physical."""
    with open_hdf5(part.path) as file:
        fields = {name: read_part(file, name, (index, time)).astype(np.float32) for name in FIELDS}
    for name, values in fields.items():
        require_finite(values, f"{name} of sample {index}, time {time},", part.path)
    for name in ("density", "pressure"):
        if not fields[name].min() > 0:
            raise ConfigError(
                f"source={part.path}: {name} of sample {index}, time {time} is not positive. Check units and file."
            )
    return fields


def _require_units(part: _File) -> None:
    """ConfigError unless velocity over the speed of sound is of the size of the stated Mach number."""
    for index in range(part.shape[0]):
        fields = _read_cells(part, index, 0)
        speed = math.sqrt(sum(float(np.mean(fields[v].astype(np.float64) ** 2)) for v in ("Vx", "Vy", "Vz")))
        sound = math.sqrt(ADIABATIC_INDEX * float(np.mean(fields["pressure"] / fields["density"], dtype=np.float64)))
        if not part.mach / MACH_RANGE <= speed / sound <= part.mach * MACH_RANGE:
            raise ConfigError(
                f"source={part.path}: sample {index} starts at Mach {speed / sound:.2g}, stated is {part.mach:.2g}. A "
                "unit is "
                "wrong (all are nondimensional), or give mach=VALUE."
            )


def _spacing(file: h5py.File, axis: str, num: int, path: Path) -> float:
    """Cell width along an axis whose coordinate must be as long as the fields are."""
    name = f"{axis}-coordinate"
    values = require_dataset(file, name, path, ndim=1)[...]
    if len(values) != num:
        raise ConfigError(
            f"source={path}: {name} has {len(values)} values, the fields {num} cells along {axis}. Axes must be (n, t, "
            "x, y, z)."
        )
    return spacing_of(values, name, path)


def _times(file: h5py.File, num: int, path: Path) -> np.ndarray:
    """Times from 0; the generating code writes one more than there are states."""
    values = require_dataset(file, "t-coordinate", path, ndim=1)[...]
    if len(values) not in (num, num + 1) or num < 2:
        raise ConfigError(
            f"source={path}: t-coordinate has {len(values)} values for {num} states. Axes must be (n, t, x, y, z)."
        )
    return np.arange(num) * spacing_of(values, "t-coordinate", path)


def _named_number(file: h5py.File, name: str, path: Path) -> float | None:
    """A parameter from the attributes, else from the file's name."""
    if name in file.attrs:
        return float(read_attribute(file, name))
    match = re.search(rf"_{name}([0-9][0-9.eE+-]*?)_", path.name, re.IGNORECASE)
    return float(match[1]) if match else None


def _given(chosen: float | None, stated: float | None, name: str, path: Path) -> float:
    value = chosen if chosen is not None else stated
    if value is None or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name}={value}: {path.name} does not state it. Give {name}=VALUE.")
    return value


def _require_periodic(path: Path, config: PDEBenchConfig) -> None:
    if "_trans_" in path.name:
        raise ConfigError(
            f"source={path}: outgoing sides (trans). A store of compressible flow is periodic: give a _periodic_ file."
        )
    if "_periodic_" not in path.name and config.boundary is None:
        raise ConfigError(f"source={path}: its name does not say `_periodic_`. If it is, give boundary=periodic.")


def _require_alike(part: _File, first: _File) -> None:
    same = part.shape[1:] == first.shape[1:] and np.allclose(part.spacing, first.spacing, rtol=1e-5)
    if not same or not np.allclose(part.times, first.times, rtol=1e-5):
        raise ConfigError(
            f"source={part.path}: another grid or other times than {first.path.name}. One store holds one grid."
        )
