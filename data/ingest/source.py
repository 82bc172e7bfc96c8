"""Files of public data sets: found, verified against a manifest of digests, opened so that damage becomes one line.

A plain .npy or HDF5 file has no checksum: a flipped bit of a value stays a plausible value. A manifest catches it:
``SHA256SUMS`` beside the files (the output of ``sha256sum *``) or at the head of the source, or ``NAME.sha256``.
Without a manifest a source is refused unless the user accepts it as it is; its digests are recorded all the same.
"""

import hashlib
import math
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np

from shodh.config import ConfigError

MANIFEST = "SHA256SUMS"
DOWNLOAD = "Download it again."
OUTLIER = 1000.0  # largest over mean deviation: turbulence and seismograms stay below 200, a flipped exponent does not
Say = Callable[[str], None]
Unverified = Literal["refuse", "accept"]

# What a damaged header makes of h5py, numpy and tifffile; anything else is a mistake of ours and shall surface as one.
DAMAGE = (
    *(OSError, RuntimeError, KeyError, ValueError, TypeError, IndexError, OverflowError, MemoryError, EOFError),
    *(AttributeError, SyntaxError, UserWarning, struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile),
)


class Provenance(NamedTuple):
    """Which bytes a store was made from."""

    sha256: dict[str, str]  # by path relative to the source
    verified: bool  # whether a manifest vouched for them

    def as_config(self) -> dict[str, Any]:
        """What the store keeps of it."""
        return {"sha256": self.sha256, "verified_by_manifest": self.verified}


def find_files(source: Path, suffixes: Sequence[str]) -> list[Path]:
    """The source itself, or the files in that folder with one of these suffixes, in natural order, none of them empty.

    Raises ConfigError when there is none, or when a manifest in the folder lists one that is not there.
    """
    if source.is_dir():
        files = [p for p in source.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")]
        listed = _read_manifest(source / MANIFEST) if (source / MANIFEST).is_file() else {}
        for name in sorted(listed):
            if Path(name).suffix.lower() in suffixes and not (source / name).is_file():
                raise ConfigError(f"source={source / name}: listed in {MANIFEST}, but missing. {DOWNLOAD}")
        if not files:
            raise ConfigError(f"source={source}: holds no {' or '.join(suffixes)} file. Give the folder that does.")
    else:
        files = [source]
    for path in files:
        if not path.is_file():
            raise ConfigError(f"source={path}: no such file or folder. Check the path.")
        if path.suffix.lower() not in suffixes:
            raise ConfigError(f"source={path}: not a {' or '.join(suffixes)} file. Give one, or a folder of them.")
        if path.stat().st_size == 0:
            raise ConfigError(f"source={path}: empty file. {DOWNLOAD}")
    return sorted(files, key=lambda path: natural_order(path.name))


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sorting key under which data2 comes before data10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def verify_files(files: Sequence[Path], root: Path, unverified: Unverified, say: Say) -> Provenance:
    """Digests of all files, compared with the manifests beside them.

    Raises ConfigError where they differ, a listed file is missing, or none vouches for a file and that is not accepted.
    """
    _require_listed(files, root)
    without = [path for path in files if _expected_digest(path, root) is None]
    if without and unverified == "refuse":
        raise ConfigError(
            f"source={without[0]}: no digest vouches for it, so that damage would go unseen. Record them where the "
            f"files come from (sha256sum FILES > {MANIFEST}, beside them), or give unverified=accept to read it as is."
        )
    digests = {}
    for path in files:
        digest = sha256_of(path)
        expected = _expected_digest(path, root)
        if expected is not None and digest != expected:
            raise ConfigError(
                f"source={path}: its SHA-256 is {digest[:12]}..., its manifest says {expected[:12]}.... {DOWNLOAD}"
            )
        digests[path.relative_to(root).as_posix() if root.is_dir() else path.name] = digest
    if without:
        say(f"source={root}: not verified, no manifest vouches for {len(without)} files; accepted as they are")
    return Provenance(digests, not without)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with reading(path), open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes its reader raise becomes one ConfigError that names the file."""
    try:
        yield
    except ConfigError:
        raise
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConfigError(f"source={path}: cannot be read ({reason}). {DOWNLOAD}") from None


@contextmanager
def without_guesses() -> Iterator[None]:
    """NumPy's warning that it guessed at a header raises; not around a ``yield``, as it is of the whole process."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file open for reading; damage met inside the block is one ConfigError."""
    with reading(path), h5py.File(path, "r") as file:
        yield file


def require_dataset(file: h5py.File | h5py.Group, name: str, path: Path, ndim: int | None = None) -> h5py.Dataset:
    """A dataset of IEEE floats or integers all of whose bytes lie in the file.

    Raises ConfigError naming what is there instead, or what is damaged.
    """
    item = file.get(name)
    if not isinstance(item, h5py.Dataset):
        there = ", ".join(names_in(file)[:12]) or "nothing"
        raise ConfigError(
            f"source={path}: has no dataset {name!r} (there are: {there}). Check the format, or {DOWNLOAD.lower()}"
        )
    if ndim is not None and item.ndim != ndim:
        raise ConfigError(
            f"source={path}: {name} has shape {item.shape}, must have {ndim} axes. Give data of that layout."
        )
    require_plain_numbers(item, name, path)
    require_all_bytes(item, name, path)
    return item


def require_group(file: h5py.File, name: str, path: Path) -> h5py.Group:
    """A group of that name; ConfigError where there is none."""
    item = file.get(name)
    if not isinstance(item, h5py.Group):
        raise ConfigError(
            f"source={path}: has no group {name!r} (there are: {', '.join(names_in(file))}). Check the format."
        )
    return item


def names_in(group: h5py.File | h5py.Group) -> list[str]:
    """Names of what a group holds, sorted."""
    return sorted(str(name) for name in group)


def read_attribute(item: h5py.File | h5py.Group | h5py.Dataset, name: str) -> Any:
    """An attribute as plain Python: text, finite numbers, or a list of them. Raises KeyError or TypeError."""
    value = np.asarray(item.attrs[name]).tolist()
    plain = [v.decode() if isinstance(v, bytes) else v for v in (value if isinstance(value, list) else [value])]
    for v in plain:
        if not isinstance(v, (str, int, float)) or (isinstance(v, float) and not math.isfinite(v)):
            raise TypeError(f"attribute {name} is {v!r}, no text or number")
    return plain if isinstance(value, list) else plain[0]


def read_part(file: h5py.File | h5py.Group, name: str, index: Any) -> np.ndarray:
    """``file[name][index]`` of a dataset that ``require_dataset`` has passed."""
    dataset = file[name]
    assert isinstance(dataset, h5py.Dataset), name
    return np.asarray(dataset[index])


def require_plain_numbers(dataset: h5py.Dataset, name: str, path: Path) -> None:
    """ConfigError unless the numbers are of a standard type: one damaged bit in a type message rescales all values."""
    types = h5py.h5t
    standard = [types.IEEE_F32LE, types.IEEE_F64LE, types.IEEE_F32BE, types.IEEE_F64BE]
    standard += [types.STD_U8LE, types.STD_I8LE, types.STD_I32LE, types.STD_I64LE, types.STD_U16LE, types.STD_I16LE]
    if not any(dataset.id.get_type().equal(kind) for kind in standard):
        raise ConfigError(f"source={path}: {name} is of type {dataset.dtype}, no plain number. {DOWNLOAD}")


def require_all_bytes(dataset: h5py.Dataset, name: str, path: Path) -> None:
    """ConfigError unless every byte of a dataset is stored in the file; HDF5 reads what is not as zeros."""
    size, handle, wanted = path.stat().st_size, dataset.id, math.prod(dataset.shape) * dataset.dtype.itemsize
    if dataset.chunks is None:
        places = [(handle.get_offset(), handle.get_storage_size())]
        complete = places[0][0] is not None and places[0][1] == wanted
    else:
        places = []
        handle.chunk_iter(lambda chunk: places.append((chunk.byte_offset, chunk.size)))
        number = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
        complete = len(places) == number
    if not complete or not all(0 < start and 0 < length and start + length <= size for start, length in places):
        raise ConfigError(f"source={path}: {name} is not wholly in the file. {DOWNLOAD}")
    places.sort()
    if any(a + n > b for (a, n), (b, _) in zip(places, places[1:], strict=False)):
        raise ConfigError(f"source={path}: {name} has pieces that overlap. {DOWNLOAD}")


def open_npy(path: Path) -> np.ndarray:
    """A memory map of a .npy file that holds float32 in C order and nothing else."""
    with reading(path), without_guesses():
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.memmap) or array.dtype != np.dtype("<f4"):
        kind = getattr(array, "dtype", type(array).__name__)
        raise ConfigError(f"source={path}: holds {kind}, not float32. Give the published file.")
    if not array.flags.c_contiguous:
        raise ConfigError(f"source={path}: its values are in Fortran order. Save it again in C order.")
    if array.offset + array.nbytes != path.stat().st_size:
        raise ConfigError(
            f"source={path}: {path.stat().st_size} bytes, its header says {array.offset + array.nbytes}. {DOWNLOAD}"
        )
    return array


def require_finite(values: np.ndarray, name: str, path: Path) -> np.ndarray:
    """The same values; ConfigError naming how many of them are NaN or infinite."""
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise ConfigError(f"source={path}: {name} has {bad} values that are NaN or infinite. {DOWNLOAD}")
    return values


def refuse_outliers(values: np.ndarray, name: str, path: Path) -> None:
    """ConfigError where one value stands so far out that it is a flipped exponent and no physics."""
    deviation = np.abs(values.astype(np.float64) - float(np.median(values)))
    mean = float(deviation.mean())
    if mean > 0 and float(deviation.max()) > OUTLIER * mean:
        ratio = float(deviation.max()) / mean
        raise ConfigError(
            f"source={path}: a value of {name} lies {ratio:.1e} mean deviations off. It is damaged: {DOWNLOAD.lower()}"
        )


def spacing_of(coordinates: np.ndarray, name: str, path: Path) -> float:
    """The one distance between ascending, evenly spaced coordinates. Raises ConfigError where they are not."""
    require_finite(coordinates, name, path)
    steps = np.diff(coordinates.astype(np.float64))
    if coordinates.ndim != 1 or not len(steps) or not steps.min() > 0:
        raise ConfigError(f"source={path}: {name} does not ascend. Its axis may be reversed; write it ascending.")
    spacing = float(steps.mean())
    tolerance = 4 * float(np.finfo(coordinates.dtype).eps) * float(np.abs(coordinates).max()) + 1e-4 * spacing
    if float(np.abs(steps - spacing).max()) > tolerance:
        raise ConfigError(f"source={path}: {name} is not evenly spaced. Only uniform grids are read here; resample it.")
    return spacing


def _require_listed(files: Sequence[Path], root: Path) -> None:
    """ConfigError where the manifest at the head of the source lists a file of this kind that is not there."""
    manifest = root / MANIFEST
    suffixes = {path.suffix for path in files}
    for name in sorted(_read_manifest(manifest)) if manifest.is_file() else ():
        if Path(name).suffix in suffixes and not (root / name).is_file():
            raise ConfigError(f"source={root / name}: listed in {MANIFEST}, but missing. {DOWNLOAD}")


def _expected_digest(path: Path, root: Path) -> str | None:
    """What a manifest beside a file, or one of the whole source, says of it; None where there is neither."""
    own, beside, whole = path.with_name(path.name + ".sha256"), path.parent / MANIFEST, root / MANIFEST
    if own.is_file():
        manifest, name, listed = own, path.name, _read_manifest(own, path.name)
    elif beside.is_file():
        manifest, name, listed = beside, path.name, _read_manifest(beside)
    elif whole.is_file():
        manifest, name, listed = whole, path.relative_to(root).as_posix(), _read_manifest(whole)
    else:
        return None
    if name not in listed:
        raise ConfigError(f"source={path}: not listed in {manifest}. Add its line (sha256sum {name}) or move it away.")
    return listed[name]


def _read_manifest(path: Path, only: str | None = None) -> dict[str, str]:
    """Digest by file name; a line is ``digest  name``, or the digest alone in a manifest of one file."""
    listed = {}
    with reading(path):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    for line in lines:
        match = re.fullmatch(r"([0-9a-fA-F]{64})(?: [ *](.+))?", line.strip())
        name = (match[2] or only) if match else None
        if match is None or name is None:
            raise ConfigError(f"source={path}: line {line[:40]!r} is no `digest  name`. Write it with sha256sum.")
        listed[name.removeprefix("./")] = match[1].lower()
    return listed
