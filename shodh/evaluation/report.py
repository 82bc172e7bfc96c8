"""One self-contained page about a run, ``report.html``, and the evaluation as a plain-text table.

Imports neither torch nor deepspeed, so that a report costs seconds.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shodh.evaluation import report_page as html
from shodh.evaluation.report_page import Tile
from shodh.evaluation.report_run import (
    Number,
    Run,
    format_count,
    format_number,
    largest_leak,
    last_entry,
    maximum,
    mean,
    pick,
    read_run,
)


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run's folder and return its path. Raises ValueError if there is no such folder."""
    from shodh.evaluation import report_reconstruction as reconstruction  # here: matplotlib, which the text table
    from shodh.evaluation import report_sections as sections  # does not need
    from shodh.evaluation.report_alarms import show_alarms
    from shodh.evaluation.report_routing import show_routing

    run = read_run(run_folder)
    content = [
        ("Alarms", show_alarms(run)),
        ("Evaluation", sections.show_evaluation(run)),
        ("Fields", sections.show_fields(run)),
        ("Reconstruction", reconstruction.show_reconstruction(run)),
        ("Latents", reconstruction.show_latents(run)),
        ("Rollout", sections.show_rollout(run)),
        ("Routing", show_routing(run)),
        ("Training", sections.show_training(run)),
        ("Conservation", sections.show_conservation(run)),
        ("Provenance", sections.show_provenance(run)),
    ]
    revision = run.facts.get("git_sha")
    subtitle = "Shodh run report" + (f", code at {str(revision)[:12]}" if revision else "")
    document = html.page(run.folder.resolve().name, subtitle, _find_headlines(run), content)
    path = run_folder / "report.html"
    partial = path.with_suffix(".html.tmp")
    partial.write_text(document, encoding="utf-8")
    os.replace(partial, path)
    return path


def format_table(evaluation: Mapping[str, Any]) -> str:
    """The evaluation as aligned text, one row a domain, at most 110 columns."""
    lines: list[tuple[str, ...]] = [
        ("", "max |div|", "tokenizer VRMSE", "one step /", "rollout VRMSE at step", "linear", "top expert"),
        (
            "domain",
            "or |curl|",
            _columns("ours", "KLT"),
            "persistence",
            _columns("1", "2-20", "20"),
            "at 20",
            "last layer",
        ),
    ]
    for name, domain in (evaluation.get("domains") or {}).items():
        errors = [pick(domain, "tokenizer", key, "velocity") for key in ("vrmse", "block_klt_vrmse")]
        rollout = [pick(domain, "rollout", "model", "vrmse", span) for span in ("1", "2-20", "20")]
        linear = pick(domain, "rollout", "linear", "vrmse", "20")
        busiest = last_entry(pick(domain, "routing", "concentration"))
        numbers = (largest_leak(domain), errors, domain.get("latent_mse_over_persistence"), rollout, linear, busiest)
        lines.append((name[:24], *(_columns(*n) if isinstance(n, list) else format_number(n) for n in numbers)))
    means = evaluation.get("mean") or {}
    if means:
        errors = [means.get(f"{key}_velocity_vrmse") for key in ("tokenizer", "block_klt")]
        lines.append(("mean", "", _columns(*errors), "", "", "", ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(f"{x:{'>' if i else '<'}{widths[i]}}" for i, x in enumerate(line)).rstrip() for line in lines]
    return "\n".join([*text[:2], "-" * max(map(len, text)), *text[2:]])


def _columns(*entries: str | Number | None) -> str:
    return " ".join(f"{entry if isinstance(entry, str) else format_number(entry):>6}" for entry in entries)


def _find_headlines(run: Run) -> list[Tile]:
    domains = run.domains.values()
    return [
        *_find_conservation_tiles(run),
        *_compare("One step, latent MSE", mean(d.get("latent_mse") for d in domains), "persistence", _persistence(run)),
        *_compare(
            "Tokenizer, velocity VRMSE",
            pick(run.evaluation, "mean", "tokenizer_velocity_vrmse"),
            "block KLT",
            pick(run.evaluation, "mean", "block_klt_velocity_vrmse"),
        ),
        *_find_sharpness_tiles(run),
        *_compare(
            "Rollout VRMSE, step 20",
            mean(pick(d, "rollout", "model", "vrmse", "20") for d in domains),
            "linear",
            mean(pick(d, "rollout", "linear", "vrmse", "20") for d in domains),
        ),
        *_find_routing_tiles(run),
        *_find_size_tiles(run),
    ]


def _compare(label: str, value: Number | None, rival: str, bound: Number | None) -> list[Tile]:
    """A tile for a figure that should be below its rival's."""
    if value is None:
        return []
    verdict = "" if bound is None else "good" if value < bound else "bad"
    return [Tile(label, format_number(value), f"{rival} {format_number(bound)}", verdict)]


def _persistence(run: Run) -> Number | None:
    return mean(d.get("persistence_latent_mse") for d in run.domains.values())


def _find_conservation_tiles(run: Run) -> list[Tile]:
    tiles = []
    for kind in ("divergence", "curl"):
        largest = maximum(pick(d, kind, "max_abs") for d in run.domains.values())
        if largest is not None:
            note = "bit for bit: stored FP32, evaluated FP64" if largest == 0 else "should be exactly 0.0"
            tiles.append(Tile(f"Largest {kind}", format_number(largest), note, "good" if largest == 0 else "bad"))
    return tiles


def _find_sharpness_tiles(run: Run) -> list[Tile]:
    ratios = [pick(d, "reconstruction", "highest_octave_energy_ratio") for d in run.domains.values()]
    ratios = [ratio for ratio in ratios if ratio is not None]
    if not ratios:
        return []
    worst = max(ratios, key=lambda ratio: max(ratio, 1 / ratio) if ratio else math.inf)
    verdict = "good" if 0.5 <= worst <= 2 else "bad"
    return [
        Tile("Energy in the highest octave", format_number(worst), "of the truth's; domain furthest from 1", verdict)
    ]


def _find_routing_tiles(run: Run) -> list[Tile]:
    layers = run.evaluation.get("routing_layers") or [{}]
    purity = layers[-1].get("purity")
    if purity is None:
        return []
    return [Tile("Expert purity, last layer", format_number(purity), "of an expert's tokens are of its main domain")]


def _find_size_tiles(run: Run) -> list[Tile]:
    total, active = (run.facts.get(key) for key in ("parameters_total", "parameters_active"))
    return [Tile("Parameters", format_count(total), f"{format_count(active)} active")] if total else []
