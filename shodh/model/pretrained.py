"""The model of an exported file: weights, sizes and what it was trained from, beside the tokenizer of its latents."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shodh.config import ConfigError, parse_config, to_plain
from shodh.model.transformer import LatentTransformer, TransformerConfig
from shodh.tensor_file import TensorPart, digest_tensors, read_part, state_on_host

KEYS = ("model", "model_digest")  # of the file's metadata


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What a file says of the model in it."""

    sizes: TransformerConfig
    step: int  # training steps behind it
    git_sha: str  # of the code that trained it
    data_digests: dict[str, str]  # of each domain's cache of latents
    tokenizer_digest: str  # of the tokenizer whose latents it forecasts
    config: dict[str, Any]  # of the training, as YAML would hold it


class Pretrained(NamedTuple):
    """A trained model in evaluation mode, and what it comes from."""

    model: LatentTransformer
    description: ModelDescription


def describe_model(pretrained: Pretrained) -> TensorPart:
    """Tensors and metadata of the model, whole, as ``from_pretrained`` reads them."""
    state = state_on_host(pretrained.model)
    text = json.dumps(to_plain(pretrained.description))
    return TensorPart(state, {"model": text, "model_digest": digest_tensors(state, text)})


def from_pretrained(path: str | Path) -> Pretrained:
    """The model that ``launch/export_model.py`` wrote into a file, without gradients, on the CPU.

    The file's tokenizer takes fields to the model's latents and back; a step forecasts a snapshot interval:

    >>> import torch
    >>> from data.reader import open_store
    >>> from shodh.evaluation.divergence import measure_divergence
    >>> from shodh.fields import NUM_GIVEN, FieldBatch
    >>> from shodh.model.pretrained import from_pretrained
    >>> from tokenizer.export import load_tokenizer
    >>> model, description = from_pretrained("runs/quickstart/shodh.safetensors")
    >>> tokenizer = load_tokenizer("runs/quickstart/shodh.safetensors")
    >>> store = open_store("stores/quickstart/open_channel")
    >>> scale, i = tokenizer.statistics["open_channel"], store.trajectories("test")[0]
    >>> states = [map(torch.from_numpy, store.snapshot(i, t)) for t in range(NUM_GIVEN)]
    >>> velocity, pressure = (torch.stack(fields) for fields in zip(*states))
    >>> medium = (torch.from_numpy(store.medium(i)) - scale["medium_mean"]) / scale["medium_scale"]
    >>> normalised = velocity / scale["velocity_scale"], pressure[:, None] / scale["pressure_scale"]
    >>> batch = FieldBatch(*normalised, medium.expand_as(pressure)[:, None], store.domain, store.grid)
    >>> latents, still = tokenizer.autoencoder.encode(batch)
    >>> forecast = model(latents[None], still[:1], torch.from_numpy(store.parameters(i))[None])
    >>> decoded = tokenizer.autoencoder.decode_fields(forecast.latent, still[:1], store.domain, store.grid)
    >>> measure_divergence(decoded.flux, store.grid.relative)["max_abs"]
    0.0

    Raises ConfigError, in one line, for a missing, truncated or altered file, one without a model, and one whose model
    this version of the code does not know.
    """
    path = Path(path)
    state, metadata = read_part(path, "model", KEYS, "Write one with launch/export_model.py.")
    if not metadata:
        raise ConfigError(
            f"model={path}: holds no model (a tokenizer's file has none). Give one that launch/export_model.py wrote."
        )
    text = metadata.get("model", "")
    if metadata.get("model_digest") != digest_tensors(state, text):
        raise ConfigError(f"model={path}: altered since it was written (digest differs). Export it again.")
    said = json.loads(text)
    try:
        description = parse_config(ModelDescription, said, source="this version")
        model = LatentTransformer(description.sizes)
        model.load_state_dict(state)
    except (ConfigError, RuntimeError) as error:
        raise ConfigError(
            f"model={path}: is of another version ({' '.join(str(error).split())[:200]}). "
            f"Use the code that trained it, commit {said.get('git_sha')}."
        ) from None
    return Pretrained(model.eval().requires_grad_(False), description)
