"""Intervals are Student's, verdicts follow from them alone, and what diverged is never better."""

import math

import numpy as np
import pytest
from scipy import stats

from shodh.evaluation.transfer import (
    METRICS,
    compare,
    compare_variants,
    list_specialisation,
    read_results,
    share_on_own_expert,
    summarise_transfer,
)
from shodh.evaluation.transfer_plot import plot_transfer
from shodh.evaluation.transfer_table import format_transfer

DOMAINS = ("a", "b")


def make_result(variant: str, seed: int, error: dict[str, float | None], domain: str | None = None) -> dict:
    """As launch/measure_transfer.py writes one; the same error in every metric."""
    blocks = {
        name: {"latent_mse_over_persistence": value, "latent_mse": value, "persistence_latent_mse": 1.0}
        | {span: {"vrmse": value, "persistence_vrmse": 2.0} for span in ("1", "2-20", "20")}
        | {"21-60": {"vrmse": None, "persistence_vrmse": None}}
        for name, value in error.items()
    }
    layer = {"normalised_mutual_information": 0.5, "dead_experts": [], "load": [0.5, 0.5], "purity": 0.75}
    loads = {name: {"load": [[1.0, 0.0] if i == 0 else [0.25, 0.75]]} for i, name in enumerate(error)}
    return {
        "job": {"variant": variant, "seed": seed, "domain": domain},
        "num_steps": 10,
        "samples_per_step": 6,
        "parameters_total": 1000,
        "parameters_active": 500,
        "cpu_seconds": 1.5,
        "domains": blocks,
        "routing": {"layers": [layer], "domains": loads},
        "gates": [{"sum": 0.9, "best_share": 1.0}],
    }


def make_matrix(shodh: dict[str, list[float | None]], num_seeds: int = 3) -> list[dict]:
    """Solo, dense and oracle models with error 1 but for a seed's own level; Shodh with these relative differences."""
    results = []
    for seed in range(num_seeds):
        level = 1.0 + seed  # differs far more between seeds than between variants: only pairing sees the difference
        results += [make_result("solo", seed, {name: level}, name) for name in DOMAINS]
        for variant in ("dense_flops", "dense_parameters", "oracle"):
            results.append(make_result(variant, seed, dict.fromkeys(DOMAINS, level)))
        errors = {name: None if (d := shodh[name][seed]) is None else level * (1 + d) for name in DOMAINS}
        results.append(make_result("shodh", seed, errors))
    return results


@pytest.mark.parametrize("num", [2, 3, 7])
def test_interval_is_that_of_a_paired_t_test(num):
    values = np.random.default_rng(num).normal(0.02, 0.1, num)
    found = compare(values.tolist())
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high), rel=1e-12)


def test_interval_of_three_seeds_in_closed_form():
    """s = 0.01 of (0.01, 0.02, 0.03), and t(0.975, 2) = sqrt(2 * 0.95^2 / (1 - 0.95^2)) = 4.3027."""
    found = compare([0.01, 0.02, 0.03])
    half = math.sqrt(2 * 0.95**2 / (1 - 0.95**2)) * 0.01 / math.sqrt(3)
    assert found.mean == pytest.approx(0.02) and found.high - 0.02 == pytest.approx(half, rel=1e-9)


@pytest.mark.parametrize(
    ("differences", "verdict", "holds"),
    [
        ([0.10, 0.11, 0.12], "worse", False),
        ([0.10, -0.11, 0.02], "equal", True),
        ([-0.10, -0.11, -0.12], "better", True),
        ([0.0, 0.0, 0.0], "equal", True),
        ([0.05, 0.05, 0.05], "worse", False),
        ([0.05], "one seed, no interval", False),
        ([-0.05], "one seed, no interval", True),
        ([], "not measured", False),
    ],
)
def test_verdict_says_where_the_interval_lies(differences, verdict, holds):
    found = compare(differences)
    assert (found.verdict, found.holds) == (verdict, holds)


def test_differences_are_relative_and_paired_by_seed():
    results = make_matrix({"a": [0.10, 0.11, 0.12], "b": [-0.2, -0.2, -0.2]})
    for reference in ("solo", "dense_flops", "oracle"):
        found = compare_variants(results, "shodh", reference, "a", "20")
        assert (found.mean, found.verdict) == (pytest.approx(0.11), "worse")
    assert compare_variants(results, "shodh", "solo", "b", "1").verdict == "better"
    shuffled = [results[i] for i in np.random.default_rng(0).permutation(len(results))]
    assert compare_variants(shuffled, "shodh", "solo", "a", "20") == compare_variants(
        results, "shodh", "solo", "a", "20"
    )


def test_a_model_that_diverged_in_one_seed_is_worse_whatever_the_others_did():
    found = compare_variants(make_matrix({"a": [-0.5, None, -0.5], "b": [0, 0, 0]}), "shodh", "solo", "a", "20")
    assert found.verdict == "diverged" and not found.holds and found.num_seeds == 2


def test_table_says_in_words_on_which_domain_shodh_is_worse():
    summary = summarise_transfer(make_matrix({"a": [0.10, 0.11, 0.12], "b": [-0.10, -0.11, -0.12]}))
    table = format_transfer(summary)
    for name in ("the solo models", "equal active parameters", "equal parameters", "the oracle router"):
        (line,) = [line for line in table.splitlines() if line.startswith("Joint loss") and name in line]
        assert line.endswith("**does not hold: Shodh is worse on a**.")
    assert "- a, one-step latent MSE over persistence: +11.00 % [+8.52, +13.48], WORSE" in table
    assert "- b, rollout velocity VRMSE, step 20: -11.00 % [-13.48, -8.52], better" in table
    better = format_transfer(summarise_transfer(make_matrix({"a": [-0.1, 0.1, 0.02], "b": [-0.10, -0.11, -0.12]})))
    assert better.count("**holds on every domain**") == 4 and "WORSE" not in better


def test_a_metric_that_no_trajectory_is_long_enough_for_is_left_out():
    summary = summarise_transfer(make_matrix({"a": [0, 0, 0], "b": [0, 0, 0]}))
    assert "21-60" not in summary["metrics"] and len(summary["metrics"]) == len(METRICS) - 1
    assert METRICS["21-60"] not in format_transfer(summary)


def test_what_was_not_measured_is_said_and_not_guessed():
    only = [result for result in make_matrix({"a": [0, 0, 0], "b": [0, 0, 0]}) if result["job"]["variant"] == "shodh"]
    summary = summarise_transfer(only)
    assert summary["shodh_over"] == {} and "Not measured" in format_transfer(summary)


def test_own_expert_is_one_that_no_other_domain_uses_most():
    apart = {"a": {"load": [[1.0, 0.0]]}, "b": {"load": [[0.25, 0.75]]}}
    assert share_on_own_expert(apart, 0) == {"a": 1.0, "b": 0.75}
    together = {"a": {"load": [[1.0, 0.0]]}, "b": {"load": [[0.75, 0.25]]}}
    assert share_on_own_expert(together, 0) == {"a": 0.0, "b": 0.0}


def test_every_seed_and_layer_of_learned_routers_is_listed():
    rows = list_specialisation(make_matrix({"a": [0, 0, 0], "b": [0, 0, 0]}))
    assert [(row["variant"], row["seed"], row["layer"]) for row in rows] == [("shodh", seed, 0) for seed in range(3)]


def test_picture_is_drawn_even_of_what_diverged(tmp_path):
    plot_transfer(summarise_transfer(make_matrix({"a": [None, None, None], "b": [0.1, 0.2, 0.1]})), tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"


def test_folder_without_results_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no result.json"):
        read_results(tmp_path)
