"""Drawn rock: the statistics of random media, and that each medium shows its own structure and no other."""

import math

import numpy as np
import pytest

from data.simulate.rock import Medium, RockRanges, draw_rock, gaussian_random_field

RANGES = RockRanges(speed=(1500.0, 4500.0), num_layers=(3, 7), correlation_length=(3.0, 8.0))
MEDIA: tuple[Medium, ...] = ("layered", "curved", "faulted", "folded", "random")


def draw(medium: Medium, seed: int, cells: int = 24) -> np.ndarray:
    return draw_rock(medium, cells, RANGES, np.random.default_rng(seed))


def require_mean(products: np.ndarray, expected: float) -> None:
    """The mean of each field is one sample: together within 4 of their own standard errors."""
    samples = products.reshape(len(products), -1).mean(1)
    assert samples.mean() == pytest.approx(expected, abs=4 * samples.std() / math.sqrt(len(samples)))


def test_random_field_has_unit_variance_and_the_given_correlation():
    """exp(-(r / length)^2) at lags up to twice the length, over all pairs of positions of 400 independent fields."""
    length = 4.0
    fields = np.stack([gaussian_random_field((24, 24), length, np.random.default_rng(seed)) for seed in range(400)])
    require_mean(fields**2, 1.0)
    for lag in (2, 4, 8):
        require_mean(fields[:, lag:] * fields[:, :-lag], math.exp(-((lag / length) ** 2)))
        require_mean(fields[:, lag:, lag:] * fields[:, :-lag, :-lag], math.exp(-2 * (lag / length) ** 2))
    at_length = (fields[:, 4:] * fields[:, :-4]).mean((1, 2))
    sharpness = 4 * at_length.std() / math.sqrt(len(at_length))
    assert math.exp(-1) - math.exp(-((4 / 3.2) ** 2)) > 3 * sharpness, "a length of 3.2 would pass for 4"


def test_opposite_sides_of_a_random_field_are_independent():
    """The torus it is drawn on is longer than the field: nothing wraps around (4 standard errors)."""
    fields = np.stack([gaussian_random_field((20, 20), 5.0, np.random.default_rng(seed)) for seed in range(400)])
    assert abs((fields[:, 0] * fields[:, -1]).mean()) < 4 / math.sqrt(400)


@pytest.mark.parametrize("medium", MEDIA)
def test_speed_stays_in_its_range_and_is_decided_by_the_generator(medium: Medium):
    for seed in range(10):
        speed = draw(medium, seed)
        assert speed.dtype == np.float32 and speed.shape == (24, 24, 24)
        assert RANGES.speed[0] <= speed.min() < speed.max() <= RANGES.speed[1]
        np.testing.assert_array_equal(speed, draw(medium, seed))
    assert np.abs(draw(medium, 0) - draw(medium, 1)).max() > 100


def test_layers_are_flat_and_faster_with_depth_on_the_whole():
    for seed in range(20):
        assert np.ptp(draw("layered", seed), axis=(0, 1)).max() == 0.0
    rise = [draw("layered", seed)[0, 0] for seed in range(20)]
    assert np.mean([column[-4:].mean() - column[:4].mean() for column in rise]) > 500


def interface_depth(medium: Medium, seed: int, cells: int = 48) -> np.ndarray:
    """Depth (x, y) [cells] of the one interface between two layers, exact since cells hold the mean compressibility."""
    two_layers = RANGES._replace(num_layers=(2, 2))
    compressibility = draw_rock(medium, cells, two_layers, np.random.default_rng(seed)).astype(np.float64) ** -2
    upper, lower = compressibility.max(), compressibility.min()
    return (compressibility.sum(axis=2) - cells * lower) / (upper - lower)


def test_curved_interfaces_are_smooth():
    """Three cosines of at most 1.5 waves a box: second difference <= 3 * 0.08 * (2 pi 1.5)^2 / 48 = 0.44 cells times
    the normal deviate of their height, which passes 3 once in 370 draws."""
    for seed in range(12):
        depth = interface_depth("curved", seed)
        assert np.ptp(depth) > 1, "flat"
        assert max(np.abs(np.diff(depth, 2, axis)).max() for axis in (0, 1)) < 0.44 * 3


def test_faulted_interfaces_are_flat_between_faults_and_jump_at_them():
    """One to three planes part the box into at most eight blocks; a half of the columns may cross a dipping plane."""
    jumps = []
    for seed in range(12):
        depth = interface_depth("faulted", seed).round(2)
        _, counts = np.unique(depth, return_counts=True)
        assert np.sort(counts)[-8:].sum() > depth.size / 2
        jumps.append(max(np.abs(np.diff(depth, axis=axis)).max() for axis in (0, 1)))
    assert np.median(jumps) > 1
