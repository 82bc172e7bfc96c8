"""Per-step telemetry against the evaluation's statistics and slow obvious counts."""

import pytest
import torch
from live_training import LiveRun, router_of, train_live

from shodh.evaluation.routing import count_routing, merge_counts, summarise
from shodh.evaluation.telemetry import MeasureFlips, gather_routing, routing_scalars
from shodh.fields import CONDITIONS, NUM_GIVEN, LatentBatch, Routing
from shodh.model.transformer import LatentTransformer, TransformerConfig
from shodh.training.engine import distributed
from shodh.training.loop import StepRecord
from shodh.training.objectives import RoutedBatch

NAMES = ("a", "b", "c")


def random_batches() -> list[RoutedBatch]:
    """Two micro-batches of two layers, Top-2 of 5 experts, domains 0 and 2 only."""
    batches = []
    for _ in range(2):
        score = torch.randn(2, 6 * 8, 5)
        routings = []
        for layer in score:
            probability = layer.softmax(-1)
            gate, expert = probability.topk(2)
            routings.append(Routing(expert, gate, probability, layer))
        batches.append(RoutedBatch(tuple(routings), 2 * (torch.arange(6) % 2)))
    return batches


def test_gathered_counts_are_those_of_the_micro_batches_and_scalars_those_of_the_summary():
    batches = random_batches()
    with distributed(threads_per_rank=1):
        step = gather_routing(batches, 3, seconds=0.5)
    whole = merge_counts([count_routing(b.routings, b.domain, 3) for b in batches])
    for gathered, counted in zip(step.counts, whole, strict=True):
        assert torch.equal(gathered, counted)  # sums of integers and of the same FP64 numbers in the same order
    assert step.seconds.tolist() == [0.5] and torch.equal(step.choices[0], whole.choices)
    scalars, summary = routing_scalars(whole, NAMES), summarise(whole, NAMES)
    assert not any("/b" in name for name in scalars)
    for layer in range(2):
        block = summary["layers"][layer]
        assert scalars[f"routing/layer{layer}/dead_experts"] == len(block["dead_experts"])
        for key in ("purity", "mutual_information", "normalised_mutual_information", "effective_experts"):
            assert scalars[f"routing/layer{layer}/{key}"] == pytest.approx(block[key], rel=1e-12)
        for expert in range(5):
            assert scalars[f"load/layer{layer}/expert{expert}"] == pytest.approx(block["load_over_ideal"][expert])
            for name in ("a", "c"):
                ideal = summary["domains"][name]["load_over_ideal"][layer][expert]
                assert scalars[f"load/layer{layer}/{name}/expert{expert}"] == pytest.approx(ideal)
        for key in ("entropy", "concentration", "margin"):
            value = summary["domains"]["c"][key][layer]
            assert scalars[f"routing/layer{layer}/{key}/c"] == pytest.approx(value, rel=1e-12)


def test_counts_and_margins_equal_those_of_a_loop_over_tokens():
    batch = random_batches()[0]
    counts = count_routing(batch.routings, batch.domain, 3)
    for layer, routing in enumerate(batch.routings):
        choices, margin = torch.zeros(3, 5), [0.0, 0.0, 0.0]
        for token in range(48):
            domain = int(batch.domain[token // 8])
            best = routing.probability[token].sort(descending=True).values
            margin[domain] += float(best[0] - best[1])
            for expert in routing.expert[token]:
                choices[domain, expert] += 1
        assert torch.equal(counts.choices[layer].float(), choices)
        assert counts.margin[layer].tolist() == pytest.approx(margin, rel=48 * torch.finfo(torch.float32).eps)


def test_purity_is_the_share_of_tokens_that_their_experts_main_domain_sends():
    expert = torch.tensor([0] * 8 + [0] * 2 + [1] * 6)[:, None]  # domain 0: all on 0; domain 1: a quarter on 0
    even = torch.full((16, 3), 1 / 3)
    counts = count_routing([Routing(expert, even[:, :1], even, even.log())], torch.tensor([0, 1]), 2)
    assert summarise(counts, ["a", "b"])["layers"][0]["purity"] == (8 + 6) / 16


def test_flip_rate_counts_probe_tokens_that_moved_since_the_last_measurement():
    sizes = {"width": 16, "num_heads": 2, "hidden": 8, "semantic_width": 4, "num_experts": 3, "depth": 2}
    model = LatentTransformer(TransformerConfig(latent_channels=2, medium_channels=1, **sizes))
    probe = LatentBatch(
        torch.randn(2, NUM_GIVEN + 1, 2, 2, 2, 2),
        torch.randn(2, 1, 2, 2, 2),
        torch.randn(2, len(CONDITIONS)),
        torch.tensor([0, 1]),
    )
    hook = MeasureFlips(model, probe, ("a", "b"), interval=2)
    first, same, moved = (StepRecord(step, {}, 1.0, []) for step in (2, 4, 6))
    hook.after_step(first)
    hook.after_step(StepRecord(3, {}, 1.0, []))
    hook.after_step(same)
    before = hook.expert
    with torch.no_grad():
        router_of(model, 0).prototype.neg_()
    hook.after_step(moved)
    assert before is not None and hook.expert is not None
    assert first.scalars == {} and set(same.scalars.values()) == {0.0}
    for layer in range(2):
        for index, name in enumerate(("a", "b")):
            pairs = zip(before[layer, index].tolist(), hook.expert[layer, index].tolist(), strict=True)
            share = sum(one != other for one, other in pairs) / 8
            assert moved.scalars[f"routing/layer{layer}/flip_rate/{name}"] == share
    assert moved.scalars["routing/layer0/flip_rate/a"] > 0


def test_every_step_of_a_training_has_loads_of_every_layer_domain_and_expert(tmp_path):
    with distributed(threads_per_rank=1):
        _, kept = train_live(LiveRun(seed=0, num_steps=3), tmp_path)
    for scalars in kept.scalars:
        for layer in range(2):
            for name in ("physics0", "physics1", "physics2"):
                loads = [scalars[f"load/layer{layer}/{name}/expert{expert}"] for expert in range(4)]
                assert sum(loads) == pytest.approx(4, rel=1e-12)
            assert 1 / 3 <= scalars[f"routing/layer{layer}/purity"] <= 1
