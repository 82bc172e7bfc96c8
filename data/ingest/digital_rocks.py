"""Segmented images of rock: headerless raw, TIFF (one file or a folder of slices), MAT v7.3 (key ``bin``), .npz.

A raw file says neither its shape nor which value is pore. The shape is given, stands in the name (..._110x110x110_...)
or is a cube; the phase is given, or the minority that percolates, and said aloud either way. Axes are those of the file
in C order, x the slowest; MATLAB stores the first axis fastest, so those of a MAT file are reversed.
Source: Digital Rocks Portal, https://www.digitalrocksportal.org; Prodanovic et al. 2015, doi:10.17612/P7CC7K.
"""

import math
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from scipy import ndimage

from data.array_store import write_array_store
from data.ingest.source import (
    DOWNLOAD,
    Say,
    Unverified,
    find_files,
    open_hdf5,
    read_part,
    reading,
    require_dataset,
    verify_files,
    without_guesses,
)
from data.rocks import KIND, rock_arrays
from data.writer import WrittenStore
from shodh.config import ConfigError

SUFFIXES = (".raw", ".tif", ".tiff", ".mat", ".npz")
AMBIGUOUS = 0.45  # a minority phase above this share may be either
BLOCK = 256  # percolation is sought in the middle block of so many voxels a side


@dataclass(frozen=True, kw_only=True)
class DigitalRocksConfig:
    """What the file does not say."""

    shape: tuple[int, int, int] | None = None  # of a raw file, slowest axis first
    pore: int | None = None  # value of the pores
    voxel_size: float | None = None  # m
    unverified: Unverified = "refuse"  # a source without SHA256SUMS

    def __post_init__(self) -> None:
        if self.shape is not None and min(self.shape) < 2:
            raise ValueError(f"shape={self.shape}: every axis needs at least 2 voxels. Give that of the image.")
        if self.voxel_size is not None and not 0 < self.voxel_size < 1e-2:
            raise ValueError(f"voxel_size={self.voxel_size}: must be in m, such as 2.25e-6. Convert it.")


class _Image(NamedTuple):
    path: Path
    shape: tuple[int, int, int]
    slices: Callable[[], Iterator[np.ndarray]]  # along the first axis, one at a time


class _Phases(NamedTuple):
    pore: int
    porosity: float
    percolates: list[str]  # axes along which the pores connect two sides of the middle block


def ingest(source: Path, store: Path, config: DigitalRocksConfig, say: Say) -> WrittenStore:
    """Write the store of one image, a slice at a time."""
    files = find_files(source, SUFFIXES)
    provenance = verify_files(files, source, config.unverified, say)
    image = _open_image(files, config)
    phases = _find_phases(image, config)
    say(
        f"{store}: {image.shape} voxels, value {phases.pore} taken for pore "
        f"({'given' if config.pore is not None else 'inferred'}): "
        f"porosity {phases.porosity:.3f}, percolates along {', '.join(phases.percolates) or 'no axis'}"
    )
    attributes = {
        "Conventions": "CF-1.11",
        "title": f"image of rock, {image.shape} voxels",
        "shape": list(image.shape),
        "porosity": phases.porosity,
        "voxel_size": config.voxel_size,
        "pore_value_in_source": phases.pore,
        "pore_value_was": "given" if config.pore is not None else "inferred",
        "percolates": phases.percolates,
        "source": provenance.as_config(),
    }

    def produce(is_done: Callable[[str, Sequence[int]], bool]) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
        for x, values in enumerate(image.slices()):
            if not is_done("pore", (x, 0, 0)):
                yield "pore", (x, 0, 0), (values == phases.pore).astype(np.uint8)

    return write_array_store(store, KIND, rock_arrays(attributes), attributes, produce)


def _open_image(files: list[Path], config: DigitalRocksConfig) -> _Image:
    first = files[0]
    kinds = {path.suffix.lower() for path in files}
    if kinds <= {".tif", ".tiff"}:
        return _open_tiff(files)
    if len(files) > 1:
        raise ConfigError(
            f"source={first.parent}: {len(files)} images. One store holds one rock: give one file, or a folder of TIFF "
            "slices."
        )
    if kinds == {".raw"}:
        return _open_raw(first, config)
    return _open_mat(first) if kinds == {".mat"} else _open_npz(first)


def _open_raw(path: Path, config: DigitalRocksConfig) -> _Image:
    """A memory map of a headerless file, whose size must be that of its shape."""
    size = path.stat().st_size
    named = re.search(r"(\d+)x(\d+)x(\d+)", path.name)
    edge = round(size ** (1 / 3))
    written = (int(named[1]), int(named[2]), int(named[3])) if named else None
    if config.shape is not None and written not in (None, config.shape):
        raise ConfigError(
            f"shape={list(config.shape)}: the name of {path.name} says {list(written or ())}. Drop shape= or rename it."
        )
    if config.shape is not None:
        shape = config.shape
    elif written:
        shape = written
    elif edge**3 == size:
        shape = (edge, edge, edge)
    else:
        raise ConfigError(
            f"shape=None: {path.name} has {size} bytes, no cube, and no shape in its name. Give shape=[x,y,z]."
        )
    if math.prod(shape) != size:
        raise ConfigError(
            f"source={path}: {size} bytes, {shape} voxels of one byte are {math.prod(shape)}. Correct shape=, or "
            f"{DOWNLOAD.lower()}"
        )
    return _Image(path, shape, lambda: iter(np.memmap(path, np.uint8, "r", shape=shape)))


def _open_tiff(files: list[Path]) -> _Image:
    """The pages of a stack, or of a folder of slices numbered without a gap."""
    shapes, num = set(), 0
    for path in files:
        with reading(path), tifffile.TiffFile(path) as file:
            for page in file.pages:
                ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
                if not ends or max(ends) > path.stat().st_size:
                    raise ConfigError(f"source={path}: truncated. {DOWNLOAD}")
                shapes.add(page.shape)
                num += 1
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ConfigError(f"source={files[0].parent}: slices of {len(shapes)} shapes, or colour. Give one grey stack.")
    if num < 2:
        raise ConfigError(f"source={files[0]}: one slice, no volume. Give the folder of all slices.")
    _require_no_gap(files)

    def slices() -> Iterator[np.ndarray]:
        for path in files:
            with reading(path), tifffile.TiffFile(path) as file:
                yield from (page.asarray() for page in file.pages)

    rows, columns = shapes.pop()
    return _Image(files[0], (num, rows, columns), slices)


def _require_no_gap(files: list[Path]) -> None:
    """ConfigError naming the first number that is missing among the slices' names."""
    numbers = [int(found[-1]) for found in (re.findall(r"\d+", path.stem) for path in files) if found]
    if len(files) > 1 and len(numbers) == len(files):
        missing = sorted(set(range(min(numbers), max(numbers) + 1)) - set(numbers))
        if missing:
            raise ConfigError(f"source={files[0].parent}: slice {missing[0]} is missing. {DOWNLOAD}")
        if len(set(numbers)) < len(numbers):
            raise ConfigError(f"source={files[0].parent}: two slices have one number. Keep one image in a folder.")


def _open_mat(path: Path) -> _Image:
    """The array ``bin`` of a MAT v7.3 file, its axes reversed as MATLAB stores them."""
    with open(path, "rb") as stream:
        old = stream.read(10) == b"MATLAB 5.0"
    if old:
        raise ConfigError(f"source={path}: MAT version 5. Save it again with save(..., '-v7.3').")
    with open_hdf5(path) as file:
        dataset = require_dataset(file, "bin", path, ndim=3)
        shape = (dataset.shape[2], dataset.shape[1], dataset.shape[0])

    def slices() -> Iterator[np.ndarray]:
        with open_hdf5(path) as file:
            for x in range(shape[0]):
                yield read_part(file, "bin", np.s_[:, :, x]).T

    return _Image(path, shape, slices)


def _open_npz(path: Path) -> _Image:
    """The one array of an archive, or that named ``pore``, uncompressed as it is read; the archive has a checksum."""
    with reading(path), zipfile.ZipFile(path) as archive:
        members = archive.namelist()
        name = "pore.npy" if "pore.npy" in members else members[0]
        if name != "pore.npy" and len(members) > 1:
            raise ConfigError(f"source={path}: holds {', '.join(members)}. Name the image's array `pore`.")
        with archive.open(name) as stream:
            shape, dtype = _read_npy_header(stream, path)
        if archive.getinfo(name).file_size < math.prod(shape) * dtype.itemsize:
            raise ConfigError(f"source={path}: {name} is shorter than its shape {shape}. {DOWNLOAD}")

    def slices() -> Iterator[np.ndarray]:
        with reading(path), zipfile.ZipFile(path) as archive, archive.open(name) as stream:
            _read_npy_header(stream, path)
            count = shape[1] * shape[2] * dtype.itemsize
            for _ in range(shape[0]):
                yield np.frombuffer(stream.read(count), dtype).reshape(shape[1:])
            if stream.read(1):  # reaching the end is what verifies the archive's checksum
                raise ConfigError(f"source={path}: {name} is longer than its shape {shape}. {DOWNLOAD}")

    return _Image(path, shape, slices)


def _read_npy_header(stream: Any, path: Path) -> tuple[tuple[int, int, int], np.dtype]:
    """Shape and type that a .npy stream states, which then stands at the data (zipfile's is no IO[bytes])."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with without_guesses():
        shape, fortran, dtype = read(stream)
    if len(shape) != 3 or fortran or dtype.kind not in "bui":
        raise ConfigError(
            f"source={path}: its array is {dtype}{shape}, must be whole numbers (x, y, z) in C order. Convert it."
        )
    return (shape[0], shape[1], shape[2]), dtype


def _find_phases(image: _Image, config: DigitalRocksConfig) -> _Phases:
    """Which value is pore, by the config or as the minority that percolates."""
    counts, block = _survey(image)
    if len(counts) != 2:
        raise ConfigError(f"source={image.path}: one value only, {list(counts)}: no rock and no pores. {DOWNLOAD}")
    pore = config.pore if config.pore is not None else min(counts, key=lambda value: counts[value])
    if pore not in counts:
        raise ConfigError(f"pore={pore}: the image holds {sorted(counts)}. Choose one of them.")
    porosity = counts[pore] / sum(counts.values())
    percolates = _percolating_axes(block == pore)
    if config.pore is None and (porosity > AMBIGUOUS or not percolates):
        why = "too near a half" if porosity > AMBIGUOUS else "but it percolates along no axis"
        first, second = sorted(counts)
        raise ConfigError(
            f"pore=None: {pore} is the minority, {porosity:.3f} of the voxels, {why}. Give pore={first} "
            f"or pore={second}."
        )
    return _Phases(pore, porosity, percolates)


def _survey(image: _Image) -> tuple[dict[int, int], np.ndarray]:
    """How often each of at most two values occurs, and the middle block of the image; a slice at a time."""
    counts: dict[int, int] = {}
    start = [max(0, (n - BLOCK) // 2) for n in image.shape]
    rows, columns = (slice(s, s + BLOCK) for s in start[1:])
    block = []
    for x, values in enumerate(image.slices()):
        if values.dtype.kind not in "bui" or values.shape != image.shape[1:]:
            found = f"{values.dtype}{values.shape}"
            raise ConfigError(f"source={image.path}: slice {x} is {found}, must be whole numbers. Segment it first.")
        for value, count in zip(*np.unique_counts(values), strict=True):
            counts[int(value)] = counts.get(int(value), 0) + int(count)
        if len(counts) > 2:
            raise ConfigError(
                f"source={image.path}: more than two values ({sorted(counts)[:4]} ...): grey, or damaged. Segment it "
                "into pore and solid first."
            )
        if start[0] <= x < start[0] + BLOCK:
            block.append(values[rows, columns].copy())
    return counts, np.stack(block)


def _percolating_axes(pore: np.ndarray) -> list[str]:
    """Axes along which face-connected pores join two opposite sides."""
    labels = np.empty(pore.shape, np.int32)
    ndimage.label(pore, output=labels)
    found = []
    for axis, name in enumerate("xyz"):
        first, last = np.take(labels, 0, axis), np.take(labels, -1, axis)
        if (set(np.unique(first)) & set(np.unique(last))) - {0}:
            found.append(name)
    return found
