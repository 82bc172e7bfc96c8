"""How every benchmark measures and says what it found.

Ratios are of interleaved pairs in one process, with a control of a thing against itself that voids a noisy run. Each
figure is one printed line (name, value, p10-p90, target, holds or short) and one entry of a JSON file.
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this folder, whose tokenizer.py would be taken for the package of that name
FOLDER = ROOT / "runs" / "benchmarks"
CONTROLLED = "1.00 +-"  # how the target of a control begins
CONTROL = 0.02  # by how much a thing's ratio to itself may differ from 1


class Figure(NamedTuple):
    """One measured value; ``low`` and ``high`` are its 10th and 90th percentile where it was repeated."""

    name: str
    value: float
    target: str = ""
    holds: bool = True
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        spread = "" if self.low is None else f"  {self.low:.4g}-{self.high:.4g}"
        short = "void, too noisy" if self.target.startswith(CONTROLLED) else "short"
        verdict = f"  target {self.target}  {'holds' if self.holds else short}" if self.target else ""
        return f"{self.name}  {self.value:.4g}{' ' if self.unit else ''}{self.unit}{spread}{verdict}"


def at_least(name: str, values: float | Sequence[float] | np.ndarray, bound: float, unit: str = "") -> Figure:
    """The median of the values, which must reach ``bound``."""
    return _bounded(name, values, f">= {bound:g}", lambda value: value >= bound, unit)


def at_most(name: str, values: float | Sequence[float] | np.ndarray, bound: float, unit: str = "") -> Figure:
    """The median of the values, which must not exceed ``bound``."""
    return _bounded(name, values, f"<= {bound:g}", lambda value: value <= bound, unit)


def stated(name: str, values: float | Sequence[float] | np.ndarray, unit: str = "") -> Figure:
    """The median of the values, without a target."""
    return _bounded(name, values, "", lambda value: True, unit)


def control(name: str, ratios: Sequence[float] | np.ndarray, within: float = CONTROL) -> Figure:
    """A thing's time over its own: further than ``within`` from 1, and the run is void."""
    return _bounded(name, ratios, f"{CONTROLLED} {within:g}", lambda value: abs(value - 1) <= within, "")


def time_interleaved(
    works: Mapping[str, Callable[[], object]], num_rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, np.ndarray]:
    """Seconds (num_rounds,) of each work, taken in turn, the order reversed every other round.

    ``time.process_time`` counts what the CPU gave one thread, however many others it served meanwhile.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()  # warms caches; not counted
    for round_ in range(num_rounds):
        for name in list(works)[:: 1 if round_ % 2 == 0 else -1]:
            start = clock()
            works[name]()
            times[name].append(clock() - start)
    return {name: np.array(seconds) for name, seconds in times.items()}


def report(benchmark: str, figures: Sequence[Figure]) -> int:
    """Print the figures, write runs/benchmarks/BENCHMARK.json, and return the exit code: 0 if all targets hold."""
    for figure in figures:
        print(figure)
    FOLDER.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": benchmark,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "figures": [figure._asdict() for figure in figures],
    }
    (FOLDER / f"{benchmark}.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(figure.holds for figure in figures) else 1


def _bounded(
    name: str, values: float | Sequence[float] | np.ndarray, target: str, holds: Callable[[float], bool], unit: str
) -> Figure:
    several = np.atleast_1d(np.asarray(values, float))
    value = float(np.median(several))
    low, high = (float(p) for p in np.percentile(several, [10, 90])) if several.size > 1 else (None, None)
    return Figure(name, value, target, holds(value), low, high, unit)
