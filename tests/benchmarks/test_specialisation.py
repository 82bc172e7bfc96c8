"""The benchmark's verdicts follow from results: whole, short by one token, on one expert, dead, or one seed too few."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # last: its tokenizer.py is not the package

from specialisation import judge, require_the_setting  # noqa: E402


def row(variant: str, seed: int, layer: int, **changes) -> dict:
    return {
        "variant": variant,
        "seed": seed,
        "layer": layer,
        "purity": 0.995,
        "information": 0.97,
        "dead_experts": [],
        "own_expert": {"open_channel": 1.0, "porous_media": 1.0},
    } | changes


def make_rows(num_seeds: int = 3, **changes) -> list[dict]:
    """Two layers a seed, the first of which specialises in nothing; ``changes`` to the last layer of the last seed."""
    nothing = {"purity": 0.4, "information": 0.0, "own_expert": {"open_channel": 0.0, "porous_media": 0.0}}
    rows = [row(v, s, 0, **nothing) for v in ("pair", "shodh") for s in range(num_seeds)]
    last = [
        row(v, s, 1, **(changes if s == num_seeds - 1 else {})) for v in ("pair", "shodh") for s in range(num_seeds)
    ]
    return rows + last


def short(rows: list[dict]) -> list[str]:
    return [figure.name for figure in judge(rows) if not figure.holds]


def test_all_hold_where_the_last_layer_specialises_and_every_seed_and_layer_is_shown():
    figures = judge(make_rows())
    assert all(figure.holds for figure in figures)
    assert len(figures) == 2 + 3 * 2 * (2 + 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"own_expert": {"open_channel": 0.9999, "porous_media": 1.0}}, ["pair seed 2 layer 1: open_channel tokens"]),
        ({"purity": 0.98}, ["shodh seed 2 layer 1: purity"]),
        ({"information": 0.94}, ["shodh seed 2 layer 1: I(domain; expert)"]),
        ({"dead_experts": [3]}, ["shodh seed 2 layer 1: dead experts"]),
    ],
)
def test_one_seed_that_falls_short_is_named(changes, said):
    found = short(make_rows(**changes))
    assert len(found) == len(said) and all(name.startswith(start) for name, start in zip(found, said, strict=True))


def test_fewer_than_three_seeds_or_none_fall_short():
    assert short(make_rows(2)) == ["pair: seeds", "shodh: seeds"]
    assert short([]) == ["pair: seeds", "shodh: seeds"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": {"balance_weight": 0.0, "bias_rate": 0.01}}, "without the balance loss"),
        ({"model": {"num_experts": 4}}, r"has \(2, 4\) domains and experts"),
        ({"domains": ["a", "b", "c"]}, r"has \(3, 2\) domains and experts"),
    ],
)
def test_models_of_another_setting_are_not_judged(change, said):
    identity = {"objective": {"balance_weight": 0.01}, "model": {"num_experts": 2}, "domains": ["a", "b"]}
    require_the_setting([{"job": {"variant": "pair"}, "identity": identity}])
    with pytest.raises(ValueError, match=said):
        require_the_setting([{"job": {"variant": "pair"}, "identity": identity | change}])
