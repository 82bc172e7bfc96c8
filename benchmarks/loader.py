"""Does reading keep up? Verified snapshots against the fastest unverified readers, and a training step with the loader.

    python benchmarks/loader.py [--quick]

Snapshots of 64^3 cells (flux and pressure, 4.2 MB) in random order into new arrays, one thread. The competitors read
the same values from files of their own without checksums; `cold` drops the files from the page cache before every pass.
The loader that opens and normalises reads velocity, pressure and medium of each sample as training scripts often do;
ours reads the same anew, with one thread and, as a user would, with two.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np
import tensorstore
import torch
import zarr
from figures import Figure, at_least, control, report, stated, time_interleaved
from random_store import write_random_store

from data.mixture import FieldMixture, MixtureConfig
from data.reader import Store
from data.simulate.porous_media import DOMAIN
from data.statistics import FieldStatistics

RESOLUTION = 64
SNAPSHOTS_PER_SHARD = 8
UNVERIFIED = ("h5py contiguous", "tensorstore", "tensorstore sharded", "zarr-python", "zarr-python sharded")

Read = Callable[[int], Sequence[np.ndarray]]


class Fields(NamedTuple):
    """The same snapshots that every format holds."""

    velocity: np.ndarray  # float32 (snapshot, 3, x, y, z)
    pressure: np.ndarray  # float32 (snapshot, x, y, z)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer snapshots and rounds")
    parser.add_argument(
        "--folder", type=Path, help="where the files are written and removed again (default: temporary)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    num_trajectories, num_rounds = (8, 11) if options.quick else (48, 15)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="shodh-loader-") as scratch:
        folder = Path(scratch)
        store = write_random_store(folder / DOMAIN.name, DOMAIN, RESOLUTION, num_trajectories, SNAPSHOTS_PER_SHARD)
        fields = read_all(store)
        readers = open_unverified(folder, fields, store.medium(0)) | read_ours(store)
        require_equal_values(readers, fields)
        figures = compare_warm(readers, len(fields.velocity), num_rounds)
        figures += compare_cold(readers, folder, len(fields.velocity), num_rounds)
        figures += compare_with_a_loader_that_opens_and_normalises(store, folder, num_rounds)
    from training_step import compare_training_steps

    figures += compare_training_steps(num_steps=3 if options.quick else 6)
    return report("loader", figures)


def read_all(store: Store) -> Fields:
    """The store's contents in memory, to be written again in the other formats."""
    num, n = store.num_trajectories * store.num_snapshots, RESOLUTION
    fields = Fields(np.empty((num, 3, n, n, n), np.float32), np.empty((num, n, n, n), np.float32))
    for i in range(num):
        store.read_stored(*divmod(i, store.num_snapshots), fields.velocity[i], fields.pressure[i])
    return fields


def read_ours(store: Store) -> dict[str, Read]:
    """Our verified readers: of what is stored, and of velocity, which takes a multiplication more."""

    def stored(i: int) -> tuple[np.ndarray, np.ndarray]:
        velocity, pressure = np.empty((3, *store.grid.shape), np.float32), np.empty(store.grid.shape, np.float32)
        store.read_stored(*divmod(i, store.num_snapshots), velocity, pressure)
        return velocity, pressure

    return {"ours": stored, "ours as velocity": lambda i: store.snapshot(*divmod(i, store.num_snapshots))}


def open_unverified(folder: Path, fields: Fields, medium: np.ndarray) -> dict[str, Read]:
    """Write the fields as each competitor likes them and return what reads one snapshot of each."""
    with h5py.File(folder / "contiguous.h5", "w") as file:
        for name, values in fields._asdict().items():
            file.create_dataset(name, data=values)
        file.create_dataset("medium", data=medium)
    h5 = h5py.File(folder / "contiguous.h5", "r")
    readers: dict[str, Read] = {"h5py contiguous": read_from({name: h5[name] for name in fields._fields})}
    for sharded in (False, True):
        name = "sharded" if sharded else "plain"
        for field, values in fields._asdict().items():
            one = (1, *values.shape[1:])
            shards = (SNAPSHOTS_PER_SHARD, *values.shape[1:]) if sharded else None
            array = zarr.create_array(
                folder / name / field, shape=values.shape, dtype="float32", chunks=one, shards=shards, compressors=None
            )
            array[:] = values
        suffix = " sharded" if sharded else ""
        arrays = {field: zarr.open_array(folder / name / field, mode="r") for field in fields._fields}
        readers["zarr-python" + suffix] = read_from(arrays)
        opened = {field: open_tensorstore(folder / name / field) for field in fields._fields}
        readers["tensorstore" + suffix] = lambda i, opened=opened: [opened[f][i].read().result() for f in opened]
    return readers


def read_from(arrays: dict) -> Read:
    return lambda i: [arrays[field][i] for field in arrays]


def open_tensorstore(path: Path) -> tensorstore.TensorStore:
    """One thread for copies and for files, like every other reader here; no cache of its own."""
    context = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
    kvstore = {"driver": "file", "path": str(path)}
    spec = {"driver": "zarr3", "kvstore": kvstore, "context": context}
    return tensorstore.open(spec, read=True).result()


def require_equal_values(readers: dict[str, Read], fields: Fields) -> None:
    """Every reader gives the same numbers; if not, no comparison is worth anything."""
    for name in (*UNVERIFIED, "ours"):
        for i in (0, len(fields.velocity) - 1):
            for found, wanted in zip(readers[name](i), (fields.velocity[i], fields.pressure[i]), strict=True):
                if not np.array_equal(np.asarray(found), wanted):
                    raise RuntimeError(f"{name}: snapshot {i} differs from what was written.")


def compare_warm(readers: dict[str, Read], num_snapshots: int, num_rounds: int) -> list[Figure]:
    """Throughput of each reader from the page cache, and ours over the fastest of the others, round by round."""
    order = np.random.default_rng(0).permutation(num_snapshots)

    def passes(read: Read) -> Callable[[], None]:
        return lambda: read_in_order(read, order)

    works = {name: passes(read) for name, read in readers.items()} | {"ours again": passes(readers["ours"])}
    return summarise("warm", time_interleaved(works, num_rounds), num_snapshots)


def read_in_order(read: Read, indices: np.ndarray) -> None:
    for i in indices:
        read(int(i))


def compare_cold(readers: dict[str, Read], folder: Path, num_snapshots: int, num_rounds: int) -> list[Figure]:
    """The same from disk: every pass reads a few snapshots of files that are not in the page cache."""
    rng = np.random.default_rng(1)
    files = [str(file) for file in folder.rglob("*") if file.is_file()]
    os.sync()

    def passes(read: Read) -> Callable[[], None]:
        return lambda: read_in_order(read, chosen)

    works = {name: passes(read) for name, read in readers.items()} | {"ours again": passes(readers["ours"])}
    rounds = []
    for _ in range(num_rounds):
        chosen = rng.permutation(num_snapshots)[:8]
        times = {}
        for name in rng.permutation(list(works)):
            drop_from_cache(files)
            times[name] = time_once(works[name])
        rounds.append(times)
    return summarise("cold", {name: np.array([times[name] for times in rounds]) for name in works}, 8)


def time_once(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def drop_from_cache(files: list[str]) -> None:
    """Ask the kernel to forget the (clean) pages of these files."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def summarise(kind: str, seconds: dict[str, np.ndarray], num_snapshots: int) -> list[Figure]:
    megabytes = num_snapshots * 16 * RESOLUTION**3 / 1e6
    figures = [stated(f"{kind}: {name}", megabytes / times, "MB/s") for name, times in seconds.items()]
    fastest = min(UNVERIFIED, key=lambda name: float(np.median(seconds[name])))
    ratio = seconds[fastest] / seconds["ours"]
    return [
        *figures,
        at_least(f"{kind}: ours, verified, over {fastest}, not verified", ratio, 0.85),
        control(f"{kind}: ours over ours", seconds["ours again"] / seconds["ours"]),
    ]


def compare_with_a_loader_that_opens_and_normalises(store: Store, folder: Path, num_rounds: int) -> list[Figure]:
    """Normalised batches of 8: ours against a loader that opens an HDF5 file and normalises each sample."""
    scales = FieldStatistics(
        velocity_scale=2.0, pressure_scale=3.0, medium_mean=0.5, medium_scale=2.0
    )  # any, as they only cost time
    one, two = (
        FieldMixture([store], [scales], MixtureConfig(batch_size=8, cache_bytes=0, read_threads=num)) for num in (1, 2)
    )
    steps = range(max(1, len(store.trajectories("train")) * SNAPSHOTS_PER_SHARD // 8))
    order = np.random.default_rng(2).permutation(len(steps) * 8)

    def opening() -> None:
        for start in range(0, len(order), 8):
            samples = [normalised_sample(folder / "contiguous.h5", int(i), scales) for i in order[start : start + 8]]
            [torch.stack(parts) for parts in zip(*samples, strict=True)]

    def ours(mixture: FieldMixture) -> None:
        for step in steps:
            mixture.batch(step)

    works = {"opening": opening, "one": lambda: ours(one), "two": lambda: ours(two), "again": lambda: ours(two)}
    times = time_interleaved(works, num_rounds)
    return [
        stated("batches: opening and normalising over ours on one thread", times["opening"] / times["one"]),
        at_least("batches: opening and normalising over ours", times["opening"] / times["two"], 4.0),
        control("batches: ours over ours", times["again"] / times["two"]),
    ]


def normalised_sample(path: Path, index: int, scales: FieldStatistics) -> tuple[torch.Tensor, ...]:
    """One sample as training scripts read it: open, read, subtract the mean, divide by the deviation."""
    with h5py.File(path, "r") as file:
        arrays: Any = file  # of datasets only
        velocity, pressure, medium = (
            torch.from_numpy(values)
            for values in (arrays["velocity"][index], arrays["pressure"][index], arrays["medium"][:])
        )
    return (
        (velocity - 0.0) / scales.velocity_scale,
        (pressure - 0.0) / scales.pressure_scale,
        (medium - scales.medium_mean) / scales.medium_scale,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
