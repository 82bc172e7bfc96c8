"""Writes a store of fields trajectory by trajectory; killed half way, the next call continues.

A store is built in ``NAME.partial``: chunks first, then one line per finished trajectory in ``.journal.jsonl`` with the
digests of its chunks, against which they are verified before a next call counts on them. When all are there, the small
arrays and the digests are written and the folder is renamed, so a store under its final name is always complete.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data.chunks import (
    ArrayLayout,
    Digests,
    FileDigest,
    StoreError,
    check_files,
    create_group,
    digest_file,
    publish,
    read_attributes,
    read_digest,
    seal,
    write_chunk,
)
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
from shodh.config import ConfigError, to_plain

JOURNAL = ".journal.jsonl"

# Yields (index, Trajectory) for the trajectory indices it is given, in any order.
Simulate = Callable[[Sequence[int]], Iterator[tuple[int, Trajectory]]]


class WrittenStore(NamedTuple):
    """What ``write_store`` did."""

    digest: str
    num_written: int  # trajectories that this call added; 0 if the store was complete already


class _Record(NamedTuple):
    """The journal's line about one trajectory that is on disk."""

    trajectory: int
    time: list[float]
    seed: int
    parameters: dict[str, float]
    digests: Digests


def write_store(path: str | Path, plan: StorePlan, simulate: Simulate) -> WrittenStore:
    """Make the store that ``plan`` describes complete, simulating only trajectories that are not on disk yet.

    Raises ConfigError when another plan's store stands there, when the disk is too small, or when another process is
    writing it; RuntimeError when a trajectory does not fit the plan or is not finite.
    """
    path = Path(path)
    if path.exists():
        _require_same_plan(path, path, plan)
        return WrittenStore(read_digest(path), 0)
    partial = partial_folder(path)
    partial.mkdir(parents=True, exist_ok=True)
    with _locked_journal(partial) as journal:
        records = _read_journal(partial, journal, plan, path)
        missing = [i for i in range(plan.num_trajectories) if i not in records]
        _require_space(path, plan.num_bytes * len(missing) // plan.num_trajectories)
        header = parse_header(read_attributes(partial), str(partial)) if (partial / "zarr.json").exists() else None
        for index, trajectory in simulate(missing) if missing else ():
            if header is None:
                header = StoreHeader(plan, trajectory.grid)
                create_group(partial, list(field_arrays(header).values()), header_attributes(header))
            if index not in missing:
                raise RuntimeError(f"store={path}: trajectory {index} came, asked were {missing}. Mend the solver.")
            records[index] = _append(partial, header, index, trajectory)
            _write_record(journal, records[index])
        left = [i for i in missing if i not in records]
        if left or header is None:
            raise RuntimeError(f"store={path}: the simulation gave no trajectory {left}. Run it again to continue.")
        digest = _finish(partial, header, records)
        publish(partial, path)
        (path / JOURNAL).unlink()
    return WrittenStore(digest, len(missing))


def _append(partial: Path, header: StoreHeader, index: int, trajectory: Trajectory) -> _Record:
    """Write the fields of one trajectory and return what the journal shall say of it."""
    _require_fit(header, index, trajectory)
    domain, arrays = header.plan.domain, field_arrays(header)
    digests = write_chunk(partial, arrays[domain.medium.name], (index, 0, 0, 0), trajectory.medium)
    for t in range(header.plan.num_snapshots):
        digests |= write_chunk(partial, arrays[domain.velocity.name], (index, t, 0, 0, 0, 0), trajectory.velocity[t])
        digests |= write_chunk(partial, arrays[domain.pressure.name], (index, t, 0, 0, 0), trajectory.pressure[t])
    parameters = {name: float(trajectory.parameters[name]) for name in domain.parameters}
    time = [float(t) for t in trajectory.time]
    return _Record(index, time, int(trajectory.seed), parameters, digests)


def _require_fit(header: StoreHeader, index: int, trajectory: Trajectory) -> None:
    plan, grid = header
    where = f"domain {plan.domain.name}: trajectory {index}"
    num, shape = plan.num_snapshots, plan.shape
    expected: dict[str, tuple[np.ndarray, tuple[int, ...]]] = {
        "velocity": (trajectory.velocity, (num, 3, *shape)),
        "pressure": (trajectory.pressure, (num, *shape)),
        "medium": (trajectory.medium, shape),
        "time": (trajectory.time, (num,)),
    }
    for name, (values, must) in expected.items():
        dtype = "float64" if name == "time" else "float32"
        if values.shape != must or values.dtype != dtype:
            found = f"{values.dtype}{values.shape}"
            raise RuntimeError(f"{where}: {name} is {found}, must be {dtype}{must}. Mend its source.")
        if not np.isfinite(values).all():
            raise RuntimeError(f"{where}: {name} is not finite. Check the simulation's time step and input.")
    if trajectory.grid != grid:
        raise RuntimeError(f"{where}: its grid is {trajectory.grid}, the store's {grid}. One store holds one grid.")
    if set(trajectory.parameters) != set(plan.domain.parameters):
        found = sorted(trajectory.parameters)
        raise RuntimeError(f"{where}: its parameters are {found}, must be {plan.domain.parameters}. Mend its source.")
    defect = max(measure_defect(velocity, header) for velocity in trajectory.velocity)
    for line in describe_defect(where, defect, header):
        raise RuntimeError(line)


def _finish(partial: Path, header: StoreHeader, records: dict[int, _Record]) -> str:
    """Write the small arrays and the digests; return the store's digest."""
    arrays = field_arrays(header)
    ordered = [records[i] for i in range(header.plan.num_trajectories)]
    small: dict[str, Any] = coordinate_values(header.grid) | {
        "time": [r.time for r in ordered],
        "seed": [r.seed for r in ordered],
        **{name: [r.parameters[name] for r in ordered] for name in header.plan.domain.parameters},
    }
    digests = {name: digest for record in ordered for name, digest in record.digests.items()}
    for name, values in small.items():
        digests |= _write_single_chunk(partial, arrays[name], np.asarray(values))
    digest = seal(partial, digests)
    problems = check_files(partial, list(arrays.values()), deep=False)
    if problems:
        raise StoreError(problems[0])
    return digest


def _write_single_chunk(partial: Path, array: ArrayLayout, values: np.ndarray) -> Digests:
    return write_chunk(partial, array, (0,) * len(array.shape), values)


@contextmanager
def _locked_journal(partial: Path) -> Iterator[IO[bytes]]:
    """The journal, open for this process alone."""
    with open(partial / JOURNAL, "a+b") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"store={partial}: another process is writing it. Wait for it or stop it.") from None
        yield journal


def _read_journal(partial: Path, journal: IO[bytes], plan: StorePlan, path: Path) -> dict[int, _Record]:
    """The finished trajectories whose chunks are intact; a torn last line or a damaged trajectory is forgotten."""
    if not (partial / "zarr.json").exists():
        return {}
    _require_same_plan(partial, path, plan)
    journal.seek(0)
    records = {}
    for line in journal.read().split(b"\n"):
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        fields["digests"] = {name: FileDigest(*entry) for name, entry in fields["digests"].items()}
        record = _Record(**fields)
        if _is_intact(partial, record):
            records[record.trajectory] = record
    journal.truncate(0)
    for record in records.values():
        _write_record(journal, record)
    return records


def _write_record(journal: IO[bytes], record: _Record) -> None:
    journal.write(json.dumps(record._asdict()).encode() + b"\n")
    journal.flush()


def _is_intact(partial: Path, record: _Record) -> bool:
    return all((partial / name).is_file() and digest_file(partial / name) == d for name, d in record.digests.items())


def _require_same_plan(folder: Path, path: Path, plan: StorePlan) -> None:
    """Raise ConfigError naming the first value in which the store on disk was planned differently."""
    found = _flatten(to_plain(parse_header(read_attributes(folder), str(folder)).plan))
    wanted = _flatten(to_plain(plan))
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key) and not (folder == path and key == "solver_version"):
            raise ConfigError(
                f"store={path}: {key} is {found.get(key)!r} in {folder.name}, {wanted.get(key)!r} now. "
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
