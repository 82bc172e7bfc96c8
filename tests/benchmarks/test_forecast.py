"""What benchmarks/forecast.py makes of measurements: who is judged against whom, and what a lost rollout means."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # last: its tokenizer.py is not the package

from forecast import judge  # noqa: E402


def one_step(ratio: float) -> dict[str, float]:
    return {"latent_mse_over_persistence": ratio, "linear_latent_mse": 0.25, "persistence_latent_mse": 0.5}


def block(error: float | None) -> dict[str, Any]:
    return {"vrmse": {"1": 0.1, "2-20": 0.2, "20": error}, "octave_energy_ratio": {"20": [0.9, None]}}


def verdicts(errors: Sequence[float | None], persistence: float | None, linear: float | None) -> list[tuple]:
    rollouts = {f"run{i}": block(error) for i, error in enumerate(errors)}
    rollouts |= {"linear": block(linear), "persistence": block(persistence), "decoded_truth": block(0.1)}
    figures = judge("fwi", [one_step(0.05 + 0.1 * i) for i in range(len(errors))], rollouts, list(rollouts)[:-3])
    return [(figure.value, figure.holds) for figure in figures if figure.target]


def test_each_bound_is_judged_by_itself():
    assert verdicts([0.4], 0.5, 0.8) == [(0.05, True), (pytest.approx(0.8), True), (pytest.approx(0.5), True)]
    assert verdicts([0.6], 0.5, 0.8) == [(0.05, True), (pytest.approx(1.2), False), (pytest.approx(0.75), True)]
    assert verdicts([0.4], 0.5, 0.3)[2] == (pytest.approx(4 / 3), False)


def test_seeds_are_judged_by_their_median():
    assert verdicts([0.4, 0.4, 0.9], 0.5, 0.8)[:2] == [(pytest.approx(0.15), False), (pytest.approx(0.8), True)]


def test_lost_rollout_is_short_whatever_its_rival_and_a_lost_rival_is_beaten():
    assert verdicts([None], 0.5, None)[1:] == [(math.inf, False), (math.inf, False)]
    assert verdicts([0.4], 0.5, None)[2] == (0.0, True)


def test_energy_is_stated_only_where_an_octave_has_some():
    figures = judge("fwi", [one_step(0.05)], {"run0": block(0.4)}, ["run0"])
    assert [figure.value for figure in figures if "octave" in figure.name] == [0.9]
