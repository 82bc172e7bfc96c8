"""Linear experts refined for rollouts: better over many steps where a state hides something, and each of its own."""

from collections.abc import Iterator

import pytest
import torch
from conftest import make_domain

from shodh.evaluation.controls import route_by_domain
from shodh.fields import CONDITIONS, PARAMETERS, LatentBatch
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


def mean_loss(engine, kernels, batches) -> float:
    return float(torch.stack([rollout_loss(engine, kernels.transpose(1, 2), batch) for batch in batches]).mean())


def solve(engine):
    gram, moment = sum_products(engine, draw_windows(take(64, 1), 1))
    kernels = torch.stack([solve_ridge(*sums, RIDGE) for sums in zip(gram, moment, strict=True)]).float()
    return kernels, torch.stack([whitening_directions(squares, RIDGE) for squares in gram]).float()


@pytest.fixture(autouse=True)
def larger_steps(monkeypatch):
    """A hundred unknowns instead of a thousand move less in as many steps."""
    monkeypatch.setattr(linear_rollouts, "RATE", 0.01)


def test_rollouts_of_unseen_samples_err_less_and_each_expert_follows_its_own():
    with distributed(1) as group:
        _, engine = build(group)
        kernels, directions = solve(engine)
        refined, losses = refine_kernels(engine, kernels, directions, draw_windows(take(100, 2), NUM_STEPS), 100)
        assert len(losses) == 100
        for kinds in ((0, 0, 0, 0), (1, 1, 1, 1)):
            unseen = list(draw_windows(take(8, 3, kinds=kinds), NUM_STEPS))
            before, after, swapped = (mean_loss(engine, k, unseen) for k in (kernels, refined, refined.flip(0)))
            assert after < 0.97 * before and after < 0.5 * swapped, kinds


def test_an_expert_without_cells_stays_as_it_is():
    with distributed(1) as group:
        _, engine = build(group)
        kernels, directions = solve(engine)
        batches = draw_windows(take(3, 2, kinds=(0, 0)), NUM_STEPS)
        refined, _ = refine_kernels(engine, kernels, directions, batches, 3)
        assert torch.equal(refined[1], kernels[1]) and not torch.equal(refined[0], kernels[0])


def test_rollouts_that_burst_are_tamed():
    with distributed(1) as group:
        _, engine = build(group)
        kernels, directions = solve(engine)
        kernels[:, 13] += 0.5  # each cell grows by half of itself every step
        _, losses = refine_kernels(engine, kernels, directions, draw_windows(take(200, 2), NUM_STEPS), 200)
        assert sum(losses[:20]) > 3 * sum(losses[-20:])


def test_the_hook_refines_what_it_solves():
    losses = []
    for num_steps in (0, NUM_STEPS):
        with distributed(1) as group:
            model, engine = build(group)
            objective = ForecastConfig(solve_at=2, solve_batches=64, refine_steps=num_steps, refine_batches=100)
            SolveLinearExperts(engine, swings, objective).begin_step(2)
            kernels = model.stencil.gain * torch.stack(list(model.stencil.kernels)).transpose(1, 2)
            losses.append(mean_loss(engine, kernels.detach(), list(draw_windows(take(8, 3), NUM_STEPS))))
    assert losses[1] < 0.97 * losses[0]


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
