"""What several launch scripts build in the same way from data, tokenizer and model."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gain import require_room
from jaxtyping import Float
from memory import memory_to_use
from torch import Tensor
from tqdm import tqdm

from data.latents import BATCH_SIZE, LatentStore, open_latents
from data.reader import Store, open_store
from data.statistics import FieldStatistics
from shodh.config import ConfigError, parse_config
from shodh.evaluation.held_out import HeldOutDomain
from shodh.evaluation.linear_forecast import LinearForecast, fit_linear_forecast
from shodh.evaluation.rollout import Predict, TrueTrajectory, join_successive
from shodh.fields import FieldBatch, LatentBatch
from shodh.model.pretrained import ModelDescription, Pretrained, from_pretrained
from shodh.model.transformer import LatentTransformer, TransformerConfig, count_parameters
from shodh.physics.masked_projection import has_solid
from shodh.training.checkpoint import load_parameters, read_newest
from tokenizer.autoencoder import DOWNSAMPLING, AutoencoderConfig
from tokenizer.block_klt import BlockKLT
from tokenizer.budget import Plan, decode_fields_within, encode_within, plan_memory
from tokenizer.export import Tokenizer, load_tokenizer
from tokenizer.memory import forecast_memory

FIELDS_READ = 6  # of a snapshot, beside the normalised batch: 4 of the state, the medium, and one on the way


def open_stores(folder: Path, domains: Sequence[str]) -> list[Store]:
    """One store per domain; ConfigError naming what there is when one is missing."""
    present = sorted(p.name for p in folder.iterdir() if (p / "zarr.json").is_file()) if folder.is_dir() else []
    for name in domains:
        if name not in present:
            raise ConfigError(
                f"domains={name}: no such store in {folder} (there are: {', '.join(present) or 'none'}). "
                "Generate it with launch/generate_data.py, or correct the name."
            )
    stores = [open_store(folder / name) for name in domains]
    for name, store in zip(domains, stores, strict=True):
        if store.domain.name != name:
            raise ConfigError(f"store={folder / name}: holds {store.domain.name}. Rename the folder to what it holds.")
    return stores


def open_tokenized(
    stores_folder: Path, latents_folder: Path, tokenizer_path: Path, domains: Sequence[str]
) -> tuple[Tokenizer, list[Store], list[LatentStore]]:
    """A tokenizer, the stores of fields and their caches of latents, all of which must belong together."""
    tokenizer = load_tokenizer(tokenizer_path)
    stores = open_stores(stores_folder, domains)
    for store in stores:
        require_tokenizer(tokenizer, store)
    latents = [open_latents(latents_folder / s.domain.name, tokenizer.digest, s.digest) for s in stores]
    return tokenizer, stores, latents


def require_tokenizer(tokenizer: Tokenizer, store: Store) -> FieldStatistics:
    """The scales that the tokenizer knows a store's fields by.

    Raises ConfigError unless it was trained with such a domain, in the same units and between the same boundaries.
    """
    domain, known = store.domain, tokenizer.domains.get(store.domain.name)
    if known is None:
        raise ConfigError(
            f"domains={domain.name}: the tokenizer was trained without it (it knows: {', '.join(tokenizer.domains)}). "
            "Train one with it, or correct the name."
        )
    if domain.name not in tokenizer.statistics:
        raise ConfigError(f"domains={domain.name}: the tokenizer has no statistics of it. Export the tokenizer again.")
    fields = ("velocity", "pressure", "medium")
    pairs = [
        (f"{f}.{part}", getattr(getattr(domain, f), part), getattr(getattr(known, f), part))
        for f in fields
        for part in ("name", "units", "location")
    ]
    pairs += [
        (part, getattr(domain, part), getattr(known, part)) for part in ("velocity_space", "boundary", "parameters")
    ]
    for name, found, wanted in pairs:
        if found != wanted:
            raise ConfigError(
                f"store={store.path}: {name} is {found!r}, the tokenizer was trained with {wanted!r}. "
                "Write the store like that, or train a tokenizer on it."
            )
    if any(n % DOWNSAMPLING for n in store.grid.shape):
        raise ConfigError(
            f"store={store.path}: its grid {store.grid.shape} is not divisible by {DOWNSAMPLING}. Crop or regrid it."
        )
    return parse_config(
        FieldStatistics, dict(tokenizer.statistics[domain.name]), source=f"the statistics of {domain.name}"
    )


class Encoding(NamedTuple):
    """How a store will be encoded: snapshots at a time, bytes for that beside those of what is read, and the plan."""

    num_snapshots: int
    max_bytes: int
    plan: Plan


def plan_encoding(config: AutoencoderConfig, store: Store, max_bytes: int) -> Encoding:
    """As many snapshots at a time as fit; ConfigError when one does not, even in slabs."""
    read = FIELDS_READ * 4 * torch.Size(store.grid.shape).numel()
    for num in (num for num in (BATCH_SIZE, 4, 2) if num <= store.num_snapshots):
        needed, limit = forecast_memory(config, store.domain, store.grid, num, "encode"), max_bytes - num * read
        if needed <= limit:
            return Encoding(num, limit, Plan(None, needed, needed))
    limit = max(0, max_bytes - read)
    return Encoding(1, limit, plan_memory(config, store.domain, store.grid, 1, "encode", limit))


def normalised_batch(
    velocity: Tensor, pressure: Tensor, medium: Tensor, store: Store, statistics: FieldStatistics
) -> FieldBatch:
    """Fields in a store's units as the batch that the tokenizer takes."""
    return FieldBatch(
        velocity / statistics.velocity_scale,
        pressure / statistics.pressure_scale,
        (medium - statistics.medium_mean) / statistics.medium_scale,
        store.domain,
        store.grid,
    )


def hold_out(
    tokenizer: Tokenizer,
    store: Store,
    latents: LatentStore,
    device: torch.device,
    num_trajectories: int | None = None,
    baselines: dict[str, BlockKLT] | None = None,
    forecasters: Mapping[str, Predict] | None = None,
    project: bool = False,
) -> HeldOutDomain:
    """One domain's test split, or its first trajectories, in memory, with the decoder and what to compare with.

    ``project``: what is decoded in a medium with solid is led through its pores before it is judged.
    """
    autoencoder, domain, grid = tokenizer.autoencoder.to(device), store.domain, store.grid
    statistics = require_tokenizer(tokenizer, store)
    trajectories, media = [], []
    for i in store.trajectories("test")[:num_trajectories]:
        states = [store.snapshot(i, t) for t in range(store.num_snapshots)]
        velocity, pressure = (
            torch.stack([torch.from_numpy(field) for field in part]) for part in zip(*states, strict=True)
        )
        medium = torch.from_numpy(store.medium(i))
        batch = normalised_batch(velocity, pressure[:, None], medium[None, None], store, statistics).to(device)
        media.append(medium)
        trajectories.append(
            TrueTrajectory(
                latents=torch.stack([torch.from_numpy(latents.latent(i, t)) for t in range(len(states))]).to(device),
                medium=torch.from_numpy(latents.medium(i)).to(device),
                parameters=torch.from_numpy(store.parameters(i)).to(device),
                velocity=batch.velocity,
                pressure=batch.pressure,
            )
        )

    @functools.cache  # each other budget would need a forecast of its own
    def max_bytes() -> int:
        return memory_to_use(device)  # at the first use, because by then all domains have been read

    def differentiable_velocity(latent: Tensor, still: Tensor) -> Tensor:
        require_room(autoencoder.config, domain, grid, max_bytes())
        return autoencoder.decode(latent, still, domain, grid).velocity

    def encode(velocity: Tensor, pressure: Tensor, stored_medium: Tensor) -> tuple[Tensor, Tensor]:
        still = (stored_medium.to(velocity) - statistics.medium_mean) / statistics.medium_scale
        return encode_within(autoencoder, FieldBatch(velocity, pressure, still, domain, grid), max_bytes())

    return HeldOutDomain(
        domain=domain,
        grid=grid.relative,
        trajectories=trajectories,
        medium=media,
        decode=lambda latent, m: decode_fields_within(autoencoder, latent, m, domain, grid, max_bytes()),
        baselines={name: klt.reconstruct for name, klt in (baselines or {}).items()},
        decode_velocity=differentiable_velocity,
        encode=encode,
        forecasters=forecasters or {},
        project=project and has_solid(domain),
    )


def require_channels(config: TransformerConfig, tokenizer: Tokenizer) -> None:
    """ConfigError unless the model takes the channels that the tokenizer gives."""
    sizes = tokenizer.autoencoder.config
    for name in ("latent_channels", "medium_channels"):
        asked, given = getattr(config, name), getattr(sizes, name)
        if asked != given:
            raise ConfigError(f"model.{name}={asked}: the tokenizer gives {given}. Set model.{name}={given}.")


def fit_baselines(tokenizer: Tokenizer, stores: Sequence[Store]) -> dict[str, BlockKLT]:
    """Block KLTs on the training fields of all domains, with as many values a block as state and medium latents have
    together (``block_klt``), and as the state's alone (``block_klt_of_state``)."""
    sizes = tokenizer.autoencoder.config
    values = {"block_klt": sizes.latent_channels + sizes.medium_channels, "block_klt_of_state": sizes.latent_channels}
    return BlockKLT.fit(training_velocities(stores, tokenizer.statistics), values)


def fit_linear(latents: LatentStore, device: torch.device) -> LinearForecast:
    """The linear latent model of a domain's training split, which is read once."""

    def read(i: int) -> LatentBatch:
        states = np.stack([latents.latent(i, t) for t in range(latents.num_snapshots)])
        arrays = (states, latents.medium(i), latents.parameters(i))
        return join_successive(*(torch.from_numpy(array).to(device) for array in arrays), index=0)

    return fit_linear_forecast(map(read, latents.trajectories("train")), latents.domain.boundary)


def training_velocities(
    stores: Sequence[Store], statistics: Mapping[str, Mapping[str, float]], most: int | None = None
) -> Iterator[Float[Tensor, "1 3 x y z"]]:
    """Normalised velocities of the training splits, equally many of each domain: of the fewest that one has, at most
    ``most``, spread evenly over each."""
    splits = [[(i, t) for i in s.trajectories("train") for t in range(s.num_snapshots)] for s in stores]
    num = min(min(map(len, splits)), most or 2**31)
    chosen = [
        (store, *states[k * len(states) // num])
        for store, states in zip(stores, splits, strict=True)
        for k in range(num)
    ]
    for store, i, t in tqdm(chosen, desc="block KLT", unit="snapshot", mininterval=1.0):
        scale = statistics[store.domain.name]["velocity_scale"]
        yield torch.from_numpy(store.snapshot(i, t)[0])[None] / scale


def load_model(source: Path, tokenizer: Tokenizer, device: torch.device) -> Pretrained:
    """The model of an exported file, or the newest of a run folder, ready to predict; ConfigError where it forecasts
    latents of another tokenizer."""
    model, description = from_pretrained(source) if source.is_file() else read_newest_model(source)
    require_latents(description, tokenizer.digest, source)
    return Pretrained(model.to(device), description)


def read_newest_model(run: Path) -> Pretrained:
    """The newest intact checkpoint of a pretraining as a model; experts are whole there however ranks shared them."""
    state, saved = read_newest(run / "checkpoints" / "pretrain")
    identity = saved["identity"]
    sizes = parse_config(TransformerConfig, identity["model"], source=str(run))
    model = LatentTransformer(sizes)
    load_parameters(model, state)
    description = ModelDescription(
        sizes=sizes,
        step=saved["step"],
        git_sha=saved["git_sha"],
        data_digests=identity["data"],
        tokenizer_digest=identity["tokenizer"],
        config=saved["record"]["config"],
    )
    return Pretrained(model.eval().requires_grad_(False), description)


def require_latents(description: ModelDescription, tokenizer_digest: str, source: Path) -> None:
    """ConfigError unless a model forecasts the latents that the tokenizer of that digest makes."""
    if description.tokenizer_digest != tokenizer_digest:
        raise ConfigError(
            f"model={source}: was trained on another tokenizer's latents. Use that tokenizer, or pretrain again."
        )


def describe_run(pretrained: Pretrained) -> dict[str, Any]:
    """What ``evaluation.json`` says of the run that a model is of."""
    model, description = pretrained
    total, active = count_parameters(model)
    return {
        "config": description.config,
        "git_sha": description.git_sha,
        "step": description.step,
        "parameters_total": total,
        "parameters_active": active,
        "data_digests": description.data_digests,
        "tokenizer_hash": description.tokenizer_digest,
    }
