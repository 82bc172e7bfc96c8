"""The forecast error against closed forms, and unrolled training."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from shodh.fields import CONDITIONS, LatentBatch
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


class Call(NamedTuple):
    previous: torch.Tensor
    current: torch.Tensor


class Spy:
    """A model that adds one to the state, and remembers what it was asked."""

    def __init__(self) -> None:
        self.model, self.calls = LatentTransformer(SMALL), list[Call]()

    def __call__(self, previous, current, medium, parameters) -> Forecast:
        self.calls.append(Call(previous, current))
        return self.model(previous, current, medium, parameters)._replace(latent=current + 1)


def make_batch(num_states: int) -> LatentBatch:
    states = torch.arange(num_states).float().reshape(1, -1, 1, 1, 1, 1).expand(6, num_states, 4, 4, 4, 4)
    return LatentBatch(states, torch.zeros(6, 2, 4, 4, 4), torch.zeros(6, len(CONDITIONS)), torch.zeros(6).long())


def predictions(unroll: int, step: int) -> Iterator[float]:
    spy, objective = Spy(), ForecastObjective(ForecastConfig(unroll=unroll, unroll_from=10))
    objective.begin_step(step)
    terms, routed = objective(spy, make_batch(2 + unroll))
    assert float(terms["data"]) == 0.0  # the states do grow by one
    assert len(routed.routings) == SMALL.depth
    return (float(call.current.mean()) for call in spy.calls)


def test_unrolled_training_feeds_predictions_back_and_only_from_its_step_on():
    assert list(predictions(unroll=3, step=9)) == [1.0]
    assert list(predictions(unroll=3, step=10)) == [1.0, 2.0, 3.0]


def test_gradient_flows_through_all_steps_of_a_rollout():
    """Fed back without gradient, the same predictions give the same loss and other gradients."""
    torch.manual_seed(0)
    model = LatentTransformer(SMALL)
    torch.nn.init.normal_(model.out.weight, std=0.1)
    batch = make_batch(5)._replace(states=torch.randn(6, 5, 4, 4, 4, 4))

    def cut(previous, current, medium, parameters) -> Forecast:
        return model(previous.detach(), current.detach(), medium, parameters)

    losses, gradients = [], []
    for engine in (model, cut):
        objective = ForecastObjective(ForecastConfig(unroll=3))
        objective.begin_step(0)
        model.zero_grad()
        loss = objective(engine, batch)[0]["total"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.embed.weight.grad.clone())
    assert losses[0] == losses[1]
    assert not torch.allclose(*gradients, rtol=1e-3)


@pytest.mark.parametrize("bad", [{"unroll": 0}, {"information_weight": -0.1}, {"bias_rate": -1.0}])
def test_a_config_that_means_nothing_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ForecastConfig(**bad)
