"""A training step with the loader over the same step on one batch made beforehand, in the quickstart configs.

    python benchmarks/training_step.py [--quick]

Stores and latents are random, of the quickstart's sizes; one process trains with the whole batch, on one core that its
loader shares: no other core hides what loading costs. Nothing is kept from one reading to the next.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import Figure, at_most, control, report, stated
from random_store import write_random_store

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "launch"))

from settings import Pretraining, TokenizerTraining, mixture_config  # noqa: E402 - beside the launch scripts

from data.latents import open_latents, write_latents  # noqa: E402
from data.mixture import FieldMixture, LatentMixture, stream  # noqa: E402
from data.simulate import acoustics, open_channel, porous_media  # noqa: E402
from data.statistics import measure_statistics  # noqa: E402
from shodh.config import load_config  # noqa: E402
from shodh.model.transformer import LatentTransformer  # noqa: E402
from shodh.training.engine import build_engine, distributed  # noqa: E402
from shodh.training.loop import LoopConfig, train  # noqa: E402
from shodh.training.objectives import ForecastObjective  # noqa: E402
from shodh.training.schedule import ScheduleConfig  # noqa: E402
from tokenizer.autoencoder import Autoencoder  # noqa: E402
from tokenizer.objective import ReconstructionObjective  # noqa: E402

DOMAINS = (acoustics.DOMAIN, open_channel.DOMAIN, porous_media.DOMAIN)
RESOLUTION, NUM_TRAJECTORIES, NUM_SNAPSHOTS = 32, 24, 25  # of configs/generate_data/quickstart.yaml
MOST = 1.02

Batches = Callable[[int], Generator[Any, None, None]]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps a round")
    return report("training_step", compare_training_steps(3 if parser.parse_args(arguments).quick else 6))


def compare_training_steps(num_steps: int, num_rounds: int = 11) -> list[Figure]:
    """The ratio for the tokenizer and for pretraining, each over ``num_rounds`` rounds of ``num_steps`` steps."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(prefix="shodh-training-") as scratch, distributed(threads_per_rank=1) as group:
        folder = Path(scratch)
        stores = [
            write_random_store(folder / domain.name, domain, RESOLUTION, NUM_TRAJECTORIES, NUM_SNAPSHOTS)
            for domain in DOMAINS
        ]
        tokenizer = load_config(TokenizerTraining, ROOT / "configs/train_tokenizer/quickstart.yaml", [])
        statistics = [measure_statistics(store) for store in stores]
        fields = FieldMixture(stores, statistics, replace(mixture_config(tokenizer), cache_bytes=0))
        engine = build_engine(Autoencoder(tokenizer.autoencoder), tokenizer.engine, group.device)
        train_some = trainer(engine, ReconstructionObjective(tokenizer.objective), num_steps)
        figures = compare("tokenizer", train_some, lambda step: stream(fields, step, group.device), num_rounds)

        pretraining = load_config(Pretraining, ROOT / "configs/pretrain/quickstart.yaml", [])
        for store in stores:
            write_latents(folder / "latents" / store.domain.name, store, encode_at_random, "random")
        caches = [open_latents(folder / "latents" / store.domain.name) for store in stores]
        latents = LatentMixture(caches, replace(mixture_config(pretraining), cache_bytes=0))
        engine = build_engine(LatentTransformer(pretraining.model), pretraining.engine, group.device)
        train_some = trainer(engine, ForecastObjective(pretraining.objective), num_steps)
        figures += compare("pretraining", train_some, lambda step: stream(latents, step, group.device), num_rounds)
    return figures


def trainer(engine: Any, objective: Any, num_steps: int) -> Callable[[Batches, int], float]:
    """What trains from a step on: one uncounted, in which a stream starts, then ``num_steps``; gives seconds a step."""

    def train_some(batches: Batches, first_step: int) -> float:
        ends: list[float] = []
        last_step = first_step + num_steps + 1
        schedule = ScheduleConfig(num_steps=last_step, learning_rate=1e-6, num_warmup_steps=0)

        class Clock:
            def after_step(self, record: Any) -> None:
                ends.append(time.perf_counter())

        train(engine, objective, batches, LoopConfig(schedule=schedule), [Clock()], first_step)
        return (ends[-1] - ends[0]) / num_steps

    return train_some


def compare(name: str, train_some: Callable[[Batches, int], float], loaded: Batches, num_rounds: int) -> list[Figure]:
    """Seconds a step from the loader, new batches in every round, and on 12 batches in memory, in turn."""
    with closing(loaded(0)) as batches:
        kept = list(itertools.islice(batches, 12))

    def from_memory(step: int) -> Generator[Any, None, None]:
        yield from itertools.cycle(kept)

    sources = {"loader": loaded, "memory": from_memory, "again": from_memory}
    for source in sources.values():
        train_some(source, 0)
    seconds: dict[str, list[float]] = {source: [] for source in sources}
    for round_ in range(num_rounds):
        for source in list(sources)[:: 1 if round_ % 2 == 0 else -1]:
            seconds[source].append(train_some(sources[source], 10 * (round_ + 1)))
    times = {source: np.array(values) for source, values in seconds.items()}
    return [
        stated(f"{name}: step on batches in memory", times["memory"], "s"),
        at_most(f"{name}: step with the loader over step in memory", times["loader"] / times["memory"], MOST),
        control(f"{name}: step in memory over itself", times["again"] / times["memory"]),
    ]


def encode_at_random(
    velocity: torch.Tensor, pressure: torch.Tensor, medium: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the quickstart's shape; what they hold costs nothing to read."""
    cells = [n // 8 for n in velocity.shape[-3:]]
    return torch.randn(len(velocity), 16, *cells), torch.randn(len(velocity), 4, *cells)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
