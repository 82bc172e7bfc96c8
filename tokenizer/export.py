"""One safetensors file that is the whole tokenizer: weights, sizes, domains, statistics, what certifies that it
conserves, and its own digest. A file that ``launch/export_model.py`` wrote holds the same beside a model.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from shodh.config import ConfigError, parse_config, to_plain
from shodh.fields import DomainSpec
from shodh.tensor_file import TensorPart, digest_tensors, read_part, state_on_host, write_tensors
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig, describe_network

KEYS = ("tokenizer", "digest", "certificate", "certificate_digest")  # of the file's metadata


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
    state = state_on_host(autoencoder)
    if certificate is not None and certificate["weights"] != digest_tensors(state):
        raise ValueError("certificate: was made with other weights than are saved. Certify these.")
    description = json.dumps(
        {"autoencoder": describe_network(autoencoder.config), "domains": to_plain(domains), "statistics": statistics}
    )
    digest = digest_tensors(state, description)
    metadata = {"tokenizer": description, "digest": digest}
    if certificate is not None:
        text = json.dumps(certificate)
        metadata |= {"certificate": text, "certificate_digest": digest_tensors({}, digest + text)}
    write_tensors(path, TensorPart(state, metadata))
    return digest


def digest_weights(autoencoder: Autoencoder) -> str:
    """SHA-256 of all weights and latent statistics, which a certificate names."""
    return digest_tensors(state_on_host(autoencoder))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read what ``save_tokenizer`` wrote, or the tokenizer of an exported model, in evaluation mode.

    Raises ConfigError, in one line, for a missing, truncated, altered or foreign file.
    """
    state, metadata = read_tokenizer_part(Path(path))
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


def read_tokenizer_part(path: Path) -> TensorPart:
    """Tensors and metadata of a file's tokenizer, verified, as they stand there. Raises as ``load_tokenizer``."""
    part = read_part(path, "tokenizer", KEYS, "Train one with launch/train_tokenizer.py.")
    if not {"tokenizer", "digest"} & part.metadata.keys():
        raise ConfigError(
            f"tokenizer={path}: is no Shodh tokenizer (nothing in it describes one). "
            "Give a file that launch/train_tokenizer.py wrote."
        )
    if _is_altered(part):
        raise ConfigError(f"tokenizer={path}: altered since it was written (digest differs). Export it again.")
    return part


def _is_altered(part: TensorPart) -> bool:
    state, metadata = part
    digest, certificate = metadata.get("digest", ""), metadata.get("certificate")
    certified = None if certificate is None else digest_tensors({}, digest + certificate)
    described = "tokenizer" in metadata and digest == digest_tensors(state, metadata["tokenizer"])
    return not described or metadata.get("certificate_digest") != certified
