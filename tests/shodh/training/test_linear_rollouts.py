"""Linear experts refined for rollouts: better over many steps where a state hides something, and each of its own."""

import math
from collections.abc import Iterator

import pytest
import torch
from conftest import make_domain

from shodh.evaluation.controls import route_by_domain
from shodh.fields import CONDITIONS, NUM_GIVEN, PARAMETERS, LatentBatch
from shodh.model.transformer import LatentTransformer, TransformerConfig
from shodh.training import linear_rollouts
from shodh.training.engine import EngineConfig, build_engine, distributed
from shodh.training.linear_rollouts import refine_kernels, rollout_loss, whitening_directions
from shodh.training.linear_start import RIDGE, SolveLinearExperts, draw_windows, solve_ridge, sum_products
from shodh.training.objectives import ForecastConfig

SMALL = TransformerConfig(
    latent_channels=1, medium_channels=1, width=12, depth=1, num_heads=2, num_experts=2, hidden=8, semantic_width=8
)
DOMAINS = [make_domain(name=f"of {name}", parameters=(name,)) for name in ("dt", "viscosity")]
NUM_STEPS = 12
FLOOR = 0.02


def swings(seed: int, kinds: tuple[int, ...] = (0, 0, 0, 1, 1, 1)) -> Iterator[LatentBatch]:
    """Standing waves of two kinds, how fast each swings being its own: soon no linear map knows its phase."""
    draw = torch.Generator().manual_seed(seed)
    kind, num = torch.tensor(kinds), len(kinds)
    parameters = torch.zeros(num, len(CONDITIONS))
    parameters[:, len(PARAMETERS) :] = 1.0
    parameters[torch.arange(num), [PARAMETERS.index(DOMAINS[k].parameters[0]) for k in kinds]] = 0.5
    while True:
        speed = torch.tensor([0.3, 1.0])[kind] + 0.8 * torch.rand(num, generator=draw)
        phase = 6.3 * torch.rand(num, generator=draw)
        swing = torch.cos(speed[:, None] * torch.arange(30) + phase[:, None])
        place = torch.randn(num, 1, 4, 4, 4, generator=draw)
        states = torch.einsum("b t, b c x y z -> b t c x y z", swing, place)
        yield LatentBatch(states, torch.zeros_like(place), parameters, kind)


def build(group):
    torch.manual_seed(0)
    model = LatentTransformer(SMALL)
    route_by_domain(model, DOMAINS)
    return model, build_engine(model, EngineConfig(batch_size=6, zero_stage=0, optimizer="muon"), group.device)


def take(number: int, seed: int, **how) -> list[LatentBatch]:
    source = swings(seed, **how)
    return [next(source) for _ in range(number)]


@torch.no_grad()
def roll(model, kernels, batch: LatentBatch) -> list[torch.Tensor]:
    """The model's own forecasts in a row, its linear experts being these; its last layer is still 0."""
    for parameter, kernel in zip(model.stencil.kernels, kernels, strict=True):
        parameter.copy_(kernel.T / model.stencil.gain)
    states, found = batch.given, []
    for _ in range(NUM_GIVEN, batch.states.shape[1]):
        found.append(model(states, batch.medium, batch.parameters).latent)
        states = torch.cat([states[:, 1:], found[-1][:, None]], 1)
    return found


def late_error(model, kernels, batches) -> float:
    """Mean square error of the last third of each rollout."""
    errors = []
    for batch in batches:
        found = roll(model, kernels, batch)[-NUM_STEPS // 3 :]
        errors += [(latent - batch.states[:, k - len(found)]).square().mean() for k, latent in enumerate(found)]
    return float(torch.stack(errors).mean())


def solve(engine):
    gram, moment, _ = sum_products(engine, draw_windows(take(64, 1), 1))
    kernels = torch.stack([solve_ridge(*sums, RIDGE) for sums in zip(gram, moment, strict=True)]).float()
    return kernels, torch.stack([whitening_directions(squares, RIDGE) for squares in gram]).float()


@pytest.fixture(autouse=True)
def larger_steps(monkeypatch):
    """A hundred unknowns instead of a thousand move less in as many steps."""
    monkeypatch.setattr(linear_rollouts, "RATE", 0.01)


def test_rollouts_of_unseen_samples_err_less_and_each_expert_follows_its_own():
    with distributed(1) as group:
        model, engine = build(group)
        kernels, directions = solve(engine)
        windows = draw_windows(take(100, 2), NUM_STEPS)
        refined, losses = refine_kernels(engine, kernels, directions, windows, 100, FLOOR)
        assert len(losses) == 100
        for kinds in ((0, 0, 0, 0), (1, 1, 1, 1)):
            unseen = list(draw_windows(take(8, 3, kinds=kinds), NUM_STEPS))
            assert late_error(model, refined, unseen) < 0.95 * late_error(model, kernels, unseen), kinds
            own, swapped = (
                rollout_loss(engine, k.transpose(1, 2), unseen[0], FLOOR) for k in (refined, refined.flip(0))
            )
            assert own < 0.9 * swapped, kinds


def test_the_loss_is_that_of_the_models_own_rollouts():
    with distributed(1) as group:
        model, engine = build(group)
        kernels, _ = solve(engine)
        batch = next(draw_windows(take(1, 5), NUM_STEPS))
        found, terms, first = roll(model, kernels, batch), [], []
        for sample in range(len(batch.domain)):
            for k, latent in enumerate(found):
                truth, before = batch.states[sample, NUM_GIVEN + k], batch.states[sample, NUM_GIVEN + k - 1]
                error = float((latent[sample] - truth).square().mean())
                terms.append(math.log(1 + error / (float(truth.square().mean()) + 0.05)))
                if k == 0:
                    first.append(error / (float((truth - before).square().mean()) + FLOOR))
        expected = sum(terms) / len(terms) + 0.5 * sum(first) / len(first)
        assert float(rollout_loss(engine, kernels.transpose(1, 2), batch, FLOOR)) == pytest.approx(expected, rel=1e-5)


def test_an_expert_without_cells_stays_as_it_is():
    with distributed(1) as group:
        _, engine = build(group)
        kernels, directions = solve(engine)
        batches = draw_windows(take(3, 2, kinds=(0, 0)), NUM_STEPS)
        refined, _ = refine_kernels(engine, kernels, directions, batches, 3, FLOOR)
        assert torch.equal(refined[1], kernels[1]) and not torch.equal(refined[0], kernels[0])


@pytest.mark.parametrize(("growth", "gain"), [(0.5, 3), (60.0, 1.05)])  # of each cell in a step; the latter to 1e21
def test_rollouts_that_burst_are_tamed(growth, gain):
    with distributed(1) as group:
        _, engine = build(group)
        kernels, directions = solve(engine)
        kernels[:, 13] += growth
        windows = draw_windows(take(200, 2), NUM_STEPS)
        refined, losses = refine_kernels(engine, kernels, directions, windows, 200, FLOOR)
        assert refined.isfinite().all() and sum(losses[:20]) > gain * sum(losses[-20:])


def test_the_hook_refines_what_it_solves():
    errors = []
    for num_steps in (0, NUM_STEPS):
        with distributed(1) as group:
            model, engine = build(group)
            objective = ForecastConfig(solve_at=2, solve_batches=64, refine_steps=num_steps, refine_batches=100)
            SolveLinearExperts(engine, swings, objective).begin_step(2)
            kernels = model.stencil.gain * torch.stack(list(model.stencil.kernels)).detach().transpose(1, 2)
            errors.append(late_error(model, kernels, list(draw_windows(take(8, 3), NUM_STEPS))))
    assert errors[1] < 0.95 * errors[0]


def test_batches_of_too_few_states_are_refused():
    with pytest.raises(ValueError, match="num_states=43"):
        next(draw_windows(take(1, 2), 40))


@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_along_the_directions_features_are_alike_and_independent(ridge):
    rows = torch.randn(400, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    rows[:, 3] = 0  # a feature that is never there
    gram = rows.T @ rows
    directions = whitening_directions(gram, ridge)
    seen = directions.T @ (gram + ridge * gram.diagonal().diag()) @ directions
    own = [0, 1, 2, 4]
    expected = seen[0, 0] * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(seen[own][:, own], expected, rtol=1e-8, atol=1e-8 * float(seen[0, 0]))
    assert float((directions**2).sum(0).mean()) == pytest.approx(1)
