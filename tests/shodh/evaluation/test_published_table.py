"""The published figures beside ours: each ours is what a slow count over the samples gives."""

import json

import pytest
import torch

from shodh.evaluation.held_out import _measure_guesses
from shodh.evaluation.published_table import (
    NORMALISATION,
    PUBLISHED,
    TITLES,
    compare_with_published,
    format_published,
    share_experts,
    write_published,
)
from shodh.evaluation.routing import count_routing, summarise
from shodh.fields import NUM_GIVEN, Routing

DOMAINS = ("open_channel", "porous_media")


def block(latent: float, load: list[float], leak: float = 0.0) -> dict:
    return {
        "latent_mse": latent,
        "persistence_latent_mse": 2 * latent,
        "decoded_mse": 3 * latent,
        "persistence_decoded_mse": 4 * latent,
        "decoded_truth_mse": 5 * latent,
        "divergence": {"max_abs": leak},
        "routing": {"load": [[0.25] * 4, load]},
    }


def evaluation(*loads: list[float]) -> dict:
    blocks = {name: block(1e-3 * (i + 1), load) for i, (name, load) in enumerate(zip(DOMAINS, loads, strict=True))}
    return {"domains": blocks, "run": {"step": 8}}


APART = evaluation([0.1, 0.7, 0.2, 0.0], [0.0, 0.1, 0.0, 0.9])


def find(rows, figure, domain):
    (row,) = (row for row in rows if (row.figure, row.domain) == (figure, domain))
    return row


def test_rows_hold_published_and_our_figures_of_each_domain():
    rows = compare_with_published(APART)
    assert len(rows) == 8
    for i, name in enumerate(DOMAINS):
        latent, decoded = find(rows, "latent_mse", name), find(rows, "decoded_mse", name)
        assert latent.ours == 1e-3 * (i + 1) and latent.persistence == 2 * latent.ours
        assert (decoded.ours, decoded.persistence, decoded.floor) == tuple(k * latent.ours for k in (3, 4, 5))
        assert find(rows, "divergence", name).ours == 0.0
        assert all(row.published == PUBLISHED[name][row.figure] for row in rows if row.domain == name)
    assert [find(rows, "routing", name)[3] for name in DOMAINS] == [0.7, 0.9]
    assert [find(rows, "routing", name).expert for name in DOMAINS] == [1, 3]


def test_published_figures_are_those_to_compare_with():
    assert [PUBLISHED[name]["latent_mse"] for name in DOMAINS] == [2.46e-5, 9.76e-6]
    assert [PUBLISHED[name]["decoded_mse"] for name in DOMAINS] == [2.48e-6, 1.76e-6]
    assert {(PUBLISHED[name]["divergence"], PUBLISHED[name]["routing"]) for name in DOMAINS} == {(2.8e-10, 1.0)}


def test_routing_share_is_that_of_a_count_token_by_token():
    torch.manual_seed(4)
    expert = torch.randint(0, 3, (2 * 5 * 8, 1))  # 2 domains x 5 samples x 8 tokens
    probability = torch.nn.functional.one_hot(expert[:, 0], 3).float()
    routing = Routing(*(expert if name == "expert" else probability for name in Routing._fields))
    counts = count_routing([routing], torch.tensor([0] * 5 + [1] * 5), 2)
    domains = summarise(counts, DOMAINS)["domains"]
    rows = compare_with_published({"domains": {name: {"routing": domains[name]} for name in DOMAINS}})
    for number, name in enumerate(DOMAINS):
        chosen = expert[40 * number : 40 * (number + 1), 0].tolist()
        busiest = max(range(3), key=chosen.count)
        row = find(rows, "routing", name)
        assert row.ours == chosen.count(busiest) / 40 and chosen.count(row.expert) == chosen.count(busiest)


def test_decoded_errors_are_means_over_every_value_of_the_next_states():
    torch.manual_seed(1)
    truth, decoded = torch.randn(2, NUM_GIVEN + 2, 3, 2, 3, 4, dtype=torch.float64)
    predicted = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64)
    slow = {"decoded_mse": 0.0, "decoded_truth_mse": 0.0, "persistence_decoded_mse": 0.0}
    for t in range(2):
        for place in [(f, x, y, z) for f in range(3) for x in range(2) for y in range(3) for z in range(4)]:
            following = truth[NUM_GIVEN + t][place].item()
            slow["decoded_mse"] += (predicted[t][place].item() - following) ** 2 / 144
            slow["decoded_truth_mse"] += (decoded[NUM_GIVEN + t][place].item() - following) ** 2 / 144
            slow["persistence_decoded_mse"] += (truth[NUM_GIVEN + t - 1][place].item() - following) ** 2 / 144
    guesses = {"decoded_mse": predicted, "decoded_truth_mse": decoded[NUM_GIVEN:]}
    found = _measure_guesses(guesses | {"persistence_decoded_mse": truth[NUM_GIVEN - 1 : -1]}, truth)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(slow, rel=1e-12)


def test_a_collapsed_router_is_not_taken_for_a_pure_one():
    collapsed = compare_with_published(evaluation([0.0, 1.0], [0.0, 1.0]))
    assert share_experts(collapsed) == list(DOMAINS)
    assert "does not tell them apart" in format_published(collapsed)
    assert "does not tell them apart" not in format_published(compare_with_published(APART))


def test_a_domain_that_nothing_was_published_of_stands_without(tmp_path):
    rows = compare_with_published(
        {"domains": {"fwi": block(1.0, [1.0]) | {"divergence": {}, "curl": {"max_abs": 0.0}}}}
    )
    assert [row.published for row in rows] == [None] * 4 and find(rows, "divergence", "fwi").ours == 0.0


def test_table_and_file_say_the_same_with_every_normalisation(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps(APART))
    text = write_published(tmp_path)
    content = json.loads((tmp_path / "table.json").read_text())
    assert text == format_published(compare_with_published(APART)) and content["step"] == 8
    assert content["normalisation"] == NORMALISATION and set(NORMALISATION) == set(TITLES)
    assert all(note in text for note in NORMALISATION.values())
    assert [row["ours"] for row in content["rows"]] == [row.ours for row in compare_with_published(APART)]
    with pytest.raises(ValueError, match="cannot be read"):
        write_published(tmp_path / "nowhere")
