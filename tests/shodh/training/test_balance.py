"""Losses of routing against closed forms, the scope of balancing, and the loss-free bias."""

import math
from types import SimpleNamespace

import pytest
import torch

from shodh.fields import Routing
from shodh.model.router import SemanticRouter
from shodh.training.balance import (
    AdjustBias,
    GlobalLoad,
    balance_loss,
    count_tokens,
    information_loss,
    measure_load,
    sample_probability,
    z_loss,
)
from shodh.training.loop import StepRecord
from shodh.training.objectives import RoutedBatch


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)  # the sum over one rank is itself


def make_routing(expert: torch.Tensor, num_experts: int, sharpness: float = 20.0) -> Routing:
    score = sharpness * torch.nn.functional.one_hot(expert, num_experts).float()
    probability = score.softmax(-1)
    gate, chosen = probability.topk(1, dim=-1)
    return Routing(chosen, gate, probability, score)


def pooled(routing: Routing, num_samples: int) -> torch.Tensor:
    return sample_probability([routing], num_samples)[0]


def load_of(routing: Routing, num_samples: int) -> GlobalLoad:
    return measure_load([routing], sample_probability([routing], num_samples))


def inform(routing: Routing, num_samples: int) -> torch.Tensor:
    """Of a batch that is the global one."""
    load = load_of(routing, num_samples)
    return information_loss(pooled(routing, num_samples), load.probability[0], load.choices[0])


def test_balance_loss_is_one_when_balanced_and_e_when_collapsed():
    balanced = make_routing(torch.arange(80) % 8, 8)
    collapsed = make_routing(torch.zeros(80, dtype=torch.long), 8)
    assert balance_loss(balanced, count_tokens(balanced)) == pytest.approx(1.0, rel=1e-5)
    assert balance_loss(collapsed, count_tokens(collapsed)) == pytest.approx(8.0, rel=1e-5)


def test_specialised_micro_batches_are_not_punished_when_the_global_batch_is_balanced():
    parts = [make_routing(torch.full((50,), expert), 4) for expert in range(4)]  # each all on one expert
    total = torch.stack([count_tokens(part) for part in parts]).sum(0)
    mean_loss = sum(float(balance_loss(part, total)) for part in parts) / 4
    assert mean_loss == pytest.approx(1.0, rel=1e-5)
    alone = sum(float(balance_loss(part, count_tokens(part))) for part in parts) / 4
    assert alone == pytest.approx(4.0, rel=1e-5)


def test_z_loss_of_uniform_scores_is_the_squared_log_of_e():
    routing = make_routing(torch.zeros(5, dtype=torch.long), 8, sharpness=0.0)
    assert float(z_loss(routing)) == pytest.approx(math.log(8) ** 2, rel=1e-6)


def test_information_is_the_log_of_the_number_of_kinds_when_each_kind_has_its_own_expert():
    routing = make_routing(torch.arange(12).repeat_interleave(5) % 3, 4)  # 12 samples of 5 tokens, of three kinds
    assert float(inform(routing, 12)) == pytest.approx(-math.log(3), rel=1e-5)


@pytest.mark.parametrize(
    "expert", [torch.zeros(60, dtype=torch.long), torch.arange(60) % 4], ids=["collapsed", "alike in every sample"]
)
def test_there_is_no_information_where_samples_do_not_differ(expert):
    assert float(inform(make_routing(expert, 4), 15)) == pytest.approx(0.0, abs=1e-5)


def test_information_is_that_of_the_global_batch_and_its_gradient_adds_up_over_parts():
    score = torch.randn(24, 4) + 3 * torch.eye(4)[0]  # one expert leads, so shares are not even enough
    score.requires_grad_()

    def routing_of(rows: torch.Tensor) -> Routing:
        probability = rows.softmax(-1)
        return Routing(*reversed(probability.topk(1, dim=-1)), probability, rows)

    whole = routing_of(score)
    per_sample = pooled(whole, 6)
    overall = per_sample.mean(0)
    exact = torch.special.entr(per_sample).sum(-1).mean() - torch.special.entr(overall).sum()
    (expected,) = torch.autograd.grad(exact, score, retain_graph=True)
    load = load_of(whole, 6)
    halves = [pooled(routing_of(rows), 3) for rows in score.split(12)]
    parts = [information_loss(half, load.probability[0], load.choices[0]) for half in halves]
    (found,) = torch.autograd.grad(torch.stack(parts).mean(), score)
    assert torch.stack(parts).mean().item() == pytest.approx(exact.item(), rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("experts", "asks"), [((0, 1, 2, 3), False), ((0, 1, 2, 2), True)])
@pytest.mark.parametrize("sharpness", [4.0, 0.1], ids=["sure", "unsure"])
def test_three_kinds_of_which_one_has_two_experts_are_not_asked_to_share_them(experts, asks, sharpness):
    """Only where an expert is idle does the entropy of the shares have a gradient, however nearly it is chosen."""
    expert = torch.tensor([experts[0], experts[0], experts[1], experts[1], *experts[2:]]).repeat_interleave(5)
    score = sharpness * torch.nn.functional.one_hot(expert, 4)
    score.requires_grad_()
    probability = score.softmax(-1)
    routing = Routing(*reversed(probability.topk(1, dim=-1)), probability, score)
    loss = inform(routing, 6)
    decided = torch.special.entr(pooled(routing, 6)).sum(-1).mean()
    found, alone = (torch.autograd.grad(value, score, retain_graph=True)[0] for value in (loss, decided))
    assert torch.allclose(found, alone) != asks


@pytest.mark.parametrize(
    ("probability", "choices", "asks"),
    [([6, 6, 6, 6], [6, 6, 6, 6], False), ([7, 6, 6, 5], [12, 12, 0, 0], True), ([12, 12, 0, 0], [6, 6, 6, 6], True)],
    ids=["both even", "an expert never chosen", "biases alone make choices even"],
)
def test_shares_are_even_enough_when_tokens_and_probability_of_the_global_batch_are(probability, choices, asks):
    """Whatever this part of it looks like: here all is on one expert."""
    score = torch.tensor([[4.0, 0.0, 0.0, 0.0]] * 3, requires_grad=True)
    here = score.softmax(-1)
    loss = information_loss(here, torch.tensor(probability).float(), torch.tensor(choices).float())
    decided = torch.special.entr(here).sum(-1).mean()
    found, alone = (torch.autograd.grad(value, score, retain_graph=True)[0] for value in (loss, decided))
    assert torch.allclose(found, alone) != asks


def test_loads_add_up_over_micro_batches():
    routing = make_routing(torch.arange(20) % 4, 4)
    once, twice = load_of(routing, 5), load_of(routing, 5) + load_of(routing, 5)
    assert torch.equal(twice.choices, 2 * once.choices)
    assert torch.equal(twice.probability, 2 * once.probability)


def step_record(routers: list[SemanticRouter], tokens: torch.Tensor) -> StepRecord:
    routings = tuple(router(tokens) for router in routers)
    batch = RoutedBatch(routings, torch.zeros(len(tokens), dtype=torch.long))
    return StepRecord(step=1, scalars={}, seconds=1.0, outputs=[batch, batch])


@torch.no_grad()
def test_the_bias_alone_balances_a_router_that_sends_all_to_one_expert():
    torch.manual_seed(0)
    routers = [SemanticRouter(16, 4, 1, 8, 0.1) for _ in range(2)]
    tokens = torch.randn(32, 10, 16) * 0.1 + torch.randn(16)  # alike: one prototype is nearest to nearly all
    before = [count_tokens(r).max() / 320 for r in step_record(routers, tokens).outputs[0].routings]
    adjust = AdjustBias(routers, rate=0.05)
    for _ in range(400):
        adjust.after_step(step_record(routers, tokens))
    after = [count_tokens(r).max() / 320 for r in step_record(routers, tokens).outputs[0].routings]
    assert max(before) > 0.9
    assert max(after) < 0.35  # of the 0.25 that is even
    still = SimpleNamespace(bias=torch.zeros(4))
    AdjustBias([still], rate=0.0).after_step(step_record(routers, tokens))
    assert not still.bias.any()


@torch.no_grad()
def test_the_bias_changes_who_is_chosen_but_no_probability():
    router, tokens = SemanticRouter(16, 4, 1, 8, 0.1), torch.randn(2, 10, 16)
    plain = router(tokens)
    router.bias[2] = 1000.0
    pushed = router(tokens)
    assert (pushed.expert == 2).all()
    assert torch.equal(pushed.probability, plain.probability)
    assert torch.equal(pushed.gate[:, 0], plain.probability[:, 2])
