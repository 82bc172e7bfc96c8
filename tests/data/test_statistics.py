"""Normalised fields have unit mean square, zero stays zero, and the test split has no say."""

from dataclasses import asdict

import numpy as np
import pytest

from data.reader import open_store
from data.statistics import FieldStatistics, _moments, _shares, measure_statistics
from data.writer import write_store
from shodh.config import parse_config
from shodh.fields import Grid


def _train_states(store):
    return [store.snapshot(i, t) for i in store.trajectories("train") for t in range(store.num_snapshots)]


def test_scales_are_those_of_the_training_split(channel):
    statistics = measure_statistics(channel)
    velocity, pressure = (np.stack(parts).astype(np.float64) for parts in zip(*_train_states(channel), strict=True))
    medium = np.stack([channel.medium(i) for i in channel.trajectories("train")]).astype(np.float64)
    deviation = velocity - velocity.mean((-3, -2, -1), keepdims=True)
    assert statistics.velocity_scale == pytest.approx(np.sqrt(np.mean(deviation**2)), rel=1e-12)
    assert statistics.pressure_scale == pytest.approx(np.sqrt(np.mean(pressure**2)), rel=1e-12)
    assert statistics.medium_mean == pytest.approx(medium.mean(), rel=1e-12)
    assert statistics.medium_scale == pytest.approx(medium.std(), rel=1e-9)


def test_means_are_over_the_volume_whatever_the_widths_of_the_cells():
    """A quadratic over a stretched axis: shares of the volume give its integrals, plain means do not."""
    widths = tuple(0.01 * 1.1**k for k in range(24))
    grid = Grid(shape=(2, 24, 2), spacing=(1.0, widths, 1.0), boundary=("periodic", "wall", "periodic"))
    height = np.cumsum(widths) / sum(widths)  # upper ends of cells; means over cells of y^2 are exact
    lower = np.concatenate([[0.0], height[:-1]])
    cell_means = ((height**3 - lower**3) / 3 / (height - lower))[:, None]
    mean, _ = _moments(np.broadcast_to(cell_means, grid.shape), _shares(grid.cell_volume))
    assert mean == pytest.approx(1 / 3, rel=1e-12)
    assert abs(cell_means.mean() - 1 / 3) > 0.05


def test_the_test_split_has_no_influence(stores, tmp_path):
    plan = stores.plan("channel")

    def simulate(factor):
        def scaled(indices):
            for i, trajectory in stores.simulate(plan)(indices):
                held_out = factor if i == 3 else 1
                yield i, trajectory._replace(velocity=trajectory.velocity * np.float32(held_out))

        return scaled

    for name, factor in (("a", 1), ("b", 1024)):
        write_store(tmp_path / name, plan, simulate(factor))
    assert measure_statistics(open_store(tmp_path / "a")) == measure_statistics(open_store(tmp_path / "b"))


def test_a_subsample_is_deterministic_and_close_to_the_whole(stores, tmp_path):
    store = stores.make(tmp_path / "a", "channel", num_trajectories=9, shape=(8, 8, 8))
    some, whole = measure_statistics(store, max_snapshots=8), measure_statistics(store)
    assert some == measure_statistics(store, max_snapshots=8) != whole
    # 8 snapshots of 3 · 512 values: the mean square has a relative deviation of about sqrt(2 / 12288) = 1.3 %
    assert some.velocity_scale == pytest.approx(whole.velocity_scale, rel=0.05)


def test_statistics_survive_json(channel):
    statistics = measure_statistics(channel)
    assert parse_config(FieldStatistics, asdict(statistics), source="checkpoint") == statistics


def test_a_constant_medium_has_scale_one(stores, tmp_path):
    plan = stores.plan("channel")

    def simulate(indices):
        for i, trajectory in stores.simulate(plan)(indices):
            yield i, trajectory._replace(medium=np.full((4, 6, 8), 0.1, np.float32))

    write_store(tmp_path / "constant", plan, simulate)
    statistics = measure_statistics(open_store(tmp_path / "constant"))
    assert statistics.medium_scale == 1.0 and statistics.medium_mean == pytest.approx(0.1, rel=1e-7)


def test_a_velocity_that_is_zero_everywhere_is_an_error(stores, tmp_path):
    plan = stores.plan("channel")

    def simulate(indices):
        for i, trajectory in stores.simulate(plan)(indices):
            yield i, trajectory._replace(velocity=np.zeros_like(trajectory.velocity))

    write_store(tmp_path / "still", plan, simulate)
    with pytest.raises(ValueError, match="still: velocity_scale=0.0"):
        measure_statistics(open_store(tmp_path / "still"))
