import math

import pytest
import torch

from shodh.evaluation.rollout import TrueTrajectory, average_present, measure_one_step, measure_rollout, roll_out
from shodh.fields import LatentBatch
from shodh.physics.spectra import vrmse

PERIODIC = ("periodic", "periodic", "periodic")


def rotating_wave(num_states: int, angle: float = 0.3) -> torch.Tensor:
    """Latents (t, 2, 4, 4, 4) whose two channels turn by ``angle`` a step: z_next = 2 cos(angle) z - z_previous."""
    phase = angle * torch.arange(num_states, dtype=torch.float64)
    x = 2 * math.pi * torch.arange(4) / 4
    wave = torch.stack([torch.cos(x[None, :] - phase[:, None]), torch.sin(x[None, :] - phase[:, None])], 1)
    return wave[..., None, None].expand(num_states, 2, 4, 4, 4).float()


def turn(previous, current, medium, parameters):
    return 2 * math.cos(0.3) * current - previous


def stay(previous, current, medium, parameters):
    return current


def decode(latent, medium):
    """Fields at twice the latents' resolution; velocity (first, second, 0), pressure their sum."""
    fine = latent
    for axis in (-3, -2, -1):
        fine = fine.repeat_interleave(2, axis)
    return torch.cat([fine, torch.zeros_like(fine[:, :1])], 1), fine.sum(1, keepdim=True)


def true_trajectory(num_states: int) -> TrueTrajectory:
    latents = rotating_wave(num_states)
    velocity, pressure = decode(latents, None)
    return TrueTrajectory(latents, torch.zeros(1, 4, 4, 4), torch.zeros(4), velocity, pressure, PERIODIC)


def test_rollout_of_the_exact_recurrence_follows_the_truth():
    latents = rotating_wave(12)
    rolled = roll_out(turn, latents[None, 0], latents[None, 1], torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 4), 10)
    growth = 10**2 * torch.finfo(torch.float32).eps  # the recurrence is neutrally stable: errors grow like t^2 at most
    assert (rolled[0] - latents[2:]).abs().max() < 2 * growth


def test_perfect_prediction_measures_the_floor_and_no_drift():
    measured = measure_rollout(turn, decode, true_trajectory(9))
    for span in ("1", "2-5", "last"):
        assert measured["vrmse"][span] < 1e-5
        assert measured["vrmse_pressure"][span] < 1e-5
        assert measured["decoded_truth_vrmse"][span] == 0.0
    assert abs(measured["energy_drift"]) < 1e-5
    assert measured["band_error"][0] == pytest.approx(1, abs=1e-5)
    assert measured["num_steps"] == 7


def test_standing_still_measures_persistence_at_its_analytic_size():
    measured = measure_rollout(stay, decode, true_trajectory(9))
    expected = [2 * math.sin(0.3 * step / 2) for step in range(1, 8)]  # chord of the turned wave over its deviation
    assert measured["persistence_vrmse_per_step"] == pytest.approx(expected, rel=1e-5)
    assert measured["vrmse"] == measured["persistence_vrmse"]
    assert measured["vrmse"]["1"] == pytest.approx(expected[0], rel=1e-5)
    assert measured["vrmse"]["2-5"] == pytest.approx(sum(expected[1:5]) / 4, rel=1e-5)
    assert measured["vrmse"]["last"] == pytest.approx(expected[6], rel=1e-5)


def test_halved_amplitude_loses_three_quarters_of_the_energy_in_the_band_that_holds_it():
    truth = true_trajectory(3)
    measured = measure_rollout(lambda *state: turn(*state) / 2, decode, truth)
    assert measured["energy_drift"] == pytest.approx(-0.75, abs=1e-5)
    assert measured["band_error"][0] == pytest.approx(0.25, abs=1e-5)
    assert measured["vrmse"] == {"1": pytest.approx(0.5, abs=1e-5), "2-5": None, "last": pytest.approx(0.5, abs=1e-5)}


def test_silent_steps_enter_no_mean():
    truth = true_trajectory(9)
    velocity = truth.velocity.clone()
    velocity[2] = 0
    measured = measure_rollout(turn, decode, truth._replace(velocity=velocity))
    assert measured["vrmse"]["1"] is None
    assert measured["vrmse_per_step"][0] is None
    assert measured["vrmse"]["last"] < 1e-5


def test_one_step_errors_match_their_definition_and_do_not_depend_on_batching():
    latents = rotating_wave(10)
    medium, parameters, domain = torch.zeros(8, 1, 4, 4, 4), torch.zeros(8, 4), torch.zeros(8, dtype=torch.long)
    batch = LatentBatch(latents[:8], latents[1:9], latents[2:], medium, parameters, domain)
    whole = measure_one_step(stay, batch)
    halves = [LatentBatch(*(field[i : i + 4] for field in batch)) for i in (0, 4)]
    assert measure_one_step(stay, iter(halves)) == pytest.approx(whole, rel=1e-12)
    chord = (2 * math.sin(0.15)) ** 2 / 2  # per value, of two channels in quadrature
    assert whole["persistence_mse"] == pytest.approx(chord, rel=1e-5)
    assert whole["extrapolation_mse"] == pytest.approx(chord * (2 * math.sin(0.15)) ** 2, rel=1e-5)
    assert whole["ratio"] == 1.0
    assert measure_one_step(turn, batch)["ratio"] < 1e-9


def test_average_of_measurements_skips_missing_numbers():
    one, other = {"a": {"1": 1.0, "2-5": None}, "b": [1.0, 2.0]}, {"a": {"1": 3.0, "2-5": None}, "b": [3.0]}
    assert average_present([one, other]) == {"a": {"1": 2.0, "2-5": None}, "b": [2.0, 2.0]}


def test_vrmse_of_rollout_is_that_of_the_physics_room():
    truth = true_trajectory(6)
    measured = measure_rollout(stay, decode, truth)
    frozen, _ = decode(truth.latents[1:2], None)
    assert measured["vrmse"]["last"] == vrmse(frozen, truth.velocity[-1:]).item()


def test_trajectories_without_a_step_are_refused():
    with pytest.raises(ValueError, match="latents: 2 states"):
        measure_rollout(stay, decode, true_trajectory(2))
