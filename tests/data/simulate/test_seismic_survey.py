"""The 2-D survey against the Green function, OpenFWI's published scheme stepped in NumPy, and reciprocity."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data.simulate.openfwi_families import FAMILIES, draw_velocity_map
from data.simulate.seismic_survey import Survey, record_gathers
from data.simulate.wave import ricker

OPENFWI = Survey()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def green_function(survey: Survey, speed: float, distance: np.ndarray) -> np.ndarray:
    """p = h^2 / (2 pi) int s(t - tau) / sqrt(tau^2 - (r/c)^2) dtau with tau = (r/c) cosh(theta), t = (n + 1) dt."""
    time = (np.arange(survey.num_samples) + 1) * survey.time_step
    peak = math.floor(2.2 / survey.frequency / survey.time_step / 2) * survey.time_step
    node, weight = np.polynomial.legendre.leggauss(400)
    traces = []
    for arrival in distance / speed:
        last = np.arccosh(np.maximum(time / arrival, 1.0))
        since_peak = time[:, None] - arrival * np.cosh(last[:, None] * (node + 1) / 2) - peak
        source = np.where(np.abs(since_peak) <= peak, ricker(since_peak, survey.frequency), 0.0)
        traces.append(source @ weight * last / 2)
    return survey.spacing**2 / (2 * math.pi) * np.stack(traces, 1)


@pytest.mark.parametrize("time_step", [1e-3, 2.5e-4])
def test_gather_matches_the_green_function_within_half_a_percent(time_step: float):
    survey = Survey(time_step=time_step, num_samples=round(1 / time_step), num_shots=3)
    gather = record_gathers(torch.full((1, 70, 70), 2500.0), survey)[0, 1].double().numpy()
    shot = survey.shot_columns(70)[1]
    offsets = np.array([5, 10, 20, 30])
    expected = green_function(survey, 2500.0, offsets * survey.spacing)
    assert relative_error(gather[:, shot + offsets], expected) < 0.005


def step_as_openfwi_does(wave_speed: np.ndarray, column: int, margin: int) -> np.ndarray:
    """Leapfrog with 4th-order differences in FP64, no absorption: right until an echo from ``margin`` cells returns."""
    c = np.pad(wave_speed.astype(np.float64), margin, mode="edge")
    courant, time = (c * 1e-3 / 10) ** 2, (np.arange(1000) - 73) * 1e-3
    wavelet = np.where(np.arange(1000) < 147, ricker(time, 15.0), 0.0)
    before, now, recorded = np.zeros_like(c), np.zeros_like(c), []
    for amplitude in wavelet:
        neighbours = sum(
            weight * np.roll(now, shift * distance, axis)
            for distance, weight in ((1, 4 / 3), (2, -1 / 12))
            for shift in (-1, 1)
            for axis in (0, 1)
        )
        before, now = now, 2 * now - before + courant * (neighbours - 5 * now)
        now[margin + 1, margin + column] += (c[margin + 1, margin + column] * 1e-3) ** 2 * amplitude
        recorded.append(now[margin + 1, margin:-margin].copy())
    return np.array(recorded)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["curvevel-b", "style-b"])
def test_gather_is_that_of_openfwi_s_scheme_in_sign_scale_and_sample(name: str):
    """4500 m/s comes back after 1 s from 225 cells on; what differs are the absorbing layers, to 2e-4."""
    wave_speed = draw_velocity_map(FAMILIES[name], np.random.default_rng(3))
    gather = record_gathers(torch.from_numpy(wave_speed)[None], OPENFWI)[0, 2].double().numpy()
    assert relative_error(gather, step_as_openfwi_does(wave_speed, 34, margin=230)) < 2e-4


def test_source_and_receiver_are_interchangeable():
    """To 1e-5 for all pairs of shots where speed is random from cell to cell, in FP64; FP32 adds its round-off."""
    speckle = np.random.default_rng(0).uniform(1500, 4500, (70, 70))
    style = draw_velocity_map(FAMILIES["style-b"], np.random.default_rng(0))
    maps = torch.from_numpy(np.stack([speckle, style]))
    columns = OPENFWI.shot_columns(70)
    traces = record_gathers(maps, OPENFWI)[..., columns].numpy()
    single = record_gathers(maps.float(), OPENFWI)[..., columns].double().numpy()
    for a, b in ((0, 4), (0, 2), (1, 3), (2, 4), (3, 4)):
        for m in range(2):
            assert relative_error(traces[m, a, :, b], traces[m, b, :, a]) < 1e-5
            round_off = OPENFWI.num_samples * np.finfo(np.float32).eps
            assert relative_error(single[m, a, :, b], single[m, b, :, a]) < round_off


def test_a_gather_does_not_depend_on_its_batch():
    maps = torch.from_numpy(
        np.stack([draw_velocity_map(FAMILIES["flatvel-b"], np.random.default_rng(i)) for i in (1, 2, 3)])
    )
    together = record_gathers(maps, OPENFWI)
    assert together.shape == (3, 5, 1000, 70)
    for index in range(3):
        assert torch.equal(record_gathers(maps[index : index + 1], OPENFWI)[0], together[index])


def test_shots_spread_over_the_surface_as_openfwi_s_do():
    assert OPENFWI.shot_columns(70) == [0, 17, 34, 52, 69]
    assert OPENFWI.wavelet.argmax() == 73 and OPENFWI.wavelet[73] == 1.0
    assert (OPENFWI.wavelet[147:] == 0).all() and OPENFWI.wavelet[146] != 0


def test_unstable_steps_and_impossible_speeds_are_refused():
    with pytest.raises(ValueError, match=r"time_step=0.002: unstable at 4500.0 m/s.*at most 0.00135 s"):
        Survey(time_step=2e-3)
    for speed in (0.0, 4501.0, math.nan):
        with pytest.raises(ValueError, match="wave_speed: not all within"):
            record_gathers(torch.full((1, 70, 70), speed), OPENFWI)


@pytest.mark.shared_data
def test_marmousi_is_shot_without_noise_or_growth(shared_data: Path):
    """Four windows of real geology, 20 m a cell: finite, quiet before the first arrival, and fading."""
    wave_speed = np.load(shared_data / "fwi/marmousi2_true_vp_173x561.npy").clip(1500, 4500)
    maps = torch.from_numpy(np.stack([wave_speed[20:90, x : x + 70] for x in (0, 160, 320, 480)]).astype(np.float32))
    survey = Survey(spacing=20.0, frequency=7.5, time_step=2e-3, num_samples=1000)
    gathers = record_gathers(maps, survey).numpy()
    assert np.isfinite(gathers).all()
    arrival = 69 * survey.spacing / maps.amax((1, 2)).numpy() / survey.time_step  # at the fastest along the surface
    for gather, first in zip(gathers, arrival.astype(int), strict=True):
        assert np.abs(gather[0, : first // 2, -1]).max() < 1e-4 * np.abs(gather[0]).max()
    loudness = np.square(gathers).mean((0, 1, 3))
    assert loudness[-200:].mean() < 1e-2 * loudness.max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_cpu_agree():
    maps = torch.from_numpy(draw_velocity_map(FAMILIES["curvefault-b"], np.random.default_rng(0)))[None]
    on_cpu, on_gpu = record_gathers(maps, OPENFWI), record_gathers(maps.cuda(), OPENFWI).cpu()
    assert relative_error(on_gpu.numpy(), on_cpu.numpy()) < 1e-4
