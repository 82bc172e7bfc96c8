"""Errors and spectra against closed forms."""

import math

import torch

from shodh.physics.spectra import band_energy, vrmse


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
