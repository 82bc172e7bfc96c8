"""Linear experts that are solved for: each has the law of its own cells, once, and nothing else is touched."""

from collections.abc import Iterator
from itertools import count

import pytest
import torch
from conftest import make_domain
from torch import Tensor

from shodh.evaluation.controls import route_by_domain
from shodh.fields import CONDITIONS, NUM_GIVEN, PARAMETERS, LatentBatch
from shodh.model.stencil import neighbourhoods
from shodh.model.transformer import LatentTransformer, TransformerConfig, linear_inputs
from shodh.training import linear_start
from shodh.training.checkpoint import collect_state, restore_state
from shodh.training.engine import EngineConfig, build_engine, distributed, set_learning_rate
from shodh.training.linear_start import SolveLinearExperts, draw_windows, solve_ridge, sum_products
from shodh.training.loop import LoopConfig, train
from shodh.training.objectives import ForecastConfig
from shodh.training.schedule import ScheduleConfig

SMALL = TransformerConfig(
    latent_channels=3, medium_channels=1, width=12, depth=1, num_heads=2, num_experts=2, hidden=8, semantic_width=8
)
FEATURES = (NUM_GIVEN * 3 + 1) * 27
DOMAINS = [make_domain(name=f"of {name}", parameters=(name,)) for name in ("dt", "viscosity")]
LAWS = 0.1 * torch.randn(2, FEATURES, 3, generator=torch.Generator().manual_seed(1))


def solve(at: int, num_batches: int = 64) -> ForecastConfig:
    return ForecastConfig(solve_at=at, solve_batches=num_batches)


def follow_law(states: Tensor, medium: Tensor, law: Tensor) -> Tensor:
    everywhere = torch.ones(len(states), len(CONDITIONS))  # periodic
    rows = neighbourhoods(*linear_inputs(states, medium, everywhere))
    return states[:, -1] + (rows @ law).reshape(len(states), 4, 4, 4, 3).movedim(-1, 1)


def batches(step: int, kinds: tuple[int, ...] = (0, 1, 1, 0, 1, 0)) -> Iterator[LatentBatch]:
    """Random states, and what the law of each sample's kind makes of them."""
    kind = torch.tensor(kinds)
    for number in count(step):
        draw = torch.Generator().manual_seed(number)
        states = torch.randn(len(kinds), NUM_GIVEN, 3, 4, 4, 4, generator=draw)
        medium = torch.randn(len(kinds), 1, 4, 4, 4, generator=draw)
        both = torch.stack([follow_law(states, medium, law) for law in LAWS])
        following = both[kind, torch.arange(len(kinds))]
        parameters = torch.zeros(len(kinds), len(CONDITIONS))
        parameters[:, len(PARAMETERS) :] = 1.0
        names = [PARAMETERS.index(DOMAINS[k].parameters[0]) for k in kinds]
        parameters[torch.arange(len(kinds)), names] = 0.5
        yield LatentBatch(torch.cat([states, following[:, None]], 1), medium, parameters, kind)


def build(engine: EngineConfig, group) -> tuple[LatentTransformer, object]:
    torch.manual_seed(0)
    model = LatentTransformer(SMALL)
    route_by_domain(model, DOMAINS)
    torch.nn.init.normal_(model.out.weight)
    built = build_engine(model, engine, group.device)
    set_learning_rate(built, 0.01)
    return model, built


def remember_a_step(engine) -> None:
    """Give the optimizer something to forget."""
    batch = next(batches(9))
    engine.backward(engine(batch.states[:, :-1], batch.medium, batch.parameters).latent.square().mean())
    engine.step()


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # of torch itself, which ZeRO imports
@pytest.mark.parametrize(("optimizer", "stage"), [("muon", 0), ("adamw", 0), ("adamw", 1), ("adamw", 2)])
def test_each_expert_gets_the_law_of_its_own_cells_and_the_layers_begin_anew(optimizer, stage):
    with distributed(1) as group:
        model, engine = build(EngineConfig(batch_size=6, zero_stage=stage, optimizer=optimizer), group)
        remember_a_step(engine)
        others = {n: p.detach().clone() for n, p in model.named_parameters() if "stencil" not in n and "out." not in n}
        hook = SolveLinearExperts(engine, batches, solve(at=7))
        hook.begin_step(6)
        assert model.out.weight.any()
        hook.begin_step(7)
        for kinds in ((0, 0), (1, 1), (1, 0)):
            batch = next(batches(3, kinds))
            found = model(batch.states[:, :-1], batch.medium, batch.parameters).latent
            change = batch.following - batch.current
            assert (found - batch.following).square().mean() < 1e-3 * change.square().mean(), kinds
        assert not model.out.weight.any() and not model.out.bias.any()
        assert all(torch.equal(others[name], p) for name, p in model.named_parameters() if name in others)
        solved = [parameter.detach().clone() for parameter in (*model.stencil.kernels, model.out.weight)]
        engine.backward(0 * sum(p.sum() for p in model.parameters()))  # no gradient: only what is remembered moves
        engine.step()
        assert all(map(torch.equal, (*model.stencil.kernels, model.out.weight), solved))
        assert not all(torch.equal(others[name], p) for name, p in model.named_parameters() if name in others)


def test_zero_never_solves_and_a_resumed_run_does_not_solve_again():
    with distributed(1) as group:
        model, engine = build(EngineConfig(batch_size=6, zero_stage=0, optimizer="muon"), group)
        SolveLinearExperts(engine, batches, solve(at=0)).begin_step(0)
        SolveLinearExperts(engine, batches, solve(at=7)).begin_step(8)
        assert model.out.weight.any() and not any(kernel.any() for kernel in model.stencil.kernels)


def test_an_expert_without_cells_gets_what_serves_all():
    with distributed(1) as group:
        model, engine = build(EngineConfig(batch_size=6, zero_stage=0, optimizer="muon"), group)
        SolveLinearExperts(engine, lambda step: batches(step, (0, 0, 0, 0)), solve(at=1)).begin_step(1)
        batch = next(batches(3, (1, 1)))
        found = model(batch.given, batch.medium, batch.parameters).latent
        expected = follow_law(batch.given, batch.medium, LAWS[0])
        assert (found - expected).square().mean() < 1e-3 * (expected - batch.current).square().mean()


def test_all_times_of_a_sample_are_drawn():
    long = next(batches(3, (0, 1)))._replace(states=torch.randn(2, NUM_GIVEN + 4, 3, 4, 4, 4))
    windows = [long.states[:, first : first + NUM_GIVEN + 1] for first in range(4)]
    drawn = [batch.states for batch in draw_windows([long] * 32, num_predicted=1)]
    assert {[torch.equal(states, window) for window in windows].index(True) for states in drawn} == {0, 1, 2, 3}


def test_large_batches_are_taken_in_parts(monkeypatch):
    with distributed(1) as group:
        _, engine = build(EngineConfig(batch_size=6, zero_stage=0, optimizer="muon"), group)
        several = [next(batches(step)) for step in range(3)]
        whole = sum_products(engine, several)
        monkeypatch.setattr(linear_start, "CELLS_AT_ONCE", 130)  # two samples of 64 cells
        for one, other in zip(whole, sum_products(engine, several), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


class SquareError:
    def begin_step(self, step: int) -> None: ...

    def __call__(self, engine, batch: LatentBatch) -> tuple[dict[str, Tensor], None]:
        error = engine(batch.given, batch.medium, batch.parameters).latent - batch.following
        return {"total": error.square().mean()}, None


class StopAfter:
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, record) -> None:
        if record.step == self.step:
            raise StopIteration


def test_a_run_resumed_just_before_or_after_the_solve_is_the_uninterrupted_one_bit_for_bit():
    loop = LoopConfig(schedule=ScheduleConfig(num_steps=5, learning_rate=0.01, num_warmup_steps=1))

    def go(group, state=None, first: int = 0, last: int = 5) -> dict[str, Tensor]:
        model, engine = build(EngineConfig(batch_size=6, zero_stage=0, optimizer="muon"), group)
        if state is not None:
            restore_state(engine, state)
        hooks = [SolveLinearExperts(engine, batches, solve(at=2, num_batches=8)), StopAfter(last)]
        with pytest.raises(StopIteration):
            train(engine, SquareError(), batches, loop, hooks, first)
        return collect_state(engine)

    with distributed(1) as group:
        whole = go(group)
        assert float(whole["buffer/correction"]) < 1
        for stop in (2, 3):
            resumed = go(group, go(group, last=stop), stop)
            assert resumed.keys() == whole.keys()
            assert all(torch.equal(resumed[name], whole[name]) for name in whole), stop


def test_samples_count_by_their_change_down_to_a_floor(monkeypatch):
    """Of two laws that one expert has to serve it prefers that of small changes, until they are below the floor."""

    def mixed(step: int) -> Iterator[LatentBatch]:
        for batch in batches(step, (0, 0, 0, 0)):
            size = torch.tensor([0.1, 0.1, 1.0, 1.0]).reshape(-1, 1, 1, 1, 1)
            following = batch.current + size * (batch.following - batch.current)
            yield batch._replace(states=torch.cat([batch.given, following[:, None]], 1))

    batch = next(batches(3, (0, 0)))
    change = batch.following - batch.current
    factors = []
    with distributed(1) as group:
        for floor in (1e-6, 1e6):
            monkeypatch.setattr(linear_start, "SOLVE_FLOOR", floor)
            torch.manual_seed(0)
            model = LatentTransformer(SMALL)
            route_by_domain(model, DOMAINS[:1])
            engine = build_engine(model, EngineConfig(batch_size=6, zero_stage=0, optimizer="muon"), group.device)
            SolveLinearExperts(engine, mixed, solve(at=1)).begin_step(1)
            found = model(batch.given, batch.medium, batch.parameters).latent.detach() - batch.current
            factors.append(float((found * change).sum() / change.square().sum()))
    by_change, alike = (0.1 / 0.1**2 + 1) / (1 / 0.1**2 + 1), (0.1 + 1) / 2  # weighted means of 0.1 and 1
    assert factors == pytest.approx([by_change, alike], rel=0.06)


def test_ridge_is_least_squares_where_it_is_small_and_ignores_a_feature_that_is_never_there():
    rows, law = torch.randn(200, 5, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    rows[:, 3] = 0
    found = solve_ridge(rows.T @ rows, rows.T @ (rows @ law), 1e-9)
    expected = law.clone()
    expected[3] = 0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
