"""What several launch scripts build in the same way from data, tokenizer and model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.latents import LatentStore, open_latents
from data.reader import Store, open_store
from data.statistics import FieldStatistics
from shodh.config import ConfigError, parse_config
from shodh.evaluation.held_out import HeldOutDomain
from shodh.evaluation.rollout import TrueTrajectory
from shodh.fields import FieldBatch
from shodh.model.transformer import LatentTransformer, TransformerConfig, count_parameters
from shodh.training.checkpoint import load_parameters, read_newest
from tokenizer.block_klt import BlockKLT
from tokenizer.export import Tokenizer, load_tokenizer


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
    unknown = [name for name in domains if name not in tokenizer.domains]
    if unknown:
        raise ConfigError(
            f"domains={unknown[0]}: the tokenizer was trained without it (it knows: {', '.join(tokenizer.domains)}). "
            "Train one with it, or correct the name."
        )
    latents = [open_latents(latents_folder / s.domain.name, tokenizer.digest, s.digest) for s in stores]
    return tokenizer, stores, latents


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
) -> HeldOutDomain:
    """One domain's test split, or its first trajectories, in memory, with the decoder and the codes to compare with."""
    tokenizer.autoencoder.to(device)
    statistics = FieldStatistics(**tokenizer.statistics[store.domain.name])
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
                boundary=store.grid.boundary,
            )
        )
    return HeldOutDomain(
        domain=store.domain,
        grid=store.grid.relative,
        trajectories=trajectories,
        medium=media,
        decode=lambda latent, m: tokenizer.autoencoder.decode_fields(latent, m, store.domain, store.grid),
        baselines={name: klt.reconstruct for name, klt in (baselines or {}).items()},
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

    def velocities() -> Iterator[Tensor]:
        states = [
            (store, i, t) for store in stores for i in store.trajectories("train") for t in range(store.num_snapshots)
        ]
        for store, i, t in tqdm(states, desc="block KLT", unit="snapshot", mininterval=1.0):
            scale = tokenizer.statistics[store.domain.name]["velocity_scale"]
            yield torch.from_numpy(store.snapshot(i, t)[0])[None] / scale

    sizes = tokenizer.autoencoder.config
    values = {"block_klt": sizes.latent_channels + sizes.medium_channels, "block_klt_of_state": sizes.latent_channels}
    return BlockKLT.fit(velocities(), values)


def load_model(run: Path, tokenizer: Tokenizer, device: torch.device) -> tuple[LatentTransformer, dict[str, Any]]:
    """The newest pretrained model of a run, ready to predict, and what ``evaluation.json`` says of the run."""
    state, saved = read_newest(run / "checkpoints" / "pretrain")
    identity = saved["identity"]
    if identity["tokenizer"] != tokenizer.digest:
        raise ConfigError(
            f"run={run}: was trained on another tokenizer's latents. Use that tokenizer, or pretrain again."
        )
    config = parse_config(TransformerConfig, identity["model"], source=str(run))
    model = LatentTransformer(config)
    load_parameters(model, state)
    total, active = count_parameters(model)
    return model.to(device).eval().requires_grad_(False), {
        "config": saved["record"]["config"],
        "git_sha": saved["git_sha"],
        "step": saved["step"],
        "parameters_total": total,
        "parameters_active": active,
        "data_digests": identity["data"],
        "tokenizer_hash": tokenizer.digest,
    }
