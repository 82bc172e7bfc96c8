"""The one layout that all data take: what a trajectory is, what a store holds, and a check that names what is wrong.

One store = one domain = one Zarr v3 group on one grid. See ``docs/data_format.md``.

    python -m data.layout STORE [STORE ...]    of fields or of latents; one line per problem, exit code 1 if any
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from data.chunks import LAYOUT_VERSION, MEND, ArrayLayout, ArrayReader, StoreError, read_attributes
from data.digests import check_files, read_digests
from shodh.config import ConfigError, parse_config, to_plain
from shodh.fields import DomainSpec, FieldSpec, Grid
from shodh.physics.exterior import curl_of_faces, divergence_of_faces

Split = Literal["train", "test"]

PARAMETER_NAMES = {
    "dt": "time between two snapshots",
    "viscosity": "kinematic viscosity",
    "frequency": "frequency of the source or of the forcing",
    "porosity": "fraction of the volume that is pore space",
    "diffusivity": "thermal diffusivity",
}

# Rounding a solenoidal field to FP32 leaves |div F| <= 6 · 2^-24 max|F|; projecting in FP32 adds some ten times that.
MAX_DEFECT = 64 * float(np.finfo(np.float32).eps)


class Trajectory(NamedTuple):
    """One simulated or ingested trajectory on a staggered grid; velocity as flux or circulation, see DomainSpec."""

    # float32 (t, 3, x, y, z) on lower faces: flux u·area (solenoidal, full) or circulation v·spacing (irrotational)
    velocity: np.ndarray
    pressure: np.ndarray  # float32 (t, x, y, z) in cells
    medium: np.ndarray  # float32 (x, y, z) in cells, static
    time: np.ndarray  # float64 (t,)
    parameters: dict[str, float]  # the DomainSpec.parameters of this trajectory
    seed: int
    grid: Grid
    scalars: Mapping[str, np.ndarray] = MappingProxyType({})  # float32 (t, x, y, z) in cells, per DomainSpec.scalars


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """What a store of fields is meant to hold, known before its first trajectory."""

    domain: DomainSpec
    num_trajectories: int
    num_snapshots: int
    num_test: int  # the last trajectories are the test split
    shape: tuple[int, int, int]
    solver: str
    solver_version: str
    config: dict[str, Any]  # what generated it
    velocity_scale: float = 1.0  # physical = stored · scale: lattice values keep their exact sums (CF scale_factor)

    def __post_init__(self) -> None:
        if not 0 < self.num_test < self.num_trajectories:
            raise ValueError(
                f"num_test={self.num_test}: of {self.num_trajectories} trajectories, at least one must be held out and "
                "one left to train on. Change num_test or num_trajectories."
            )

    @property
    def num_bytes(self) -> int:
        """Size on disk but for checksums and metadata: nothing is compressed, as turbulence gains 16 % at most."""
        num_fields = 4 + len(self.domain.scalars)
        return 4 * self.num_trajectories * math.prod(self.shape) * (num_fields * self.num_snapshots + 1)


class StoreHeader(NamedTuple):
    """What a store says of itself in its root attributes."""

    plan: StorePlan
    grid: Grid


def split_trajectories(num_trajectories: int, num_test: int) -> dict[str, list[int]]:
    """Which trajectories train and which test: by trajectory, never by snapshot, the last ``num_test`` held out."""
    first_test = num_trajectories - num_test
    return {"train": list(range(first_test)), "test": list(range(first_test, num_trajectories))}


def header_attributes(header: StoreHeader) -> dict[str, Any]:
    """The root attributes of a store of fields; ``parse_header`` of them gives the header back."""
    plan = header.plan
    return {
        "kind": "fields",
        "layout_version": LAYOUT_VERSION,
        "Conventions": "CF-1.11",
        "title": f"{plan.domain.name}: {plan.num_trajectories} trajectories of {plan.num_snapshots} snapshots",
        **to_plain(plan),
        "grid": to_plain(header.grid),
        "split": split_trajectories(plan.num_trajectories, plan.num_test),
    }


def parse_header(attributes: dict[str, Any], source: str) -> StoreHeader:
    """The header that root attributes stand for. Raises ConfigError for another kind or version of layout."""
    require_kind(attributes, "fields", source)
    known = {field.name for field in fields(StorePlan)}
    plan = parse_config(StorePlan, {k: v for k, v in attributes.items() if k in known}, source=source)
    grid = parse_config(Grid, attributes.get("grid", {}), source=f"{source}, grid")
    if grid.shape != plan.shape:
        raise ConfigError(f"store={source}: its grid is {grid.shape}, its plan {plan.shape}. {MEND}")
    if grid.boundary != plan.domain.boundary:
        raise ConfigError(
            f"store={source}: its grid ends in {grid.boundary}, its domain in {plan.domain.boundary}. {MEND}"
        )
    return StoreHeader(plan, grid)


def require_kind(attributes: dict[str, Any], kind: str, source: str) -> None:
    """Raise ConfigError unless the attributes are those of this kind and version of layout."""
    if attributes.get("kind") != kind:
        raise ConfigError(f"store={source}: holds {attributes.get('kind')!r}, not {kind!r}. Choose another folder.")
    version = attributes.get("layout_version")
    if version != LAYOUT_VERSION:
        raise ConfigError(f"store={source}: layout version {version}, not {LAYOUT_VERSION}. Write it again.")


def field_arrays(header: StoreHeader) -> dict[str, ArrayLayout]:
    """Every array of a store of fields by name; one file per trajectory and field, one inner chunk per snapshot."""
    plan, grid = header
    domain, shape = plan.domain, grid.shape
    dims, states = ("x", "y", "z"), (plan.num_trajectories, plan.num_snapshots)
    state_dims = ("trajectory", "time")
    velocity = _describe(domain.velocity)
    if plan.velocity_scale != 1:
        velocity["scale_factor"] = plan.velocity_scale
    arrays = [
        _states(domain.velocity.name, (*state_dims, "component", *dims), (*states, 3, *shape), velocity),
        *(
            _states(spec.name, (*state_dims, *dims), (*states, *shape), _describe(spec))
            for spec in (domain.pressure, *domain.scalars)
        ),
        _static(domain.medium.name, ("trajectory", *dims), (states[0], *shape), _describe(domain.medium)),
        *trajectory_arrays(domain, states),
        *_coordinates(domain, shape),
    ]
    by_name = {array.name: array for array in arrays}
    if len(by_name) < len(arrays):
        raise ValueError(
            f"domain {domain.name}: two of its variables share one name: {[a.name for a in arrays]}. Rename one."
        )
    return by_name


def latent_arrays(
    domain: DomainSpec, latent_shape: tuple[int, ...], medium_shape: tuple[int, ...]
) -> dict[str, ArrayLayout]:
    """Every array of a cache of latents of shape (trajectory, time, c, x, y, z) and (trajectory, m, x, y, z)."""
    dims = ("x", "y", "z")  # of latent cells
    note = {"units": "1", "long_name": "whitened latent state"}
    medium = {"units": "1", "long_name": "whitened latent of the medium"}
    arrays = [
        _states("latent", ("trajectory", "time", "channel", *dims), latent_shape, note),
        _static("medium", ("trajectory", "medium_channel", *dims), medium_shape, medium),
        *trajectory_arrays(domain, latent_shape[:2]),
    ]
    return {array.name: array for array in arrays}


def trajectory_arrays(domain: DomainSpec, states: tuple[int, ...]) -> list[ArrayLayout]:
    """What fields and latents both keep of a trajectory: time, seed and parameters, each a single chunk."""
    time = {"units": _units(domain)[1], "long_name": "time since the first state", "standard_name": "time"}
    if time["units"] == "1":
        del time["standard_name"]  # CF keeps that name for a dimensional time
    trajectory, count = ("trajectory",), states[:1]
    return [
        ArrayLayout("time", ("trajectory", "time"), states, states, "float64", time),
        ArrayLayout("seed", trajectory, count, count, "int64", {"units": "1", "long_name": "seed of the random draws"}),
        *(
            ArrayLayout(name, trajectory, count, count, "float64", {"units": "1", "long_name": PARAMETER_NAMES[name]})
            for name in domain.parameters
        ),
    ]


def coordinate_values(grid: Grid) -> dict[str, np.ndarray]:
    """Cell centres along x, y and z, and the component axis."""
    centres = {}
    for axis, name in enumerate(("x", "y", "z")):
        n, widths = grid.shape[axis], grid.widths(axis)
        uniform = (np.arange(n) + 0.5) * widths[0]
        centres[name] = uniform if grid.is_uniform(axis) else np.cumsum(widths) - widths / 2
    return centres | {"component": np.arange(3)}


def measure_defect(stored_velocity: np.ndarray, header: StoreHeader) -> float:
    """Largest |div F| (solenoidal), |curl v| (irrotational) or velocity through a wall over the largest |F|, in FP64.

    A ``full`` velocity must only vanish on walls. The operators are those of ``shodh.physics.exterior``.
    """
    velocity = torch.from_numpy(stored_velocity.astype(np.float64))
    space, boundary = header.plan.domain.velocity_space, header.grid.boundary
    defects = [velocity[i].select(i, 0) for i in range(3) if boundary[i] == "wall"]
    if space == "solenoidal":
        # the last cells along an open axis have a face that is not stored
        known = tuple(slice(n - 1 if b == "open" else n) for n, b in zip(header.grid.shape, boundary, strict=True))
        defects.append(divergence_of_faces(velocity, boundary)[known])
    elif space == "irrotational":
        defects.append(curl_of_faces(velocity, boundary))
    largest = velocity.abs().max().item()
    return max((d.abs().max().item() for d in defects), default=0.0) / largest if largest > 0 else 0.0


def check(path: str | Path, deep: bool = True) -> list[str]:
    """What is wrong with a store of fields or of latents, one line each (what, where, how to mend); empty if sound.

    Shallow: metadata against header and digests, presence and size of every file. ``deep`` reads every byte: digests,
    finite values, divergence or curl of the velocity.
    """
    path = Path(path)
    partial = partial_folder(path)
    if not path.is_dir():
        if partial.is_dir():
            return [f"store={path}: incomplete, see {partial.name}. Run the command that writes it again to continue."]
        return [f"store={path}: no such folder. Generate or ingest it first."]
    try:
        attributes = read_attributes(path)
        if attributes.get("kind") == "latents":
            from data.latents import check_latents  # here, as that module is built on this one

            return check_latents(path, deep)
        header = parse_header(attributes, str(path))
        arrays = field_arrays(header)
        return check_files(path, list(arrays.values()), deep=deep) or (
            _check_values(path, header, arrays) if deep else []
        )
    except (StoreError, ValueError) as error:
        return [str(error)]


def check_finite(path: Path, array: ArrayLayout, reader: ArrayReader) -> list[str]:
    """One line per trajectory and snapshot whose values are not finite."""
    problems = []
    for chunk, inner in np.ndindex(len(list(array.chunk_indices())), array.num_inner):
        if not np.isfinite(reader.read(chunk, inner)).all():
            problems.append(f"{describe_place(path, array, chunk, inner)} is not finite. {MEND}")
    return problems


def describe_place(path: Path, array: ArrayLayout, chunk: int, inner: int) -> str:
    """Which part of an array an inner chunk is, in words."""
    if array.dims[0] != "trajectory" or array.chunk[0] != 1:
        return f"{path}: {array.name}"
    snapshot = f", snapshot {inner}," if array.dims[1] == "time" else ""
    return f"{path}: {array.name} of trajectory {chunk}{snapshot}"


def partial_folder(path: Path) -> Path:
    """Where a store lives until it is complete."""
    return path.with_name(path.name + ".partial")


def _states(name: str, dims: tuple[str, ...], shape: tuple[int, ...], attributes: dict) -> ArrayLayout:
    """A float32 array (trajectory, time, ...): one file per trajectory, one inner chunk per state."""
    chunk, inner = (1, *shape[1:]), (1, 1, *shape[2:])
    return ArrayLayout(name, dims, tuple(shape), chunk, "float32", attributes, inner)


def _static(name: str, dims: tuple[str, ...], shape: tuple[int, ...], attributes: dict) -> ArrayLayout:
    """A float32 array (trajectory, ...): one file per trajectory."""
    return ArrayLayout(name, dims, tuple(shape), (1, *shape[1:]), "float32", attributes)


def _describe(spec: FieldSpec) -> dict[str, Any]:
    location = "lower faces normal to the component" if spec.location == "face" else "cells"
    return {"units": spec.units, "long_name": spec.long_name, "location": location}


def _coordinates(domain: DomainSpec, shape: tuple[int, int, int]) -> list[ArrayLayout]:
    length = _units(domain)[0]
    axes = []
    for name, n in zip(("x", "y", "z"), shape, strict=True):
        centre = {"units": length, "long_name": f"cell centre along {name}", "axis": name.upper()}
        axes.append(ArrayLayout(name, (name,), (n,), (n,), "float64", centre))
    meaning = {"units": "1", "long_name": "axis", "flag_values": [0, 1, 2], "flag_meanings": "x y z"}
    return [*axes, ArrayLayout("component", ("component",), (3,), (3,), "int64", meaning)]


def _units(domain: DomainSpec) -> tuple[str, str]:
    """Units of length and time: SI as soon as one field has a dimension, else 1."""
    specs = (domain.velocity, domain.pressure, domain.medium, *domain.scalars)
    dimensional = any(spec.units != "1" for spec in specs)
    return ("m", "s") if dimensional else ("1", "1")


def _check_values(path: Path, header: StoreHeader, arrays: dict[str, ArrayLayout]) -> list[str]:
    digests, problems, axes = read_digests(path), [], coordinate_values(header.grid)
    for array in arrays.values():
        reader = ArrayReader(path, array, digests)
        problems += check_finite(path, array, reader)
        if array.name in axes and not np.array_equal(reader.read(), axes[array.name]):
            problems.append(f"{path}: {array.name} is not that of the grid. {MEND}")
        if array.name == header.plan.domain.velocity.name and not problems:
            problems += _check_constraint(path, header, array, reader)
    return problems


def _check_constraint(path: Path, header: StoreHeader, array: ArrayLayout, reader: ArrayReader) -> list[str]:
    problems = []
    for chunk, inner in np.ndindex(header.plan.num_trajectories, header.plan.num_snapshots):
        defect = measure_defect(reader.read(chunk, inner)[0, 0], header)
        problems += describe_defect(describe_place(path, array, chunk, inner), defect, header)
    return problems


def describe_defect(where: str, defect: float, header: StoreHeader) -> list[str]:
    """One line if the defect of a stored velocity exceeds FP32 round-off, else nothing."""
    if defect <= MAX_DEFECT:
        return []
    names = {"solenoidal": "divergence or flux through a wall", "irrotational": "curl or velocity through a wall"}
    name = names.get(header.plan.domain.velocity_space, "velocity through a wall")
    size = f"{defect:.1e} of its largest value, limit {MAX_DEFECT:.1e}"
    return [f"{where} has {name} {size}. Project it where it is made, and set walls to 0."]


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m data.layout STORE [STORE ...]", file=sys.stderr)
        return 0 if arguments else 2
    found = {path: check(path) for path in arguments}
    for path, problems in found.items():
        print("\n".join(problems) or f"{path}: sound")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
