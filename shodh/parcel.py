"""A set of files as parts of bounded size with digests, for carrying results and state from one machine to another.

A parcel is a folder: each file under its own name, or as NAME.part-000, NAME.part-001, ... where it is larger than a
part may be, and ``parcel.json``, which lists the size of every file and, in order, size and SHA-256 of its parts. A new
parcel replaces the old one only when it is complete; parts that both hold stay the same files. Nothing is unpacked
before every part has been verified.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from shodh.config import ConfigError

PART_BYTES = 15 * 2**20
CONTENTS = "parcel.json"


class Part(NamedTuple):
    """A file of a parcel, as its contents list it."""

    name: str
    size: int
    sha256: str


def pack(files: Mapping[str, Path], folder: Path, part_bytes: int = PART_BYTES) -> int:
    """Put files into the parcel under the names given (relative, with /); returns the number of parts.

    Raises ConfigError when something other than a parcel stands there.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / CONTENTS).is_file():
        raise ConfigError(f"export={folder}: holds something that is no export. Choose another folder, or empty it.")
    fresh = folder.with_name(folder.name + ".fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    contents = {name: _pack_file(file, fresh, folder, name, part_bytes) for name, file in files.items()}
    (fresh / CONTENTS).write_text(json.dumps({"files": contents}, indent=1))
    stale = folder.with_name(folder.name + ".stale")
    shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)
    return sum(len(entry["parts"]) for entry in contents.values())


def unpack(folder: Path, into: Path) -> list[str]:
    """Join all files of a parcel in the folder ``into``, which is made; returns their names.

    Raises ConfigError, before anything is written, for a part that is missing or damaged, and where ``into`` holds
    something already.
    """
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ConfigError(f"run={into}: is there already. Give another run, or remove it.")
    contents = _read_contents(folder)
    for parts in contents.values():
        for part in parts:
            _require_intact(folder, part)
    fresh = into.with_name(into.name + ".fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    for name, parts in contents.items():
        _join_file([folder / part.name for part in parts], fresh / name)
    if into.exists():
        into.rmdir()
    fresh.rename(into)
    return list(contents)


def _pack_file(file: Path, fresh: Path, before: Path, name: str, part_bytes: int) -> dict[str, Any]:
    """Put one file's parts into ``fresh``; what ``parcel.json`` says of it."""
    parts, is_split = [], file.stat().st_size > part_bytes
    (fresh / name).parent.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(_read_parts(file, part_bytes)):
        part = f"{name}.part-{number:03d}" if is_split else name
        _put_part(content, fresh / part, before / part)
        parts.append(Part(part, len(content), hashlib.sha256(content).hexdigest()))
    return {"size": sum(part.size for part in parts), "parts": [part._asdict() for part in parts]}


def _put_part(content: bytes, path: Path, before: Path) -> None:
    """The file of the parcel before where it holds the same, so that nothing is written or carried away again."""
    if before.is_file() and before.stat().st_size == len(content) and before.read_bytes() == content:
        with contextlib.suppress(OSError):  # a file system without links
            return os.link(before, path)
    path.write_bytes(content)


def _read_parts(file: Path, part_bytes: int) -> Iterator[bytes]:
    """The file's content piece by piece; of an empty file one piece without content."""
    with file.open("rb") as stream:
        yield stream.read(part_bytes)
        while content := stream.read(part_bytes):
            yield content


def _read_contents(folder: Path) -> dict[str, list[Part]]:
    """The parts of every file, in order."""
    try:
        files = json.loads((folder / CONTENTS).read_text())["files"]
        contents = {name: [Part(p["name"], p["size"], p["sha256"]) for p in files[name]["parts"]] for name in files}
        for name, parts in contents.items():
            if sum(part.size for part in parts) != files[name]["size"]:
                raise ValueError(f"the parts of {name} do not make it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"import={folder}: {CONTENTS} cannot be read ({what}). Fetch the export again.") from None
    for name in [*contents, *(part.name for parts in contents.values() for part in parts)]:
        if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ConfigError(
                f"import={folder}: {CONTENTS} names {name!r}, outside the folder. Do not use this export."
            )
    return contents


def _require_intact(folder: Path, part: Part) -> None:
    path = folder / part.name
    if not path.is_file():
        raise ConfigError(f"part={path}: is missing. Fetch it again, or export again.")
    if hashlib.sha256(path.read_bytes()).hexdigest() != part.sha256:
        raise ConfigError(f"part={path}: is damaged (its SHA-256 differs). Fetch it again, or export again.")


def _join_file(parts: Iterable[Path], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        for part in parts:
            stream.write(part.read_bytes())
