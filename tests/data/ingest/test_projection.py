"""What projection removes is the error of interpolation and nothing else; what it leaves has no divergence."""

import numpy as np
import pytest

from data.ingest.projection import (
    divergence_share,
    faces_between_centres,
    means_between_points,
    project_flux,
    project_open_flux,
)
from shodh.fields import Grid

FLOAT32 = float(np.finfo(np.float32).eps)
PERIODIC = ("periodic", "periodic", "periodic")


def others(axis: int) -> list[int]:
    return [a for a in range(3) if a != axis]


def project_points(velocity: np.ndarray, points: list, boundary) -> tuple[float, np.ndarray, Grid]:
    widths = [p if isinstance(p, float) else tuple(float(w) for w in np.diff(p)) for p in points]
    sizes = [n - (b != "periodic") for n, b in zip(velocity.shape[1:], boundary, strict=True)]
    grid = Grid(shape=tuple(sizes), spacing=tuple(widths), boundary=boundary)
    components = [means_between_points(velocity[i], others(i), points) for i in range(3)]
    flux, removed = project_open_flux(components, grid)
    return removed, flux, grid


def test_means_of_a_periodic_solenoidal_field_need_no_projection(published):
    """The mean of a band-limited field over faces is exact, so that only FP64 round-off is left to remove."""
    n = 16
    velocity = published.velocity(*np.meshgrid(*published.points((n,) * 3, 2 * np.pi / n), indexing="ij"))
    removed, flux, _ = project_points(velocity, [2 * np.pi / n] * 3, PERIODIC)
    assert removed < n**1.5 * np.finfo(np.float64).eps
    divergence = sum(np.roll(flux[i].astype(float), -1, i) - flux[i] for i in range(3))
    assert np.abs(divergence).max() <= 6 * FLOAT32 / 2 * np.abs(flux).max()  # rounding of six faces


@pytest.mark.parametrize("stretched", [False, True])
def test_what_a_cut_out_loses_falls_at_fourth_order_at_least(published, stretched):
    losses = []
    for n in (16, 32):
        points = [0.4 + np.linspace(0, 2, n + 1) for _ in range(3)]
        if stretched:
            points[1] = 1 - np.cos(np.linspace(0.3, 2.5, n + 1))
        velocity = published.velocity(*np.meshgrid(*points, indexing="ij"))
        removed, flux, grid = project_points(velocity, points, ("open", "open", "open"))
        inside = tuple(slice(size - 1) for size in grid.shape)  # the last cells' upper faces are not stored
        divergence = sum(np.diff(flux[i].astype(float), axis=i)[inside] for i in range(3))
        assert np.abs(divergence).max() <= 6 * FLOAT32 / 2 * np.abs(flux).max()
        losses.append(removed)
    assert losses[0] / losses[1] > 2**4


def test_the_flux_through_a_cut_out_is_the_integral_over_its_faces(published):
    """Against Gauss-Legendre quadrature of the formula, which splines and projection know nothing of."""
    n = 24
    points = [0.4 + np.linspace(0, 1.5, n + 1) for _ in range(3)]
    velocity = published.velocity(*np.meshgrid(*points, indexing="ij"))
    _, flux, grid = project_points(velocity, points, ("open", "open", "open"))
    nodes, weights = np.polynomial.legendre.leggauss(5)
    h = 1.5 / n
    for i, j, k in ((3, 5, 7), (20, 1, 11), (9, 16, 2)):
        y, z = (points[0][c] + h * (nodes + 1) / 2 for c in (j, k))
        u = published.velocity(points[0][i], y[:, None], z[None, :])[0]
        exact = float(weights @ u @ weights) * h * h / 4
        assert abs(flux[0, i, j, k] - exact) < (3 * h) ** 4 * float(np.abs(flux).max())  # fourth order, wave number 3


def test_a_whole_channel_has_no_flux_through_its_walls(published):
    n = 12
    points = [2 * np.pi / n, 1 - np.cos(np.linspace(0, np.pi, n + 1)), 2 * np.pi / n]
    coordinates = [np.arange(n) * points[0], points[1], np.arange(n) * points[2]]
    velocity = published.velocity(*np.meshgrid(*coordinates, indexing="ij"))
    _, flux, grid = project_points(velocity, points, ("periodic", "wall", "periodic"))
    assert not flux[1, :, 0].any()
    lower, upper = flux.astype(float), [np.roll(flux[i].astype(float), -1, i) for i in range(3)]
    upper[1][:, -1] = 0
    assert np.abs(sum(upper) - lower.sum(0)).max() <= 6 * FLOAT32 / 2 * np.abs(flux).max()


def test_the_mean_of_two_cells_is_second_order(published):
    losses = []
    for n in (16, 32):
        spacing = 2 * np.pi / n
        velocity = published.velocity(*np.meshgrid(*published.points((n,) * 3, spacing, spacing / 2), indexing="ij"))
        grid = Grid(shape=(n, n, n), spacing=(spacing,) * 3, boundary=PERIODIC)
        losses.append(project_flux(faces_between_centres(velocity, grid), grid).removed)
    assert losses[0] / losses[1] == pytest.approx(4, rel=0.1)  # second order, next term (k h)^2 / 10 at k = 3


def test_the_mean_of_two_cells_never_leaves_their_range():
    velocity = np.where(np.arange(8) < 4, 0.0, 1.0)[None, :, None, None] * np.ones((3, 8, 4, 4))
    grid = Grid(shape=(8, 4, 4), spacing=(1.0, 1.0, 1.0), boundary=("wall", "periodic", "periodic"))
    faces = faces_between_centres(velocity, grid)
    assert faces.min() == 0 and faces.max() == 1 and not faces[0, 0].any()


def test_removed_is_the_norm_of_the_gradient_that_was_added(published):
    """A gradient of known size is put on a solenoidal field, and found again."""
    n = 32
    spacing = 2 * np.pi / n
    x, y, z = np.meshgrid(*published.points((n,) * 3, spacing), indexing="ij")
    velocity = published.velocity(x, y, z)
    gradient = 0.1 * np.stack([np.cos(x), -np.sin(y), np.cos(z)])
    removed, _, _ = project_points(velocity + gradient, [spacing] * 3, PERIODIC)
    deviation = velocity + gradient - (velocity + gradient).mean((1, 2, 3), keepdims=True)
    expected = np.linalg.norm(gradient) / np.linalg.norm(deviation)
    assert removed == pytest.approx(expected, rel=0.03)  # means over faces damp the rest by (k h)^2 / 12, k = 3


def test_divergence_tells_components_of_the_wrong_axes(published):
    n = 24
    velocity = published.velocity(*np.meshgrid(*published.points((n,) * 3, 2 * np.pi / n), indexing="ij"))
    assert divergence_share(velocity, [2 * np.pi / n] * 3) < 0.05
    assert divergence_share(velocity[::-1], [2 * np.pi / n] * 3) > 0.3
    assert divergence_share(velocity.transpose(0, 3, 2, 1), [2 * np.pi / n] * 3) > 0.3
