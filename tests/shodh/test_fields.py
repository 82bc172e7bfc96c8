"""Grids: lengths, areas and volumes, uniform and stretched."""

import math

import numpy as np
import pytest

from shodh.config import parse_config, to_plain
from shodh.fields import Grid

WIDTHS = (0.1, 0.2, 0.4, 0.3)
STRETCHED = Grid(shape=(2, 4, 3), spacing=(0.5, WIDTHS, 2.0), boundary=("periodic", "wall", "periodic"))


def test_areas_and_volumes_fill_the_box():
    volume = np.broadcast_to(STRETCHED.cell_volume, STRETCHED.shape)
    assert volume.sum() == pytest.approx(1.0 * 1.0 * 6.0)
    area = np.broadcast_to(STRETCHED.face_area, (3, *STRETCHED.shape))
    assert [area[i].take(0, axis=i).sum() for i in range(3)] == pytest.approx([6.0, 6.0, 1.0])


def test_distance_between_cells_is_that_of_their_centres():
    centres = np.cumsum(WIDTHS) - np.array(WIDTHS) / 2
    distance = STRETCHED.face_distance[1].reshape(-1)
    np.testing.assert_allclose(distance[1:], np.diff(centres), rtol=1e-15)
    assert distance[0] == 2 * centres[0]


def test_relative_grid_has_the_same_proportions_and_mean_cell_volume_one():
    relative = STRETCHED.relative
    assert np.broadcast_to(relative.cell_volume, relative.shape).mean() == pytest.approx(1.0)
    np.testing.assert_allclose(relative.edge_length / STRETCHED.edge_length, relative.widths(0)[0] / 0.5, rtol=1e-15)


def test_uniform_grid_written_as_widths_is_the_same_grid():
    written = Grid(shape=(2, 4, 3), spacing=(0.5, (0.25,) * 4, 2.0), boundary=STRETCHED.boundary)
    plain = Grid(shape=(2, 4, 3), spacing=(0.5, 0.25, 2.0), boundary=STRETCHED.boundary)
    for name in ("edge_length", "face_area", "face_distance"):
        whole = [np.broadcast_to(getattr(grid, name), (3, 2, 4, 3)) for grid in (written, plain)]
        np.testing.assert_allclose(*whole, rtol=1e-15)


@pytest.mark.parametrize("grid", [STRETCHED, Grid(shape=(2, 2, 2), spacing=(1.0, 2.0, 3.0), boundary=("wall",) * 3)])
def test_grid_survives_json(grid):
    assert parse_config(Grid, to_plain(grid), source="test") == grid


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        ((0.5, (0.1, 0.2), 2.0), "2 widths for 4 cells"),
        (((0.1, 0.2), WIDTHS, 2.0), "stretched, but the axis is periodic"),
        ((0.5, (0.1, 0.2, -0.4, 0.3), 2.0), "positive and finite"),
        ((0.5, math.nan, 2.0), "positive and finite"),
    ],
)
def test_widths_that_are_none_are_refused(spacing, message):
    with pytest.raises(ValueError, match=message):
        Grid(shape=(2, 4, 3), spacing=spacing, boundary=STRETCHED.boundary)
