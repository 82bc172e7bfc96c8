"""Folders of Zarr v3 arrays in which every chunk is one checksummed file: written, read, digested and checked here.

The metadata are zarr's own, so zarr and xarray open the same folder. Chunks are encoded and decoded directly: zarr
would read a missing chunk as fill values (NaN here, so that it shows even there) and takes twice the time. Digests
stand in the empty child group ``digests``, the one kind of side file that zarr lists without a warning.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numcodecs.zstd import Zstd

ZSTD = Zstd(level=1, checksum=True)
DIGESTS = "digests/zarr.json"
MEND = "Restore it from a copy or remove the folder and write it again."


class StoreError(RuntimeError):
    """A stored file is missing or damaged; the message names it in one line."""


class ArrayLayout(NamedTuple):
    """What one array must be; its shape is a multiple of its chunk."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    attributes: dict[str, Any]

    def chunk_indices(self) -> Iterator[tuple[int, ...]]:
        return product(*(range(n // c) for n, c in zip(self.shape, self.chunk, strict=True)))

    def chunk_file(self, index: Sequence[int]) -> str:
        return "/".join([self.name, "c", *map(str, index)])


class FileDigest(NamedTuple):
    """Size and SHA-256 of one file."""

    num_bytes: int
    sha256: str


Digests = dict[str, FileDigest]  # by path relative to the folder, "/" between its parts


def create_group(folder: Path, arrays: Sequence[ArrayLayout], attributes: Mapping[str, Any]) -> None:
    """Write the metadata of a group and of its still empty arrays; the group's own last, so that it vouches for all."""
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        _create_metadata(Path(scratch), arrays, attributes)
        for array in arrays:
            (folder / array.name).mkdir(parents=True, exist_ok=True)
            os.replace(f"{scratch}/{array.name}/zarr.json", folder / array.name / "zarr.json")
        os.replace(f"{scratch}/zarr.json", folder / "zarr.json")


def write_chunk(folder: Path, array: ArrayLayout, index: Sequence[int], values: np.ndarray) -> Digests:
    """Write one chunk and return its digest. Raises StoreError when the disk refuses it."""
    assert values.size == math.prod(array.chunk), f"{array.name}: {values.shape} is no chunk {array.chunk}"
    name = array.chunk_file(index)
    little_endian = np.ascontiguousarray(values, np.dtype(array.dtype).newbyteorder("<"))
    encoded = bytes(ZSTD.encode(little_endian.reshape(-1)))
    _write_file(folder / name, encoded)
    return {name: FileDigest(len(encoded), hashlib.sha256(encoded).hexdigest())}


def read_chunk(folder: str | Path, array: ArrayLayout, index: Sequence[int]) -> np.ndarray:
    """One chunk as a read-only array. Raises StoreError when its file is missing, truncated or altered."""
    file = f"{folder}/{array.chunk_file(index)}"
    try:
        with open(file, "rb") as stream:
            decoded = ZSTD.decode(stream.read())
    except OSError as error:
        raise StoreError(f"{file}: cannot be read ({error.strerror}). {MEND}") from None
    except RuntimeError as error:
        raise StoreError(f"{file}: damaged ({error}). {MEND}") from None
    values = np.frombuffer(decoded, np.dtype(array.dtype).newbyteorder("<"))
    if values.size != math.prod(array.chunk):
        raise StoreError(f"{file}: holds {values.size} values, not {math.prod(array.chunk)}. {MEND}")
    return values.reshape(array.chunk)


def read_whole(folder: str | Path, array: ArrayLayout) -> np.ndarray:
    """An array that is stored as a single chunk."""
    assert array.shape == array.chunk, f"{array.name}: has several chunks"
    return read_chunk(folder, array, (0,) * len(array.shape))


def seal(folder: Path, chunks: Digests) -> str:
    """Write the digests of all files, last of all, and return the one digest of the folder.

    That digest is the SHA-256 of the lines ``path size sha256``, sorted: equal contents have equal digests.
    """
    metadata = sorted(p for p in folder.rglob("zarr.json") if p.parent.name != "digests")
    digests = chunks | {p.relative_to(folder).as_posix(): digest_file(p) for p in metadata}
    digest = _digest_of_digests(digests)
    attributes = {"digest": digest, "files": {name: list(digests[name]) for name in sorted(digests)}}
    node = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    _write_file(folder / DIGESTS, json.dumps(node, indent=0).encode())
    return digest


def read_digest(folder: Path) -> str:
    """The one digest of a sealed folder. Raises StoreError when the folder is not sealed or its digests are altered."""
    return _digest_of_digests(_read_digests(folder))


def publish(partial: Path, path: Path) -> None:
    """Flush all to disk, then move a sealed folder to its final name in one step; what stood there is removed.

    One flush at the end costs a tenth of one per chunk; until then a chunk's digest tells whether it is whole.
    """
    os.sync()
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    os.rename(partial, path)
    os.sync()
    shutil.rmtree(old, ignore_errors=True)


def read_attributes(folder: Path) -> dict[str, Any]:
    """The attributes of the group. Raises StoreError when there is no readable group."""
    return _read_json(folder / "zarr.json").get("attributes", {})


def check_files(folder: Path, arrays: Sequence[ArrayLayout], *, deep: bool) -> list[str]:
    """What differs from the layout and the digests, one line each; ``deep`` reads every byte."""
    problems = [line for array in arrays for line in _check_metadata(folder, array)]
    try:
        digests = _read_digests(folder)
    except StoreError as error:
        return [*problems, str(error)]
    present = _sizes(folder)
    expected = {array.chunk_file(index) for array in arrays for index in array.chunk_indices()}
    metadata = {"zarr.json"} | {f"{array.name}/zarr.json" for array in arrays}
    for name in sorted((expected | metadata | set(digests)) - set(present)):
        problems.append(f"{folder / name}: missing. {MEND}")
    for name in sorted(set(present) - expected - metadata - {DIGESTS}):
        if not name.rpartition("/")[2].startswith("."):
            problems.append(f"{folder / name}: not part of the layout. Remove this file.")
    for name in sorted((expected | metadata) & set(present)):
        if name not in digests:
            problems.append(f"{folder / name}: has no digest. {MEND}")
        elif present[name] != digests[name].num_bytes:
            problems.append(f"{folder / name}: {present[name]} bytes, not {digests[name].num_bytes}. {MEND}")
        elif deep and digest_file(folder / name) != digests[name]:
            problems.append(f"{folder / name}: differs from its digest. {MEND}")
    return problems


def digest_file(file: Path) -> FileDigest:
    content = file.read_bytes()
    return FileDigest(len(content), hashlib.sha256(content).hexdigest())


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by relative path."""
    sizes, waiting = {}, [(str(folder), "")]
    while waiting:
        place, prefix = waiting.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append((entry.path, f"{prefix}{entry.name}/"))
                else:
                    sizes[prefix + entry.name] = entry.stat().st_size
    return sizes


def _write_file(file: Path, content: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    except OSError as error:
        raise StoreError(f"{file}: cannot be written ({error.strerror}). Free space or move the folder.") from None


def _create_metadata(folder: Path, arrays: Sequence[ArrayLayout], attributes: Mapping[str, Any]) -> None:
    import zarr  # here, as only writing needs it
    from zarr.codecs import ZstdCodec

    group = zarr.create_group(folder, attributes=dict(attributes), overwrite=True)
    for array in arrays:
        group.create_array(
            array.name,
            shape=array.shape,
            chunks=array.chunk,
            dtype=array.dtype,
            compressors=[ZstdCodec(level=ZSTD.level, checksum=True)],
            fill_value=np.nan if array.dtype.startswith("float") else -1,
            dimension_names=array.dims,
            attributes=array.attributes,
        )


def _digest_of_digests(digests: Mapping[str, FileDigest]) -> str:
    lines = "".join(f"{name} {digests[name].num_bytes} {digests[name].sha256}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def _read_digests(folder: Path) -> Digests:
    attributes = _read_json(folder / DIGESTS).get("attributes", {})
    if "digest" not in attributes:
        raise StoreError(f"{folder}: incomplete, its digests were never written. {MEND}")
    digests = {name: FileDigest(*entry) for name, entry in attributes["files"].items()}
    if _digest_of_digests(digests) != attributes["digest"]:
        raise StoreError(f"{folder / DIGESTS}: altered since it was written. {MEND}")
    return digests


def _check_metadata(folder: Path, array: ArrayLayout) -> list[str]:
    file = folder / array.name / "zarr.json"
    try:
        found = _read_json(file)
    except StoreError:
        return [f"{folder}: array {array.name!r} is missing. {MEND}"]
    attributes = found.get("attributes", {})
    codecs = [(c.get("name"), c.get("configuration", {})) for c in found.get("codecs", [])]
    rows: list[tuple[str, Any, Any]] = [
        ("shape", found.get("shape"), list(array.shape)),
        ("dtype", found.get("data_type"), array.dtype),
        ("dims", found.get("dimension_names"), list(array.dims)),
        ("chunk", found.get("chunk_grid", {}).get("configuration", {}).get("chunk_shape"), list(array.chunk)),
        ("codecs", codecs, [("bytes", {"endian": "little"}), ("zstd", {"level": ZSTD.level, "checksum": True})]),
        *((f"attribute {key}", attributes.get(key), array.attributes[key]) for key in array.attributes),
    ]
    return [f"{file}: {what} is {is_!r}, must be {must!r}. {MEND}" for what, is_, must in rows if is_ != must]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise StoreError(f"{file}: cannot be read ({error.strerror}). {MEND}") from None
    except ValueError:
        raise StoreError(f"{file}: not valid JSON. {MEND}") from None
