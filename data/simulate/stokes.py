"""Steady Stokes flow through a block of rock made of voxels: permeability along each axis.

    -lap u + grad p = e,   div u = 0,   u = 0 on the grains,   cell size and viscosity 1

on staggered cells, with unknowns in the pores only: a symmetric indefinite system of velocities and pressures, solved
by minimal residuals. Preconditioner: multigrid for the Laplacian A, and for the inverse of the pressure's Schur
complement S, 1 + multigrid(D W D')^-1 with W = A^-1 1, the velocity that a unit force drives locally. Across
wavelengths long against a pore's width S is D W D' (Darcy's law of each pore), across short ones it is 1; so the number
of iterations depends neither on how many cells wide the block is, nor its pores. Method and preconditioners of this
kind: Elman, Silvester, Wathen 2014, Finite Elements and Fast Iterative Solvers, chapter 4.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import LinearOperator, cg

from data.simulate.multigrid import build_multigrid
from data.simulate.pore_space import keep_winding, label_pores
from data.simulate.stokes_system import Boundary, StokesSystem, Walls, assemble_stokes

MAX_ITERATIONS = 1000
DRIVEN_TOLERANCE = 1e-2  # of W: it only preconditions

Operator = Callable[[np.ndarray], np.ndarray]


class StokesFlow(NamedTuple):
    """What the steady flow along one axis amounts to."""

    permeability: float  # mean velocity under a unit force, in units of a cell's face area (K / dx^2)
    num_iterations: int


def permeabilities(
    pore: Bool[np.ndarray, "x y z"],
    *,
    boundary: Boundary = "periodic",
    walls: Walls = "smooth",
    tolerance: float = 1e-4,
) -> tuple[float, float, float]:
    """Darcy permeability K / dx^2 along x, y and z; see ``solve_stokes``."""
    along_x, along_y, along_z = (
        solve_stokes(pore, axis, boundary=boundary, walls=walls, tolerance=tolerance).permeability for axis in range(3)
    )
    return along_x, along_y, along_z


def solve_stokes(
    pore: Bool[np.ndarray, "x y z"],
    axis: int,
    *,
    boundary: Boundary = "periodic",
    walls: Walls = "smooth",
    tolerance: float = 1e-4,
) -> StokesFlow:
    """Permeability of a block along an axis, in units of a cell's face area, and the iterations that it took.

    ``periodic`` wraps the block; ``confined`` puts planes of constant pressure at its ends along the axis, through
    which fluid passes freely, and no-slip walls at its four sides, as a core holder or porefoam does. ``walls`` is
    ``smooth`` where the voxels are a staircase that stands for smooth grains, ``voxel`` where they are the geometry.
    The residual (in the preconditioner's norm) falls below ``tolerance`` times its first value; the error of the
    permeability is of its square. 0 where nothing percolates. Raises ValueError where there is no grain, RuntimeError
    after MAX_ITERATIONS.
    """
    if pore.all():
        raise ValueError("pore: no solid cell, so that nothing holds the flow back. Pass a block with grains.")
    along = np.ascontiguousarray(np.moveaxis(_percolating(pore, axis, boundary), axis, 0))
    if not along.any():
        return StokesFlow(0.0, 0)
    system = assemble_stokes(along, boundary, walls)
    apply, precondition = _saddle_point(system), _preconditioner(system)
    right = np.concatenate([system.force, np.zeros(system.cell_place.shape[1])])
    solution, num_iterations = minimal_residual(apply, right, precondition, tolerance)
    # f.x is off by x.r; with that added the error is of second order
    work = 2 * (right @ solution) - solution @ apply(solution)
    return StokesFlow(float(work) / pore.size, num_iterations)


def minimal_residual(
    apply: Operator, right: Float[np.ndarray, "n"], precondition: Operator, tolerance: float
) -> tuple[Float[np.ndarray, "n"], int]:
    """Solution of a symmetric indefinite system and the number of iterations; the preconditioner must be positive.

    Source: Elman, Silvester, Wathen 2014, algorithm 4.1 (preconditioned MINRES).
    """
    solution, basis_last, basis = np.zeros_like(right), np.zeros_like(right), right
    step_last, step = np.zeros_like(right), np.zeros_like(right)
    image = precondition(basis)
    norm_last, norm = 1.0, math.sqrt(image @ basis)
    error = first = norm
    sine_last, sine, cosine_last, cosine = 0.0, 0.0, 1.0, 1.0
    for num_iterations in range(1, MAX_ITERATIONS + 1):
        direction = image / norm
        applied = apply(direction)
        overlap = float(applied @ direction)
        basis_last, basis = basis, applied - (overlap / norm) * basis - (norm / norm_last) * basis_last
        image = precondition(basis)
        norm_last, norm = norm, math.sqrt(max(float(image @ basis), 0.0))
        turned = cosine * overlap - cosine_last * sine * norm_last
        above = sine * overlap + cosine_last * cosine * norm_last
        far_above = sine_last * norm_last
        pivot = math.hypot(turned, norm)
        cosine_last, cosine, sine_last, sine = cosine, turned / pivot, sine, norm / pivot
        step_last, step = step, (direction - far_above * step_last - above * step) / pivot
        solution = solution + (cosine * error) * step
        error = -sine * error
        if abs(error) <= tolerance * first:
            return solution, num_iterations
    raise RuntimeError(f"tolerance={tolerance}: not reached in {MAX_ITERATIONS} iterations. Raise it.")


def _saddle_point(system: StokesSystem) -> Operator:
    size, gradient = len(system.force), csr_array(-system.divergence.T)

    def apply(vector: np.ndarray) -> np.ndarray:
        velocity, pressure = vector[:size], vector[size:]
        return np.concatenate([system.laplacian @ velocity + gradient @ pressure, -(system.divergence @ velocity)])

    return apply


def _preconditioner(system: StokesSystem) -> Operator:
    size = len(system.force)
    of_velocity = build_multigrid(system.laplacian, system.face_place)
    inverse = LinearOperator((size, size), matvec=of_velocity.solve, dtype=float)  # pyright: ignore[reportCallIssue] (untyped)
    driven = cg(system.laplacian, np.ones(size), rtol=DRIVEN_TOLERANCE, M=inverse)[0]
    driven = np.maximum(driven, 1 / system.laplacian.diagonal())  # which bounds the exact one from below
    darcy = csr_array(system.divergence @ (diags_array(driven) @ system.divergence.T))
    of_pressure = build_multigrid(darcy, system.cell_place)

    def precondition(residual: np.ndarray) -> np.ndarray:
        velocity, pressure = residual[:size], residual[size:]
        return np.concatenate([of_velocity.solve(velocity), pressure + of_pressure.solve(pressure)])

    return precondition


def _percolating(pore: Bool[np.ndarray, "x y z"], axis: int, boundary: Boundary) -> Bool[np.ndarray, "x y z"]:
    """Pores that may carry flow along the axis: pieces that reach from end to end, or around the periodic box."""
    if boundary == "periodic":
        return keep_winding(pore, axis)
    label = label_pores(pore, (False, False, False))
    present = np.ones(label.max() + 1, dtype=bool)
    for plane in (0, -1):
        here = np.zeros_like(present)
        here[label.take(plane, axis)[pore.take(plane, axis)]] = True
        present &= here
    return pore & present[label]
