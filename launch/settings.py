"""What each launch script's YAML may say: its sections are the configs of the parts it builds."""

from dataclasses import dataclass
from pathlib import Path

from data.mixture import MixtureConfig
from shodh.model.transformer import TransformerConfig
from shodh.training.engine import EngineConfig
from shodh.training.loop import LoopConfig
from shodh.training.objectives import ForecastConfig
from shodh.training.tracking import TrackingConfig
from tokenizer.autoencoder import AutoencoderConfig
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


@dataclass(frozen=True, kw_only=True)
class LatentCaching:
    """launch/cache_latents.py"""

    stores: Path
    domains: tuple[str, ...]
    tokenizer: Path
    latents: Path
    threads: int = 2


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


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """launch/evaluate_model.py"""

    stores: Path
    latents: Path
    domains: tuple[str, ...]
    tokenizer: Path
    run: Path
    threads: int = 2


CONFIGS = {
    "train_tokenizer": TokenizerTraining,
    "cache_latents": LatentCaching,
    "pretrain": Pretraining,
    "evaluate_model": Evaluation,
}


def mixture_config(engine: EngineConfig, loop: LoopConfig, augment: bool = False) -> MixtureConfig:
    """How a training run draws its batches."""
    return MixtureConfig(
        batch_size=engine.batch_size, accumulation=engine.accumulation, seed=loop.seed, augment=augment
    )
