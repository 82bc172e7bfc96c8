"""Writes a store of fields trajectory by trajectory; killed half way, the next call continues.

A store is built in ``NAME.partial``: the files of a trajectory first, then one line in a journal with their digests,
against which they are verified before a next call counts on them. Several processes may each take a share of the
trajectories. Whoever completes the set verifies what the others wrote, adds the small arrays, the metadata and the
digests and renames the folder, so a store under its final name is always complete.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.chunks import Digests, StoreError, create_group, read_attributes, write_chunk
from data.digests import check_files, publish, read_digest, seal
from data.journal import WHOLE, Record, Share, claim, first_intact, lock, read_plan, read_records, remove_journals
from data.layout import (
    StoreHeader,
    StorePlan,
    Trajectory,
    coordinate_values,
    describe_defect,
    field_arrays,
    header_attributes,
    measure_defect,
    parse_header,
    partial_folder,
)
from shodh.config import ConfigError, parse_config, to_plain
from shodh.fields import Grid

# Yields (index, Trajectory) for the trajectory indices it is given, in any order.
Simulate = Callable[[Sequence[int]], Iterator[tuple[int, Trajectory]]]


class WrittenStore(NamedTuple):
    """What ``write_store`` did."""

    digest: str  # of the complete store; empty while trajectories of other shares are missing
    num_written: int  # trajectories that this call added; 0 if they were there already
    missing: tuple[int, ...] = ()  # what other shares have still to write


def write_store(path: str | Path, plan: StorePlan, simulate: Simulate, share: Share = WHOLE) -> WrittenStore:
    """Write this share's trajectories of the store that ``plan`` describes, but for those on disk; by default all.

    Raises ConfigError when another plan's store stands there, when the disk is too small, or when another process is
    writing the same share; RuntimeError when a trajectory does not fit the plan or is not finite.
    """
    path = Path(path)
    if path.exists():
        return _leave_complete(path, plan)
    partial = partial_folder(path)
    with claim(partial, share, to_plain(plan)) as journal:
        if path.exists():  # published by another process since this one looked
            with lock(partial):  # so that nobody is just claiming what is removed
                shutil.rmtree(partial, ignore_errors=True)
            return _leave_complete(path, plan)
        _require_same_plan(parse_config(StorePlan, read_plan(partial) or {}, source=str(partial)), partial, path, plan)
        written = journal.intact(share)
        missing = [i for i in range(plan.num_trajectories) if share.holds(i) and i not in written]
        if path.exists():  # or while this one verified
            return _leave_complete(path, plan)
        if missing:
            num_left = len(set(range(plan.num_trajectories)) - (read_records(partial).keys() - set(missing)))
            _require_space(path, plan.num_bytes * num_left // plan.num_trajectories)
        for index, trajectory in simulate(missing) if missing else ():
            if index not in missing:
                raise RuntimeError(
                    f"store={path}: the simulator gave trajectory {index}, but was asked for {missing}. "
                    "Let it yield each index that it is given, once."
                )
            _require_fit(plan, index, trajectory)
            _require_one_grid(partial, written, trajectory)
            written[index] = _write_trajectory(partial, plan, index, trajectory)
            journal.append(written[index])
        left = [i for i in missing if i not in written]
        if left:
            raise RuntimeError(f"store={path}: the simulation gave no trajectory {left}. Run it again to continue.")
        digest, others = _complete(path, plan, written)
    return WrittenStore(digest, len(missing), tuple(others))


def _leave_complete(path: Path, plan: StorePlan) -> WrittenStore:
    """What there is to say of a complete store."""
    _require_same_plan(parse_header(read_attributes(path), str(path)).plan, path, path, plan)
    return WrittenStore(read_digest(path), 0)


def _write_trajectory(partial: Path, plan: StorePlan, index: int, trajectory: Trajectory) -> Record:
    """Write the fields of one trajectory and return what the journal shall say of it."""
    domain, arrays = plan.domain, field_arrays(StoreHeader(plan, trajectory.grid))
    fields = {domain.velocity.name: trajectory.velocity, domain.pressure.name: trajectory.pressure}
    fields |= {domain.medium.name: trajectory.medium, **trajectory.scalars}
    digests: Digests = {}
    for name, values in fields.items():
        digests |= write_chunk(partial, arrays[name], (index, *(0,) * (len(arrays[name].shape) - 1)), values)
    notes = {
        "time": [float(t) for t in trajectory.time],
        "seed": int(trajectory.seed),
        "parameters": {name: float(trajectory.parameters[name]) for name in domain.parameters},
        "grid": to_plain(trajectory.grid),
    }
    return Record(index, notes, digests)


def _require_fit(plan: StorePlan, index: int, trajectory: Trajectory) -> None:
    header = StoreHeader(plan, trajectory.grid)
    where = f"domain {plan.domain.name}: trajectory {index}"
    num, shape = plan.num_snapshots, plan.shape
    expected: dict[str, tuple[np.ndarray, tuple[int, ...]]] = {
        "velocity": (trajectory.velocity, (num, 3, *shape)),
        "pressure": (trajectory.pressure, (num, *shape)),
        "medium": (trajectory.medium, shape),
        "time": (trajectory.time, (num,)),
        **{name: (values, (num, *shape)) for name, values in trajectory.scalars.items()},
    }
    for name, (values, must) in expected.items():
        dtype = "float64" if name == "time" else "float32"
        if values.shape != must or values.dtype != dtype:
            found = f"{values.dtype}{values.shape}"
            raise RuntimeError(f"{where}: {name} is {found}, must be {dtype}{must}. Mend its source.")
        if not np.isfinite(values).all():
            raise RuntimeError(f"{where}: {name} is not finite. Check the simulation's time step and input.")
    if trajectory.grid.shape != plan.shape:
        raise RuntimeError(f"{where}: its grid is {trajectory.grid.shape}, must be {plan.shape}. Mend its source.")
    if trajectory.grid.boundary != plan.domain.boundary:
        found, must = trajectory.grid.boundary, plan.domain.boundary
        raise RuntimeError(f"{where}: its grid ends in {found}, the domain in {must}. Make the grid with the domain's.")
    if set(trajectory.parameters) != set(plan.domain.parameters):
        found = sorted(trajectory.parameters)
        raise RuntimeError(f"{where}: its parameters are {found}, must be {plan.domain.parameters}. Mend its source.")
    if not np.isfinite(list(trajectory.parameters.values())).all():
        raise RuntimeError(f"{where}: its parameters {trajectory.parameters} are not finite. Mend its source.")
    scalars = [spec.name for spec in plan.domain.scalars]
    if set(trajectory.scalars) != set(scalars):
        raise RuntimeError(
            f"{where}: its scalars are {sorted(trajectory.scalars)}, must be {scalars}. Mend its source."
        )
    defect = max(measure_defect(velocity, header) for velocity in trajectory.velocity)
    for line in describe_defect(where, defect, header):
        raise RuntimeError(line)


def _complete(path: Path, plan: StorePlan, written: dict[int, Record]) -> tuple[str, list[int]]:
    """Publish the store if every trajectory is there; returns its digest, or "" and what is missing.

    What this process wrote or verified already is trusted; every byte of the others' is verified here, before the
    lock is taken: nobody waits for that, and nobody writes a trajectory anew that was found whole.
    """
    partial, indices = partial_folder(path), range(plan.num_trajectories)
    found = read_records(partial)  # whoever appends the last record sees all
    missing = [i for i in indices if i not in found]
    records = {} if missing else {i: written.get(i) or first_intact(partial, found[i]) for i in indices}
    missing += [i for i, record in records.items() if record is None]
    if missing:
        return (read_digest(path), []) if path.exists() else ("", missing)
    with lock(partial) as is_there:
        if not is_there or path.exists():  # another process came first
            return read_digest(path), []
        digest = _finish(partial, plan, [record for record in records.values() if record is not None])
        publish(partial, path)
    remove_journals(path)
    return digest, []


def _finish(partial: Path, plan: StorePlan, records: list[Record]) -> str:
    """Write the metadata, the small arrays and the digests; return the store's digest."""
    header = StoreHeader(plan, _parse_grid(partial, records[0]))
    if other := [r.trajectory for r in records if r.notes["grid"] != records[0].notes["grid"]]:
        raise RuntimeError(f"store={partial}: the grids of trajectories 0 and {other[0]} differ. One store, one grid.")
    arrays = field_arrays(header)
    create_group(partial, list(arrays.values()), header_attributes(header))
    small: dict[str, Any] = coordinate_values(header.grid) | {
        "time": [r.notes["time"] for r in records],
        "seed": [r.notes["seed"] for r in records],
        **{name: [r.notes["parameters"][name] for r in records] for name in plan.domain.parameters},
    }
    digests = {name: digest for record in records for name, digest in record.digests.items()}
    for name, values in small.items():
        digests |= write_chunk(partial, arrays[name], (0,) * len(arrays[name].shape), np.asarray(values))
    digest = seal(partial, digests)
    problems = check_files(partial, list(arrays.values()), deep=False)
    if problems:
        raise StoreError(problems[0])
    return digest


def _parse_grid(partial: Path, record: Record) -> Grid:
    return parse_config(Grid, record.notes["grid"], source=f"{partial}, journal of trajectory {record.trajectory}")


def _require_one_grid(partial: Path, written: dict[int, Record], trajectory: Trajectory) -> None:
    """Raise RuntimeError if a trajectory on disk has another grid; all shares' are looked at when all are there."""
    for record in list(written.values())[:1]:
        if to_plain(trajectory.grid) != record.notes["grid"]:
            where, grid = f"store={partial}: trajectory {record.trajectory}", record.notes["grid"]
            raise RuntimeError(f"{where} has grid {grid}, the next {trajectory.grid}. One store holds one grid.")


def _require_same_plan(found: StorePlan, folder: Path, path: Path, plan: StorePlan) -> None:
    """Raise ConfigError naming the first value in which the store on disk was planned differently."""
    was, now = _flatten(to_plain(found)), _flatten(to_plain(plan))
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key) and not (folder == path and key == "solver_version"):
            raise ConfigError(
                f"store={path}: {key} is {was.get(key)!r} in {folder.name}, {now.get(key)!r} now. "
                "Remove that folder or choose another."
            )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    stem = f"{prefix}." if prefix else ""
    return {k: v for key, item in value.items() for k, v in _flatten(item, f"{stem}{key}").items()}


def _require_space(path: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise ConfigError(
            f"store={path}: needs {num_bytes / 1e9:.3g} GB, {free / 1e9:.3g} GB are free. "
            "Free space, choose another folder or fewer trajectories."
        )
