"""The rate ladder: one tokenizer per number of latent channels, against the best linear code of as many values.

    python benchmarks/rate_ladder.py [--stores stores/ladder] [--rungs 4 16 64] [--cpu-minutes 60] [--jobs 1]
        [--seed 0] [--set key=value ...] [--runs runs/ladder] [--evaluate-only] [--plot docs/rate_ladder.png] [--quick]

Each rung is trained by launch/train_tokenizer.py on one core (configs/train_tokenizer/ladder.yaml), into
RUNS/cC; killed, the same command continues; what decides its weights must be the same, or RUNS another folder. Its CPU
time, start-up and certificate included, is what the kernel counted. On held-out trajectories: the velocity VRMSE of
every domain over that of the block KLT of C values a block, one basis for all domains, fitted on the same training
fields, equally many of each; beside it the KLT of as many values as state and medium latents have together; and the
energy of the highest resolved octave over the truth's.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from figures import ROOT, Figure, at_least, at_most, report, stated

sys.path.append(str(ROOT / "launch"))

from parts import open_stores, require_tokenizer, training_velocities  # noqa: E402 - beside the launch scripts
from rate_ladder_identity import read_settings, require_same_training  # noqa: E402
from rate_ladder_plot import plot_ladder  # noqa: E402
from rate_ladder_rungs import Rung, measure_rung, read_cpu_seconds, set_rung, train_rung  # noqa: E402

from data.reader import Store  # noqa: E402
from data.statistics import FieldStatistics  # noqa: E402
from shodh.config import ConfigError, to_plain  # noqa: E402
from tokenizer.block_klt import BlockKLT  # noqa: E402
from tokenizer.export import Tokenizer, load_tokenizer  # noqa: E402

MOST_ERROR = 0.7  # of the KLT's: 30 % below
LEAST_ENERGY = 0.5  # of the truth's, in the highest resolved octave
OPTIONS = {  # of --set have an option of their own here
    "stores": "--stores",
    "run": "--runs",
    "loop.seed": "--seed",
    "autoencoder.latent_channels": "--rungs",
}
QUICK = ("loop.schedule.num_steps=8", "loop.schedule.num_warmup_steps=2", "checkpoint_interval=8")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", type=Path, default=Path("stores/ladder"))
    parser.add_argument("--rungs", type=int, nargs="+", default=[4, 16, 64], help="latent channels")
    parser.add_argument("--cpu-minutes", type=float, default=60.0, help="that training a rung may take")
    parser.add_argument("--jobs", type=int, default=1, help="rungs trained at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="overrides of ladder.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs/ladder"), help="folder of the rungs' runs")
    parser.add_argument("--evaluate-only", action="store_true", help="train nothing")
    parser.add_argument("--plot", type=Path, help="PNG of VRMSE against rate")
    parser.add_argument("--quick", action="store_true", help="one rung, a few steps, two held-out trajectories")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rungs = options.rungs[:1] if options.quick else options.rungs
    runs = {channels: options.runs / (f"quick{channels}" if options.quick else f"c{channels}") for channels in rungs}
    overrides = list_overrides(options)
    stores = open_stores(options.stores, read_settings(overrides).domains)
    if not options.evaluate_only:
        train(runs, overrides, stores, options)
    for channels, run in runs.items():
        require_same_training(run, read_settings(set_rung(channels, run, overrides)), stores)
    measured = measure(runs, stores, 2 if options.quick else None)
    if options.plot:
        plot_ladder(measured, options.plot)
    figures = [figure for rung in measured for figure in judge(rung, options.cpu_minutes / 60)]
    return report("rate_ladder_quick" if options.quick else "rate_ladder", figures)


def list_overrides(options: argparse.Namespace) -> list[str]:
    """The options as overrides of ladder.yaml; ConfigError for one that is set both ways."""
    for override in options.set:
        key = override.partition("=")[0]
        if key in OPTIONS:
            raise ConfigError(f"--set {override}: has an option of its own. Use {OPTIONS[key]}.")
    own = (f"stores={options.stores.resolve()}", f"loop.seed={options.seed}")
    return [*own, *(QUICK if options.quick else ()), *options.set]


def train(
    runs: Mapping[int, Path], overrides: Sequence[str], stores: Sequence[Store], options: argparse.Namespace
) -> None:
    """Train what is not yet trained, ``--jobs`` rungs at a time; a quick run is trained anew."""
    if options.quick:
        for run in filter(Path.exists, runs.values()):
            shutil.rmtree(run)
    with ThreadPoolExecutor(options.jobs) as pool:
        rung = partial(train_rung, overrides=overrides, stores=stores)
        list(pool.map(rung, runs, runs.values()))  # raises what a rung raised


def measure(runs: Mapping[int, Path], stores: Sequence[Store], most: int | None) -> list[Rung]:
    """Every rung on the held-out trajectories of every store, ``most`` at most."""
    tokenizers = {channels: load_tokenizer(run / "tokenizer.safetensors") for channels, run in runs.items()}
    scales = agree_on_scales(list(tokenizers.values()), stores)
    codes = fit_codes(list(tokenizers.values()), stores, scales, None if most is None else 24)
    return [
        measure_rung(tokenizer, stores, scales, codes, read_cpu_seconds(runs[channels]), most)
        for channels, tokenizer in tokenizers.items()
    ]


def agree_on_scales(tokenizers: Sequence[Tokenizer], stores: Sequence[Store]) -> dict[str, FieldStatistics]:
    """The scales in which all rungs and codes are compared, by domain; ConfigError where rungs have different ones."""
    scales = {}
    for store in stores:
        name = store.domain.name
        first, *others = (require_tokenizer(tokenizer, store) for tokenizer in tokenizers)
        if any(other != first for other in others):
            raise ConfigError(f"store={store.path}: rungs normalise {name} differently. Train them all anew on it.")
        scales[name] = first
    return scales


def fit_codes(
    tokenizers: Sequence[Tokenizer], stores: Sequence[Store], scales: Mapping[str, FieldStatistics], most: int | None
) -> dict[int, BlockKLT]:
    """Block KLTs of all the numbers of values that the rungs are compared with, by that number."""
    statistics = {name: to_plain(scale) for name, scale in scales.items()}
    sizes = [tokenizer.autoencoder.config for tokenizer in tokenizers]
    numbers = {size.latent_channels + extra for size in sizes for extra in (0, size.medium_channels)}
    codes = BlockKLT.fit(training_velocities(stores, statistics, most), {str(number): number for number in numbers})
    return {int(number): code for number, code in codes.items()}


def judge(rung: Rung, most_hours: float) -> list[Figure]:
    """What is measured of a rung, against its targets."""
    c, figures = rung.latent_channels, []
    both = c + rung.medium_channels
    for domain, found in rung.domains.items():
        name = f"C={c} {domain}"
        figures += [
            stated(f"{name}: velocity VRMSE", found.vrmse),
            stated(f"{name}: block KLT of {c} values", found.vrmse_of_klt),
            stated(f"{name}: block KLT of {both} values", found.vrmse_of_klt_with_medium),
            at_most(f"{name}: VRMSE over block KLT of {c} values", found.vrmse / found.vrmse_of_klt, MOST_ERROR),
            stated(f"{name}: VRMSE over block KLT of {both} values", found.vrmse / found.vrmse_of_klt_with_medium),
            at_least(f"{name}: energy of the highest octave over the truth's", found.energy_ratio, LEAST_ENERGY),
            stated(f"{name}: correlation in the highest octave", found.correlation),
            stated(f"{name}: pressure VRMSE", found.vrmse_of_pressure),
        ]
    return [*figures, at_most(f"C={c}: training", rung.cpu_seconds / 3600, most_hours, "CPU hours")]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, RuntimeError) as error:  # what a user can mend
        sys.exit(f"error: {' '.join(str(error).split())}")
