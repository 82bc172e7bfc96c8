"""The evaluation of a model on held-out fields whose errors are known in closed form."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_domain
from torch import Tensor

from shodh.evaluation.held_out import HeldOutDomain, evaluate, picture_domain
from shodh.evaluation.report import format_table, write_report
from shodh.evaluation.rollout import TrueTrajectory
from shodh.fields import NUM_GIVEN, DecodedFields, DomainSpec, Grid, Routing
from shodh.model.transformer import Forecast
from shodh.physics.masked_projection import PORE_SPACE, open_faces

N, NUM_STATES = 8, 6
GRID = Grid(shape=(N, N, N), spacing=(1.0, 1.0, 1.0), boundary=("periodic", "periodic", "periodic"))


def make_periodic(medium: str = "wall_distance") -> DomainSpec:
    domain = make_domain("solenoidal", GRID.boundary)
    return replace(domain, medium=replace(domain.medium, name=medium))


def stay(states: Tensor, medium: Tensor, parameters: Tensor) -> Forecast:
    """A model that predicts the current state and sends every token to the first of two experts."""
    num, current = len(states) * N**3, states[:, -1]
    gates = torch.tensor([0.75, 0.25]).expand(num, 2)
    return Forecast(current, (Routing(torch.tensor([[0, 1]]).expand(num, 2), gates, gates, gates.log()),))


def decode(latent: Tensor, medium: Tensor) -> DecodedFields:
    """The latent is the state; a fifth of it is lost."""
    fields = 0.8 * latent
    return DecodedFields(fields[:, :3], fields[:, :3], fields[:, 3:])


def hold_out(states: Tensor, medium: Tensor, **options: Any) -> HeldOutDomain:
    """One trajectory of states (t, 4, x, y, z), velocity and pressure, which are their own latents."""
    trajectory = TrueTrajectory(states, medium[None], torch.zeros(1), states[:, :3], states[:, 3:])
    baselines = {"block_klt": lambda velocity: velocity / 2}
    options = {"domain": make_periodic(), **options}
    return HeldOutDomain(
        grid=GRID, trajectories=[trajectory], medium=[medium], decode=decode, baselines=baselines, **options
    )


def headlines(evaluation: dict[str, Any]) -> list[float | None]:
    tokenizer, mean = evaluation["domains"]["anything"]["tokenizer"], evaluation["mean"]
    errors = [tokenizer["vrmse"]["velocity"], tokenizer["vrmse"]["pressure"], tokenizer["block_klt_vrmse"]["velocity"]]
    return [*errors, mean["tokenizer_velocity_vrmse"], mean["block_klt_velocity_vrmse"]]


@pytest.mark.parametrize("quiet", [0.0, 3.0, None])
def test_snapshot_at_rest_changes_no_headline(quiet):
    states = torch.randn(NUM_STATES, 4, N, N, N)
    alone = evaluate(stay, [hold_out(states, torch.rand(N, N, N))])
    more = 1e-6 * states[:1] if quiet is None else torch.full((1, 4, N, N, N), quiet)  # silent or constant
    together = evaluate(stay, [hold_out(torch.cat([states, more]), torch.rand(N, N, N))])
    assert headlines(together) == pytest.approx(headlines(alone), rel=1e-12)
    assert headlines(alone)[0] == pytest.approx(0.2, rel=1e-2)  # but for the means of 512 random values
    assert headlines(alone)[2] == pytest.approx(0.5, rel=1e-2)
    block = together["domains"]["anything"]
    assert block["tokenizer"]["vrmse"]["velocity"] == block["reconstruction"]["vrmse"]["velocity"]
    assert block["reconstruction"]["num_snapshots"] == NUM_STATES + 1


def test_trajectory_at_rest_has_no_figure_and_a_dash_in_table_and_report(tmp_path):
    evaluation = evaluate(stay, [hold_out(torch.full((NUM_STATES, 4, N, N, N), 2.0), torch.rand(N, N, N))])
    assert headlines(evaluation) == [None] * 5
    row = next(line for line in format_table(evaluation).splitlines() if line.startswith("anything"))
    assert row.split()[2:4] == ["-", "-"]
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation, allow_nan=False))
    assert "<td>-</td>" in write_report(tmp_path).read_text().replace(' class="number"', "")


def test_baselines_reconstruct_every_snapshot_once():
    seen = []

    def reconstruct(velocity: Tensor) -> Tensor:
        seen.append(len(velocity))
        return velocity / 2

    held_out = hold_out(torch.randn(NUM_STATES, 4, N, N, N), torch.rand(N, N, N))
    evaluate(stay, [held_out._replace(baselines={"block_klt": reconstruct})])
    assert sum(seen) == NUM_STATES


def test_projected_fields_leave_the_solid_and_the_report_says_so(tmp_path):
    pore = torch.rand(N, N, N) < 0.6
    states = torch.randn(NUM_STATES, 4, N, N, N)
    leaky = hold_out(states, pore.float(), domain=make_periodic(PORE_SPACE))
    tight = leaky._replace(project=True)
    through, around = (evaluate(stay, [held_out])["domains"]["anything"] for held_out in (leaky, tight))
    assert through["reconstruction"]["flux_in_solid"]["decoded"] > 0 and not through["projected"]
    assert around["reconstruction"]["flux_in_solid"]["decoded"] == 0 and around["projected"]
    assert through["divergence"]["max_abs"] > 0 and around["divergence"]["max_abs"] == 0
    assert around["rollout"]["model"]["vrmse"]["1"] != through["rollout"]["model"]["vrmse"]["1"]
    assert around["decoded_mse"] != through["decoded_mse"]
    sealed = ~open_faces(pore, GRID.boundary)[:, :, :, N // 2].any(0)  # cells none of whose lower faces is open
    for held_out, tightness in ((leaky, False), (tight, True)):
        assert bool(picture_domain(stay, held_out)["decoded"][sealed.numpy()].any()) != tightness
    (tmp_path / "evaluation.json").write_text(json.dumps({"domains": {"rock": {"projected": around["projected"]}}}))
    assert "rock: decoded fields were projected into the pores" in write_report(tmp_path).read_text()


def test_picture_holds_the_expert_of_every_token_in_place_and_a_slice_of_the_field_through_each():
    states = torch.randn(NUM_STATES, 4, N, N, N)

    def route_by_place(given: Tensor, medium: Tensor, parameters: Tensor) -> Forecast:
        """Tokens of 2 x 2 x 2 cells; each chooses the expert that its place is numbered with."""
        expert = torch.arange(64).repeat(len(given))[:, None]
        even = torch.full((len(expert), 64), 1 / 64)
        return Forecast(given[:, -1], (Routing(expert, even[:, :1], even, even.log()),))

    picture = picture_domain(route_by_place, hold_out(states, torch.rand(N, N, N)))
    assert picture["experts"].tolist() == [torch.arange(64).reshape(4, 4, 4).tolist()]
    shown = states[(NUM_STATES - NUM_GIVEN) // 2 + NUM_GIVEN, :3].norm(dim=0)
    assert torch.equal(torch.from_numpy(picture["truth_slices"]), shown[..., [1, 3, 5, 7]])
