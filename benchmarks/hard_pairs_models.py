"""The hard pairs' data and models: two stores of one domain a pair, and small models trained on both at once."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from figures import ROOT

sys.path.append(str(ROOT / "launch"))

import cache_latents  # noqa: E402 - beside the launch scripts
from parts import open_tokenized  # noqa: E402

from data.latents import LatentStore  # noqa: E402
from data.mixture import LatentMixture, MixtureConfig, stream  # noqa: E402
from data.reader import Store  # noqa: E402
from shodh.config import to_plain  # noqa: E402
from shodh.model.transformer import LatentTransformer, TransformerConfig  # noqa: E402
from shodh.training.engine import EngineConfig, Membership, build_engine  # noqa: E402
from shodh.training.linear_start import SolveLinearExperts  # noqa: E402
from shodh.training.loop import LoopConfig  # noqa: E402
from shodh.training.objectives import ForecastConfig, ForecastObjective  # noqa: E402
from shodh.training.run import train_resumably  # noqa: E402
from shodh.training.schedule import ScheduleConfig  # noqa: E402
from shodh.training.tracking import StepSize, TrackingConfig  # noqa: E402
from tokenizer.export import Tokenizer  # noqa: E402

PAIRS = {"open_channel": ("slow", "fast"), "porous_media": ("blobs", "spheres")}  # folders of stores, by domain
BATCH_SIZE = 16
LEARNING_RATE = 2e-3  # of Muon
CACHING = ROOT / "configs" / "cache_latents" / "quickstart.yaml"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two stores of one domain, whose name or index no model is ever given."""

    domain: str
    members: tuple[str, str]
    stores: tuple[Store, Store]
    latents: tuple[LatentStore, LatentStore]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One model to train on a pair."""

    domain: str
    num_experts: int
    information_weight: float
    seed: int

    @property
    def setting(self) -> str:
        """What its seeds have in common."""
        return f"{self.domain} E={self.num_experts} information {self.information_weight:g}"

    @property
    def folder(self) -> str:
        return f"{self.setting} seed {self.seed}".replace(" ", "-").replace("=", "")


def open_pair(domain: str, stores: Path, latents: Path, tokenizer_path: Path) -> tuple[Tokenizer, Pair]:
    """The pair and the tokenizer its latents come from; latents that are missing or stale are made anew.

    Raises ConfigError where a store is missing or does not fit the tokenizer.
    """
    tokenizer, opened, caches = None, [], []
    for member in PAIRS[domain]:
        paths = {"stores": stores / member, "latents": latents / member, "tokenizer": tokenizer_path}
        overrides = [f"{key}={path.resolve()}" for key, path in paths.items()]
        cache_latents.main([str(CACHING), *overrides, f"domains=[{domain}]", "threads=1"])
        tokenizer, (store,), (cache,) = open_tokenized(stores / member, latents / member, tokenizer_path, [domain])
        opened.append(store)
        caches.append(cache)
    assert tokenizer is not None
    members = PAIRS[domain]
    return tokenizer, Pair(domain=domain, members=members, stores=tuple(opened), latents=tuple(caches))


def train_trial(trial: Trial, pair: Pair, tokenizer: Tokenizer, runs: Path, steps: int, group: Membership):
    """The trained model, ready to predict; one that was trained to the end before is read, one half trained continued.

    Raises ConfigError where the folder holds another run.
    """
    sizes = tokenizer.autoencoder.config
    model_config = TransformerConfig(
        latent_channels=sizes.latent_channels,
        medium_channels=sizes.medium_channels,
        width=128,
        depth=4,
        num_heads=4,
        num_experts=trial.num_experts,
        hidden=256,
    )
    objective = ForecastConfig(
        balance_weight=0.01, information_weight=trial.information_weight, windows=2, solve_at=steps // 2
    )
    engine_config = EngineConfig(batch_size=BATCH_SIZE, optimizer="muon", zero_stage=0)
    warmup = min(30, steps // 4)
    schedule = ScheduleConfig(num_steps=steps, learning_rate=LEARNING_RATE, num_warmup_steps=warmup)
    loop = LoopConfig(schedule=schedule, seed=trial.seed)
    mixture = LatentMixture(
        pair.latents, MixtureConfig(batch_size=BATCH_SIZE, seed=trial.seed, windows=objective.windows)
    )
    parts = {"model": model_config, "objective": objective, "engine": engine_config, "loop": loop}
    plain = {name: to_plain(part) for name, part in parts.items()}
    torch.manual_seed(trial.seed)
    model = LatentTransformer(model_config)
    engine = build_engine(model, engine_config, group.device)

    def batches_from(step: int) -> Any:
        return stream(mixture, step, group.device, group.rank, group.size)

    train_resumably(
        engine,
        ForecastObjective(objective),
        batches_from,
        loop,
        hooks=[SolveLinearExperts(engine, batches_from, objective)],
        folder=runs / trial.folder,
        phase="pretrain",
        identity=plain | {"data": _digests(pair), "tokenizer": tokenizer.digest},
        record={"config": plain},
        checkpoint_interval=100,
        tracking=TrackingConfig(wandb="disabled", interval=10),
        step_size=StepSize(BATCH_SIZE * pair.latents[0].cells_per_state),
    )
    return model.eval()


def list_trials(domains: Sequence[str], seeds: Sequence[int], weights: Sequence[float]) -> list[Trial]:
    """As many experts as the pair has members, and twice as many, which leaves room to divide the places within one."""
    return [
        Trial(domain=domain, num_experts=num_experts, information_weight=weight, seed=seed)
        for domain in domains
        for num_experts in (2, 4)
        for weight in weights
        for seed in seeds
    ]


def _digests(pair: Pair) -> dict[str, str]:
    return {member: cache.digest for member, cache in zip(pair.members, pair.latents, strict=True)}
