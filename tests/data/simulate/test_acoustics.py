"""The acoustic simulator against the Green function, reciprocity, and the laws that its stored fields must obey."""

import math
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import pytest
import torch

from data.layout import Trajectory
from data.simulate.acoustics import (
    DOMAIN,
    TIME_UNIT,
    AcousticsConfig,
    Observation,
    Solver,
    Sources,
    draw_shot,
    draw_wave_speed,
    propagate,
    ricker,
    simulate,
    total_work,
)
from shodh.physics.exterior import curl_of_faces, divergence_of_faces
from shodh.physics.spectra import vrmse

SMALL = AcousticsConfig(num_trajectories=3, num_snapshots=5, resolution=16, seed=7)
SOURCE = (8, 8, 8)
OFFSETS = ((8, 0, 0), (10, 6, 3), (5, 14, 9), (20, 2, 12), (18, 18, 4), (20, 20, 20))  # 80 to 346 m at 10 m


@pytest.fixture(scope="module")
def small() -> list[Trajectory]:
    return [trajectory for _, trajectory in simulate(SMALL, range(3))]


class Green(NamedTuple):
    """Relative L2 errors of one run against the Green function, over all receivers and times."""

    potential: float
    pressure: float


def green_errors(
    time_step: float, *, speed: float = 2500.0, frequency: float = 15.0, space_order: Literal[4, 8] = 4
) -> Green:
    """phi = s(t - r/c) / (4 pi r) in a homogeneous 380 m box of 10 m cells, receivers 80 to 346 m away."""
    cells, spacing, delay = 38, 10.0, 1.2 / frequency
    duration = 2 * delay + 346 / speed
    time = np.arange(round(duration / time_step)) * time_step
    sources = Sources(
        torch.tensor([[SOURCE]]), torch.from_numpy(ricker(time - delay, frequency)).float().reshape(1, 1, -1)
    )
    receivers = torch.tensor(SOURCE) + torch.tensor(OFFSETS)
    solver = Solver(
        spacing=spacing,
        time_step=time_step,
        steps_per_observation=1,
        fastest=speed,
        frequency=frequency,
        space_order=space_order,
    )
    times, potentials, pressures = [], [], []

    def listen(wave: Observation) -> None:
        times.append(wave.time)
        potentials.append(wave.potential[0, *receivers.T].double().numpy())
        pressures.append(wave.pressure[0, *receivers.T].double().numpy())

    propagate(torch.full((1, cells, cells, cells), speed), sources, solver, listen)
    distance = np.linalg.norm(OFFSETS, axis=1) * spacing
    late = np.array(times)[:, None] - distance / speed - delay
    tick = 1e-6  # s, of the analytic wavelet's central difference
    rate = (ricker(late + tick, frequency) - ricker(late - tick, frequency)) / (2 * tick)
    return Green(
        relative_error(np.array(potentials), ricker(late, frequency) / (4 * math.pi * distance)),
        relative_error(np.array(pressures), -rate / (4 * math.pi * distance)),
    )


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("speed", "frequency"), [(2500.0, 15.0), (1500.0, 1500 / 140)])
def test_wave_matches_the_green_function_at_one_millisecond(speed: float, frequency: float):
    """At the highest frequency, and where the slowest rock is resolved worst (7 cells at twice the peak frequency)."""
    errors = green_errors(1e-3, speed=speed, frequency=frequency)
    assert errors.potential < 0.02
    assert errors.pressure < 0.02


def test_error_falls_at_second_order_with_the_time_step():
    """8th order in space leaves the time step's error alone; 10 % are left for what is not yet asymptotic."""
    coarse, fine = green_errors(1e-3, space_order=8), green_errors(5e-4, space_order=8)
    assert coarse.potential / fine.potential == pytest.approx(4, rel=0.1)
    assert coarse.pressure / fine.pressure == pytest.approx(4, rel=0.1)


def test_source_and_receiver_are_interchangeable():
    """Reciprocity in layered, faulted rock, to FP32 round-off over 400 steps (absorbing layers included)."""
    wave_speed = torch.from_numpy(draw_wave_speed(SMALL, np.random.default_rng(3)))
    here, there = (8, 20, 11), (27, 9, 25)
    steps = 400
    wavelet = ricker(np.arange(steps) * SMALL.solver.time_step - 0.1, 12.0) * 1e3
    sources = Sources(torch.tensor([[here], [there]]), torch.from_numpy(wavelet).float().expand(2, 1, -1))
    at_there, at_here = [], []

    def listen(wave: Observation) -> None:
        at_there.append(wave.potential[0][there].item())
        at_here.append(wave.potential[1][here].item())

    propagate(wave_speed.expand(2, -1, -1, -1), sources, SMALL.solver, listen)
    error = relative_error(np.array(at_there), np.array(at_here))
    assert np.abs(at_here).max() > 0.1
    assert error < steps * torch.finfo(torch.float32).eps


def test_stored_circulation_has_exactly_zero_curl(small: list[Trajectory]):
    for trajectory in small:
        circulation = torch.from_numpy(trajectory.velocity).double()
        assert circulation.abs().max() > 0.01
        assert curl_of_faces(circulation, DOMAIN.boundary).abs().max() == 0.0


def test_stored_fields_obey_momentum_balance_and_compressibility():
    """v_t = -grad p, p_t = -c^2 div v, to the truncation of central differences at twice the peak frequency."""
    config = AcousticsConfig(num_trajectories=2, num_snapshots=3, snapshot_interval=1e-3, resolution=16)
    for _, trajectory in simulate(config, range(2)):
        velocity = torch.from_numpy(trajectory.velocity).double()
        pressure = torch.from_numpy(trajectory.pressure).double()
        two_steps = 2 * trajectory.parameters["dt"]
        angle = 2 * math.pi * 2 * trajectory.parameters["frequency"] * trajectory.parameters["dt"]
        for axis in range(3):
            acceleration = ((velocity[2, axis] - velocity[0, axis]) / two_steps).narrow(axis, 1, 15)
            assert relative_error(acceleration.numpy(), -pressure[1].diff(dim=axis).numpy()) < angle**2 / 6
        courant = torch.from_numpy(trajectory.medium).double() * TIME_UNIT / config.spacing
        inflow = -(courant**2) * divergence_of_faces(velocity[1], ("wall", "wall", "wall"))
        rise = (pressure[2] - pressure[0]) / two_steps
        stored = (slice(0, 15),) * 3  # cells all of whose faces are stored
        tolerance = angle**2 / 6 + (2 * math.pi / 7) ** 2 / 12
        assert relative_error(rise[stored].numpy(), inflow[stored].numpy()) < tolerance


def test_a_trajectory_depends_on_seed_and_index_only(small: list[Trajectory]):
    """Bit for bit when repeated; to round-off when it is simulated alone or in another batch."""
    repeated = [trajectory for _, trajectory in simulate(SMALL, range(3))]
    for first, second in zip(small, repeated, strict=True):
        np.testing.assert_array_equal(first.velocity, second.velocity)
        np.testing.assert_array_equal(first.pressure, second.pressure)
    for index, trajectory in simulate(SMALL, [2, 0]):
        assert trajectory.parameters == small[index].parameters
        np.testing.assert_array_equal(trajectory.medium, small[index].medium)
        for field in ("velocity", "pressure"):
            alone, together = getattr(trajectory, field), getattr(small[index], field)
            np.testing.assert_allclose(alone, together, rtol=0, atol=1e-5 * np.abs(together).max())


def test_another_seed_gives_another_rock_and_another_wave(small: list[Trajectory]):
    ((_, other),) = simulate(replace(SMALL, seed=8), [0])
    assert np.abs(other.medium - small[0].medium).max() > 100
    assert relative_error(other.pressure, small[0].pressure) > 0.5


def test_rock_stays_in_range_and_resolves_the_wavelet():
    """At least 7 cells per wavelength in the slowest rock at twice the peak frequency, for every drawn trajectory."""
    config = AcousticsConfig(num_snapshots=2, resolution=16)
    for index in range(50):
        shot = draw_shot(config, index)
        slowest, fastest = float(shot.wave_speed.min()), float(shot.wave_speed.max())
        assert config.speed[0] <= slowest <= fastest <= config.speed[1]
        assert config.frequency[0] <= shot.frequency <= config.frequency[1]
        assert slowest / (2 * shot.frequency) >= 7 * config.spacing * (1 - 1e-6)
        beyond = (shot.location < 10) | (shot.location >= 10 + config.resolution)
        assert beyond.any(axis=1).all(), "a source lies in the recorded box"


def test_progress_counts_to_the_announced_total():
    done: list[int] = []
    list(simulate(SMALL, [1], progress=done.append))
    assert sum(done) == total_work(SMALL, 1)


def test_a_wave_that_blows_up_is_named(monkeypatch: pytest.MonkeyPatch):
    shot = draw_shot(SMALL, 1)
    too_loud = shot._replace(amplitude=np.full_like(shot.amplitude, np.inf))
    monkeypatch.setattr("data.simulate.acoustics.draw_shot", lambda config, index: too_loud if index == 1 else shot)
    with pytest.raises(RuntimeError, match=r"trajectory 1: the wave is not finite at 0\.\d+ s"):
        list(simulate(SMALL, [0, 1]))


def test_an_unstable_step_is_refused():
    solver = Solver(spacing=10.0, time_step=2e-3, steps_per_observation=1, fastest=4500.0, frequency=10.0)
    sources = Sources(torch.tensor([[SOURCE]]), torch.ones(1, 1, 4))
    with pytest.raises(ValueError, match="time_step=0.002: unstable"):
        propagate(torch.full((1, 16, 16, 16), 4500.0), sources, solver, lambda wave: None)


def test_config_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"spacing <= 13\.4 m"):
        AcousticsConfig(spacing=20.0)
    with pytest.raises(ValueError, match="speed="):
        AcousticsConfig(speed=(3000.0, 2000.0))
    with pytest.raises(ValueError, match="num_snapshots=0"):
        AcousticsConfig(num_snapshots=0)


@pytest.mark.slow
def test_waves_cross_the_box_throughout_the_recording():
    """Default config: the last snapshot keeps 10 % of the loudest's amplitude, and two states predict the next."""
    persistence, linear = [], []
    for _, trajectory in simulate(AcousticsConfig(), range(24)):
        pressure = torch.from_numpy(trajectory.pressure)[:, None]
        loudness = pressure.square().mean((1, 2, 3, 4)).sqrt()
        assert loudness[-1] > 0.1 * loudness.max()
        persistence.append(vrmse(pressure[1:-1], pressure[2:]).mean().item())
        linear.append(vrmse(2 * pressure[1:-1] - pressure[:-2], pressure[2:]).mean().item())
    assert 0.3 < np.mean(persistence) < 0.6
    assert np.mean(linear) < np.mean(persistence) / math.sqrt(2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_cpu_agree(small: list[Trajectory]):
    for index, trajectory in simulate(SMALL, range(3), device="cuda"):
        assert relative_error(trajectory.velocity, small[index].velocity) < 1e-4
        assert relative_error(trajectory.pressure, small[index].pressure) < 1e-4
