"""Negative transfer as a picture: every variant's error over the solo models', by domain and metric."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shodh.evaluation.transfer import METRICS, REFERENCES

WIDTHS = {"panel": 3.4, "names": 1.6, "row": 0.3, "around": 1.1}  # inches


def plot_transfer(summary: Mapping[str, Any], path: Path) -> None:
    """Points are means over seeds of (model - solo) / solo, bars their 95 % intervals; written as PNG."""
    domains, metrics = summary["domains"], summary["metrics"]
    variants = list(summary["over_solo"])
    height = len(metrics) * (WIDTHS["row"] * max(3, len(variants)) + 0.5) + WIDTHS["around"]
    figure = Figure(figsize=(len(domains) * WIDTHS["panel"] + WIDTHS["names"], height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(metrics), len(domains), squeeze=False, sharey=True)
    for row, metric in zip(axes, metrics, strict=True):
        for axis, domain in zip(row, domains, strict=True):
            _draw(
                axis,
                {v: found[domain][metric] for v, found in summary["over_solo"].items() if domain in found},
                variants,
            )
            axis.set_title(f"{domain}: {METRICS[metric]}", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("(model - solo) / solo, %; left is better", fontsize=8)
    seeds = ", ".join(map(str, summary["seeds"]))
    figure.suptitle(f"Joint over solo training; bars: 95 % interval of the mean over seeds {seeds}", fontsize=10)
    partial = path.with_suffix(".tmp.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)


def _draw(axis: Axes, found: Mapping[str, Mapping[str, Any]], variants: list[str]) -> None:
    """One panel; Shodh stands out, its controls are dark, the rest is grey."""
    axis.axvline(0, color="0.3", linewidth=0.8)
    for place, variant in enumerate(variants):
        comparison = found.get(variant)
        if comparison is None or comparison["mean"] is None:
            axis.text(0, place, " diverged" if comparison and comparison["num_lost"] else "", va="center", fontsize=7)
            continue
        mean = 100 * comparison["mean"]
        low, high = (mean if comparison[end] is None else 100 * comparison[end] for end in ("low", "high"))
        colour = "#d55e00" if variant == "shodh" else "#0072b2" if variant in REFERENCES else "0.45"
        axis.errorbar(
            mean,
            place,
            xerr=[[mean - low], [high - mean]],
            fmt="o",
            color=colour,
            capsize=3,
            markersize=4,
            linewidth=1.2,
        )
    axis.set_yticks(range(len(variants)), variants, fontsize=8)
    axis.set_ylim(len(variants) - 0.5, -0.5)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", alpha=0.3)
