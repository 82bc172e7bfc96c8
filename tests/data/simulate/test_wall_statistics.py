"""Statistics collected on the fly against snapshots and against the momentum balance that the solver obeys."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from data.simulate.channel_flow import Channel, Stencil, Top, advance, momentum_tendency
from data.simulate.open_channel import OpenChannelConfig, make_grid, make_initial_velocity
from data.simulate.wall_statistics import (
    WallStatistics,
    advance_and_measure,
    compute_profiles,
    fold,
    measure,
    merge,
)
from shodh.physics.helmholtz import remove_divergence

VISCOSITY = 0.02
CASES = list(product(("free", "wall"), ("narrow", "wide")))


def make_flow(top: Top, stencil: Stencil = "narrow", num: int = 1) -> tuple[Tensor, Channel]:
    """Strong solenoidal flows on a stretched grid, FP64."""
    config = OpenChannelConfig(resolution=16, top=top, stretching=1.7)
    grid = make_grid(config, 16)
    starts = torch.stack([make_initial_velocity(config, index, grid)[0] for index in range(num)])
    viscosity = torch.full((num,), VISCOSITY, dtype=torch.float64)
    return remove_divergence(starts, grid), Channel(grid, viscosity, top=top, stencil=stencil)


@pytest.mark.parametrize(("top", "stencil"), CASES)
def test_the_mean_flow_is_accelerated_by_the_force_and_the_slope_of_the_total_stress(
    top: Top, stencil: Stencil
) -> None:
    velocity, channel = make_flow(top, stencil)
    profiles = compute_profiles(measure(velocity, channel), channel)
    acceleration = momentum_tendency(velocity, channel)[0, 0].mean((0, 2)).numpy()
    balance = channel.force + np.diff(profiles.total_stress[0]) / channel.grid.widths(1)
    np.testing.assert_allclose(balance, acceleration, rtol=0, atol=1e-12 * np.abs(acceleration).max())


@pytest.mark.parametrize("top", ["free", "wall"])
def test_profiles_are_the_covariances_of_the_snapshots(top: Top) -> None:
    velocity, channel = make_flow(top, num=2)
    snapshots, parts = [], []
    for _ in range(3):
        velocity = advance(velocity, channel, 1e-3, 2)
        snapshots.append(velocity.numpy())
        parts.append(measure(velocity, channel))
    profiles = compute_profiles(merge(parts), channel)
    fields = np.stack(snapshots)  # (time, b, 3, x, y, z)
    mean = fields.mean((0, 3, 5), keepdims=True)
    fluctuation = fields - mean
    sharp = fluctuation.copy()  # to point values: less h^2 / 24 d^2 along the periodic axes of each face
    for component, axes in ((0, (4,)), (1, (2, 4)), (2, (2,))):
        field = fluctuation[:, :, component]
        for axis in axes:
            sharp[:, :, component] -= (np.roll(field, 1, axis) + np.roll(field, -1, axis) - 2 * field) / 24
    variance = (sharp**2).mean((0, 3, 5))
    np.testing.assert_allclose(profiles.velocity, mean[0, :, 0, 0, :, 0], rtol=1e-12)
    np.testing.assert_allclose(profiles.uu, variance[:, 0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(profiles.vv[:, :-1], variance[:, 1], rtol=0, atol=1e-10)
    np.testing.assert_allclose(profiles.ww, variance[:, 2], rtol=0, atol=1e-10)
    u, v = fluctuation[:, :, 0], fluctuation[:, :, 1]
    shear = ((u[..., 1:, :] + u[..., :-1, :]) * (v + np.roll(v, 1, 2))[..., 1:, :]).mean((0, 2, 4)) / 4
    np.testing.assert_allclose(profiles.uv[:, 1:-1], shear, rtol=0, atol=1e-10)
    bulk = (fields[:, :, 0] * channel.grid.cell_volume).mean((0, 2, 3, 4)) / channel.grid.cell_volume.mean()
    np.testing.assert_allclose(profiles.bulk_velocity, bulk, rtol=1e-12)


def test_statistics_on_the_fly_are_those_of_the_same_steps_one_by_one_and_leave_the_flow_alone() -> None:
    start, channel = make_flow("wall")
    velocity, statistics = advance_and_measure(start, channel, 1e-3, 6, 2)
    parts, now = [], start
    for _ in range(3):
        now = advance(now, channel, 1e-3, 2)
        parts.append(measure(now, channel))
    assert torch.equal(velocity, now)
    for ours, reference in zip(statistics, merge(parts), strict=True):
        np.testing.assert_array_equal(ours, reference)


def test_statistics_of_a_batch_are_those_of_each_channel() -> None:
    velocity, channel = make_flow("free", num=3)
    together = measure(velocity, channel)
    for b in range(3):
        alone = measure(velocity[b : b + 1], channel)
        for ours, reference in zip(together[1:], alone[1:], strict=True):
            np.testing.assert_allclose(np.asarray(ours)[b : b + 1], reference, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("cells", [8, 9])
def test_folding_joins_a_profile_with_its_mirror_image(cells: int) -> None:
    config = OpenChannelConfig(resolution=cells, top="wall", stretching=1.5)
    channel = Channel(make_grid(config, cells), torch.ones(1, dtype=torch.float64), top="wall")
    rng = np.random.default_rng(0)
    sums = rng.normal(size=(1, 3, cells)), 9 + rng.normal(size=(1, 3, cells)), rng.normal(size=(1, cells + 1))
    sums[0][:, 1, 0] = sums[1][:, 1, 0] = sums[2][:, [0, -1]] = 0  # on the walls

    def mirror(values: np.ndarray) -> np.ndarray:
        """The same flow seen upside down: v changes its sign and sits on the faces 1 to n - 1."""
        flipped = values[..., ::-1].copy()
        flipped[:, 1, 0], flipped[:, 1, 1:] = 0, values[:, 1, :0:-1]
        return flipped

    statistics = WallStatistics(1, *sums)
    upside_down = WallStatistics(1, mirror(sums[0]) * [[[1], [-1], [1]]], mirror(sums[1]), -sums[2][:, ::-1])
    one, other = (fold(compute_profiles(s, channel)) for s in (statistics, upside_down))
    assert one.cell_height.max() <= 1 + 1e-12 and one.face_height.max() <= 1 + 1e-12
    for ours, reference in zip(one, other, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-12)


def test_variances_are_those_of_point_values_up_to_fourth_order() -> None:
    errors = []
    for n in (8, 16, 32):
        config = OpenChannelConfig(resolution=n)
        channel = Channel(make_grid(config, n), torch.ones(1, dtype=torch.float64))
        h = 2 * np.pi / n
        wave = torch.sin(torch.arange(n, dtype=torch.float64) * h) * np.sin(h / 2) / (h / 2)  # its mean over cells
        velocity = torch.zeros(1, 3, n, n, n, dtype=torch.float64)
        velocity[0, 1] = wave[:, None, None] * wave
        profiles = compute_profiles(measure(velocity, channel), channel)
        errors.append(abs(profiles.vv[0, 1] - 0.25))
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(16, rel=0.05)
