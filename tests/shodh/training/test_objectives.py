"""The forecast error against closed forms, and unrolled training."""

import itertools
import math

import pytest
import torch

from shodh.fields import CONDITIONS, NUM_GIVEN, LatentBatch, Routing
from shodh.model.transformer import Forecast, LatentTransformer, TransformerConfig
from shodh.training.objectives import ForecastConfig, ForecastObjective, relative_errors

SMALL = TransformerConfig(latent_channels=4, medium_channels=2, width=24, depth=1, num_heads=2, num_experts=2, hidden=8)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)  # the sum over one rank is itself


def test_persistence_scores_one_whatever_the_speed_of_the_sample():
    change = torch.randn(4, 3, 2, 2, 2) * torch.tensor([0.1, 1.0, 10.0, 100.0]).reshape(4, 1, 1, 1, 1)
    assert float(relative_errors(-change, change, floor=0.0)["data"]) == pytest.approx(1.0, rel=1e-4)
    assert float(relative_errors(torch.zeros_like(change), change, floor=0.0)["data"]) == 0.0


def test_an_error_that_all_cells_share_is_all_mean():
    change, shared = torch.randn(4, 3, 2, 2, 2), torch.randn(4, 3, 1, 1, 1).expand(4, 3, 2, 2, 2)
    errors = relative_errors(shared, change, floor=0.0)
    assert float(errors["mean"]) == pytest.approx(float(errors["data"]), rel=1e-5)
    assert float(relative_errors(shared - shared, change, floor=0.0)["mean"]) == 0.0


class Spy:
    """A model that adds one to the state, and remembers what it was asked."""

    def __init__(self) -> None:
        self.model, self.calls, self.graded = LatentTransformer(SMALL), list[torch.Tensor](), list[bool]()

    def __call__(self, states, medium, parameters) -> Forecast:
        self.calls.append(states)
        self.graded.append(torch.is_grad_enabled())
        return self.model(states, medium, parameters)._replace(latent=states[:, -1] + 1)


def make_batch(num_states: int) -> LatentBatch:
    states = torch.arange(num_states).float().reshape(1, -1, 1, 1, 1, 1).expand(6, num_states, 4, 4, 4, 4)
    return LatentBatch(states, torch.zeros(6, 2, 4, 4, 4), torch.zeros(6, len(CONDITIONS)), torch.zeros(6).long())


def asked(step: int, **stages: tuple[tuple[int, int], ...]) -> list[list[float]]:
    """The states given at each call; all values of a state are its number."""
    spy, objective = Spy(), ForecastObjective(config := ForecastConfig(**stages))
    objective.begin_step(step)
    terms, routed = objective(spy, make_batch(config.num_states))
    assert float(terms["data"]) == 0.0  # the states do grow by one
    assert len(routed.routings) == SMALL.depth
    return [states[0, :, 0, 0, 0, 0].tolist() for states in spy.calls]


def test_unrolled_training_feeds_predictions_back_and_only_from_its_step_on():
    for step, num in ((9, 1), (10, 3), (19, 3), (20, 2)):
        calls = asked(step, unroll=((10, 3), (20, 2)))
        first = calls[0][0]
        assert calls == [[first + k + i for i in range(NUM_GIVEN)] for k in range(num)]


def test_steps_that_lead_up_are_predicted_and_of_every_length_and_all_states_get_their_turn():
    """Batches hold NUM_GIVEN + 4 + 2 states, the last of which nothing is predicted from."""
    leads, seen = set(), set()
    for step in range(10, 300):
        calls = asked(step, unroll=((0, 2),), lead=((10, 4),))
        leads.add(len(calls) - 2)
        seen.update(number for call in calls for number in call)
        assert all(after[0] == before[0] + 1 for before, after in itertools.pairwise(calls))
    assert leads == set(range(5)) and seen == set(range(NUM_GIVEN + 5))
    assert {len(asked(step, unroll=((0, 2),), lead=((10, 4),))) for step in range(10)} == {2}


def test_leads_are_the_smaller_of_two_draws_so_short_ones_prevail():
    objective, leads = ForecastObjective(ForecastConfig(lead=((0, 4),))), []
    for step in range(5000):
        objective.begin_step(step)
        leads.append(objective.lead)
    for lead in range(5):
        assert leads.count(lead) / 5000 == pytest.approx((9 - 2 * lead) / 25, abs=0.02)


def test_experts_are_as_even_as_the_load_of_their_own_layer_over_the_accumulation_so_far():
    """Each micro-batch is of one expert, the second of the one that the first left idle, in the second layer alone."""
    objective = ForecastObjective(config := ForecastConfig(information_weight=1.0))
    objective.begin_step(0)
    gradients = []
    for expert in (0, 1):
        score = torch.zeros(2, 48, 2)
        score[:, :, expert] += 2.0 + expert
        score[0, :, 0] += 9.0  # the first layer always sends all to the first
        score.requires_grad_()

        def route(states, medium, parameters, score=score) -> Forecast:
            probability = score.softmax(-1)
            routings = tuple(
                Routing(*reversed(p.topk(1, dim=-1)), p, s) for p, s in zip(probability, score, strict=True)
            )
            return Forecast(states[:, -1] + 1, routings)

        terms, _ = objective(route, make_batch(config.num_states))
        sharpened = torch.special.entr(score.softmax(-1)).sum(-1).mean()  # of samples whose tokens are all alike
        both = [torch.autograd.grad(value, score, retain_graph=True)[0] for value in (terms["information"], sharpened)]
        gradients.append([torch.allclose(found, alone) for found, alone in zip(*both, strict=True)])
    assert gradients == [[False, False], [False, True]]


def test_steps_that_lead_up_have_no_gradient():
    config = ForecastConfig(unroll=((0, 2),), lead=((0, 4),))
    for step in range(20):
        spy, objective = Spy(), ForecastObjective(config)
        objective.begin_step(step)
        objective(spy, make_batch(config.num_states))
        assert spy.graded == [False] * objective.lead + [True, True]


@pytest.mark.parametrize(
    ("turns", "windows", "information"), [(False, 1, -math.log(2)), (True, 1, 0.0), (False, 2, 0.0), (False, 3, None)]
)
def test_experts_that_change_from_step_to_step_or_window_to_window_tell_less_of_a_trajectory(
    turns, windows, information
):
    """The experts of the six samples alternate, so pairs of them have both, and one of two in three is the other."""
    if information is None:
        information = sum(-p * math.log(p) for p in (1 / 3, 2 / 3)) - math.log(2)
    calls = itertools.count()

    def route(states, medium, parameters) -> Forecast:
        expert = (torch.arange(6).repeat_interleave(8) + (next(calls) if turns else 0)) % 2
        probability = torch.nn.functional.one_hot(expert, 2).float()
        routing = Routing(expert[:, None], torch.ones(48, 1), probability, probability)
        return Forecast(states[:, -1] + 1, (routing,))

    objective = ForecastObjective(config := ForecastConfig(unroll=((0, 2),), windows=windows))
    objective.begin_step(0)
    terms, _ = objective(route, make_batch(config.num_states))
    assert float(terms["information"]) == pytest.approx(information, abs=1e-5)


def test_the_total_weighs_information():
    config = ForecastConfig(information_weight=0.5, balance_weight=0.0, z_weight=0.0)
    objective = ForecastObjective(config)
    objective.begin_step(0)
    batch = make_batch(NUM_GIVEN + 1)._replace(states=torch.randn(6, NUM_GIVEN + 1, 4, 4, 4, 4))
    terms = {name: value.item() for name, value in objective(Spy(), batch)[0].items()}
    rest = terms["data"] + config.mean_weight * terms["mean"]
    assert terms["information"] != 0.0
    assert terms["total"] == pytest.approx(rest + 0.5 * terms["information"], rel=1e-5)


def test_gradient_flows_through_all_steps_of_a_rollout():
    """Fed back without gradient, the same predictions give the same loss and other gradients."""
    torch.manual_seed(0)
    model = LatentTransformer(SMALL)
    torch.nn.init.normal_(model.out.weight, std=0.1)
    batch = make_batch(NUM_GIVEN + 3)
    batch = batch._replace(states=torch.randn(batch.states.shape))

    def cut(states, medium, parameters) -> Forecast:
        return model(states.detach(), medium, parameters)

    losses, gradients = [], []
    for engine in (model, cut):
        objective = ForecastObjective(ForecastConfig(unroll=((0, 3),)))
        objective.begin_step(0)
        model.zero_grad()
        loss = objective(engine, batch)[0]["total"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.embed.weight.grad.clone())
    assert losses[0] == losses[1]
    assert not torch.allclose(*gradients, rtol=1e-3)


UNROLLS = [((0, 0),), ((5, 2), (5, 3)), ((5, 2), (4, 3)), ((-1, 2),)]


@pytest.mark.parametrize(
    "bad",
    [
        *({"unroll": unroll} for unroll in UNROLLS),
        {"lead": ((0, -1),)},
        {"information_weight": -0.1},
        {"bias_rate": -1.0},
        {"as_one": -1},
        {"solve_at": -1},
        {"solve_batches": 0},
        {"refine_batches": 0},
        {"refine_steps": -1},
        {"refine_steps": 4},  # of experts that nothing solves for
    ],
)
def test_a_config_that_means_nothing_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ForecastConfig(**bad)
