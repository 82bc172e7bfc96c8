"""Writes gathers and velocity maps as files of OpenFWI's own names, shapes and sign; killed half way, it continues.

    FlatVel_A/data/data1.npy, FlatFault_A/seis2_1_0.npy      float32 (maps, 5, 1000, 70)
    FlatVel_A/model/model1.npy, FlatFault_A/vel2_1_0.npy     float32 (maps, 1, 70, 70)

OpenFWI has 500 maps a file, and 60 (Vel), 108 (Fault) or 134 (Style) files a family. The first number in the name of
a Fault file is 2-4 (A) or 6-8 (B) in its public split files; here it is the number of layers.

Each pair of files is decided by (seed, family, its number) alone. It is written under temporary names, its digests are
entered in the family's ``SHA256SUMS`` (as sha256sum writes it, so that ingest verifies it), what it was made from in
``manifest.jsonl``, and it is renamed; so what stands under its final name is complete, and a file that is not in the
manifest is somebody else's and is never written over. Several processes may write one folder side by side.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from data.journal import parse_share
from data.simulate.openfwi_families import CELLS, FAMILIES, FamilyName, draw_velocity_map
from shodh.config import ConfigError, to_plain
from shodh.disk import sync

MANIFEST, DIGESTS = "manifest.jsonl", "SHA256SUMS"
GATHER_SHAPE = (5, 1000, CELLS)
RECIPE = 1  # of maps and survey; another number means that the same seed gives other files

# Gathers (maps, 5, 1000, 70) over velocity maps (maps, 1, 70, 70) [m/s], both float32.
Record = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class GathersConfig:
    """Which files are written, and how."""

    folder: Path
    families: tuple[FamilyName, ...]
    num_files: int  # per family, each a pair of gathers and maps
    maps_per_file: int = 500
    maps_per_batch: int = 10  # recorded at once; more for a GPU. Without influence on what is written
    shard: str = "0/1"  # i/n: every n-th file, beginning with the i-th; n processes share the work
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        for name in ("num_files", "maps_per_file", "maps_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1. Raise it.")
        if not self.families:
            raise ValueError(f"families=(): none to draw. Name some of {', '.join(FAMILIES)}.")
        twice = sorted({name for name in self.families if self.families.count(name) > 1})
        if twice:
            raise ValueError(f"families={list(self.families)}: {twice[0]} is named twice. Name each family once.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative. Give 0 or a positive number.")
        parse_share(self.shard)


class FilePair(NamedTuple):
    """One file of gathers and one of the maps beneath them, before they exist."""

    family: FamilyName
    number: int  # within the family, from 0 on
    gathers: str  # path within the folder
    maps: str
    num_layers: int | None  # None: each map draws its own


class WrittenFiles(NamedTuple):
    """What ``write_files`` did."""

    num_written: int  # pairs that this call added
    num_intact: int  # pairs of this shard that were there already and agree with their digests


def plan_files(config: GathersConfig) -> list[FilePair]:
    """The pairs of files of ``config.shard``, spread over its families."""
    pairs = [_plan_pair(family, number) for number in range(config.num_files) for family in config.families]
    share = parse_share(config.shard)
    return [pair for number, pair in enumerate(pairs) if share.holds(number)]


def write_files(
    config: GathersConfig, record: Record, *, progress: Callable[[int], object] | None = None
) -> WrittenFiles:
    """Make the files of ``config.shard`` complete; ``progress`` is told of maps as they are recorded or verified.

    Raises ConfigError when a file was made from another config, was altered, or is none of ours, and when the disk is
    too small; RuntimeError when a gather is not finite.
    """
    config.folder.mkdir(parents=True, exist_ok=True)
    pairs, entries = plan_files(config), _read_manifest(config.folder)
    missing = [pair for pair in pairs if not _is_complete(config, pair, entries.get(pair.gathers))]
    _require_space(config, len(missing))
    if progress is not None:
        progress((len(pairs) - len(missing)) * config.maps_per_file)
    for pair in missing:
        _write_pair(config, pair, record, progress)
    return WrittenFiles(len(missing), len(pairs) - len(missing))


def draw_maps(config: GathersConfig, pair: FilePair) -> np.ndarray:
    """The velocity maps (maps, 1, 70, 70) of one file [m/s], float32."""
    family, order = FAMILIES[pair.family], list(FAMILIES).index(pair.family)
    seeds = ([config.seed, order, pair.number, index] for index in range(config.maps_per_file))
    drawn = (draw_velocity_map(family, np.random.default_rng(seed), num_layers=pair.num_layers) for seed in seeds)
    return np.stack(list(drawn))[:, None]


def _plan_pair(name: FamilyName, number: int) -> FilePair:
    family = FAMILIES[name]
    if family.faulted:
        index, layers = divmod(number, len(family.num_layers))
        stem = f"{family.num_layers[layers]}_1_{index}.npy"
        return FilePair(
            name, number, f"{family.folder}/seis{stem}", f"{family.folder}/vel{stem}", family.num_layers[layers]
        )
    gathers, maps = f"data/data{number + 1}.npy", f"model/model{number + 1}.npy"
    return FilePair(name, number, f"{family.folder}/{gathers}", f"{family.folder}/{maps}", None)


def _write_pair(
    config: GathersConfig, pair: FilePair, record: Record, progress: Callable[[int], object] | None
) -> None:
    gathers, maps = paths = [config.folder / pair.gathers, config.folder / pair.maps]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw_maps(config, pair)
    with _locked(_temporary(maps)) as file:
        np.save(file, drawn)
        file.flush()
        _record_gathers(_temporary(gathers), drawn, config, record, progress)
        digests = {str(path.relative_to(config.folder)): _digest(_temporary(path)) for path in paths}
        for path in paths:
            sync(_temporary(path))
        _append(config.folder, _entry(config, pair), digests)
        for path in (maps, gathers):
            os.replace(_temporary(path), path)
            sync(path.parent)


def _temporary(path: Path) -> Path:
    """Where a file is written; what a killed process left there is written over."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """An empty file that is open for this process alone."""
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{path}: another process is writing it. Give each process its own shard=i/n.") from None
        file.truncate(0)
        yield file


def _record_gathers(
    path: Path, maps: np.ndarray, config: GathersConfig, record: Record, progress: Callable[[int], object] | None
) -> None:
    """A batch at a time into a file of its final size, so that memory does not grow with the file."""
    gathers = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(maps), *GATHER_SHAPE))
    for first in range(0, len(maps), config.maps_per_batch):
        batch = slice(first, first + config.maps_per_batch)
        recorded = record(maps[batch])
        if not np.isfinite(recorded).all():
            raise RuntimeError(f"{path.name}: a gather of maps {first} on is not finite. Check device and solver.")
        gathers[batch] = recorded
        if progress is not None:
            progress(len(recorded))
    gathers.flush()


def _is_complete(config: GathersConfig, pair: FilePair, entry: dict[str, Any] | None) -> bool:
    """Whether both files are there and agree with the manifest; raises ConfigError where they are there and do not."""
    paths = {name: config.folder / name for name in (pair.gathers, pair.maps)}
    there = {name: path for name, path in paths.items() if path.exists()}
    for path in there.values():
        if entry is None:
            raise ConfigError(f"{path}: is not in {MANIFEST}, so it is none of ours. Choose another folder.")
        for key, value in _entry(config, pair).items():
            if entry.get(key) != value:
                raise ConfigError(
                    f"{path}: was made with {key}={entry.get(key)!r}, now {value!r}. "
                    "Remove it or choose another folder."
                )
    digests = _read_digests(config.folder, Path(pair.gathers).parts[0])
    for name, path in there.items():
        if name not in digests:
            raise ConfigError(f"{path}: has no line in {DIGESTS}. Remove the file to have it made again.")
        if _digest(path) != digests[name]:
            raise ConfigError(f"{path}: truncated or altered since it was written. Remove it to have it made again.")
    return len(there) == 2


def _entry(config: GathersConfig, pair: FilePair) -> dict[str, Any]:
    """What the manifest says of a pair."""
    n = config.maps_per_file
    return to_plain(
        {
            **pair._asdict(),
            "seed": config.seed,
            "recipe": RECIPE,
            "gathers_shape": (n, *GATHER_SHAPE),
            "maps_shape": (n, 1, CELLS, CELLS),
        }
    )


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest entry per file of gathers; a torn last line is forgotten."""
    return {entry["gathers"]: entry for entry in _entries(folder / MANIFEST)}


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _append(folder: Path, entry: dict[str, Any], digests: dict[str, str]) -> None:
    """Enter the digests, then what they are of: an entry without digests cannot come to be."""
    with open(folder / MANIFEST, "ab") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_EX)
        _add_digests(folder, Path(entry["gathers"]).parts[0], digests)
        manifest.write(b"\n" * _is_torn(folder / MANIFEST) + json.dumps(entry).encode() + b"\n")
        manifest.flush()
        os.fsync(manifest.fileno())


def _read_digests(folder: Path, family: str) -> dict[str, str]:
    """By path within the folder."""
    path = folder / family / DIGESTS
    lines = path.read_text().splitlines() if path.exists() else []
    return {f"{family}/{name}": digest for digest, name in (line.split("  ", 1) for line in lines)}


def _add_digests(folder: Path, family: str, digests: dict[str, str]) -> None:
    """Write the family's list anew, under a temporary name, so that no reader meets half a line."""
    path, listed = folder / family / DIGESTS, _read_digests(folder, family) | digests
    lines = [f"{digest}  {name.removeprefix(f'{family}/')}\n" for name, digest in sorted(listed.items())]
    with open(_temporary(path), "w") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(_temporary(path), path)


def _is_torn(path: Path) -> bool:
    """Whether the last line has no end, because its writer was killed."""
    content = path.read_bytes()
    return bool(content) and not content.endswith(b"\n")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_space(config: GathersConfig, num_missing: int) -> None:
    needed = num_missing * config.maps_per_file * 4 * (int(np.prod(GATHER_SHAPE)) + CELLS**2)
    free = shutil.disk_usage(config.folder).free
    if needed > free:
        raise ConfigError(
            f"folder={config.folder}: needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free. "
            "Free space, choose another folder or fewer files."
        )
