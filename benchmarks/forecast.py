"""Whether forecasts hold on held-out trajectories: against persistence and the best linear latent model, per domain.

    python benchmarks/forecast.py [key=value ...] [--quick] [--config configs/evaluate_model/transfer.yaml]
        [--run runs/transfer/shodh-0 runs/transfer/shodh-1 ...]

Several runs are seeds of one model: a figure is their median, with p10-p90. Judged: the one-step latent MSE is at most
a tenth of persistence's; the velocity VRMSE of the decoded rollout at step 20, mean over trajectories and starts, is at
most persistence's and the linear latent model's. Stated: VRMSE of all over the spans of steps, and what forecasts
keep of the physics by step 20. The linear model is fitted to each domain's training latents, and told the domain. A run
whose rollout was lost has no VRMSE and is short; against a linear model that was lost any other holds. `--quick`: two
held-out trajectories of a domain.
"""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from figures import ROOT, Figure, at_most, report, stated

sys.path.append(str(ROOT / "launch"))

from parts import fit_linear, hold_out, load_model, open_tokenized
from settings import Evaluation

from shodh.config import ConfigError, load_config
from shodh.device import find_device
from shodh.evaluation.held_out import HeldOutDomain, measure_forecasts, measure_next_latents
from shodh.evaluation.report_run import pick
from shodh.evaluation.rollout import SHORT, SPANS, Predict
from shodh.fields import NUM_GIVEN

LARGEST_RATIO = 0.1  # of one-step latent MSE, over persistence's
QUANTITIES = {  # stated of step 20
    "energy drift": ("energy_drift", "20"),
    "permeability error": ("permeability", "20", "flow_error"),
    "dissipation error": ("permeability", "20", "dissipation_error"),
    "wall shear error": ("wall_shear", "20", "mean_error"),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two held-out trajectories of each domain")
    parser.add_argument("--config", default=str(ROOT / "configs/evaluate_model/transfer.yaml"), help="of an evaluation")
    parser.add_argument("--run", nargs="+", type=Path, help="folders of pretraining runs (default: the config's)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(Evaluation, options.config, options.overrides)
    runs = options.run or [config.run]
    torch.set_num_threads(config.threads)
    figures = measure_runs(config, runs, 2 if options.quick else None)
    return report("forecast_quick" if options.quick else "forecast", figures)


def measure_runs(config: Evaluation, runs: Sequence[Path], num_trajectories: int | None) -> list[Figure]:
    """Figures of all domains. ConfigError where a store holds too few snapshots to judge step 20."""
    device = find_device()
    tokenizer, stores, latents = open_tokenized(config.stores, config.latents, config.tokenizer, config.domains)
    for cache in latents:
        if cache.num_snapshots < (needed := NUM_GIVEN + SHORT):
            raise ConfigError(
                f"latents={cache.path}: {cache.num_snapshots} snapshots, step {SHORT} needs {needed}. Generate more."
            )
    models = [load_model(run, tokenizer, device)[0] for run in runs]
    predictors: dict[str, Predict] = {
        f"run{i}": lambda *inputs, model=model: model(*inputs).latent for i, model in enumerate(models)
    }
    figures = []
    for store, cache in zip(stores, latents, strict=True):
        linear = fit_linear(cache, device)
        held_out = hold_out(
            tokenizer, store, cache, device, num_trajectories, forecasters={"linear": linear}, project=config.project
        )
        figures += measure_domain(held_out, predictors)
    return figures


def measure_domain(held_out: HeldOutDomain, predictors: Mapping[str, Predict]) -> list[Figure]:
    one_step = [measure_next_latents(held_out, predict) for predict in predictors.values()]
    rollouts = measure_forecasts(held_out, predictors)
    return judge(held_out.domain.name, one_step, rollouts, list(predictors))


def judge(
    domain: str, one_step: Sequence[Mapping[str, float]], rollouts: Mapping[str, Any], runs: Sequence[str]
) -> list[Figure]:
    """The judged figures of a domain, then the stated ones; a lost rollout of the model is infinitely wrong."""
    ratios = [measured["latent_mse_over_persistence"] for measured in one_step]
    linear = one_step[0]["linear_latent_mse"] / max(one_step[0]["persistence_latent_mse"], 1e-300)
    figures = [
        at_most(f"{domain}: one-step latent MSE over persistence's", ratios, LARGEST_RATIO),
        stated(f"{domain}: one-step latent MSE of the linear model over persistence's", linear),
    ]
    errors = [_error_at_20(rollouts, run) for run in runs]
    for rival, said in (("persistence", "persistence's"), ("linear", "the linear model's")):
        other = _error_at_20(rollouts, rival)
        over = [error / other if math.isfinite(error) else math.inf for error in errors]
        figures.append(at_most(f"{domain}: rollout VRMSE at step {SHORT} over {said}", over, 1.0))
    for name, blocks in _group(rollouts, runs).items():
        paths = {f"VRMSE at step {span}": ("vrmse", span) for span in SPANS} | QUANTITIES
        for said, path in paths.items():
            values = [value for block in blocks if (value := pick(block, *path)) is not None]
            figures += [stated(f"{domain}: {said}, {name}", values)] if values else []
        figures += _state_octaves(f"{domain}: energy at step {SHORT} over the truth's", name, blocks)
    return figures


def _error_at_20(rollouts: Mapping[str, Any], name: str) -> float:
    error = pick(rollouts, name, "vrmse", "20")
    return math.inf if error is None else error


def _group(rollouts: Mapping[str, Any], runs: Sequence[str]) -> dict[str, list[Any]]:
    """Blocks by what is said of them: the runs together, every other forecast by itself."""
    others = {name: [block] for name, block in rollouts.items() if name not in runs}
    return {"model": [rollouts[run] for run in runs]} | others


def _state_octaves(said: str, name: str, blocks: Sequence[Any]) -> list[Figure]:
    """Coarsest octave first."""
    octaves = [pick(block, "octave_energy_ratio", "20") or [] for block in blocks]
    by_octave = {i: [row[i] for row in octaves if i < len(row) and row[i] is not None] for i in range(len(octaves[0]))}
    return [stated(f"{said}, octave {i}, {name}", values) for i, values in by_octave.items() if values]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"error: {error}")
