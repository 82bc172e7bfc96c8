import math

import pytest
import torch

from shodh.evaluation.rollout import (
    STRUCTURE_STEPS,
    TrueTrajectory,
    average_present,
    forecast_steps,
    join_successive,
    measure_one_step,
    plan_steps,
    roll_out,
)
from shodh.evaluation.rollout_quality import measure_rollouts, measure_short_rollout, summarise_rollouts
from shodh.fields import NUM_GIVEN, Grid
from shodh.physics.spectra import vrmse

GRID = Grid(shape=(8, 8, 8), spacing=(1.0, 1.0, 1.0), boundary=("periodic", "periodic", "periodic"))


def rotating_wave(num_states: int, angle: float = 0.3) -> torch.Tensor:
    """Latents (t, 2, 4, 4, 4) whose two channels turn by ``angle`` a step: z_next = 2 cos(angle) z - z_previous."""
    phase = angle * torch.arange(num_states, dtype=torch.float64)
    x = 2 * math.pi * torch.arange(4) / 4
    wave = torch.stack([torch.cos(x[None, :] - phase[:, None]), torch.sin(x[None, :] - phase[:, None])], 1)
    return wave[..., None, None].expand(num_states, 2, 4, 4, 4).float()


def turn(states, medium, parameters):
    return 2 * math.cos(0.3) * states[:, -1] - states[:, -2]


def stay(states, medium, parameters):
    return states[:, -1]


def decode(latent, medium):
    """Fields at twice the latents' resolution; velocity (first, second, 0), pressure their sum."""
    fine = latent
    for axis in (-3, -2, -1):
        fine = fine.repeat_interleave(2, axis)
    return torch.cat([fine, torch.zeros_like(fine[:, :1])], 1), fine.sum(1, keepdim=True)


def true_trajectory(num_states: int) -> TrueTrajectory:
    latents = rotating_wave(num_states)
    velocity, pressure = decode(latents, None)
    return TrueTrajectory(latents, torch.zeros(1, 4, 4, 4), torch.zeros(4), velocity, pressure)


def measure(truth: TrueTrajectory, grid: Grid = GRID, medium: torch.Tensor | None = None, **forecasters) -> dict:
    medium = torch.full(grid.shape, 0.5) if medium is None else medium
    decoded = decode(truth.latents, None)
    return summarise_rollouts([measure_rollouts(forecasters, decode, truth, decoded, grid, medium)])


def test_rollout_of_the_exact_recurrence_follows_the_truth():
    latents = rotating_wave(NUM_GIVEN + 10)
    rolled = roll_out(turn, latents[None, :NUM_GIVEN], torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 4), 10)
    growth = 10**2 * torch.finfo(torch.float32).eps  # the recurrence is neutrally stable: errors grow like t^2 at most
    assert (rolled[0] - latents[NUM_GIVEN:]).abs().max() < 2 * growth


def test_starts_are_spread_where_twenty_steps_are_left_and_nothing_beyond_the_end_is_asked_for():
    starts = [plan_steps(NUM_GIVEN + left).starts for left in (22, 23, 62)]
    assert starts == [(0,), (0, 3), (0, 21, 42)]
    for num_states in (NUM_GIVEN + 1, 6, 21, 22, 25, 40, 64, 100):
        steps = plan_steps(num_states)
        assert int(steps.time.max()) <= num_states - 1
        end = min(60, num_states - NUM_GIVEN)
        assert steps.step[steps.start == 0].tolist() == [*range(1, min(20, end) + 1), *range(22, end + 1, 2)]
        for start in steps.starts[1:]:
            assert steps.step[steps.start == start].tolist() == [k for k in STRUCTURE_STEPS if k <= 20]


def test_forecasts_of_all_starts_are_those_of_each_rolled_out_alone():
    truth, steps = true_trajectory(64), plan_steps(64)
    together = forecast_steps(turn, truth, steps)
    for start in steps.starts:
        given = truth.latents[None, start : start + NUM_GIVEN]
        alone = roll_out(turn, given, truth.medium[None], truth.parameters[None], 60)[0]
        pairs = steps.start == start
        assert torch.equal(together[pairs], alone[steps.step[pairs] - 1])


def test_perfect_prediction_measures_the_floor_and_no_drift():
    measured = measure(true_trajectory(64), model=turn)["model"]
    growth = 60**2 * torch.finfo(torch.float32).eps  # as above
    for span in ("1", "2-20", "20", "21-60"):
        assert measured["vrmse"][span] < 2 * growth and measured["vrmse_pressure"][span] < 2 * growth
        assert abs(measured["energy_drift"][span]) < 2 * growth
        assert measured["octave_energy_ratio"][span][0] == pytest.approx(1, abs=4 * growth)
        assert measured["lost"][span] == 0
    assert measured["permeability"] is None and measured["wall_shear"]["20"] is None
    floor = measure(true_trajectory(64))["decoded_truth"]
    assert floor["vrmse"] == {"1": 0.0, "2-20": 0.0, "20": 0.0, "21-60": 0.0}


def test_standing_still_measures_persistence_at_its_analytic_size():
    measured = measure(true_trajectory(64), model=stay)
    expected = [2 * abs(math.sin(0.3 * step / 2)) for step in range(1, 61)]  # chord of the turned wave
    for name in ("persistence", "model"):
        per_step = measured[name]["vrmse_per_step"]
        assert per_step[:20] + per_step[21::2] == pytest.approx(expected[:20] + expected[21::2], rel=1e-4)
        assert per_step[20::2] == [None] * 20
        spans = measured[name]["vrmse"]
        assert spans["1"] == pytest.approx(expected[0], rel=1e-4) and spans["20"] == pytest.approx(
            expected[19], rel=1e-4
        )
        assert spans["2-20"] == pytest.approx(sum(expected[1:20]) / 19, rel=1e-4)
        assert spans["21-60"] == pytest.approx(sum(expected[21::2]) / 20, rel=1e-4)


def test_halved_amplitude_loses_three_quarters_of_the_energy_in_the_octave_that_holds_it():
    measured = measure(true_trajectory(NUM_GIVEN + 1), model=lambda *state: turn(*state) / 2)["model"]
    assert measured["energy_drift"]["1"] == pytest.approx(-0.75, abs=1e-5)
    assert measured["octave_energy_ratio"]["1"][0] == pytest.approx(0.25, abs=1e-5)
    assert measured["vrmse"] == {"1": pytest.approx(0.5, abs=1e-5), "2-20": None, "20": None, "21-60": None}
    assert measured["vrmse_per_step"] == [pytest.approx(0.5, abs=1e-5)]


def test_short_trajectories_average_the_steps_they_have():
    measured = measure(true_trajectory(NUM_GIVEN + 4), model=stay)["model"]
    expected = [2 * math.sin(0.3 * step / 2) for step in range(1, 5)]
    assert measured["vrmse"]["2-20"] == pytest.approx(sum(expected[1:]) / 3, rel=1e-5)
    assert measured["vrmse"]["20"] is None and measured["energy_drift"]["21-60"] is None


def test_silent_steps_enter_no_mean():
    truth = true_trajectory(9)
    velocity = truth.velocity.clone()
    velocity[NUM_GIVEN] = 0
    measured = measure(truth._replace(velocity=velocity), model=turn)["model"]
    assert measured["vrmse"]["1"] is None
    assert measured["vrmse_per_step"][0] is None
    assert measured["vrmse"]["2-20"] < 1e-5


def grow(states, medium, parameters):
    return 10 * states[:, -1]


def test_lost_forecasts_leave_no_mean_that_looks_better_for_them():
    measured = measure(true_trajectory(NUM_GIVEN + 22), model=grow)["model"]  # beyond 1e6 from step 7 on
    assert measured["vrmse_per_step"][5] > 1 and measured["vrmse_per_step"][6:] == [None] * 16
    assert measured["vrmse"]["2-20"] is None and measured["energy_drift"]["20"] is None
    assert measured["octave_energy_ratio"]["20"] == [None, None]
    assert measured["lost"]["1"] == 0 and measured["lost"]["20"] == 1
    assert measured["lost"]["2-20"] == pytest.approx(14 / 19)


def test_permeability_halves_with_the_flow_and_walls_feel_half_the_shear():
    flow = torch.tensor([1.0] * (NUM_GIVEN - 1) + [-2.0, 3.0, -2.0, 1.5])[:, None, None, None]
    truth = true_trajectory(len(flow))
    profile = (torch.arange(8) + 0.5) / 8  # linear: sticks to the lower wall along y
    velocity = torch.zeros(len(flow), 3, 8, 8, 8)
    velocity[:, 0] = profile[None, None, :, None] * flow
    rock = (torch.arange(512).reshape(8, 8, 8) % 5 > 0).float()
    grid = Grid(shape=GRID.shape, spacing=GRID.spacing, boundary=("periodic", "wall", "periodic"))
    truth = truth._replace(velocity=velocity)
    fields = (velocity / 2, truth.pressure)
    measured = measure_rollouts({}, decode, truth, fields, grid, rock)
    floor = summarise_rollouts([measured])["decoded_truth"]
    for span in ("1", "2-20"):
        assert floor["permeability"][span]["flow_error"] == pytest.approx(0.5)
        assert floor["permeability"][span]["dissipation_error"] == pytest.approx(0, abs=1e-6)  # of U^2 / |grad u|^2
        assert floor["wall_shear"][span]["mean_error"] == pytest.approx(0.5)
        assert floor["energy_drift"][span] == pytest.approx(-0.75)
    kept = summarise_rollouts([measured])["persistence"]
    assert kept["permeability"]["1"]["flow_error"] == pytest.approx(5 / 3)  # -2 for 3


def test_short_rollout_is_the_long_one_up_to_step_20():
    truth = true_trajectory(NUM_GIVEN + 21)
    short, long = measure_short_rollout(stay, decode, truth), measure(truth, model=stay)["model"]["vrmse"]
    assert set(short) == {"1", "2-20", "20"}
    assert short["1"] == pytest.approx(long["1"]) and short["20"] == pytest.approx(long["20"])


def test_one_step_errors_match_their_definition_and_do_not_depend_on_batching():
    latents = rotating_wave(10)
    batch = join_successive(latents, torch.zeros(1, 4, 4, 4), torch.zeros(4), 0)
    whole = measure_one_step(stay, batch)
    halves = [type(batch)(*(field[i : i + 4] for field in batch)) for i in (0, 4)]
    assert measure_one_step(stay, iter(halves)) == pytest.approx(whole, rel=1e-12)
    chord = (2 * math.sin(0.15)) ** 2 / 2  # per value, of two channels in quadrature
    assert whole["persistence_mse"] == pytest.approx(chord, rel=1e-5)
    assert whole["extrapolation_mse"] == pytest.approx(chord * (2 * math.sin(0.15)) ** 2, rel=1e-5)
    assert whole["ratio"] == 1.0
    assert measure_one_step(turn, batch)["ratio"] < 1e-9


def test_average_of_measurements_skips_missing_numbers():
    one, other = {"a": {"1": 1.0, "20": None}, "b": [1.0, 2.0]}, {"a": {"1": 3.0, "20": None}, "b": [3.0]}
    assert average_present([one, other]) == {"a": {"1": 2.0, "20": None}, "b": [2.0, 2.0]}


def test_vrmse_of_rollout_is_that_of_the_physics_room():
    truth = true_trajectory(6)
    measured = measure(truth, model=stay)["model"]
    frozen, _ = decode(truth.latents[NUM_GIVEN - 1 : NUM_GIVEN], None)
    assert measured["vrmse_per_step"][-1] == vrmse(frozen, truth.velocity[-1:]).item()


def test_trajectories_without_a_step_are_refused():
    with pytest.raises(ValueError, match="latents: 2 states"):
        measure(true_trajectory(2), model=stay)
