"""Hard pairs: does the router tell apart what is nearly the same physics, or places within one field?

    python benchmarks/hard_pairs.py --tokenizer runs/quickstart/tokenizer.safetensors [--stores stores/pairs]
        [--runs runs/pairs] [--seeds 0 1 2] [--weights 0.1 0] [--steps 300] [--domains open_channel porous_media]
        [--model RUN] [--plot docs/hard_pairs.png] [--quick]

Two Reynolds numbers of the open channel, and two kinds of rock; their stores come from
launch/generate_data.py configs/generate_data/hard_pairs_{slow,fast,blobs,spheres}.yaml. On each pair small models are
trained on both members at once, as many experts as members and twice as many, with and without the information loss;
which member a sample is from is never an input (the viscosity is, as for every model). Measured on held-out
trajectories, per layer and seed: purity and I(member; expert) / H(member), beside other ways to halve the trajectories;
and I(place; expert) / H(place) within the fields (near the wall, in throats), beside shuffled places. ``--model`` adds
a pretrained model of the same tokenizer, which never saw these stores. What was trained is kept and not trained again.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from figures import FOLDER, Figure, report, stated
from hard_pairs_measures import Visit, classify_places, measure_pair, measure_places, visit_held_out
from hard_pairs_models import PAIRS, Pair, Trial, list_trials, open_pair, train_trial
from hard_pairs_plot import ExpertMaps, plot_maps
from parts import load_model

from shodh.model.transformer import LatentTransformer
from shodh.training.engine import Membership, distributed
from tokenizer.export import Tokenizer

Measures = dict[str, list[float]]  # by name, a value per layer
PLOTTED_EXPERTS = 4
STATED = ("one-step", "purity", "I/H(member)", "share of a state", "I/H(wall or not)", "I/H(throat or body)")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", type=Path, default=Path("stores/pairs"), help="folder of the four stores' folders")
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/quickstart/tokenizer.safetensors"))
    parser.add_argument("--runs", type=Path, default=Path("runs/pairs"), help="folder of latents and trained models")
    parser.add_argument("--domains", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.1, 0.0], help="of the information loss")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--model", type=Path, help="run folder of a pretrained model to measure beside")
    parser.add_argument("--plot", type=Path, help="PNG of expert maps beside the flow")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.steps, options.runs = options.seeds[:1], 4, options.runs / "quick"
    results: dict[str, dict[str, Measures]] = {}
    maps: list[ExpertMaps] = []
    with distributed(threads_per_rank=1) as group:
        for domain in options.domains:
            tokenizer, pair = open_pair(domain, options.stores, options.runs / "latents", options.tokenizer)
            trials = list_trials([domain], options.seeds, options.weights)
            measure_trials(trials, pair, tokenizer, options, group, results, maps)
            if options.model:
                model, _ = load_model(options.model, tokenizer, group.device)
                results[f"{domain}, {options.model.name}"] = {"": measure(model, pair, visit_held_out(model, pair))}
    print_tables(results)
    if options.plot:
        plot_maps(maps, options.plot)
    name = "hard_pairs_quick" if options.quick else "hard_pairs"
    code = report(name, make_figures(results))
    (FOLDER / f"{name}_seeds.json").write_text(json.dumps(results, indent=1) + "\n")
    return code


def measure_trials(
    trials: Sequence[Trial],
    pair: Pair,
    tokenizer: Tokenizer,
    options: argparse.Namespace,
    group: Membership,
    results: dict[str, dict[str, Measures]],
    maps: list[ExpertMaps],
) -> None:
    """Train or read each model and add what is measured of it to ``results``, and the first seeds' maps to ``maps``."""
    for trial in trials:
        model = train_trial(trial, pair, tokenizer, options.runs, options.steps, group)
        visits = visit_held_out(model, pair)
        results.setdefault(trial.setting, {})[f"seed {trial.seed}"] = measure(model, pair, visits)
        if options.plot and trial.num_experts == PLOTTED_EXPERTS and trial.seed == options.seeds[0]:
            maps.append(ExpertMaps.of(trial.setting, pair, visits[-1], model.config.patch))


def measure(model: LatentTransformer, pair: Pair, visits: Sequence[Visit]) -> Measures:
    """All that is measured of one model, per layer; the error, which has no layer, as a single value."""
    places = measure_places(visits, classify_places(pair, visits, model.config.patch))
    error = float(np.mean([visit.error for visit in visits]))
    return {"one-step error over persistence's": [error]} | measure_pair(visits, pair) | places


def print_tables(results: Mapping[str, Mapping[str, Measures]]) -> None:
    """Every value of every seed: a table per setting, a row per measure, a column per layer, seeds side by side."""
    for setting, seeds in results.items():
        first = next(iter(seeds.values()))
        depth = max(map(len, first.values()))
        print(f"\n{setting} ({', '.join(seeds)})\n")
        print("| measure | " + " | ".join(f"layer {k + 1}" for k in range(depth)) + " |")
        print("|" + "---|" * (depth + 1))
        for name, layers in first.items():
            cells = (" ".join(f"{found[name][k]:.2f}" for found in seeds.values()) for k in range(len(layers)))
            print(f"| {name} | {' | '.join(cells)} |" + " |" * (depth - len(layers)))
    print()


def make_figures(results: Mapping[str, Mapping[str, Measures]]) -> list[Figure]:
    """The median over seeds, layer by layer, of what the tables show first; the tables have the rest."""
    figures = []
    for setting, seeds in results.items():
        found = list(seeds.values())
        stated_here = [(n, layers) for n, layers in found[0].items() if n.startswith(STATED) and "largest" not in n]
        for name, layers in stated_here:
            for k in range(len(layers)):
                where = f", layer {k + 1}" if len(layers) > 1 else ""
                figures.append(stated(f"{setting}{where}: {name}", [measures[name][k] for measures in found]))
    return figures


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, RuntimeError) as error:  # what a user can mend
        sys.exit(f"error: {' '.join(str(error).split())}")
