"""Velocity from potentials, exactly: F = d a + H (solenoidal), v = d phi (irrotational), or their sum (full).

``snap_potentials`` puts potentials on a lattice 2^-k, on which every sum below is exact in FP32: the divergence of the
stored FP32 flux, evaluated in FP64, is then 0.0 bit for bit. Units enter as a scale beside the array, never by
rescaling it.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from shodh.fields import Boundary, Grid, VelocitySpace
from shodh.physics.exterior import curl_of_edges, divergence_of_faces, gradient_of_cells, zero_wall_faces


class Potentials(NamedTuple):
    """What a decoder emits instead of a velocity."""

    circulation: Float[Tensor, "b 3 x y z"]  # vector potential along edges
    scalar: Float[Tensor, "b x y z"]  # potential in cells
    mean_flow: Float[Tensor, "b 3"]  # constant flux per face and axis (harmonic part); none across walls


def compose_velocity(
    potentials: Potentials, boundary: Sequence[Boundary], space: VelocitySpace
) -> Float[Tensor, "b 3 x y z"]:
    """The velocity on lower faces that the potentials stand for, in lattice units; no flux through walls."""
    if space == "irrotational":
        return gradient_of_cells(potentials.scalar, boundary)
    flows = zip(potentials.mean_flow.unbind(1), boundary, strict=True)
    mean_flow = torch.stack([torch.zeros_like(flow) if b == "wall" else flow for flow, b in flows], 1)
    flux = curl_of_edges(potentials.circulation, boundary).add_(rearrange(mean_flow, "b f -> b f 1 1 1"))
    return flux if space == "solenoidal" else flux + gradient_of_cells(potentials.scalar, boundary)


def snap_potentials(potentials: Potentials, space: VelocitySpace = "full") -> Potentials:
    """Potentials rounded to a lattice 2^-k, k per sample, so that sums of them are exact in FP32.

    A flux adds at most 4 circulations, 2 scalars and one mean flow, and k keeps twice that bound below 2^24 lattice
    steps. The relative change is about 2^-22 of the largest potential; what is below 2^-121 becomes 0, before FP32
    loses digits. Potentials that ``space`` does not use come back as 0. Raises ValueError for potentials that are not
    finite, or whose flux FP32 cannot hold.
    """
    used = space != "irrotational", space != "solenoidal", space != "irrotational"
    bounds = zip(potentials, (4.0, 4.0, 1.0), used, strict=True)
    largest = torch.stack([weight * _largest(values).double() for values, weight, use in bounds if use]).sum(0)
    if not bool((largest <= torch.finfo(torch.float32).max).all()):
        raise ValueError(
            "potentials: not finite, or beyond FP32, so they have no lattice. Check the decoder's input and weights."
        )
    _, exponent = torch.frexp(largest)  # largest < 2^exponent
    exponent = (exponent - 23).clamp_min(-120)
    step, inverse = (_power_of_two(power) for power in (exponent, -exponent))

    def snap(values: Tensor, use: bool) -> Tensor:
        if not use:
            return torch.zeros_like(values)
        shape = [-1] + [1] * (values.ndim - 1)
        return (values.float() * inverse.reshape(shape)).round_().mul_(step.reshape(shape))  # powers of 2 lose nothing

    return Potentials(*(snap(values, use) for values, use in zip(potentials, used, strict=True)))


def _power_of_two(exponent: Int[Tensor, "b"]) -> Float[Tensor, "b"]:
    """2^exponent in FP32, written into its bits, because a device's own power function may be off in the last one."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def _largest(values: Float[Tensor, "b *s"]) -> Float[Tensor, "b"]:
    """Largest magnitude of each sample, NaN if it holds one; without a copy of the field."""
    flat = values.flatten(1)
    return torch.maximum(flat.amax(1), -flat.amin(1))


def solve_poisson(right: Float[Tensor, "*s x y z"], grid: Grid) -> Float[Tensor, "*s x y z"]:
    """The zero-mean p with div grad p = right on cells: periodic axes by FFT, walls (Neumann) by their eigenvectors.

    Exact to round-off for the staggered operators of ``physics.exterior`` with the grid's lengths; the mean of
    ``right`` over the volume is ignored, that of p is zero. Raises ValueError for an open axis.
    """
    if "open" in grid.boundary:
        raise ValueError(
            f"grid.boundary={grid.boundary}: an open axis has no Poisson problem here. Use periodic or wall."
        )
    walls = [i for i in range(3) if grid.boundary[i] == "wall"]
    periodic = [i - 3 for i in range(3) if grid.boundary[i] == "periodic"]
    modes, inverse_eigenvalue = _poisson_factors(grid, right.dtype, right.device)
    values = right
    for i in walls:
        values = (modes[i].analysis @ values.movedim(i - 3, -2)).movedim(-2, i - 3)
    if periodic:
        values = torch.fft.rfftn(values, dim=periodic) * inverse_eigenvalue
        values = torch.fft.irfftn(values, s=[grid.shape[i] for i in periodic], dim=periodic)
    else:
        values = values * inverse_eigenvalue
    for i in walls:
        values = (modes[i].synthesis @ values.movedim(i - 3, -2)).movedim(-2, i - 3)
    return values


def remove_divergence(velocity: Float[Tensor, "*s 3 x y z"], grid: Grid) -> Float[Tensor, "*s 3 x y z"]:
    """The nearest solenoidal velocity on lower faces with the same mean flow: u - grad p, div u = 0 to round-off.

    Nothing crosses a wall: whatever velocity stands there is set to 0 first.
    """
    velocity = zero_wall_faces(velocity, grid.boundary)
    pressure = solve_poisson(divergence_of_velocity(velocity, grid), grid)
    return velocity - pressure_gradient(pressure, grid)


def divergence_of_velocity(velocity: Float[Tensor, "*s 3 x y z"], grid: Grid) -> Float[Tensor, "*s x y z"]:
    """div u per unit volume of a velocity on lower faces, stretched grids included."""
    lengths = _grid_lengths(grid, velocity.dtype, velocity.device)
    return divergence_of_faces(velocity * lengths.area, grid.boundary) / lengths.volume


def pressure_gradient(pressure: Float[Tensor, "*s x y z"], grid: Grid) -> Float[Tensor, "*s 3 x y z"]:
    """grad p on lower faces of a cell quantity; 0 through walls."""
    return gradient_of_cells(pressure, grid.boundary) / _grid_lengths(grid, pressure.dtype, pressure.device).distance


class _GridLengths(NamedTuple):
    area: Float[Tensor, "3 x y z"]
    distance: Float[Tensor, "3 x y z"]
    volume: Float[Tensor, "x y z"]


@functools.lru_cache(maxsize=16)
def _grid_lengths(grid: Grid, dtype: torch.dtype, device: torch.device) -> _GridLengths:
    arrays = grid.face_area, grid.face_distance, grid.cell_volume
    with torch.inference_mode(False):
        return _GridLengths(*(torch.from_numpy(array).to(device, dtype) for array in arrays))


class _Modes(NamedTuple):
    """Eigenvectors of the second difference between two walls: what takes cell values to modes, and modes back."""

    analysis: Float[Tensor, "k n"]
    synthesis: Float[Tensor, "n k"]
    eigenvalue: Float[Tensor, "k"]


@functools.lru_cache(maxsize=16)
def _poisson_factors(grid: Grid, dtype: torch.dtype, device: torch.device) -> tuple[dict[int, _Modes], Tensor]:
    """Modes of each walled axis, and 1 / eigenvalue of div grad per mode (0 for the mean), built in FP64."""
    periodic = [i for i in range(3) if grid.boundary[i] == "periodic"]
    with torch.inference_mode(False):  # kept for later callers, who may need gradients through the product
        modes = {i: _wall_modes(grid, i) for i in range(3) if i not in periodic}
        eigenvalue = torch.zeros(1, 1, 1, dtype=torch.float64)
        for i in range(3):
            values = modes[i].eigenvalue if i in modes else _eigenvalues(grid, i)
            if periodic and i == periodic[-1]:  # a real transform keeps half of its last axis
                values = values[: grid.shape[i] // 2 + 1]
            eigenvalue = eigenvalue + values.reshape([-1 if a == i else 1 for a in range(3)])
        inverse = torch.where(eigenvalue < 0, 1 / eigenvalue, 0.0)
        cast = {i: _Modes(*(part.to(device, dtype) for part in axis)) for i, axis in modes.items()}
        return cast, inverse.to(device, dtype)


def _wall_modes(grid: Grid, axis: int) -> _Modes:
    """Cosines (DCT-II) on a uniform axis.

    On a stretched one, with w the widths of cells and s the distances between them, the eigenvectors of the symmetric
    w^-1/2 (-d^T s^-1 d) w^-1/2, times w^-1/2.
    """
    n = grid.shape[axis]
    if grid.is_uniform(axis):
        k = torch.arange(n, dtype=torch.float64)
        cosines = torch.cos(math.pi / n * k[:, None] * (k[None, :] + 0.5)) * math.sqrt(2 / n)
        cosines[0] /= math.sqrt(2)
        return _Modes(cosines, cosines.T, _eigenvalues(grid, axis))
    widths = torch.from_numpy(grid.widths(axis).copy())
    root = widths.sqrt()
    difference = torch.eye(n, dtype=torch.float64).diff(dim=0)
    stiffness = -difference.T @ (difference / (widths[1:, None] + widths[:-1, None]) * 2)
    eigenvalue, vectors = torch.linalg.eigh(stiffness / root[:, None] / root)
    eigenvalue[-1] = 0.0  # the constant: its eigenvalue is 0 but for round-off
    return _Modes(vectors.T * root, vectors / root[:, None], eigenvalue)


def _eigenvalues(grid: Grid, axis: int) -> Tensor:
    """Of the second difference on a uniform axis."""
    n, h = grid.shape[axis], grid.mean_spacing[axis]
    k = torch.arange(n, dtype=torch.float64)
    angle = math.pi * k / n if grid.boundary[axis] == "periodic" else math.pi * k / (2 * n)
    return -((2 / h * torch.sin(angle)) ** 2)
