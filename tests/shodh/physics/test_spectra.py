"""Errors and spectra against closed forms."""

import math

import pytest
import torch

from shodh.physics.spectra import (
    band_energy,
    fourier_modes,
    mode_wavenumbers,
    octave_of,
    shell_of,
    sum_by_bin,
    vrmse,
)

PERIODIC = ("periodic",) * 3
CHANNEL = ("periodic", "wall", "periodic")


def test_predicting_the_mean_scores_one_and_the_truth_scores_zero():
    truth = torch.randn(2, 3, 8, 8, 8) + 5
    mean = truth.mean((-3, -2, -1), keepdim=True).expand_as(truth)
    torch.testing.assert_close(vrmse(mean, truth), torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)
    assert (vrmse(truth, truth) == 0).all()


def test_vrmse_does_not_depend_on_units():
    prediction, truth = torch.randn(2, 2, 3, 8, 8, 8)
    torch.testing.assert_close(vrmse(1e3 * prediction, 1e3 * truth), vrmse(prediction, truth), rtol=1e-5, atol=0)


def test_band_energies_sum_to_the_mean_square():
    field = torch.randn(2, 3, 16, 16, 16, dtype=torch.float64)
    total = band_energy(field, ("periodic",) * 3, 4).sum(1)
    torch.testing.assert_close(total, field.square().mean((-3, -2, -1)).sum(1))


def test_one_wave_falls_into_its_octave():
    n, boundary = 32, ("periodic",) * 3
    x = torch.arange(n) / n
    for waves, band in ((2, 0), (3, 1), (6, 2), (12, 3)):  # Nyquist is 16 waves; bands end at 2, 4, 8, 16
        field = torch.sin(2 * math.pi * waves * x).reshape(1, 1, n, 1, 1).expand(1, 1, n, n, n)
        energy = band_energy(field, boundary, 4)
        assert energy[0].argmax() == band and energy[0, band] / energy.sum() > 0.999


def octave_energy(field: torch.Tensor, boundary, num_octaves: int = 4, *, on_faces: bool = False) -> torch.Tensor:
    octave = octave_of(mode_wavenumbers(tuple(field.shape[-3:]), boundary), num_octaves)
    return sum_by_bin(fourier_modes(field, boundary, on_faces=on_faces).abs() ** 2, octave, num_octaves + 1)


@pytest.mark.parametrize("boundary", [PERIODIC, CHANNEL, ("open", "wall", "periodic"), ("open",) * 3])
def test_squares_of_modes_sum_to_the_variance_for_every_boundary_and_odd_sizes(boundary):
    field = torch.randn(2, 2, 12, 9, 7, dtype=torch.float64) + 3
    energy = (fourier_modes(field, boundary).abs() ** 2).sum((-3, -2, -1))
    torch.testing.assert_close(energy, field.var((-3, -2, -1), correction=0))


def test_cosines_hold_the_energy_of_the_mirrored_field_in_every_octave():
    field = torch.randn(1, 1, 16, 16, 16, dtype=torch.float64)
    field -= field.mean()
    boundary = ("open", "wall", "periodic")
    ours = octave_energy(field, boundary)[:, 0]
    ours = torch.cat([ours[:, :3], ours[:, 3:].sum(1, keepdim=True)], 1)  # corners beyond Nyquist in the last band
    torch.testing.assert_close(ours, band_energy(field, boundary, 4))


def test_wave_along_each_kind_of_axis_lands_in_its_octave_and_shell():
    n = 32  # Nyquist is 16 waves or 32 half-waves; octaves end at 1/8, 1/4, 1/2 and 1 of it
    centre, face = (torch.arange(n) + 0.5) / n, torch.arange(n) / n
    for waves, octave in ((2, 0), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3), (16, 3)):
        along_x = torch.cos(2 * math.pi * waves * face)[:, None, None].expand(1, 1, n, n, n)
        along_y = torch.cos(math.pi * (2 * waves - 1) * centre)[None, :, None].expand(1, 1, n, n, n)
        for field in (along_x, along_y):
            energy = octave_energy(field.contiguous(), CHANNEL)[0, 0]
            assert energy[octave] / energy.sum() == pytest.approx(1, abs=1e-10)  # FP32 amplitudes, squared
    shells = shell_of(mode_wavenumbers((n, n, n), CHANNEL), n // 2)
    assert shells[5, 0, 0] == shells[0, 10, 0] == 4 and shells[16, 0, 0] == 15 and shells[16, 1, 0] == 16


def test_velocity_normal_to_a_wall_is_a_sine_on_faces():
    n = 16
    velocity = torch.zeros(1, 3, n, n, n, dtype=torch.float64)
    velocity[:, 1] = torch.sin(math.pi * 10 * torch.arange(n, dtype=torch.float64) / n)[:, None]
    energy = fourier_modes(velocity, CHANNEL, on_faces=True).abs() ** 2
    assert energy[0, 1, 0, 10, 0] == pytest.approx(0.5, rel=1e-12)  # the mean square of a sine: all in one mode
    assert energy.sum() == pytest.approx(0.5, rel=1e-12)
    taken_for_cells = fourier_modes(velocity, CHANNEL).abs() ** 2
    assert taken_for_cells.max() < 0.45


def test_kink_of_a_mirrored_no_slip_profile_falls_as_the_fourth_power_and_hides_no_turbulence():
    n = 64
    y = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    profile = (6 * y * (1 - y))[None, :, None].expand(1, 1, n, n, n).contiguous()  # Poiseuille, bulk velocity 1
    octaves = octave_energy(profile, CHANNEL, 5)[0, 0, :5]
    # The second difference of the mirrored samples is constant but for 6 / n in the cells at both walls, so an even
    # half-wave k has the energy 18 (cos t)^2 / (n sin t)^4, t = pi k / 2n: 288 / (pi k)^4 for long waves.
    k = torch.arange(2, n, 2, dtype=torch.float64)
    angle = math.pi * k / (2 * n)
    energy = 18 * angle.cos() ** 2 / (n * angle.sin()) ** 4
    expected = [energy[octave_of(k / n, 5) == octave].sum().item() for octave in range(5)]
    assert octaves.tolist() == pytest.approx(expected, rel=1e-9)
    assert octaves[4] / octaves.sum() < 1e-4


def test_highest_octave_ends_at_nyquist_and_corners_lie_beyond():
    wavenumber = torch.tensor([0.0, 0.1, 0.125, 0.25, 0.2500001, 0.5, 0.5000001, 1.0, 1.0000001, 1.7]).double()
    assert octave_of(wavenumber, 4).tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 4, 4]
    assert octave_of(wavenumber, 1).tolist() == [0] * 8 + [1, 1]
