"""The linear latent model is the best linear one: it finds an exact law, chooses on held-back data, never fails."""

import pytest
import torch

from shodh.evaluation.linear_forecast import (
    OFFSETS,
    RIDGES,
    STENCILS,
    describe_cells,
    fit_linear_forecast,
    solve_ridges,
    sum_products,
)
from shodh.evaluation.rollout import join_successive, measure_one_step, roll_out
from shodh.fields import NUM_GIVEN, LatentBatch

CHANNEL = ("periodic", "wall", "periodic")
PERIODIC = ("periodic", "periodic", "periodic")


def random_trajectory(num_states: int = 8, channels: int = 2) -> LatentBatch:
    return join_successive(torch.randn(num_states, channels, 4, 4, 4), torch.randn(1, 4, 4, 4), torch.rand(3), 0)


def obey(batch: LatentBatch, boundary, weights: torch.Tensor, stencil: int) -> LatentBatch:
    """The same states, but each followed by what a linear law makes of them."""
    features = describe_cells(batch.given, batch.medium, batch.parameters, boundary, stencil)
    change = (features @ weights).reshape(len(batch.current), 4, 4, 4, -1).movedim(-1, 1)
    return batch._replace(states=torch.cat([batch.given, (batch.current + change)[:, None]], 1))


@pytest.mark.parametrize("boundary", [CHANNEL, PERIODIC])
@pytest.mark.parametrize("stencil", [7, 27])
def test_exactly_linear_law_is_recovered_to_round_off(boundary, stencil):
    num_features = stencil * NUM_GIVEN * 2 + 1 + 3 + 1
    weights = torch.randn(num_features, 2, dtype=torch.float64) / num_features
    double = (
        LatentBatch(*(v.double() if v.is_floating_point() else v for v in random_trajectory())) for _ in range(10)
    )
    train = [obey(batch, boundary, weights, stencil) for batch in double]
    *train, test = train
    fitted = fit_linear_forecast(train, boundary)
    assert fitted.stencil >= stencil
    error = measure_one_step(fitted, test)["latent_mse"]
    assert error < RIDGES[0] ** 2 * len(weights)  # features are of order 1: the ridge biases a weight by its strength


def test_chosen_ridge_and_stencil_are_candidates_and_noise_asks_for_a_strong_ridge():
    fitted = fit_linear_forecast([random_trajectory(NUM_GIVEN + 2) for _ in range(5)], PERIODIC)
    assert fitted.ridge in RIDGES and fitted.stencil in STENCILS
    assert fitted.stencil == 1 and fitted.ridge >= 1e-4  # states are independent: each further weight fits noise


def test_fewer_samples_than_unknowns_are_solved_by_the_ridge():
    batch = join_successive(torch.randn(NUM_GIVEN + 1, 8, 2, 2, 2), torch.randn(1, 2, 2, 2), torch.zeros(3), 0)
    equations = sum_products(batch, PERIODIC)
    assert equations.num_cells == 8 < len(equations.gram)
    columns = torch.arange(len(equations.gram))
    for ridge, weights in zip(RIDGES, solve_ridges(equations, columns, RIDGES), strict=True):
        scaled = weights * (equations.gram.diagonal() / 8).sqrt()[:, None]
        assert bool(weights.isfinite().all()) and scaled.norm() < (equations.square / 8 / ridge).sqrt()
    fitted = fit_linear_forecast([batch, batch], PERIODIC)
    assert bool(fitted(batch.given, batch.medium, batch.parameters).isfinite().all())


def test_walls_give_zeros_and_periodic_axes_wrap():
    current = torch.arange(64.0).reshape(1, 1, 4, 4, 4)
    features = describe_cells(torch.stack([current] * 2, 1), torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1), CHANNEL, 7)
    by_offset = features[:, :14].reshape(4, 4, 4, 7, 2)[..., 1]
    below = {offset: number for number, offset in enumerate(OFFSETS)}
    assert torch.equal(by_offset[..., 0].float(), current[0, 0])
    assert torch.equal(by_offset[..., below[-1, 0, 0]].float(), current[0, 0].roll(1, 0))
    assert bool((by_offset[:, 0, :, below[0, -1, 0]] == 0).all())
    assert torch.equal(by_offset[:, 1:, :, below[0, -1, 0]].float(), current[0, 0, :, :-1])


def test_sums_do_not_depend_on_how_states_are_batched(monkeypatch):
    batch = random_trajectory(9)
    whole = sum_products(batch, CHANNEL)
    monkeypatch.setattr("shodh.evaluation.linear_forecast.CELLS_AT_ONCE", 128)
    for one, other in zip(whole, sum_products(batch, CHANNEL), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-12, atol=1e-12)


def test_it_rolls_out_like_any_model():
    batch = random_trajectory()
    fitted = fit_linear_forecast([batch, random_trajectory()], CHANNEL)
    told = batch.medium[:1], batch.parameters[:1]
    rolled = roll_out(fitted, batch.given[:1], *told, 3)
    assert rolled.shape == (1, 3, 2, 4, 4, 4) and rolled.dtype == torch.float32


def test_one_trajectory_is_too_few():
    with pytest.raises(ValueError, match="at least two for training"):
        fit_linear_forecast([random_trajectory()], CHANNEL)
