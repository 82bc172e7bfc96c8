"""What a run has left in its folder, read so that missing or broken files become sentences, and its numbers as text.

``evaluation.json``: the measurements; ``metrics.jsonl``: one JSON object a logged step; ``slices.npz``: 2-D slices.
"""

import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Number = float | int  # JSON writes 1.0 as either


class Run(NamedTuple):
    """All that the report knows; ``problems`` says what could not be read."""

    folder: Path
    evaluation: dict[str, Any]
    metrics: list[dict[str, Any]]
    slices: dict[str, np.ndarray]
    problems: list[str]

    @property
    def domains(self) -> dict[str, dict[str, Any]]:
        return self.evaluation.get("domains") or {}

    @property
    def facts(self) -> dict[str, Any]:
        return self.evaluation.get("run") or {}


def read_run(run_folder: Path) -> Run:
    """What the folder holds; a file that is missing or broken is named in ``problems``."""
    if not run_folder.is_dir():
        raise ValueError(f"run_folder={run_folder}: no such folder. Pass one that a run wrote, as runs/quickstart.")
    problems: list[str] = []
    return Run(
        folder=run_folder,
        evaluation=_read_evaluation(run_folder / "evaluation.json", problems),
        metrics=read_metrics(run_folder / "metrics.jsonl", problems),
        slices=_read_slices(run_folder / "slices.npz", problems),
        problems=problems,
    )


def read_metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The lines of a run's log that still hold, oldest first; ``problems`` gains a sentence if some are broken.

    A resumed run logs the steps after its checkpoint again: a line replaces what its phase logged before for later
    steps, and adds to what it logged for the same one.
    """
    if not path.is_file():
        problems.append("metrics.jsonl is not there yet, so there are no curves.")
        return []
    kept: dict[str, list[dict[str, Any]]] = {}
    num_broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            step, phase = int(record["step"]), str(record.get("phase", "pretrain"))
        except (ValueError, TypeError, KeyError, AttributeError):
            num_broken += bool(line.strip())
            continue
        records = kept.setdefault(phase, [])
        while records and records[-1]["step"] > step:
            records.pop()
        numbers = {key: float(value) for key, value in record.items() if isinstance(value, (int, float))}
        numbers |= {"step": step, "phase": phase}
        if records and records[-1]["step"] == step:
            records[-1] |= numbers
        else:
            records.append(numbers)
    if num_broken:
        problems.append(f"metrics.jsonl: {num_broken} broken {'line' if num_broken == 1 else 'lines'} skipped.")
    return [record for records in kept.values() for record in records]


def pick(tree: Any, *keys: str) -> Any:
    """The entry of nested mappings under these keys, or None where one is missing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def largest_leak(domain: Mapping[str, Any]) -> Number | None:
    """The largest divergence or curl of a domain, whichever it is held to."""
    return maximum(pick(domain, kind, "max_abs") for kind in ("divergence", "curl"))


def maximum(values: Iterable[Number | None]) -> Number | None:
    return max((value for value in values if value is not None), default=None)


def mean(values: Iterable[Number | None]) -> Number | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def last_entry(values: Sequence[Number] | None) -> Number | None:
    return values[-1] if values else None


def format_number(value: Number | None) -> str:
    """Three significant digits; exactly zero reads 0.0, and only that does."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return str(float(value))
    if not 1e-3 <= abs(value) < 1e3:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e+")
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def format_count(value: Number | None) -> str:
    """A count with a metric prefix: 9800, 12.3 k, 4.3 M, 1.2 G."""
    if value is None:
        return "-"
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= max(size, 1e4):
            return f"{value / size:.1f} {prefix}"
    return str(int(value))


def _read_evaluation(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        problems.append("evaluation.json is not there yet.")
        return {}
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        evaluation = None
    if not isinstance(evaluation, dict):
        problems.append("evaluation.json is broken, so it is left out. Evaluate the run again.")
        return {}
    return evaluation


def _read_slices(path: Path, problems: list[str]) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        problems.append("slices.npz is broken, so no fields are shown. Evaluate the run again.")
        return {}
