"""Latent statistics and the decoder's smoothness, on latents and decoders whose answers are known."""

import json
import math

import pytest
import torch

from shodh.evaluation.latent_quality import (
    BOUND,
    LatentSample,
    LatentTrajectory,
    deviation,
    measure_gain,
    measure_largest_gain,
    measure_latent_quality,
    measure_round_trip,
    merge_moments,
    spread_samples,
    sum_moments,
    summarise_moments,
)
from shodh.fields import DecodedFields

LATENT, FIELD = (1, 4, 2, 2, 2), (1, 3, 8, 8, 8)
SIZE = math.prod(LATENT)


def make_linear_decoder(singular_values: torch.Tensor):
    """velocity = U diag(s) z with orthonormal columns in U, each of zero mean per component."""
    noise = torch.randn(3, 8**3, SIZE, dtype=torch.float64)
    basis, _ = torch.linalg.qr((noise - noise.mean(1, keepdim=True)).flatten(0, 1))
    matrix = (basis * singular_values).float()

    def decode(latent: torch.Tensor, medium: torch.Tensor) -> torch.Tensor:
        return (matrix @ latent.flatten()).reshape(FIELD) + medium.mean()

    return decode


def make_samples(num: int = 40) -> list[LatentSample]:
    return [LatentSample(torch.randn(LATENT), torch.randn(1, 2, 2, 2, 2), torch.ones(8, 8, 8)) for _ in range(num)]


def test_orthogonal_decoder_has_gain_one_at_every_size_and_in_every_direction():
    decode, samples = make_linear_decoder(torch.full((SIZE,), 2.5)), make_samples()
    gain = measure_gain(decode, samples)
    for key in ("mean", "p90", "max"):
        # FP32 fields of unit size change by 1e-3: a difference of them is true to eps / 1e-3
        assert gain[key] == pytest.approx([1.0] * 3, abs=10 * torch.finfo(torch.float32).eps / 1e-3)
    assert gain["nonlinearity"] == pytest.approx(1.0, abs=1e-3)
    assert gain["num_samples"] == len(samples)
    assert measure_largest_gain(decode, samples[0]) == pytest.approx(1.0, rel=1e-5)


def test_largest_gain_is_the_largest_singular_value_and_random_ones_stay_below_it():
    singular_values = torch.linspace(0.1, 1.0, SIZE).double()
    singular_values[-1] = 3.0
    decode, samples = make_linear_decoder(singular_values), make_samples()
    latent, medium, _ = samples[0]
    scale = latent.norm() / deviation(decode(latent, medium))
    largest = measure_largest_gain(decode, samples[0])
    assert largest == pytest.approx(3.0 * scale.item(), rel=1e-5)  # the next is a third: 10 iterations leave 9^-10
    gain = measure_gain(decode, samples)
    assert gain["mean"][0] < gain["p90"][0] < gain["max"][0] < 3.0 / 0.1
    # a random direction is stretched by the rms of the singular values, and so is the latent itself, on average
    assert gain["mean"][0] == pytest.approx(1.0, abs=4 * 0.5 / math.sqrt(len(samples)))


def test_quadratic_decoder_is_nonlinear_by_its_second_order_term():
    matrix = torch.zeros(3 * 8**3, SIZE)
    matrix[:SIZE] = torch.eye(SIZE)

    def decode(latent: torch.Tensor, medium: torch.Tensor) -> torch.Tensor:
        return (matrix @ latent.flatten() ** 3).reshape(FIELD)

    state = LatentSample(torch.ones(LATENT), torch.zeros(1, 1, 2, 2, 2), torch.ones(8, 8, 8))
    gain = measure_gain(decode, [state], seed=3)
    noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(3)).double()
    step = 0.1 * noise / noise.norm() * math.sqrt(SIZE)
    change, linear = ((1 + step) ** 3 - 1).norm(), (3 * step).norm()
    assert gain["nonlinearity"] == pytest.approx((change / linear).item(), rel=5e-3)  # linear but for 1e-3 of itself
    assert gain["nonlinearity"] > 1.005


def test_decoder_that_ignores_its_latent_has_no_gain():
    field = torch.randn(FIELD)

    def decode(latent: torch.Tensor, medium: torch.Tensor) -> torch.Tensor:
        return field + 0 * latent.sum()

    assert measure_largest_gain(decode, make_samples(1)[0]) == 0.0


def test_largest_gain_can_be_measured_without_gradients_around_it():
    with torch.no_grad():
        assert measure_largest_gain(make_linear_decoder(torch.ones(SIZE)), make_samples(1)[0]) == pytest.approx(1.0)


def test_white_latents_have_all_channels_and_condition_one_within_sampling_error():
    num_cells, num_channels = 40 * 8**3, 6
    quality = summarise_moments(sum_moments(torch.randn(40, num_channels, 8, 8, 8)))
    # eigenvalues of a sampled covariance spread by (1 +- sqrt(c / n))^2 (Marchenko and Pastur)
    spread = math.sqrt(num_channels / num_cells)
    assert quality["condition_number"] < ((1 + spread) / (1 - spread)) ** 2 * 1.01
    assert quality["effective_channels"] == pytest.approx(num_channels, rel=1e-3)
    assert quality["std"] == pytest.approx(1, abs=4 / math.sqrt(2 * num_cells * num_channels))
    assert abs(quality["mean"]) < 4 / math.sqrt(num_cells * num_channels)
    assert quality["share_outside"] < 1e-4 and quality["bound"] == BOUND


def test_condition_number_and_effective_channels_are_those_of_the_eigenvalues():
    signs = torch.tensor([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)])  # covariance exactly the identity
    latent = (signs * torch.tensor([3.0, 1.0])).T.reshape(1, 2, 2, 2, 1)
    quality = summarise_moments(sum_moments(latent))
    assert quality["condition_number"] == pytest.approx(9, rel=1e-12)
    assert quality["effective_channels"] == pytest.approx(100 / 82, rel=1e-12)
    assert quality["largest"] == 3 and quality["std"] == pytest.approx(math.sqrt(5), rel=1e-12)
    copied = latent.repeat(1, 2, 1, 1, 1)
    assert summarise_moments(sum_moments(copied))["condition_number"] is None  # singular


def test_outliers_are_counted_and_parts_merge_to_the_whole():
    latent = torch.randn(6, 4, 4, 4, 4).clamp(-4, 4)
    latent[0, 0, 0, 0, 0], latent[5, 3, 3, 3, 3] = 7.0, -9.0
    whole = summarise_moments(sum_moments(latent))
    assert whole["share_outside"] == 2 / latent.numel() and whole["largest"] == 9.0
    parts = summarise_moments(merge_moments([sum_moments(latent[:2]), sum_moments(latent[2:])]))
    assert parts == pytest.approx(whole, rel=1e-9)


def test_round_trip_is_zero_for_an_invertible_codec_and_one_for_a_forgetful_one():
    def decode(latent, medium):
        velocity = latent[:, :3]
        return DecodedFields(velocity, velocity, latent[:, 3:])

    def encode(velocity, pressure, medium):
        assert medium.shape == (1, 1, 8, 8, 8)
        return torch.cat([velocity, pressure], 1), medium

    samples = make_samples(3)
    assert measure_round_trip(decode, encode, samples) == 0
    assert measure_round_trip(decode, lambda u, p, m: (0 * torch.cat([u, p], 1), m), samples) == pytest.approx(1)


def test_samples_are_spread_over_trajectories_and_times():
    still, medium = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1)
    trajectories = [LatentTrajectory(torch.full((10, 1, 1, 1, 1), float(i)), still, medium) for i in range(3)]
    samples = spread_samples(trajectories, 6)
    assert [sample.latent.item() for sample in samples] == [0, 0, 1, 1, 2, 2]
    assert len(spread_samples(trajectories, 100)) == 30


def test_largest_gain_that_does_not_fit_is_none_with_its_reason_and_the_others_are_measured():
    linear = make_linear_decoder(torch.ones(SIZE))

    def decode(latent, medium):
        return DecodedFields(linear(latent, medium), linear(latent, medium), torch.zeros(1, 1, 8, 8, 8))

    def refuse(latent, medium):
        raise MemoryError("it takes 26 GB")

    trajectory = LatentTrajectory(torch.randn(5, *LATENT[1:]), torch.zeros(2, 2, 2, 2), torch.ones(8, 8, 8))
    quality = measure_latent_quality([trajectory], decode, refuse)
    assert quality["largest_gain_skipped"] == "it takes 26 GB"
    for part in quality["smoothness"].values():
        assert part["largest_gain"] is None
        assert part["mean"] == pytest.approx([1.0] * 3, abs=10 * torch.finfo(torch.float32).eps / 1e-3)  # orthogonal
    assert "largest_gain_skipped" not in measure_latent_quality([trajectory], decode, linear)


def test_gain_of_the_pattern_leaves_out_the_mean_flow():
    linear = make_linear_decoder(torch.ones(SIZE))

    def decode_velocity(latent, medium):
        flow = torch.zeros(1, 3, 1, 1, 1)
        flow[:, 0] = 100 * latent.mean()
        return linear(latent, medium) + flow

    def decode(latent, medium):
        return DecodedFields(linear(latent, medium), linear(latent, medium), torch.zeros(1, 1, 8, 8, 8))

    trajectory = LatentTrajectory(torch.randn(5, *LATENT[1:]), torch.zeros(2, 2, 2, 2), torch.ones(8, 8, 8))
    quality = measure_latent_quality([trajectory], decode, decode_velocity)
    assert "round_trip" not in quality and quality["num_channels"] == LATENT[1]
    pattern, velocity = quality["smoothness"]["pattern"], quality["smoothness"]["velocity"]
    assert pattern["largest_gain"] == pytest.approx(1, rel=1e-3)  # FP32 means of a flow 100 times as large
    # J^T J = 1 + a^2 n n^T with n the unit vector of equal entries and a = 100 sqrt(8^3 / SIZE)
    assert velocity["largest_gain"] == pytest.approx(math.sqrt(1 + 100**2 * 8**3 / SIZE), rel=1e-3)
    json.dumps(quality, allow_nan=False)
