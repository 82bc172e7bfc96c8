"""From velocities at points to fluxes through faces whose discrete divergence is zero, and what that took away.

Two ways onto the faces. ``means_between_points``: the points are where faces cross, and values are averaged over the
faces and cells between them, by Fourier series along periodic axes and by cubic splines along others. The exact mean
of a solenoidal field is discretely solenoidal (Gauss), so what projection then removes is the error of interpolation.
``faces_between_centres``: the points are the centres of cells, and a face takes the mean of its two cells: second
order, never beyond its neighbours, so also fit for shocks.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.interpolate import CubicSpline

from shodh.fields import Grid
from shodh.physics.helmholtz import divergence_of_velocity, pressure_gradient, remove_divergence, solve_poisson


class Projected(NamedTuple):
    """A discretely solenoidal flux, and the share of the velocity that projection removed."""

    flux: np.ndarray  # float32 (3, x, y, z) through lower faces
    removed: float  # L2 norm of what was removed / L2 norm of the velocity without its mean


def means_between_points(values: np.ndarray, axes: Sequence[int], points: Sequence[np.ndarray | float]) -> np.ndarray:
    """Means of a field over the intervals between its points along the given axes; it stays at the points elsewhere.

    ``points[axis]`` is the coordinates of the points (n points, n - 1 intervals) or, for a periodic axis, the spacing
    (n intervals, the last one across the end).
    """
    for axis in axes:
        where = points[axis]
        values = _spline_means(values, axis, where) if isinstance(where, np.ndarray) else _fourier_means(values, axis)
    return values


def faces_between_centres(velocity: np.ndarray, grid: Grid) -> np.ndarray:
    """Velocity (3, x, y, z) on lower faces from centres of cells; 0 in walls, the cell's own value at an open end."""
    faces = np.empty_like(velocity)
    for axis in range(3):
        component = np.moveaxis(velocity[axis], axis, 0)
        lower = np.roll(component, 1, 0)
        if grid.boundary[axis] == "open":
            lower[0] = component[0]
        mean = (component + lower) / 2
        if grid.boundary[axis] == "wall":
            mean[0] = 0
        faces[axis] = np.moveaxis(mean, 0, axis)
    return faces


def project_flux(velocity: np.ndarray, grid: Grid) -> Projected:
    """The nearest solenoidal flux to a velocity on lower faces, between periodic sides and walls."""
    given = torch.from_numpy(velocity.astype(np.float64))
    kept = remove_divergence(given, grid)
    return Projected((kept.numpy() * grid.face_area).astype(np.float32), _share(given - kept, given, grid))


def project_open_flux(components: Sequence[np.ndarray], grid: Grid) -> Projected:
    """The nearest solenoidal flux to a velocity on all faces of a box cut out of a flow, its sides left as they are.

    ``components[i]`` has one face more than cells along an open or walled axis i. What flows through the sides is kept
    but for their net outflow, which is taken off in proportion to |flux|. The upper sides are not stored.
    """
    closed = Grid(shape=grid.shape, spacing=grid.spacing, boundary=_closed(grid))
    fluxes = [torch.from_numpy(c.astype(np.float64)) * _area(grid, i) for i, c in enumerate(components)]
    lower = torch.stack([_without_last(f, i, grid) for i, f in enumerate(fluxes)])
    _balance_sides(fluxes, grid)
    volume = torch.from_numpy(grid.cell_volume)
    divergence = sum((_net_outflow(f, i, grid) for i, f in enumerate(fluxes)), torch.zeros(grid.shape).double())
    gradient = pressure_gradient(solve_poisson(divergence / volume, closed), closed)
    area = torch.from_numpy(grid.face_area)
    kept = torch.stack([_without_last(f, i, grid) for i, f in enumerate(fluxes)]) - gradient * area
    return Projected(kept.numpy().astype(np.float32), _share((lower - kept) / area, lower / area, grid))


def divergence_share(velocity: np.ndarray, spacing: Sequence[float | np.ndarray]) -> float:
    """RMS of the divergence / RMS of the velocity gradient, by central differences inside the box.

    ``spacing`` is one distance or the coordinates per axis.

    1/sqrt(3) for components that know nothing of one another, whatever their spectrum; towards 0 for a resolved flow
    without divergence: it tells which axis a component belongs to.
    """
    inside = tuple(slice(1, -1) for _ in range(3))
    trace, total = 0.0, 0.0
    for i in range(3):
        for j in range(3):
            part = np.gradient(velocity[i], spacing[j], axis=j)[inside]
            trace = trace + part if i == j else trace
            total += float(np.mean(part**2))
    return math.sqrt(float(np.mean(np.asarray(trace) ** 2)) / total) if total > 0 else 0.0


def compressible_share(velocity: np.ndarray, grid: Grid) -> float:
    """The share of a velocity on lower faces that a projection would remove; for flows whose divergence is physics."""
    given = torch.from_numpy(velocity.astype(np.float64))
    gradient = pressure_gradient(solve_poisson(divergence_of_velocity(given, grid), grid), grid)
    return _share(gradient, given, grid)


def _share(part: torch.Tensor, velocity: torch.Tensor, grid: Grid) -> float:
    volume = torch.from_numpy(grid.cell_volume)
    deviation = velocity - velocity.mean((1, 2, 3), keepdim=True)
    whole = float((deviation**2 * volume).sum())
    return math.sqrt(float((part**2 * volume).sum()) / whole) if whole > 0 else 0.0


def _fourier_means(values: np.ndarray, axis: int) -> np.ndarray:
    """Means over [i, i + 1] of a periodic band-limited signal: its spectrum times sinc, half a cell on."""
    n = values.shape[axis]
    phase = 2j * np.pi * np.fft.rfftfreq(n)
    factor = np.ones(len(phase), complex)
    factor[1:] = (np.exp(phase[1:]) - 1) / phase[1:]
    if n % 2 == 0:
        factor[-1] = 0  # the shift of the highest wave is not known
    spectrum = np.fft.rfft(values, axis=axis) * factor.reshape([-1 if a == axis else 1 for a in range(values.ndim)])
    return np.fft.irfft(spectrum, n, axis=axis)


def _spline_means(values: np.ndarray, axis: int, points: np.ndarray) -> np.ndarray:
    integral = CubicSpline(points, values, axis=axis).antiderivative()(points)
    widths = np.diff(points).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
    return np.diff(integral, axis=axis) / widths


def _closed(grid: Grid) -> tuple:
    return tuple("periodic" if b == "periodic" else "wall" for b in grid.boundary)


def _area(grid: Grid, axis: int) -> torch.Tensor:
    return torch.from_numpy(grid.face_area[axis]).narrow(axis, 0, 1)  # the same for all faces along their normal


def _without_last(flux: torch.Tensor, axis: int, grid: Grid) -> torch.Tensor:
    return flux.narrow(axis, 0, grid.shape[axis])


def _net_outflow(flux: torch.Tensor, axis: int, grid: Grid) -> torch.Tensor:
    if grid.boundary[axis] == "periodic":
        return flux.roll(-1, axis) - flux
    return flux.diff(dim=axis)


def _balance_sides(fluxes: list[torch.Tensor], grid: Grid) -> None:
    """Take the net outflow off the sides, in place: none of it through walls, where the flux is 0."""
    lower_sides, upper_sides = [], []
    for axis, flux in enumerate(fluxes):
        if grid.boundary[axis] == "periodic":
            continue
        sides = flux.select(axis, 0), flux.select(axis, -1)
        if grid.boundary[axis] == "wall":
            for side in sides:
                side.zero_()
        lower_sides.append(sides[0])
        upper_sides.append(sides[1])
    through = sum(float(side.abs().sum()) for side in lower_sides + upper_sides)
    if through == 0:
        return
    surplus = sum(float(s.sum()) for s in upper_sides) - sum(float(s.sum()) for s in lower_sides)
    for side in upper_sides:
        side -= surplus / through * side.abs()
    for side in lower_sides:
        side += surplus / through * side.abs()
