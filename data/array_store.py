"""Stores of plain arrays that are no fields on a staggered grid (seismic gathers, images of rock).

The same chunks, checksums and digests as a store of fields, and the same promise: built in ``NAME.partial``, continued
where it was interrupted, complete under its final name.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.chunks import ArrayLayout, Digests, FileDigest, StoreError, create_group, read_attributes, write_chunk
from data.digests import check_files, is_intact, publish, read_digest, seal
from data.layout import LAYOUT_VERSION, partial_folder, require_kind
from data.writer import WrittenStore
from shodh.config import ConfigError

JOURNAL = ".journal.jsonl"

# Given whether a chunk (array name, index) is on disk, yields those that are not with their values, in any order.
Produce = Callable[[Callable[[str, Sequence[int]], bool]], Iterator[tuple[str, tuple[int, ...], np.ndarray]]]


def write_array_store(
    path: Path, kind: str, arrays: Mapping[str, ArrayLayout], attributes: Mapping[str, Any], produce: Produce
) -> WrittenStore:
    """Make the store complete, producing only chunks that are not on disk yet; ``num_written`` counts those.

    Raises ConfigError when a store with other attributes stands there, the disk is too small or another process writes.
    """
    header = json.loads(json.dumps({"kind": kind, "layout_version": LAYOUT_VERSION, **attributes}))
    if path.exists():
        _require_same(path, header)
        return WrittenStore(read_digest(path), 0)
    partial = partial_folder(path)
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / JOURNAL, "a+b") as journal:
        _lock(journal, partial)
        digests = _read_journal(partial, journal, header)
        _require_space(path, arrays)
        if not (partial / "zarr.json").exists():
            create_group(partial, list(arrays.values()), header)
        known = len(digests)

        def is_done(name: str, index: Sequence[int]) -> bool:
            return arrays[name].chunk_file(index) in digests

        for name, index, values in produce(is_done):
            written = write_chunk(partial, arrays[name], index, values)
            digests.update(written)
            journal.write(json.dumps(written).encode() + b"\n")
            journal.flush()
        digest = seal(partial, digests)
        problems = check_files(partial, list(arrays.values()), deep=False)
        if problems:
            raise StoreError(problems[0])
        publish(partial, path)
    (path / JOURNAL).unlink()
    return WrittenStore(digest, len(digests) - known)


def open_array_store(
    path: Path, kind: str, layout: Callable[[Mapping[str, Any]], Mapping[str, ArrayLayout]], *, deep: bool = False
) -> tuple[dict[str, Any], str]:
    """Attributes and digest of a complete store of this kind, whose arrays must be those of ``layout(attributes)``.

    Every chunk file's presence and size are checked, with ``deep`` every byte. Raises ConfigError in one line.
    """
    if not path.is_dir():
        state = "incomplete, write it again to continue" if partial_folder(path).is_dir() else "no such folder"
        raise ConfigError(f"store={path}: {state}. Ingest it first: python launch/ingest_data.py --help")
    try:
        attributes = read_attributes(path)
        require_kind(attributes, kind, str(path))
        problems = check_files(path, list(layout(attributes).values()), deep=deep)
        if problems:
            raise ConfigError(problems[0])
        return attributes, read_digest(path)
    except StoreError as error:
        raise ConfigError(str(error)) from None
    except KeyError as error:
        raise ConfigError(f"store={path}: its attributes lack {error}. Ingest it again.") from None


def _lock(journal: IO[bytes], partial: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"store={partial}: another process is writing it. Wait for it or stop it.") from None


def _read_journal(partial: Path, journal: IO[bytes], header: Mapping[str, Any]) -> Digests:
    """Digests of the chunks that are on disk and intact; a torn last line is forgotten."""
    if not (partial / "zarr.json").exists():
        return {}
    _require_same(partial, header)
    journal.seek(0)
    digests: Digests = {}
    for line in journal.read().split(b"\n"):
        try:
            entries = json.loads(line)
        except ValueError:
            continue
        for name, entry in entries.items():
            file, digest = partial / name, FileDigest(*entry)
            if is_intact(file, digest):
                digests[name] = digest
    journal.truncate(0)
    journal.write(b"".join(json.dumps({name: digest}).encode() + b"\n" for name, digest in digests.items()))
    journal.flush()
    return digests


def _require_same(folder: Path, header: Mapping[str, Any]) -> None:
    found = read_attributes(folder)
    for key in sorted(set(found) | set(header)):
        if found.get(key) != header.get(key):
            raise ConfigError(
                f"store={folder}: {key} is {str(found.get(key))[:80]!r} there, {str(header.get(key))[:80]!r} now. "
                "Remove that folder or choose another."
            )


def _require_space(path: Path, arrays: Mapping[str, ArrayLayout]) -> None:
    wanted = sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in arrays.values())
    free = shutil.disk_usage(path.parent).free
    if wanted > free:
        raise ConfigError(f"store={path}: needs {wanted / 1e9:.3g} GB, {free / 1e9:.3g} GB are free. Free space.")
