"""The rate ladder: one tokenizer per number of latent channels, against the best linear code of as many values.

    python benchmarks/rate_ladder.py [--stores stores/quickstart] [--rungs 4 16 64] [--cpu-minutes 60] [--jobs 1]
        [--seed 0] [--set key=value ...] [--evaluate-only] [--plot docs/rate_ladder.png] [--quick]

Each rung is trained by launch/train_tokenizer.py on one core (configs/train_tokenizer/ladder.yaml), into
runs/ladder/cC; killed, the same command continues. Its CPU time, start-up and certificate included, is what the kernel
counted. On held-out trajectories: the velocity VRMSE of every domain over that of the block KLT of C values a block,
one basis for all domains, fitted on the same training fields, equally many of each; beside it the KLT of as many values
as state and medium latents have together; and the energy of the highest resolved octave over the truth's.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from figures import ROOT, Figure, at_least, at_most, report, stated
from rate_ladder_plot import plot_ladder
from rate_ladder_rungs import Rung, measure_rung, read_cpu_seconds, train_rung

sys.path.append(str(ROOT / "launch"))

from parts import open_stores, training_velocities  # noqa: E402 - beside the launch scripts

from data.reader import Store  # noqa: E402
from data.statistics import measure_statistics  # noqa: E402
from shodh.config import to_plain  # noqa: E402
from tokenizer.block_klt import BlockKLT  # noqa: E402
from tokenizer.export import Tokenizer, load_tokenizer  # noqa: E402

DOMAINS = ("fwi", "open_channel", "porous_media")
MOST_ERROR = 0.7  # of the KLT's: 30 % below
LEAST_ENERGY = 0.5  # of the truth's, in the highest resolved octave
QUICK = ("loop.schedule.num_steps=8", "loop.schedule.num_warmup_steps=2", "checkpoint_interval=8")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", type=Path, default=Path("stores/quickstart"))
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
    if not options.evaluate_only:
        train(runs, options)
    measured = measure(runs, options.stores, 2 if options.quick else None)
    if options.plot:
        plot_ladder(measured, options.plot)
    figures = [figure for rung in measured for figure in judge(rung, options.cpu_minutes / 60)]
    return report("rate_ladder_quick" if options.quick else "rate_ladder", figures)


def train(runs: dict[int, Path], options: argparse.Namespace) -> None:
    """Train what is not yet trained, ``--jobs`` rungs at a time."""
    overrides = [*(QUICK if options.quick else ()), *options.set]
    overrides = [f"stores={options.stores}", f"loop.seed={options.seed}", *overrides]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(partial(train_rung, overrides=overrides), runs, runs.values()))  # raises what a rung raised


def measure(runs: dict[int, Path], folder: Path, most: int | None) -> list[Rung]:
    """Every rung on the held-out trajectories of every store, ``most`` at most."""
    stores = open_stores(folder, DOMAINS)
    tokenizers = {channels: load_tokenizer(run / "tokenizer.safetensors") for channels, run in runs.items()}
    codes = fit_codes(list(tokenizers.values()), stores, None if most is None else 24)
    return [
        measure_rung(tokenizer, stores, codes, read_cpu_seconds(runs[channels]), most)
        for channels, tokenizer in tokenizers.items()
    ]


def fit_codes(tokenizers: Sequence[Tokenizer], stores: Sequence[Store], most: int | None) -> dict[int, BlockKLT]:
    """Block KLTs of all the numbers of values that the rungs are compared with, by that number."""
    statistics = {store.domain.name: to_plain(measure_statistics(store)) for store in stores}
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
    sys.exit(main(sys.argv[1:]))
