"""What vouches for a folder of arrays: size and digests of every file, one digest over them all, and the check.

The digests stand in the empty child group ``digests``, the one kind of side file that zarr lists without a warning.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.chunks import (
    MEND,
    ArrayLayout,
    Digests,
    FileDigest,
    StoreError,
    array_codecs,
    new_file,
    read_attributes,
    read_json,
)

DIGESTS = "digests/zarr.json"


def seal(folder: Path, chunks: Digests) -> str:
    """Write the digests of all files, last of all, and return the one digest of the folder.

    That digest is the SHA-256 of the lines ``path size sha256 inner``, sorted: equal contents have equal digests.
    """
    metadata = sorted(p for p in folder.rglob("zarr.json") if p.parent.name != "digests")
    digests = chunks | {p.relative_to(folder).as_posix(): digest_file(p) for p in metadata}
    digest = _digest_of_digests(digests)
    attributes = {"digest": digest, "files": {name: list(digests[name]) for name in sorted(digests)}}
    node = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    with new_file(folder / DIGESTS) as stream:
        stream.write(json.dumps(node, indent=0).encode())
    return digest


def read_digest(folder: Path) -> str:
    """The one digest of a sealed folder. Raises StoreError when the folder is not sealed or its digests are altered."""
    return _digest_of_digests(read_digests(folder))


def read_digests(folder: Path) -> Digests:
    """The digests of all files of a sealed folder. Raises StoreError as ``read_digest`` does."""
    attributes = read_attributes(folder / "digests")
    if "digest" not in attributes:
        raise StoreError(f"{folder}: incomplete, its digests were never written. {MEND}")
    try:
        digests = {name: FileDigest(*entry) for name, entry in attributes["files"].items()}
        sound = _digest_of_digests(digests) == attributes["digest"]
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise StoreError(f"{folder / DIGESTS}: altered since it was written. {MEND}")
    return digests


def publish(partial: Path, path: Path) -> None:
    """Flush all to disk, then move a sealed folder to its final name in one step; what stood there is removed.

    One flush at the end costs a tenth of one per chunk; until then a chunk's digest tells whether it is whole. What is
    replaced goes by way of ``.NAME.replaced``, a name that nobody else uses: NAME.old and the like are the user's.
    """
    os.sync()
    old = path.with_name(f".{path.name}.replaced")  # may stand there if a call before was killed
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    os.rename(partial, path)
    os.sync()
    shutil.rmtree(old, ignore_errors=True)


def check_files(folder: Path, arrays: Sequence[ArrayLayout], *, deep: bool) -> list[str]:
    """What differs from the layout and the digests, one line each; ``deep`` reads every byte, else of metadata only."""
    problems = {f"{array.name}/zarr.json": _check_metadata(folder, array) for array in arrays}
    try:
        digests = read_digests(folder)
    except StoreError as error:
        return [*(line for lines in problems.values() for line in lines), str(error)]
    present = _sizes(folder)
    expected = {array.chunk_file(index) for array in arrays for index in array.chunk_indices()}
    metadata = {"zarr.json", *problems}
    for name in sorted(expected | metadata | set(digests) | set(present) - {DIGESTS}):
        if not problems.get(name):
            belongs, is_small = name in expected or name in metadata, name in metadata
            problems[name] = _check_file(folder / name, present.get(name), digests.get(name), belongs, deep or is_small)
    return [line for name in sorted(problems) for line in problems[name]]


def digest_file(file: Path) -> FileDigest:
    """Size and SHA-256 of a file, read piece by piece."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileDigest(stream.tell(), digest)


def is_intact(file: Path, digest: FileDigest) -> bool:
    """Whether the file is there and every byte is as it was when the digest was taken."""
    try:
        return file.is_file() and digest_file(file)[:2] == digest[:2]
    except FileNotFoundError:  # moved meanwhile, by a process that published the folder
        return False


def _check_file(file: Path, size: int | None, digest: FileDigest | None, belongs: bool, read: bool) -> list[str]:
    if size is None:
        return [f"{file}: missing. {MEND}"]
    if not belongs:
        return [] if file.name.startswith(".") else [f"{file}: not part of the layout. Remove this file."]
    if digest is None:
        return [f"{file}: has no digest. {MEND}"]
    if size != digest.num_bytes:
        return [f"{file}: {size} bytes, not {digest.num_bytes}. {MEND}"]
    return [f"{file}: differs from its digest. {MEND}"] if read and not is_intact(file, digest) else []


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


def _digest_of_digests(digests: Mapping[str, FileDigest]) -> str:
    lines = "".join(
        f"{name} {digests[name].num_bytes} {digests[name].sha256} {digests[name].inner}\n" for name in sorted(digests)
    )
    return hashlib.sha256(lines.encode()).hexdigest()


def _check_metadata(folder: Path, array: ArrayLayout) -> list[str]:
    file = folder / array.name / "zarr.json"
    try:
        found = read_json(file)
    except StoreError:
        return [f"{folder}: array {array.name!r} is missing or its metadata are not readable. {MEND}"]
    attributes = found.get("attributes")
    attributes = attributes if isinstance(attributes, dict) else {}
    keys = {"name": "regular", "configuration": {"chunk_shape": list(array.chunk)}}
    rows: list[tuple[str, Any, Any]] = [
        ("shape", found.get("shape"), list(array.shape)),
        ("dtype", found.get("data_type"), array.dtype),
        ("dims", found.get("dimension_names"), list(array.dims)),
        ("chunk grid", found.get("chunk_grid"), keys),
        ("codecs", found.get("codecs"), array_codecs(array)),
        *(
            (f"attribute {key}", attributes.get(key), array.attributes.get(key))
            for key in sorted(attributes.keys() | array.attributes.keys())
        ),
    ]
    return [f"{file}: {what} is {is_!r}, must be {must!r}. {MEND}" for what, is_, must in rows if is_ != must]
