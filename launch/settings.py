"""What each launch script's YAML may say: its sections are the configs of the parts it builds."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data.mixture import MixtureConfig
from shodh.config import load_config, parse_config, to_plain
from shodh.evaluation.certificate import CertificateConfig
from shodh.model.transformer import TransformerConfig
from shodh.planning.arrangement import Workload
from shodh.planning.cluster import ClusterConfig
from shodh.training.engine import EngineConfig
from shodh.training.loop import LoopConfig
from shodh.training.objectives import ForecastConfig
from shodh.training.tracking import TrackingConfig
from tokenizer.autoencoder import AutoencoderConfig, describe_network
from tokenizer.objective import ReconstructionConfig


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining:
    """launch/train_tokenizer.py"""

    stores: Path  # folder that holds one store per domain
    domains: tuple[str, ...]
    run: Path  # folder that the run writes
    autoencoder: AutoencoderConfig
    objective: ReconstructionConfig
    engine: EngineConfig
    loop: LoopConfig
    tracking: TrackingConfig
    checkpoint_interval: int
    augment: bool = True  # random translations along periodic axes
    weights: tuple[float, ...] = ()  # how often each domain is drawn; empty: all alike

    def __post_init__(self) -> None:
        require_domains(self.domains, self.weights)
        require_positive(self, "checkpoint_interval")
        require_whole(self.engine, "a tokenizer has no experts")


@dataclass(frozen=True, kw_only=True)
class LatentCaching:
    """launch/cache_latents.py"""

    stores: Path
    domains: tuple[str, ...]
    tokenizer: Path
    latents: Path
    threads: int = 2
    max_gigabytes: float | None = None  # of memory for encoding; else most of what is free

    def __post_init__(self) -> None:
        require_domains(self.domains)
        require_positive(self, "threads")
        if self.max_gigabytes is not None and not self.max_gigabytes > 0:
            raise ValueError(f"max_gigabytes={self.max_gigabytes}: must be positive. Raise it, or leave it out.")


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """launch/pretrain.py"""

    stores: Path
    latents: Path
    domains: tuple[str, ...]
    tokenizer: Path
    run: Path
    model: TransformerConfig
    objective: ForecastConfig
    engine: EngineConfig
    loop: LoopConfig
    tracking: TrackingConfig
    checkpoint_interval: int
    measure_interval: int  # steps between measurements on held-out samples
    weights: tuple[float, ...] = ()  # how often each domain is drawn; empty: all alike

    def __post_init__(self) -> None:
        require_domains(self.domains, self.weights)
        require_positive(self, "checkpoint_interval", "measure_interval")
        require_solved(self.objective, self.loop)
        if self.model.num_experts % self.engine.expert_parallel:
            raise ValueError(
                f"engine.expert_parallel={self.engine.expert_parallel}: does not divide model.num_experts="
                f"{self.model.num_experts}. Choose a divisor."
            )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """launch/evaluate_model.py"""

    stores: Path
    latents: Path
    domains: tuple[str, ...]
    tokenizer: Path
    run: Path
    threads: int = 2
    project: bool = False  # lead fields decoded in a medium with solid through its pores before they are judged
    certificate: CertificateConfig = CertificateConfig()
    exported: Path | None = None  # of launch/export_model.py, in place of the tokenizer and the run's checkpoint

    def __post_init__(self) -> None:
        require_domains(self.domains)
        require_positive(self, "threads")


@dataclass(frozen=True, kw_only=True)
class ModelExport:
    """launch/export_model.py, for a run folder"""

    run: Path
    tokenizer: Path | None = None  # None: at the path that the training read it from


Variant = Literal[
    "shodh",
    "solo",
    "solo_dense",
    "dense_flops",
    "dense_parameters",
    "oracle",
    "hash",
    "untold",
    "free",
    "top2",
    "top4",
    "pair",
]  # see launch/variants.py
PER_DOMAIN = ("solo", "solo_dense")  # variants with a model for each domain
PAIR = ("open_channel", "porous_media")  # the domains of the variant ``pair``


@dataclass(frozen=True, kw_only=True)
class TransferMeasurement:
    """launch/measure_transfer.py; ``model``, ``objective``, ``engine`` and ``loop`` are those of the variant shodh."""

    stores: Path
    latents: Path
    domains: tuple[str, ...]
    tokenizer: Path
    run: Path
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]  # each in place of loop.seed
    model: TransformerConfig
    objective: ForecastConfig
    engine: EngineConfig
    loop: LoopConfig
    checkpoint_interval: int
    record_interval: int = 20  # steps between lines of metrics.jsonl
    jobs: int = 2  # processes side by side

    def __post_init__(self) -> None:
        require_domains(self.domains)
        require_positive(self, "checkpoint_interval", "record_interval", "jobs")
        require_solved(self.objective, self.loop)
        for name, values in (("seeds", self.seeds), ("variants", self.variants)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)}: name at least one, and none twice.")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds={list(self.seeds)}: none may be negative.")
        require_whole(self.engine, "each model is trained by one process")
        for name, usual in (("top_k", 1), ("expert_hidden", None), ("num_kernels", None), ("told", True)):
            if getattr(self.model, name) != usual:
                raise ValueError(f"model.{name}: is what variants change. Leave it out.")
        if self.model.hidden % 4 and {"top2", "top4"} & set(self.variants):
            raise ValueError(f"model.hidden={self.model.hidden}: not a multiple of 4, which top4 divides it by.")
        if "pair" in self.variants and not set(PAIR) <= set(self.domains):
            raise ValueError(f"variants=pair: is of the domains {PAIR}. Add them, or leave the variant out.")
        if "oracle" in self.variants and self.model.num_experts < len(self.domains):
            raise ValueError(f"model.num_experts={self.model.num_experts}: too few for the oracle's {self.domains}.")
        if self.engine.batch_size % (len(self.domains) * self.objective.windows):
            raise ValueError(
                f"engine.batch_size={self.engine.batch_size}: no multiple of {len(self.domains)} domains x "
                f"{self.objective.windows} windows, so no solo model could see what the joint one sees. Change it."
            )


@dataclass(frozen=True, kw_only=True)
class RunPlanning:
    """launch/plan_run.py, beside the config of the training that is planned"""

    cluster: ClusterConfig
    latent_shape: tuple[int, int, int] = (16, 16, 16)  # of 128^3 cells


CONFIGS = {
    "train_tokenizer": TokenizerTraining,
    "cache_latents": LatentCaching,
    "pretrain": Pretraining,
    "evaluate_model": Evaluation,
    "measure_transfer": TransferMeasurement,
    "plan_run": RunPlanning,
}


def read_export(source: Path, overrides: list[str]) -> ModelExport:
    """Which run and tokenizer a run folder means, or a config of launch/evaluate_model.py."""
    if source.is_dir():
        given = {key: value for key, _, value in (override.partition("=") for override in overrides)}
        return parse_config(ModelExport, {"run": source} | given, source="the command line")
    config = load_config(Evaluation, source, overrides)
    return ModelExport(run=config.run, tokenizer=config.tokenizer)


def require_domains(domains: tuple[str, ...], weights: tuple[float, ...] = ()) -> None:
    """ValueError unless there is a domain and none twice, and a weight for each where there is any."""
    if not domains or len(set(domains)) < len(domains):
        raise ValueError(f"domains={list(domains)}: name at least one, and none twice.")
    if len(weights) not in (0, len(domains)):
        raise ValueError(
            f"weights={list(weights)}: there are {len(domains)} domains. Give one for each, or [] for all alike."
        )


def require_solved(objective: ForecastConfig, loop: LoopConfig) -> None:
    """Raise ValueError where training ends before linear experts are solved for."""
    if objective.solve_at >= loop.schedule.num_steps:
        raise ValueError(
            f"objective.solve_at={objective.solve_at}: training ends after loop.schedule.num_steps="
            f"{loop.schedule.num_steps}. Set it to a third of them, or to 0, with refine_steps=0, to solve for nothing."
        )


def require_whole(engine: EngineConfig, reason: str) -> None:
    """ValueError with the reason where ranks are to share out experts that they cannot."""
    if engine.expert_parallel > 1:
        raise ValueError(f"engine.expert_parallel={engine.expert_parallel}: {reason}. Leave it out.")


def require_positive(config: object, *names: str) -> None:
    """ValueError naming the first of these fields that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: must be at least 1. Raise it.")


def identity_of(config: "TokenizerTraining | Pretraining") -> dict[str, Any]:
    """The part of a training config that decides its result; a run is continued only with the same."""
    plain = to_plain(config)
    decisive = ("batch_size", "accumulation", "optimizer", "precision", "betas", "gradient_clipping", "weight_decay")
    engine = {key: plain["engine"][key] for key in decisive}
    kept = ("domains", "model", "objective", "loop", "augment", "weights")
    identity = {key: plain[key] for key in kept if key in plain} | {"engine": engine}
    if isinstance(config, Pretraining):
        del identity["model"]["recompute"]  # which only takes memory or time
    if isinstance(config, TokenizerTraining):
        identity["autoencoder"] = describe_network(config.autoencoder)
    return identity


def workload_of(config: Pretraining, planning: RunPlanning) -> Workload:
    """What is planned of a pretraining."""
    return Workload(
        model=config.model,
        objective=config.objective,
        engine=config.engine,
        schedule=config.loop.schedule,
        checkpoint_interval=config.checkpoint_interval,
        grid=planning.latent_shape,
    )


def mixture_config(config: "TokenizerTraining | Pretraining") -> MixtureConfig:
    """How a training run draws its batches."""
    mixture = MixtureConfig(
        batch_size=config.engine.batch_size,
        accumulation=config.engine.accumulation,
        seed=config.loop.seed,
        weights=config.weights,
    )
    if isinstance(config, TokenizerTraining):
        return replace(mixture, augment=config.augment)
    return replace(mixture, num_states=config.objective.num_states, windows=config.objective.windows)
