"""Zarr v3 arrays whose chunks are shards: one file of inner chunks, each with its checksum; written and read here.

The metadata are zarr's own (codec ``sharding_indexed``: every inner chunk followed by its CRC-32C, then the index and
its CRC-32C), so zarr, xarray and tensorstore read the same files. Shodh reads them directly: the offset of an inner
chunk follows from the layout, its bytes go straight into the caller's array, and each is compared with the hash that
``data.digests`` keeps for that very place: what is lost, damaged or taken from elsewhere raises. zarr would read a
missing shard as fill values (NaN here, so that it shows even there).
"""

import errno
import hashlib
import json
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, NamedTuple

import google_crc32c
import numpy as np
import xxhash

LAYOUT_VERSION = 2  # of stores and of what is left half way; 1 had one compressed file per snapshot
MEND = "Restore it from a copy or remove the folder and write it again."
REMEDIES = {  # what is no fault of the file
    errno.EMFILE: "Raise `ulimit -n`: this process has too many files open.",
    errno.ENFILE: "Close other programs: this machine has too many files open.",
    errno.EACCES: "Mend its permissions.",
    errno.EPERM: "Mend its permissions.",
}
BLOCK = 2**21  # bytes read, hashed and scaled at a time: they stay in the cache between these three
MOST_OPEN = (
    512  # files that all readers keep open, half of what Linux allows a process: opening costs as much as 200 KB
)
CHECKSUM_BYTES = 4
HASH_BYTES = 8

assert sys.byteorder == "little", "chunks are little endian and read without conversion"


class StoreError(RuntimeError):
    """A stored file is missing or damaged; the message names it in one line."""


class ArrayLayout(NamedTuple):
    """What one array must be; its shape is a multiple of its chunk, and that of its inner chunk along one axis."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]  # of one file
    dtype: str
    attributes: dict[str, Any]
    inner: tuple[int, ...] = ()  # of what has a checksum of its own; empty means the whole chunk

    def chunk_indices(self) -> Iterator[tuple[int, ...]]:
        return product(*(range(n // c) for n, c in zip(self.shape, self.chunk, strict=True)))

    def chunk_file(self, index: Sequence[int]) -> str:
        """Path below the group. Dots, so that all files of an array lie in one folder and one scan sees them."""
        return f"{self.name}/" + ".".join(["c", *map(str, index)])

    @property
    def inner_shape(self) -> tuple[int, ...]:
        return self.inner or self.chunk

    @property
    def num_inner(self) -> int:
        """Inner chunks per file."""
        return math.prod(self.chunk) // math.prod(self.inner_shape)

    @property
    def inner_bytes(self) -> int:
        """Bytes of one inner chunk, without its checksum."""
        return math.prod(self.inner_shape) * np.dtype(self.dtype).itemsize


class FileDigest(NamedTuple):
    """Size and SHA-256 of one file; of a chunk's file also the XXH3-64 of its inner chunks, in hexadecimal."""

    num_bytes: int
    sha256: str
    inner: str = ""


# What rows (x, y, z) are multiplied by: one number (40 % faster), an array that broadcasts over them, or nothing.
Factor = np.float32 | np.ndarray | None

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
    """Write the file of one chunk and return its digest. Raises StoreError when the disk refuses it."""
    assert values.size == math.prod(array.chunk), f"{array.name}: {values.shape} is no chunk {array.chunk}"
    name = array.chunk_file(index)
    whole, num_bytes, hashes = hashlib.sha256(), 0, []
    with new_file(folder / name) as stream:
        for part in values.reshape(array.num_inner, -1):
            content = np.ascontiguousarray(part, array.dtype)
            hashes.append(xxhash.xxh3_64_hexdigest(content.data))
            for piece in (content.data.cast("B"), _checksum(content)):
                stream.write(piece)
                whole.update(piece)
                num_bytes += len(piece)
        index_bytes = _shard_index(array)
        stream.write(index_bytes)
        whole.update(index_bytes)
    return {name: FileDigest(num_bytes + len(index_bytes), whole.hexdigest(), "".join(hashes))}


class ArrayReader:
    """Reads the inner chunks of one array, each verified against the hash that the digests hold for its place."""

    def __init__(self, folder: str | Path, array: ArrayLayout, digests: Digests):
        self.array = array
        names = [array.chunk_file(index) for index in array.chunk_indices()]
        self._files = [f"{folder}/{name}" for name in names]
        self._num_bytes, self._dtype = array.inner_bytes, np.dtype(array.dtype)  # asked for at every read
        self._stride = self._num_bytes + CHECKSUM_BYTES
        try:
            self._hashes = [bytes.fromhex(digests[name].inner) for name in names]
        except (KeyError, ValueError):
            self._hashes = []
        if {len(hashes) for hashes in self._hashes} != {HASH_BYTES * array.num_inner}:
            raise StoreError(f"{folder}: the digests of {array.name} are incomplete. {MEND}")
        self._open: dict[int, _OpenFile] = {}  # those of the first files read
        _readers.add(self)

    def read(self, chunk: int = 0, inner: int = 0) -> np.ndarray:
        """A new array of the inner chunk's shape; ``chunk`` counts files in C order, ``inner`` chunks in the file."""
        values = np.empty(self.array.inner_shape, self.array.dtype)
        self.fill(values, chunk, inner)
        return values

    def fill(self, out: np.ndarray, chunk: int = 0, inner: int = 0, factors: Sequence[Factor] = (None,)) -> None:
        """Read an inner chunk into ``out`` (contiguous); as many equal parts as there are ``factors`` are multiplied.

        Raises StoreError for a file that is missing, short or altered; ``out`` is then undefined.
        """
        assert out.nbytes == self._num_bytes and out.dtype == self._dtype and out.flags.c_contiguous
        try:
            file = self._open.get(chunk) or self._open_file(chunk)
            found = _fill(file.descriptor, out, inner * self._stride, factors)
        except OSError as error:
            raise _unreadable(self._files[chunk], error) from None
        if found != self._hashes[chunk][HASH_BYTES * inner : HASH_BYTES * (inner + 1)]:
            raise StoreError(f"{self._files[chunk]}: damaged, inner chunk {inner} differs from its digest. {MEND}")

    def _open_file(self, chunk: int) -> "_OpenFile":
        """A file, kept open if it is among the first; all that is kept is let go when there are too many."""
        try:
            file = _OpenFile(self._files[chunk])
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            for reader in list(_readers):
                reader._open.clear()
            file = _OpenFile(self._files[chunk])
        if sum(len(reader._open) for reader in list(_readers)) < MOST_OPEN:
            self._open[chunk] = file
        return file


class _OpenFile:
    """A file open for reading, closed when the last who holds it lets go: threads never close each other's."""

    def __init__(self, file: str):
        self.descriptor = -1  # in case it cannot be opened
        self.descriptor = os.open(file, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.descriptor >= 0:
            close(self.descriptor)


_readers: "weakref.WeakSet[ArrayReader]" = weakref.WeakSet()


def _unreadable(file: str | Path, error: OSError) -> StoreError:
    """The error that says how to mend that a file cannot be read: few reasons are faults of the file."""
    return StoreError(f"{file}: cannot be read ({error.strerror or error}). {REMEDIES.get(error.errno or 0, MEND)}")


def read_attributes(folder: Path) -> dict[str, Any]:
    """The attributes of the group. Raises StoreError when there is no readable group."""
    attributes = read_json(folder / "zarr.json").get("attributes", {})
    return attributes if isinstance(attributes, dict) else {}


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises StoreError when there is none."""
    try:
        node = json.loads(file.read_bytes())
    except OSError as error:
        raise _unreadable(file, error) from None
    except (ValueError, RecursionError):
        node = None
    if not isinstance(node, dict):
        raise StoreError(f"{file}: not valid JSON. {MEND}")
    return node


@contextmanager
def new_file(file: Path) -> Iterator[IO[bytes]]:
    """A new binary file, its folder made if need be. Raises StoreError when the disk refuses it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as stream:
            yield stream
    except OSError as error:
        raise StoreError(f"{file}: cannot be written ({error.strerror}). Free space or move the folder.") from None


def array_codecs(array: ArrayLayout) -> list[dict[str, Any]]:
    """The codecs in the metadata of an array, see https://zarr-specs.readthedocs.io, sharding-indexed 1.0."""
    index_codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    codecs = [{"name": "bytes"}, {"name": "crc32c"}] if array.dtype == "uint8" else index_codecs  # bytes have no order
    sharding = {
        "chunk_shape": list(array.inner_shape),
        "codecs": codecs,
        "index_codecs": index_codecs,
        "index_location": "end",
    }
    return [{"name": "sharding_indexed", "configuration": sharding}]


def _read_exactly(descriptor: int, out: np.ndarray, offset: int) -> None:
    """Fill ``out``; one call returns at most 2 GB on Linux, and less at will on a network file system."""
    count = os.preadv(descriptor, [out.data], offset)
    if count == out.nbytes:
        return
    rest = out.data.cast("B")[count:]
    while rest and count:
        offset += count
        count = os.preadv(descriptor, [rest], offset)
        rest = rest[count:]
    if rest:
        raise OSError("truncated")


def _fill(descriptor: int, out: np.ndarray, offset: int, factors: Sequence[Factor]) -> bytes:
    """The hash of what was read into ``out``, as many equal parts of which as there are factors were multiplied."""
    if factors == (None,):
        _read_exactly(descriptor, out, offset)
        return xxhash.xxh3_64_digest(out.data)
    found = xxhash.xxh3_64()
    for rows, factor in zip(out.reshape(len(factors), -1, *out.shape[-2:]), factors, strict=True):
        _fill_rows(descriptor, rows, offset, found, factor)
        offset += rows.nbytes
    return found.digest()


def _fill_rows(descriptor: int, rows: np.ndarray, offset: int, found: xxhash.xxh3_64, factor: Factor) -> None:
    """Read rows (x, y, z), add them to the hash and multiply them, while they are in the processor's cache."""
    num = max(1, BLOCK // max(1, rows[0].nbytes))
    for first in range(0, len(rows), num):
        block = rows[first : first + num]
        _read_exactly(descriptor, block, offset)
        offset += block.nbytes
        found.update(block.data)
        if isinstance(factor, np.ndarray):
            np.multiply(block, factor if len(factor) == 1 else factor[first : first + num], out=block)
        elif factor is not None:
            np.multiply(block, factor, out=block)


def _create_metadata(folder: Path, arrays: Sequence[ArrayLayout], attributes: Mapping[str, Any]) -> None:
    import zarr  # here, as only writing needs it
    from zarr.codecs import Crc32cCodec

    group = zarr.create_group(folder, attributes=dict(attributes), overwrite=True)
    for array in arrays:
        group.create_array(
            array.name,
            shape=array.shape,
            shards=array.chunk,
            chunks=array.inner_shape,
            dtype=array.dtype,
            compressors=[Crc32cCodec()],
            fill_value=np.nan if array.dtype.startswith("float") else 255 if array.dtype == "uint8" else -1,
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=array.dims,
            attributes=array.attributes,
        )


def _shard_index(array: ArrayLayout) -> bytes:
    """Offset and size of every inner chunk, and their checksum."""
    stride = array.inner_bytes + CHECKSUM_BYTES
    entries = np.array([(k * stride, stride) for k in range(array.num_inner)], "<u8").tobytes()
    return entries + _checksum(entries)


def _checksum(content: bytes | np.ndarray) -> bytes:
    return google_crc32c.value(content).to_bytes(CHECKSUM_BYTES, "little")
