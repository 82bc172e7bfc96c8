import math

import pytest
import torch

from shodh.evaluation.alarms import find_evaluation_alarms, find_metric_alarms
from shodh.evaluation.routing import (
    RoutingCounts,
    count_routing,
    merge_counts,
    mutual_information,
    summarise,
)
from shodh.fields import Routing

NAMES = ("open_channel", "porous_media", "fwi")


def route(expert: torch.Tensor, num_experts: int, confidence: float = 0.7) -> Routing:
    """A Top-1 routing to the given experts with the given probability, the rest shared evenly."""
    probability = torch.full((len(expert), num_experts), (1 - confidence) / max(num_experts - 1, 1))
    probability.scatter_(1, expert[:, None], confidence)
    return Routing(expert[:, None], probability.gather(1, expert[:, None]), probability, probability.log())


def random_routing(seed: int, num_samples: int, num_tokens: int, *, tokens_agree: bool) -> tuple[Routing, torch.Tensor]:
    """Experts drawn without regard to the domain, per token or (tokens_agree) once per sample."""
    generator = torch.Generator().manual_seed(seed)
    domain = torch.arange(num_samples) % 3
    draws = torch.randint(0, 4, (num_samples, 1 if tokens_agree else num_tokens), generator=generator)
    return route(draws.expand(num_samples, num_tokens).flatten(), 4), domain


@pytest.mark.parametrize("tokens_agree", [False, True])
def test_information_of_independent_routing_averages_to_zero_although_tokens_of_a_sample_agree(tokens_agree):
    trials, num_samples, num_tokens = 200, 96, 8
    values = []
    for seed in range(trials):
        routing, domain = random_routing(seed, num_samples, num_tokens, tokens_agree=tokens_agree)
        values.append(mutual_information(count_routing([routing], domain, 3))[0].item())
    effective = num_samples if tokens_agree else num_samples * num_tokens
    # 2 n I is chi-squared with (3 - 1)(4 - 1) = 6 degrees of freedom: mean 6, variance 12
    deviation = math.sqrt(12) / (2 * effective)
    uncorrected_bias = 6 / (2 * effective)
    mean = sum(values) / trials
    assert abs(mean) < 4 * deviation / math.sqrt(trials) + 0.1 * uncorrected_bias
    assert max(values) < 6 * deviation


def test_information_equals_miller_correction_when_every_token_is_its_own_sample():
    routing, domain = random_routing(0, 600, 1, tokens_agree=False)
    counts = count_routing([routing], domain, 3)
    joint = counts.choices[0] / counts.choices.sum()
    independent = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    plug_in = (joint * (joint / independent).log()).sum().item()
    corrected = mutual_information(counts)[0].item()
    assert plug_in - corrected == pytest.approx(6 / (2 * 600), rel=0.05)  # unequal loads differ at second order


def test_deterministic_routing_tells_all_of_the_domain():
    domain = torch.arange(300) % 3
    summary = summarise(count_routing([route(domain + 1, 4)], domain, 3), NAMES)
    layer = summary["layers"][0]
    assert layer["mutual_information"] == pytest.approx(math.log(3), rel=1e-12)
    assert layer["normalised_mutual_information"] == pytest.approx(1, rel=1e-12)
    assert layer["dead_experts"] == [0]
    assert layer["effective_experts"] == pytest.approx(3, rel=1e-12)
    for name in NAMES:
        assert summary["domains"][name]["concentration"] == [1.0]
        assert summary["domains"][name]["entropy"] == [0.0]


def test_names_of_experts_do_not_matter():
    routing, domain = random_routing(5, 60, 8, tokens_agree=False)
    permuted = route(torch.tensor([2, 0, 3, 1])[routing.expert[:, 0]], 4)
    one, other = (summarise(count_routing([r], domain, 3), NAMES) for r in (routing, permuted))
    for key in ("mutual_information", "effective_experts"):
        assert one["layers"][0][key] == pytest.approx(other["layers"][0][key], rel=1e-12)
    assert one["domains"]["fwi"]["concentration"] == other["domains"]["fwi"]["concentration"]
    assert one["domains"]["fwi"]["load"][0][0] == other["domains"]["fwi"]["load"][0][2]


def test_even_routing_has_full_entropy_and_ideal_load():
    expert = torch.arange(64) % 4
    summary = summarise(count_routing([route(expert, 4, 0.7)] * 2, torch.zeros(8, dtype=torch.long), 3), NAMES)
    assert list(summary["domains"]) == ["open_channel"]
    domain = summary["domains"]["open_channel"]
    assert domain["load_over_ideal"] == [[1.0] * 4] * 2
    assert domain["entropy"] == pytest.approx([math.log(4)] * 2)
    assert domain["normalised_entropy"] == pytest.approx([1.0] * 2)
    assert domain["margin"] == pytest.approx([0.7 - 0.1] * 2, rel=1e-6)  # probabilities are FP32
    assert summary["layers"][1]["normalised_mutual_information"] == 0.0


def test_merged_batches_count_the_same_as_one_batch():
    routing, domain = random_routing(7, 12, 8, tokens_agree=False)
    whole = count_routing([routing], domain, 3)
    parts = []
    for half in (slice(0, 6), slice(6, 12)):
        tokens = slice(half.start * 8, half.stop * 8)
        parts.append(count_routing([Routing(*(field[tokens] for field in routing))], domain[half], 3))
    for field, (one, other) in zip(RoutingCounts._fields, zip(whole, merge_counts(parts), strict=True), strict=True):
        assert torch.allclose(one, other, rtol=1e-12), field


def test_second_choices_count_in_the_load():
    probability = torch.tensor([[0.5, 0.3, 0.2]] * 4)
    routing = Routing(torch.tensor([[0, 1]] * 4), probability[:, :2], probability, probability.log())
    summary = summarise(count_routing([routing], torch.zeros(4, dtype=torch.long), 1), ["open_channel"])
    assert summary["domains"]["open_channel"]["load"] == [[0.5, 0.5, 0.0]]


def routed(load: list[list[float]]) -> dict:
    return {"routing": {"load": load, "choices_per_token": 1}}


def test_alarms_name_collapse_starvation_and_death_but_not_specialisation():
    specialised = [[[0.98, 0.01, 0.01]], [[0.01, 0.98, 0.01]], [[0, 0.1, 0.9]]]
    sound = {name: routed(load) for name, load in zip("abc", specialised, strict=True)}
    assert find_evaluation_alarms({"domains": sound}) == []
    poor = [0.01, 0.495, 0.495, 0.0]
    ill = {name: routed([[0.2, 0.3, 0.3, 0.2], [0.99, 0.01, 0.0, 0.0], poor]) for name in "ab"}
    alarms = find_evaluation_alarms({"domains": ill})
    assert [alarm.split(",")[0] for alarm in alarms] == [
        "Layer 1: collapse",
        "Layer 2: expert 3 is dead",
        "Layer 2: expert 0 is starved",
    ]
    assert all("objective.balance_weight" in alarm for alarm in alarms)
    assert find_evaluation_alarms({"domains": {}}) == []


def test_evaluation_alarms_name_leaks_and_predictions_worse_than_persistence():
    leaking = {"divergence": {"max_abs": 1e-7}, "latent_mse_over_persistence": 1.5}
    sound = {"curl": {"max_abs": 0.0}, "latent_mse_over_persistence": 0.5}
    alarms = find_evaluation_alarms({"domains": {"a": leaking, "b": sound}})
    assert len(alarms) == 2
    assert all(alarm.startswith("a:") for alarm in alarms)
    assert find_metric_alarms([{"step": 1, "loss": 0.5}, {"step": 2}]) == []
    assert "first at step 3" in find_metric_alarms([{"step": 1, "loss": 0.5}, {"step": 3, "loss": math.nan}])[0]


def test_tokens_that_do_not_divide_into_samples_are_refused():
    with pytest.raises(ValueError, match="domain: 3 entries for 8 tokens"):
        count_routing([route(torch.zeros(8, dtype=torch.long), 2)], torch.zeros(3, dtype=torch.long), 1)
