"""Published figures beside those of a run: one row a figure and domain, with the normalisation that each is in.

The published ones state neither the normalisation of latents and fields nor the operator and precision of the
divergence, so each row also says what persistence makes of the same data: an error means something only beside that.
Imports neither torch nor deepspeed.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shodh.evaluation.report_run import largest_leak, pick

# Source: figures as published for this architecture (latent MSE, decoded MSE, divergence, routing), whose normalisation
# is not stated. Per domain: error of the latent one step ahead, of the field decoded from it, and the share of a
# domain's tokens that its expert gets. The divergence is given once, in FP64, for both domains.
PUBLISHED = {
    "open_channel": {"latent_mse": 2.46e-5, "decoded_mse": 2.48e-6, "divergence": 2.8e-10, "routing": 1.0},
    "porous_media": {"latent_mse": 9.76e-6, "decoded_mse": 1.76e-6, "divergence": 2.8e-10, "routing": 1.0},
}

NORMALISATION = {
    "latent_mse": "mean square over all values of the next latent; ours whitened to covariance 1 over all domains "
    "together, the published normalisation is not stated",
    "decoded_mse": "mean square of velocity decoded one step ahead, per component and cell, in units of the domain's "
    "rms velocity about its mean flow; the published normalisation is not stated",
    "divergence": "largest |div| (of fwi: |curl|) of the stored FP32 flux of decoded forecasts and truths, evaluated "
    "in FP64 with the operator of its grid, normalised velocity per mean cell size; the published operator is not "
    "stated",
    "routing": "share of a domain's held-out tokens on its busiest expert of the last layer (its number in brackets)",
}
TITLES = {
    "latent_mse": "latent MSE",
    "decoded_mse": "decoded MSE",
    "divergence": "divergence (FP64)",
    "routing": "routing",
}


class Row(NamedTuple):
    """One figure of one domain; None where there is none."""

    figure: str
    domain: str
    published: float | None
    ours: float | None
    persistence: float | None = None
    floor: float | None = None  # what the tokenizer alone errs
    expert: int | None = None  # the busiest of the last layer


def compare_with_published(evaluation: Mapping[str, Any]) -> list[Row]:
    """The rows of an ``evaluation.json``, figure by figure; a domain that nothing was published of has ours alone."""
    domains = evaluation.get("domains") or {}
    return [
        _fill_row(figure, name, PUBLISHED.get(name, {}).get(figure), block)
        for figure in TITLES
        for name, block in domains.items()
    ]


def share_experts(rows: list[Row]) -> list[str]:
    """Domains whose busiest expert is also another domain's: their shares say nothing of specialisation."""
    experts = {row.domain: row.expert for row in rows if row.figure == "routing"}
    return [name for name, expert in experts.items() if list(experts.values()).count(expert) > 1]


def format_published(rows: list[Row]) -> str:
    """The table as aligned text, the normalisations below it."""
    lines = [("figure", "domain", "published", "ours", "persistence", "tokenizer alone")]
    lines += [(TITLES[row.figure], row.domain, *_format_numbers(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(f"{x:{'<>'[i > 1]}{widths[i]}}" for i, x in enumerate(line)).rstrip() for line in lines]
    notes = [f"{TITLES[figure]}: {note}." for figure, note in NORMALISATION.items()]
    if shared := share_experts(rows):
        notes.append(f"The busiest expert of {' and '.join(shared)} is the same: the router does not tell them apart.")
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:], "", *notes])


def write_published(folder: Path) -> str:
    """Write ``table.json`` beside a folder's ``evaluation.json``, and return the table as text.

    Raises ValueError where there is no evaluation to be read.
    """
    source = folder / "evaluation.json"
    try:
        evaluation = json.loads(source.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"evaluation={source}: cannot be read ({error}). Run launch/evaluate_model.py first."
        ) from None
    rows = compare_with_published(evaluation)
    content = {
        "rows": [row._asdict() for row in rows],
        "normalisation": NORMALISATION,
        "same_expert": share_experts(rows),
        "step": pick(evaluation, "run", "step"),
    }
    partial = folder / "table.json.tmp"
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, folder / "table.json")
    return format_published(rows)


def _fill_row(figure: str, name: str, published: float | None, block: Mapping[str, Any]) -> Row:
    if figure == "latent_mse":
        return Row(figure, name, published, block.get("latent_mse"), block.get("persistence_latent_mse"))
    if figure == "decoded_mse":
        ours, persistence, floor = (
            block.get(key) for key in ("decoded_mse", "persistence_decoded_mse", "decoded_truth_mse")
        )
        return Row(figure, name, published, ours, persistence, floor)
    if figure == "divergence":
        return Row(figure, name, published, largest_leak(block))
    load = (pick(block, "routing", "load") or [None])[-1]
    if not load:
        return Row(figure, name, published, None)
    return Row(figure, name, published, max(load), expert=load.index(max(load)))


def _format_numbers(row: Row) -> tuple[str, ...]:
    if row.figure == "routing":
        published, ours = (_format(value, percent=True) for value in (row.published, row.ours))
        return published, f"{ours} ({row.expert})" if row.expert is not None else ours, "", ""
    return tuple(map(_format, (row.published, row.ours, row.persistence, row.floor)))


def _format(value: float | None, percent: bool = False) -> str:
    """Three significant digits; exactly zero reads 0.0, and only that does."""
    if value is None:
        return "-"
    if percent:
        return f"{100 * value:.1f} %"
    return "0.0" if value == 0 else f"{value:.2e}"
