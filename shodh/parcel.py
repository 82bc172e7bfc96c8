"""A set of files as parts of bounded size with digests, for carrying results and state from one machine to another.

A parcel is a folder: each file under its own name, or as NAME.part-000, NAME.part-001, ... where it is larger than a
part may be, and ``parcel.json``, which lists size and SHA-256 of every file and part. A new parcel replaces the old one
only when it is complete, and nothing is unpacked before every part has been verified.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from shodh.config import ConfigError

PART_BYTES = 15 * 2**20
CONTENTS = "parcel.json"


def pack(files: Mapping[str, Path], folder: Path, part_bytes: int = PART_BYTES) -> int:
    """Put files into the parcel under the names given (relative, with /); returns the number of parts.

    Raises ConfigError when something other than a parcel stands there.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / CONTENTS).is_file():
        raise ConfigError(f"export={folder}: holds something that is no export. Choose another folder, or empty it.")
    fresh = folder.with_name(folder.name + ".fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    contents = {name: _pack_file(file, fresh, name, part_bytes) for name, file in files.items()}
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
    for entry in contents.values():
        for part in entry["parts"]:
            _require_intact(folder, part)
    fresh = into.with_name(into.name + ".fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    for name, entry in contents.items():
        _join_file(folder, entry, fresh / name)
    if into.exists():
        into.rmdir()
    fresh.rename(into)
    return list(contents)


def _pack_file(file: Path, folder: Path, name: str, part_bytes: int) -> dict[str, Any]:
    """Write one file's parts; what ``parcel.json`` says of it."""
    whole, parts, is_split = hashlib.sha256(), [], file.stat().st_size > part_bytes
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(_read_parts(file, part_bytes)):
        part = f"{name}.part-{number:03d}" if is_split else name
        (folder / part).write_bytes(content)
        whole.update(content)
        parts.append({"name": part, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    return {"size": sum(part["size"] for part in parts), "sha256": whole.hexdigest(), "parts": parts}


def _read_parts(file: Path, part_bytes: int) -> Iterator[bytes]:
    """The file's content piece by piece; of an empty file one piece without content."""
    with file.open("rb") as stream:
        yield stream.read(part_bytes)
        while content := stream.read(part_bytes):
            yield content


def _read_contents(folder: Path) -> dict[str, Any]:
    try:
        contents = json.loads((folder / CONTENTS).read_text())["files"]
        names = [name for key, entry in contents.items() for name in (key, *(part["name"] for part in entry["parts"]))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"import={folder}: {CONTENTS} cannot be read ({what}). Fetch the export again.") from None
    for name in names:
        if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ConfigError(
                f"import={folder}: {CONTENTS} names {name!r}, outside the folder. Do not use this export."
            )
    return contents


def _require_intact(folder: Path, part: Mapping[str, Any]) -> None:
    path = folder / part["name"]
    if not path.is_file():
        raise ConfigError(f"part={path}: is missing. Fetch it again, or export again.")
    if hashlib.sha256(path.read_bytes()).hexdigest() != part["sha256"]:
        raise ConfigError(f"part={path}: is damaged (its SHA-256 differs). Fetch it again, or export again.")


def _join_file(folder: Path, entry: Mapping[str, Any], file: Path) -> None:
    """Raises ConfigError where parts, each intact, do not make the file that was packed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = hashlib.sha256()
    with file.open("wb") as stream:
        for part in entry["parts"]:
            content = (folder / part["name"]).read_bytes()
            whole.update(content)
            stream.write(content)
    if whole.hexdigest() != entry["sha256"]:
        raise ConfigError(f"import={folder}: the parts of {file.name} do not make it. Export again.")
