"""Skill of forecasts whose errors are known: none, persistence's own, and one that leaves all bounds."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_domain

from shodh.evaluation.held_out import HeldOutDomain
from shodh.evaluation.rollout import TrueTrajectory
from shodh.evaluation.skill import average_guesses, measure_skill
from shodh.fields import CONDITIONS, NUM_GIVEN, DecodedFields, Grid, Routing
from shodh.physics.spectra import vrmse

SIZE, CHANNELS = 4, 3


def make_held_out(num_states: int, num_trajectories: int = 2) -> HeldOutDomain:
    """Fields that grow by a fixed factor a snapshot, as latents that are the velocity itself."""
    domain, shape = make_domain(), (SIZE, SIZE, SIZE)
    grid = Grid(shape=shape, spacing=(1.0, 1.0, 1.0), boundary=domain.boundary)
    trajectories = []
    for _ in range(num_trajectories):
        growth = 1.1 ** torch.arange(num_states).reshape(-1, 1, 1, 1, 1)
        latents = torch.randn(1, CHANNELS, *shape) * growth
        still, told = torch.zeros(2, *shape), torch.ones(len(CONDITIONS))
        trajectories.append(TrueTrajectory(latents, still, told, latents, latents[:, :1]))
    return HeldOutDomain(
        domain=domain,
        grid=grid,
        trajectories=trajectories,
        medium=[torch.zeros(shape)] * num_trajectories,
        decode=lambda latent, medium: DecodedFields(latent, latent, latent[:, :1]),
        baselines={},
    )


def route(states: torch.Tensor) -> tuple[Routing, ...]:
    """One layer of two experts, in turn, with gate 3/4."""
    num = len(states) * SIZE**3
    expert, probability = torch.arange(num).unsqueeze(1) % 2, torch.full((num, 2), 0.5)
    return (Routing(expert, torch.full((num, 1), 0.75), probability, probability),)


def make_model(factor: float):
    def model(states, medium, parameters):
        return SimpleNamespace(latent=factor * states[:, -1], routings=route(states))

    return model


@pytest.mark.parametrize("num_states", [NUM_GIVEN + 1, 6, 25, 64])
def test_a_perfect_forecast_has_no_error_and_one_that_persists_has_that_of_persistence(num_states):
    held_out = make_held_out(num_states)
    (perfect,), (kept,) = (measure_skill(make_model(f), [held_out])["domains"].values() for f in (1.1, 1.0))
    # round-off of at most 60 products in a row, each of half a unit in the last place
    assert perfect["latent_mse_over_persistence"] < 1e-8 and kept["latent_mse_over_persistence"] == pytest.approx(1)
    for span, reached in (("1", 1), ("2-20", 2), ("20", 20), ("21-60", 30)):
        if num_states < NUM_GIVEN + reached:
            assert perfect[span] == {"vrmse": None, "persistence_vrmse": None}
            continue
        assert perfect[span]["vrmse"] < 60 * 2.0**-23
        assert (
            kept[span]["vrmse"] == pytest.approx(kept[span]["persistence_vrmse"], rel=1e-5) and kept[span]["vrmse"] > 0
        )


def test_error_at_step_20_is_that_of_a_rollout_by_hand():
    held_out = make_held_out(NUM_GIVEN + 20, num_trajectories=1)
    (block,) = measure_skill(make_model(1.05), [held_out])["domains"].values()
    current, truth = (held_out.trajectories[0].velocity[None, t] for t in (NUM_GIVEN - 1, NUM_GIVEN + 19))
    by_hand = vrmse(current * 1.05**20, truth).item()
    assert block["20"]["vrmse"] == pytest.approx(by_hand, rel=1e-4)  # 20 FP32 products
    assert block["20"]["persistence_vrmse"] == pytest.approx(vrmse(current, truth).item())


@pytest.mark.parametrize("factor", [1e9, math.nan])
def test_a_rollout_that_does_not_stay_finite_has_no_error_that_could_flatter_it(factor):
    (block,) = measure_skill(make_model(factor), [make_held_out(NUM_GIVEN + 23)])["domains"].values()
    assert block["20"]["vrmse"] is None and block["2-20"]["vrmse"] is None
    assert block["20"]["persistence_vrmse"] > 0


def test_silent_states_have_no_relative_error():
    held_out = make_held_out(NUM_GIVEN + 4, num_trajectories=1)
    held_out.trajectories[0].velocity[NUM_GIVEN : NUM_GIVEN + 2] *= 1e-6
    (block,) = measure_skill(make_model(1.1), [held_out])["domains"].values()
    assert block["2-20"]["vrmse"] is None or block["2-20"]["vrmse"] < 1
    assert average_guesses([{"vrmse": [], "persistence_vrmse": []}]) == {"vrmse": None, "persistence_vrmse": None}


def test_routing_and_gates_are_of_the_held_out_tokens():
    found = measure_skill(make_model(1.0), [make_held_out(5)])
    assert found["gates"] == [{"sum": 0.75, "best_share": 1.0}]
    (layer,) = found["routing"]["layers"]
    assert layer["load"] == [0.5, 0.5] and layer["dead_experts"] == []
