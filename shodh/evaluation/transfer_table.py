"""Negative transfer as Markdown: the verdicts in words, then every difference, error, size and layer behind them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shodh.evaluation.transfer import LOSS, METRICS

NAMES = {
    "solo": "the solo models",
    "solo_dense": "the dense solo models",
    "dense_flops": "the dense model of equal active parameters",
    "dense_parameters": "the dense model of equal parameters",
    "oracle": "the oracle router",
}
WORDS = {
    "better": "better: its whole interval lies below 0",
    "equal": "not distinguishable: 0 lies within the seeds' interval",
    "worse": "WORSE: its whole interval lies above 0",
    "diverged": "WORSE: its rollouts did not stay finite",
    "not measured": "not measured",
}


def format_transfer(summary: Mapping[str, Any]) -> str:
    """The whole of transfer.md."""
    seeds = ", ".join(map(str, summary["seeds"]))
    percent = round(100 * summary["confidence"])
    title = f"# Joint training against its controls: {summary['num_steps']} steps, seeds {seeds}"
    note = (
        "Differences are (model - reference) / reference of errors, paired by seed: negative is better. In brackets "
        f"the {percent} % interval of their mean over seeds (Student's t, uncorrected for how many there are). "
        '"Not worse" holds where the interval reaches 0 or lies below it.'
    )
    parts = [title, note, *_format_verdicts(summary), *_format_differences(summary), *_format_errors(summary)]
    return "\n\n".join([*parts, _format_sizes(summary), _format_specialisation(summary["specialisation"])])


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """Such as "-3.10 % [-5.02, -1.18]"."""
    if comparison["mean"] is None:
        return "diverged" if comparison["num_lost"] else "-"
    mean = f"{100 * comparison['mean']:+.2f} %"
    if comparison["num_lost"]:
        return f"{mean} ({comparison['num_lost']} seeds diverged)"
    if comparison["low"] is None:
        return mean
    return f"{mean} [{100 * comparison['low']:+.2f}, {100 * comparison['high']:+.2f}]"


def _format_verdicts(summary: Mapping[str, Any]) -> Iterable[str]:
    """Shodh against each reference: one sentence by reference, then one by domain and metric."""
    yield "## Is Shodh worse than any of them?"
    if not summary["shodh_over"]:
        yield "Not measured: it takes the variant shodh and one of " + ", ".join(NAMES) + "."
    for reference, domains in summary["shodh_over"].items():
        verdict = _format_verdict({name: metrics[LOSS] for name, metrics in domains.items()})
        lines = [f"Joint loss (one-step latent error) no worse than that of {NAMES[reference]}: {verdict}.", ""]
        for name, metrics in domains.items():
            for metric, comparison in metrics.items():
                words = WORDS.get(comparison["verdict"], comparison["verdict"])
                lines.append(f"- {name}, {METRICS[metric]}: {format_comparison(comparison)}, {words}")
        yield "\n".join(lines)


def _format_verdict(losses: Mapping[str, Mapping[str, Any]]) -> str:
    """One sentence's end: where it fails, where nothing can be said, and where the mean itself is above 0."""
    unknown = [name for name, found in losses.items() if found["verdict"] == "not measured"]
    worse = [name for name, found in losses.items() if not found["holds"] and name not in unknown]
    above = [name for name, found in losses.items() if found["holds"] and found["mean"] > 0]
    if worse:
        return f"**does not hold: Shodh is worse on {', '.join(worse)}**"
    if unknown or not losses:
        return f"not measured on {', '.join(unknown) or 'any domain'}"
    if above:
        return f"**holds on every domain**, though the mean over seeds lies above on {', '.join(above)}"
    return "**holds on every domain**, in the mean too"


def _format_differences(summary: Mapping[str, Any]) -> Iterable[str]:
    yield "## Every variant against the solo models"
    for metric in summary["metrics"]:
        rows = [
            [variant, *(format_comparison(found[d][metric]) if d in found else "-" for d in summary["domains"])]
            for variant, found in summary["over_solo"].items()
        ]
        yield f"{METRICS[metric]}, (model - solo) / solo:\n\n" + _table(["model", *summary["domains"]], rows)


def _format_errors(summary: Mapping[str, Any]) -> Iterable[str]:
    """Errors themselves: mean over seeds, and the spread from least to most."""
    yield "## The errors"
    for metric in summary["metrics"]:
        rows = [
            [variant, *(_format_seeds(errors[domain][metric]) for domain in summary["domains"])]
            for variant, errors in summary["errors"].items()
        ]
        kept = ["persistence", *(_format_number(summary["persistence"][d][metric]) for d in summary["domains"])]
        head = f"{METRICS[metric]}, mean over seeds (least to most):\n\n"
        yield head + _table(["model", *summary["domains"]], [*rows, kept])


def _format_sizes(summary: Mapping[str, Any]) -> str:
    head = ["model", "parameters", "active", "samples a step", "CPU s a training", "sum of gates", "share of the best"]
    rows = [
        [
            variant,
            f"{size['parameters_total']:,}",
            f"{size['parameters_active']:,}",
            str(size["samples_per_step"]),
            "-" if size["cpu_seconds"] is None else f"{size['cpu_seconds']:.0f}",
            f"{size['gate_sum']:.2f}",
            f"{size['gate_best_share']:.2f}",
        ]
        for variant, size in summary["variants"].items()
    ]
    return "## Sizes\n\n" + _table(head, rows)


def _format_specialisation(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every seed and layer of the learned routers."""
    head = ["model", "seed", "layer", "purity", "I / H(domain)", "dead experts", "on its own expert", "load"]
    cells = [
        [
            row["variant"],
            str(row["seed"]),
            str(row["layer"]),
            _format_number(row["purity"]),
            _format_number(row["information"]),
            ", ".join(map(str, row["dead_experts"])) or "none",
            ", ".join(f"{name} {100 * share:.1f} %" for name, share in row["own_expert"].items()),
            " ".join(f"{load:.2f}" for load in row["load"]),
        ]
        for row in rows
    ]
    return "## Which expert serves which domain, on held-out tokens\n\n" + _table(head, cells)


def _format_seeds(errors: Mapping[Any, float | None]) -> str:
    values = [value for value in errors.values() if value is not None]
    if len(values) < len(errors):
        return f"{len(errors) - len(values)} of {len(errors)} diverged"
    if not values:
        return "-"
    mean = math.fsum(values) / len(values)
    return f"{_format_number(mean)} ({_format_number(min(values))} to {_format_number(max(values))})"


def _format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
