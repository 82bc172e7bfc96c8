"""The acoustic simulator against the laws that its stored fields must obey."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.layout import Trajectory
from data.simulate.acoustics import (
    DOMAIN,
    TIME_UNIT,
    AcousticsConfig,
    draw_shot,
    forecast,
    simulate,
    total_work,
)
from shodh.physics.exterior import curl_of_faces, divergence_of_faces
from shodh.physics.spectra import vrmse

SMALL = AcousticsConfig(num_trajectories=3, num_snapshots=5, resolution=16, seed=7)


@pytest.fixture(scope="module")
def small() -> list[Trajectory]:
    return [trajectory for _, trajectory in simulate(SMALL, range(3))]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


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


def test_config_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"spacing <= 13\.4 m"):
        AcousticsConfig(spacing=20.0)
    with pytest.raises(ValueError, match="speed="):
        AcousticsConfig(speed=(3000.0, 2000.0))
    with pytest.raises(ValueError, match="num_snapshots=0"):
        AcousticsConfig(num_snapshots=0)
    with pytest.raises(ValueError, match="media="):
        AcousticsConfig(media=())
    with pytest.raises(ValueError, match="correlation_length="):
        AcousticsConfig(correlation_length=(0.0, 10.0))
    with pytest.raises(ValueError, match="^snapshot_interval=inf"):
        AcousticsConfig(snapshot_interval=math.inf)
    with pytest.raises(ValueError, match="^frequency="):
        AcousticsConfig(frequency=(8.0, math.inf))


def test_random_rock_no_longer_than_its_correlation_is_refused_and_its_torus_forecast():
    with pytest.raises(ValueError, match=r"^correlation_length=.*longer than the rock of 520 m. Take less"):
        AcousticsConfig(media=("random",), correlation_length=(100.0, 3e4))
    longest = AcousticsConfig(media=("folded", "random"), correlation_length=(30.0, 520.0))
    torus = 8 * (52 + 3 * 52) ** 3  # its white noise in FP64, to begin with
    assert forecast(longest).peak_bytes > 3 * torus


def test_every_medium_is_drawn_and_carries_waves():
    """Stored rock of every kind differs from the others' and its waves enter the box."""
    config = replace(SMALL, media=("layered", "curved", "faulted", "folded", "random"), correlation_length=(20.0, 40.0))
    assert len({replace(config, media=(medium,)).media for medium in config.media}) == 5
    for medium in config.media:
        ((_, trajectory),) = simulate(replace(config, media=(medium,)), [0])
        assert np.isfinite(trajectory.pressure).all() and np.abs(trajectory.pressure).max() > 0.1
        flat = np.ptp(trajectory.medium, axis=(0, 1)).max() == 0.0
        assert flat == (medium == "layered")
    drawn = [draw_shot(config, index).wave_speed for index in range(12)]
    kinds = {bool(np.ptp(speed, axis=(0, 1)).max() == 0.0) for speed in drawn}
    assert kinds == {True, False}, "twelve draws from five media are all flat or never flat"


def test_forecast_grows_as_the_work_does_and_covers_what_is_held_in_memory(small: list[Trajectory]):
    """Time follows cells times steps; memory holds at least one batch's stored fields and its waves."""
    small_cost, large_cost = forecast(SMALL), forecast(replace(SMALL, resolution=64))
    cells = ((64 + 40) / (16 + 40)) ** 3
    steps = total_work(replace(SMALL, resolution=64), 1) / total_work(SMALL, 1)
    assert large_cost.seconds_per_trajectory / small_cost.seconds_per_trajectory == pytest.approx(cells * steps)
    stored = sum(t.velocity.nbytes + t.pressure.nbytes for t in small)
    assert small_cost.peak_bytes > stored + 3 * 4 * len(small) * SMALL.simulated_cells


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
