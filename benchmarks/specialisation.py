"""Do experts specialise by themselves? Judged on held-out tokens of the models that launch/measure_transfer.py trained.

    python benchmarks/specialisation.py [--run runs/transfer]

pair (open_channel and porous_media, E = 2): 100 % of the tokens of each domain on its own expert in the last layer, for
every seed. shodh (all domains): purity, the mean over tokens of the largest domain share of their expert, >= 0.99 and
I(domain; expert) / H(domain) >= 0.95 in the last layer, and no expert dead there. Every seed and layer is printed; no
label enters these models, and their balance loss is on.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import Figure, at_least, at_most, report, stated

from shodh.evaluation.transfer import list_specialisation, read_results

LEAST_PURITY = 0.99
LEAST_INFORMATION = 0.95
LEAST_SEEDS = 3
SETTINGS = {"pair": (2, 2), "shodh": (3, 4)}  # domains and experts
VARIANTS = tuple(SETTINGS)

Row = Mapping[str, Any]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/transfer"), help="folder of the models' folders")
    options = parser.parse_args(arguments)
    results = read_results(options.run)
    require_the_setting(results)
    return report("specialisation", judge(list_specialisation(results, VARIANTS)))


def require_the_setting(results: Sequence[Mapping[str, Any]]) -> None:
    """ValueError where a model was trained without the balance loss, or on other domains or experts than is claimed."""
    for result in results:
        variant, identity = result["job"]["variant"], result["identity"]
        if variant not in VARIANTS:
            continue
        if not identity["objective"]["balance_weight"]:
            raise ValueError(f"{result['job']}: was trained without the balance loss. Set objective.balance_weight.")
        wanted, found = SETTINGS[variant], (len(identity["domains"]), identity["model"]["num_experts"])
        if found != wanted:
            raise ValueError(f"{result['job']}: has {found} domains and experts. Measure with {wanted}.")


def judge(rows: Sequence[Row]) -> list[Figure]:
    """Every seed and layer, those of last layers against their targets."""
    figures = []
    for variant in VARIANTS:
        own = [row for row in rows if row["variant"] == variant]
        figures.append(at_least(f"{variant}: seeds", float(len({row["seed"] for row in own})), LEAST_SEEDS))
        last = max((row["layer"] for row in own), default=0)
        for row in own:
            figures += (judge_pair if variant == "pair" else judge_shodh)(row, row["layer"] == last)
    return figures


def judge_pair(row: Row, is_last: bool) -> list[Figure]:
    """Share of each domain's tokens on its own expert; 0 where two domains prefer the same."""
    name, figures = _name(row), []
    for domain, share in row["own_expert"].items():
        label = f"{name}: {domain} tokens on their own expert"
        figures.append(at_least(label, 100 * share, 100, "%") if is_last else stated(label, 100 * share, "%"))
    return figures


def judge_shodh(row: Row, is_last: bool) -> list[Figure]:
    labels = [f"{_name(row)}: {what}" for what in ("purity", "I(domain; expert) / H(domain)", "dead experts")]
    values = [row["purity"], row["information"], float(len(row["dead_experts"]))]
    if not is_last:
        return [stated(label, value) for label, value in zip(labels, values, strict=True)]
    return [
        at_least(labels[0], values[0], LEAST_PURITY),
        at_least(labels[1], values[1], LEAST_INFORMATION),
        at_most(labels[2], values[2], 0),
    ]


def _name(row: Row) -> str:
    return f"{row['variant']} seed {row['seed']} layer {row['layer']}"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, RuntimeError) as error:  # what a user can mend
        sys.exit(f"error: {' '.join(str(error).split())}")
