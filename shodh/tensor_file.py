"""Named tensors in safetensors files, with metadata and one digest over both.

A file is one part (a tokenizer) or joins several (a tokenizer and a model), the tensors of each under ``PART/``. Every
part says its own metadata and has a digest of its own, the same in either kind of file.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shodh.config import ConfigError
from shodh.disk import sync


class TensorPart(NamedTuple):
    """Tensors by name, and what is said of them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def state_on_host(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, contiguous and on the CPU, as files hold them."""
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def digest_tensors(tensors: Mapping[str, Tensor], description: str = "") -> str:
    """SHA-256, hexadecimal, of a text, then of the name and the bytes of every tensor in the order of their names."""
    sha = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].numpy().reshape(-1).data)
    return sha.hexdigest()


def join_parts(parts: Mapping[str, TensorPart]) -> TensorPart:
    """All parts as what one file holds. Two that say the same of themselves would be one: they are refused."""
    tensors = {f"{name}/{key}": value for name, part in parts.items() for key, value in part.tensors.items()}
    metadata = {key: text for part in parts.values() for key, text in part.metadata.items()}
    assert len(metadata) == sum(len(part.metadata) for part in parts.values())
    return TensorPart(tensors, metadata)


def write_tensors(path: Path, part: TensorPart) -> None:
    """Write, sync and rename the file. Raises ConfigError where that fails; what stood there stays untouched."""
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(part.tensors, temporary, metadata=part.metadata)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"file={path}: cannot be written ({error}). Free disk space, or give another path.") from None


def read_part(path: Path, name: str, keys: Iterable[str], advice: str) -> TensorPart:
    """The tensors under ``NAME/``, or all in a file that is not joined, and the ``keys`` that its metadata have.

    They are mapped, and read where they are used. Raises ConfigError beginning with NAME=PATH for a missing file, with
    ``advice`` on how to get one, and for one that is truncated or not safetensors; digests are the caller's to compare.
    """
    if not path.is_file():
        raise ConfigError(f"{name}={path}: no such file. {advice}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            names = list(file.keys())
            prefix = f"{name}/" if any("/" in found for found in names) else ""
            tensors = {n.removeprefix(prefix): file.get_tensor(n) for n in names if n.startswith(prefix)}
    except SafetensorError as error:
        raise ConfigError(f"{name}={path}: truncated or not safetensors ({error}). Export it again.") from None
    return TensorPart(tensors, {key: metadata[key] for key in keys if key in metadata})
