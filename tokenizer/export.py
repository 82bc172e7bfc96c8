"""One safetensors file that is the whole tokenizer: weights, sizes, domains, statistics, what certifies that it
conserves, and its own digest.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shodh.config import ConfigError, parse_config, to_plain
from shodh.fields import DomainSpec
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig, describe_network


class Tokenizer(NamedTuple):
    """A trained tokenizer and what it needs to speak physical units."""

    autoencoder: Autoencoder
    domains: dict[str, DomainSpec]
    statistics: dict[str, dict[str, float]]  # per domain, the fields of data.statistics.FieldStatistics
    digest: str
    certificate: dict[str, Any] | None = None  # of what these weights conserve; see shodh.evaluation.certificate


def save_tokenizer(
    path: Path,
    autoencoder: Autoencoder,
    domains: dict[str, DomainSpec],
    statistics: dict[str, dict[str, float]],
    certificate: dict[str, Any] | None = None,
) -> str:
    """Write the file atomically and return its digest, over weights and description: what latents are bound to.

    The certificate has a digest of its own, over it and the file's: certifying the same weights again, on another
    machine, leaves their latents valid. Raises ValueError for a certificate of other weights.
    """
    state = _state(autoencoder)
    if certificate is not None and certificate["weights"] != _digest(state, ""):
        raise ValueError("certificate: was made with other weights than are saved. Certify these.")
    description = json.dumps(
        {"autoencoder": describe_network(autoencoder.config), "domains": to_plain(domains), "statistics": statistics}
    )
    digest = _digest(state, description)
    metadata = {"tokenizer": description, "digest": digest}
    if certificate is not None:
        text = json.dumps(certificate)
        metadata |= {"certificate": text, "certificate_digest": _digest({}, digest + text)}
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, temporary, metadata=metadata)
    os.replace(temporary, path)
    return digest


def digest_weights(autoencoder: Autoencoder) -> str:
    """SHA-256 of all weights and latent statistics, which a certificate names."""
    return _digest(_state(autoencoder), "")


def load_tokenizer(path: Path) -> Tokenizer:
    """Read what ``save_tokenizer`` wrote, in evaluation mode.

    Raises ConfigError, in one line, for a missing, truncated, altered or foreign file.
    """
    if not path.is_file():
        raise ConfigError(f"tokenizer={path}: no such file. Train one with launch/train_tokenizer.py.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ConfigError(f"tokenizer={path}: truncated or not safetensors ({error}). Export it again.") from None
    if not {"tokenizer", "digest"} & metadata.keys():
        raise ConfigError(
            f"tokenizer={path}: is no Shodh tokenizer (nothing in it describes one). "
            "Give a file that launch/train_tokenizer.py wrote."
        )
    if _is_altered(metadata, state):
        raise ConfigError(f"tokenizer={path}: altered since it was written (digest differs). Export it again.")
    description = json.loads(metadata["tokenizer"])
    autoencoder = Autoencoder(parse_config(AutoencoderConfig, description["autoencoder"], source=str(path)))
    autoencoder.load_state_dict(state)
    domains = {
        name: parse_config(DomainSpec, domain, source=str(path)) for name, domain in description["domains"].items()
    }
    certificate = json.loads(metadata["certificate"]) if "certificate" in metadata else None
    return Tokenizer(
        autoencoder.eval().requires_grad_(False), domains, description["statistics"], metadata["digest"], certificate
    )


def _is_altered(metadata: dict[str, str], state: dict[str, Tensor]) -> bool:
    digest, certificate = metadata.get("digest", ""), metadata.get("certificate")
    certified = None if certificate is None else _digest({}, digest + certificate)
    described = "tokenizer" in metadata and digest == _digest(state, metadata["tokenizer"])
    return not described or metadata.get("certificate_digest") != certified


def _state(autoencoder: Autoencoder) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in autoencoder.state_dict().items()}


def _digest(state: dict[str, Tensor], description: str) -> str:
    sha = hashlib.sha256(description.encode())
    for name in sorted(state):
        sha.update(name.encode())
        sha.update(state[name].numpy().tobytes())
    return sha.hexdigest()
