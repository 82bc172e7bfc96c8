"""One time step of unsteady incompressible flow between solid grains, in a periodic box of length 1 along x.

    du/dt + div(u u) = -grad p + viscosity lap u + force e_x,   div u = 0,   u = 0 on the grains

Staggered cells, each solid or pore. A face that touches a solid cell carries no flux and lies *on* the wall, so a
tangential neighbour sees u = 0 one cell away; a face buried between two solid cells has the wall half a cell away.
That is for "smooth" walls, which voxels only approximate; next to "voxel" walls, both have it half a cell away.
Time: second-order backward differences, viscosity implicit, advection extrapolated, incremental pressure correction in
rotational form (Guermond, Minev, Shen 2006, Comput. Methods Appl. Mech. Eng. 195, 6011).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from data.simulate.stokes_system import Walls
from shodh.fields import Boundary, Grid
from shodh.physics.exterior import difference_down, difference_up, divergence_of_faces, gradient_of_cells
from shodh.physics.helmholtz import solve_poisson

PERIODIC: tuple[Boundary, Boundary, Boundary] = ("periodic", "periodic", "periodic")

VISCOUS_TOLERANCE = 1e-4  # residuals of a time step, relative to the velocity
PROJECTION_TOLERANCE = 1e-4
MAX_ITERATIONS = 2000


class Rock(NamedTuple):
    """The pore space as the operators read it; all in one floating-point type."""

    pore: Float[Tensor, "b x y z"]  # 1 in pores
    open_face: Float[Tensor, "b 3 x y z"]  # 1 between two pore cells
    diagonal: Float[Tensor, "b 3 x y z"]  # of minus the vector Laplacian, cell size 1


class State(NamedTuple):
    """What one time step hands to the next."""

    velocity: Float[Tensor, "b 3 x y z"]
    previous: Float[Tensor, "b 3 x y z"]  # velocity one step earlier
    previous_advection: Float[Tensor, "b 3 x y z"]
    pressure: Float[Tensor, "b x y z"]
    correction: Float[Tensor, "b x y z"]  # last change of pressure


def prepare_rock(pore: Bool[Tensor, "b x y z"], dtype: torch.dtype = torch.float32, walls: Walls = "smooth") -> Rock:
    """The operators' view of a pore space, walls as the head of this file says."""
    solid = (~pore).to(dtype)
    open_face = torch.stack([(pore & pore.roll(1, i - 3)).to(dtype) for i in range(3)], 1)
    buried = torch.stack([solid * solid.roll(1, i - 3) for i in range(3)], 1)
    mirrored = buried if walls == "smooth" else 1 - open_face
    diagonal = torch.full_like(open_face, 6.0)
    for axis in range(3):  # a wall half a cell away mirrors the velocity: its neighbour is -u
        for normal in range(3):
            faces = (buried if normal == axis else mirrored)[:, normal]
            diagonal[:, normal] += faces.roll(1, axis - 3) + faces.roll(-1, axis - 3)
    return Rock(pore.to(dtype), open_face, diagonal)


def laplacian(velocity: Float[Tensor, "b 3 x y z"], rock: Rock) -> Float[Tensor, "b 3 x y z"]:
    """Vector Laplacian on open faces for cell size 1, no slip on the grains; 0 on closed faces."""
    total = -rock.diagonal * velocity
    for dim in (-3, -2, -1):
        total = total + velocity.roll(1, dim) + velocity.roll(-1, dim)
    return rock.open_face * total


def advection(velocity: Float[Tensor, "b 3 x y z"]) -> Float[Tensor, "b 3 x y z"]:
    """div(u u) on lower faces for cell size 1: second order, conserves momentum and, if div u = 0, energy.

    Closed faces get values too, which the caller masks.
    Source: Harlow and Welch 1965, Phys. Fluids 8, 2182 (the momentum fluxes live in cells and on edges).
    """
    component = velocity.unbind(-4)
    total = []
    for i in range(3):
        centre = component[i] + difference_up(component[i], i, "periodic") / 2
        total.append(difference_down(centre**2, i, "periodic"))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        along_i = component[i] - difference_down(component[i], j, "periodic") / 2
        along_j = component[j] - difference_down(component[j], i, "periodic") / 2
        flux = along_i * along_j
        total[i] = total[i] + difference_up(flux, j, "periodic")
        total[j] = total[j] + difference_up(flux, i, "periodic")
    return torch.stack(total, -4)


def project(
    velocity: Float[Tensor, "b 3 x y z"],
    rock: Rock,
    tolerance: float,
    guess: Float[Tensor, "b x y z"] | None = None,
) -> tuple[Float[Tensor, "b 3 x y z"], Float[Tensor, "b x y z"]]:
    """The nearest solenoidal velocity without flux through closed faces, and the potential that was taken off.

    u = M(velocity - grad potential), M the mask of open faces, cell size 1; the divergence falls below ``tolerance``
    relative to the velocity, both as root sum squares. Preconditioned by the exact inverse without grains (FFT).
    """
    num_x, num_y, num_z = velocity.shape[-3:]
    cells = Grid(shape=(num_x, num_y, num_z), spacing=(1.0, 1.0, 1.0), boundary=PERIODIC)
    inside = rock.open_face * velocity

    def apply(potential: Tensor) -> Tensor:
        return -divergence_of_faces(rock.open_face * gradient_of_cells(potential, PERIODIC), PERIODIC)

    def precondition(residual: Tensor) -> Tensor:
        return -rock.pore * solve_poisson(residual, cells)

    right = -divergence_of_faces(inside, PERIODIC)
    start = torch.zeros_like(right) if guess is None else guess
    potential = conjugate_gradient(apply, right, start, tolerance * _norm(inside), precondition)
    return inside - rock.open_face * gradient_of_cells(potential, PERIODIC), potential


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    right: Float[Tensor, "b *s"],
    guess: Float[Tensor, "b *s"],
    tolerance: Float[Tensor, "b"],
    precondition: Callable[[Tensor], Tensor] = lambda residual: residual,
) -> Float[Tensor, "b *s"]:
    """Solutions of a batch of positive (semi-)definite systems, each to its own residual norm.

    A sample that has converged stands still, so that none depends on its companions; one that has not after
    MAX_ITERATIONS comes back as NaN.
    """
    solution, residual = guess, right - apply(guess)
    direction = torch.zeros_like(right)
    weight = torch.ones_like(tolerance)
    error = _norm(residual)
    for _ in range(MAX_ITERATIONS):
        active = (error > tolerance) & torch.isfinite(error)
        if not bool(active.any()):
            break
        correction = precondition(residual)
        last, weight = weight, _inner(residual, correction)
        direction = correction + _spread(torch.where(active, weight / last, 0.0), right) * direction
        image = apply(direction)
        step = _spread(torch.where(active, weight / _inner(direction, image), 0.0), right)
        solution = solution + step * direction
        residual = residual - step * image
        error = _norm(residual)
    solved = (error <= tolerance) & torch.isfinite(error)
    return torch.where(_spread(solved, right) > 0, solution, torch.nan)


def rest(rock: Rock) -> State:
    """Fluid at rest."""
    zero, none = torch.zeros_like(rock.open_face), torch.zeros_like(rock.pore)
    return State(zero, zero, zero, none, none)


def advance(state: State, rock: Rock, viscosity: Float[Tensor, "b"], force: Float[Tensor, "b"], step: float) -> State:
    """The state one time step later; ``force`` is the body force along x then. The box is of length 1 along x."""
    size = 1 / state.velocity.shape[-3]
    lead = 1.5 / step  # of the second-order backward difference (3 u' - 4 u + u_previous) / (2 step)
    now = advection(state.velocity) / size
    drive = -gradient_of_cells(state.pressure, PERIODIC) / size - (2 * now - state.previous_advection)
    drive[:, 0] += rearrange(force, "b -> b 1 1 1")
    right = rock.open_face * (drive + (2 * state.velocity - state.previous / 2) / step) / lead
    diffusion = _spread(viscosity / (lead * size**2), right)

    def apply(velocity: Tensor) -> Tensor:
        return velocity - diffusion * laplacian(velocity, rock)

    guess = 2 * state.velocity - state.previous
    tentative = conjugate_gradient(apply, right, guess, VISCOUS_TOLERANCE * _norm(right))
    to_pressure = lead * size
    velocity, potential = project(tentative, rock, PROJECTION_TOLERANCE, state.correction / to_pressure)
    correction = to_pressure * potential
    dilatation = divergence_of_faces(tentative, PERIODIC) / size
    pressure = state.pressure + correction - _spread(viscosity, dilatation) * dilatation
    return State(velocity, state.velocity, now, _without_mean(pressure, rock), correction)


def _without_mean(pressure: Float[Tensor, "b x y z"], rock: Rock) -> Float[Tensor, "b x y z"]:
    mean = reduce(pressure * rock.pore, "b x y z -> b", "sum") / reduce(rock.pore, "b x y z -> b", "sum")
    return rock.pore * (pressure - _spread(mean, pressure))


def _inner(left: Tensor, right: Tensor) -> Tensor:
    return reduce(left * right, "b ... -> b", "sum")


def _norm(values: Tensor) -> Tensor:
    return _inner(values, values).sqrt()


def _spread(per_sample: Tensor, like: Tensor) -> Tensor:
    """One value per sample, shaped to multiply ``like``; in its type."""
    return per_sample.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
