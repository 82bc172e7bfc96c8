"""Flow through porous rock: unsteady incompressible Navier-Stokes between solid grains, driven by a pulsating force.

    du/dt + div(u u) = -grad p + viscosity lap u + f0 (1 + amplitude sin(2 pi frequency t + phase)) e_x,   div u = 0

in a periodic unit box, u = 0 on the grains. With the pores' hydraulic radius l = pore volume / wetted area, the force
is f0 = viscosity / (2 l)^2: velocity comes in units of f0 (2 l)^2 / viscosity, O(0.1) on average and O(1) in throats.

Staggered cells, each solid or pore. A face that touches a solid cell carries no flux and lies *on* the wall, so a
tangential neighbour sees u = 0 one cell away; a face buried between two solid cells has the wall half a cell away.
Time: second-order backward differences, viscosity implicit, advection extrapolated, incremental pressure correction in
rotational form (Guermond, Minev, Shen 2006, Comput. Methods Appl. Mech. Eng. 195, 6011).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from data.layout import Trajectory
from data.simulate.pore_space import draw_pore_space
from shodh.fields import Boundary, DomainSpec, FieldSpec, Grid
from shodh.physics.exterior import difference_down, difference_up, divergence_of_faces, gradient_of_cells
from shodh.physics.helmholtz import solve_poisson

PERIODIC: tuple[Boundary, Boundary, Boundary] = ("periodic", "periodic", "periodic")

DOMAIN = DomainSpec(
    name="porous_media",
    velocity_space="solenoidal",
    boundary=PERIODIC,
    velocity=FieldSpec(name="flux", units="1", location="face", long_name="volume flux through lower faces"),
    pressure=FieldSpec(name="pressure", units="1", location="cell", long_name="kinematic pressure, 0 in the solid"),
    medium=FieldSpec(name="pore_space", units="1", location="cell", long_name="1 in pores, 0 in the solid"),
    parameters=("dt", "viscosity", "frequency", "porosity"),
)

STEP_PER_CELL = 0.6  # time step / cell size: Courant number 0.6 at unit velocity
VISCOUS_TOLERANCE = 1e-4  # residuals of a time step, relative to the velocity
PROJECTION_TOLERANCE = 1e-4
STORED_TOLERANCE = 1e-8  # below FP32 round-off, for stored snapshots (in FP64)
MAX_ITERATIONS = 2000
CPU_CELLS_PER_BATCH = 2**15  # one trajectory at 32^3 fills the cache
GPU_CELLS_PER_BATCH = 2**24  # 8 trajectories at 128^3


@dataclass(frozen=True, kw_only=True)
class PorousMediaConfig:
    """Which rocks and flows to simulate; ranges are drawn from per trajectory, uniformly (viscosity: log-uniformly)."""

    num_trajectories: int = 24
    num_snapshots: int = 25
    snapshot_interval: float = 0.2  # in units of box length / velocity
    resolution: int = 32  # cells per axis
    seed: int = 0
    spin_up: float = 2.0  # simulated from rest before the first snapshot
    porosity: tuple[float, float] = (0.45, 0.7)  # before unconnected pores are filled
    blobiness: tuple[float, float] = (0.3, 0.5)  # of porespy; grains are about box / (9 blobiness) wide
    viscosity: tuple[float, float] = (0.01, 0.04)
    frequency: tuple[float, float] = (0.3, 0.5)
    amplitude: tuple[float, float] = (0.6, 1.1)  # of the pulsation, relative to the mean force

    def __post_init__(self) -> None:
        for name in ("num_trajectories", "num_snapshots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1. Raise it.")
        if self.resolution < 8:
            raise ValueError(f"resolution={self.resolution}: pores would be narrower than 2 cells. Use 8 or more.")
        if not self.snapshot_interval > 0:
            raise ValueError(f"snapshot_interval={self.snapshot_interval}: must be positive. Raise it.")
        if self.spin_up < 0:
            raise ValueError(f"spin_up={self.spin_up}: must not be negative. Use 0 to record from rest.")
        for name in ("porosity", "blobiness", "viscosity", "frequency", "amplitude"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}={low, high}: not a range of positive values. Write it as [low, high].")
        if self.porosity[1] >= 1:
            raise ValueError(f"porosity={self.porosity}: without grains the flow accelerates for ever. Stay below 1.")

    @property
    def grid(self) -> Grid:
        n, size = self.resolution, 1 / self.resolution
        return Grid(shape=(n, n, n), spacing=(size, size, size), boundary=PERIODIC)

    @property
    def num_steps(self) -> int:
        """Time steps from one snapshot to the next."""
        return math.ceil(self.snapshot_interval * self.resolution / STEP_PER_CELL)

    @property
    def num_spin_up(self) -> int:
        """Snapshot intervals before the first snapshot."""
        return math.ceil(self.spin_up / self.snapshot_interval)


class Rock(NamedTuple):
    """The pore space as the operators read it; all in one floating-point type."""

    pore: Float[Tensor, "b x y z"]  # 1 in pores
    open_face: Float[Tensor, "b 3 x y z"]  # 1 between two pore cells
    diagonal: Float[Tensor, "b 3 x y z"]  # of minus the vector Laplacian, cell size 1


class Forcing(NamedTuple):
    """Fluid and driving force of each trajectory of a batch; FP64, so that parameters are stored as drawn."""

    viscosity: Float[Tensor, "b"]
    strength: Float[Tensor, "b"]  # f0
    amplitude: Float[Tensor, "b"]
    frequency: Float[Tensor, "b"]
    phase: Float[Tensor, "b"]

    def at(self, time: float) -> Float[Tensor, "b"]:
        """Body force along x."""
        return self.strength * (1 + self.amplitude * torch.sin(2 * math.pi * self.frequency * time + self.phase))


class State(NamedTuple):
    """What one time step hands to the next."""

    velocity: Float[Tensor, "b 3 x y z"]
    previous: Float[Tensor, "b 3 x y z"]  # velocity one step earlier
    previous_advection: Float[Tensor, "b 3 x y z"]
    pressure: Float[Tensor, "b x y z"]
    correction: Float[Tensor, "b x y z"]  # last change of pressure


def simulate(
    config: PorousMediaConfig,
    indices: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Trajectory]]:
    """Each wanted trajectory with its index; trajectory i depends only on (config, i).

    ``progress(k)`` is called after every k of the ``total_work(config, len(indices))`` units. Raises RuntimeError where
    a solution blows up or no rock percolates.
    """
    device = torch.device(device)
    num_cells = CPU_CELLS_PER_BATCH if device.type == "cpu" else GPU_CELLS_PER_BATCH
    size = max(1, num_cells // config.resolution**3)
    for start in range(0, len(indices), size):
        batch = indices[start : start + size]
        pores, forcings = zip(*(_draw_case(config, index) for index in batch), strict=True)
        forcing = Forcing(*torch.tensor(forcings, dtype=torch.float64, device=device).unbind(1))
        rock = prepare_rock(torch.from_numpy(np.stack(pores)).to(device))
        state = rest(rock)
        velocity, pressure = [], []
        for k in range(-config.num_spin_up, config.num_snapshots):
            if k >= 0:
                velocity.append(_stored_flux(state.velocity, rock))
                pressure.append(state.pressure.cpu().numpy())
            if k + 1 < config.num_snapshots:
                state = _advance_interval(state, rock, forcing, config, k)
                _refuse_blow_up(state, batch, (k + 1) * config.snapshot_interval)
            if progress:
                progress(len(batch))
        for b, index in enumerate(batch):
            yield (
                index,
                Trajectory(
                    velocity=np.stack([snapshot[b] for snapshot in velocity]),
                    pressure=np.stack([snapshot[b] for snapshot in pressure]),
                    medium=pores[b].astype(np.float32),
                    time=np.arange(config.num_snapshots) * config.snapshot_interval,
                    parameters={
                        "dt": config.snapshot_interval,
                        "viscosity": float(forcing.viscosity[b]),
                        "frequency": float(forcing.frequency[b]),
                        "porosity": float(pores[b].mean()),
                    },
                    seed=config.seed,
                    grid=config.grid,
                ),
            )


def total_work(config: PorousMediaConfig, num: int) -> int:
    """Units of work, one per trajectory and snapshot interval, in ``num`` trajectories."""
    return num * (config.num_spin_up + config.num_snapshots)


def permeability(pore: Bool[Tensor, "x y z"], axis: int, tolerance: float = 1e-5) -> float:
    """Darcy permeability along an axis, in units of a cell's face area, of a periodic rock: k = mean of u.

    u is the steady Stokes flow at unit viscosity and force: P(-lap u) = P f, with P the projection onto solenoidal
    fields, by conjugate gradients that stay in the range of P. FP64; the residual falls below ``tolerance`` relative to
    P f (the error of k is of its square). Raises RuntimeError where that takes more than MAX_ITERATIONS.
    """
    rock = prepare_rock(pore[None], torch.float64)
    force = torch.zeros_like(rock.open_face)
    force[:, axis] = rock.open_face[:, axis]
    tight = tolerance / 100

    def apply(velocity: Tensor) -> Tensor:
        return project(-laplacian(velocity, rock), rock, tight)[0]

    right = project(force, rock, tight)[0]
    velocity = conjugate_gradient(apply, right, torch.zeros_like(right), tolerance * _norm(right))
    value = float(velocity[:, axis].mean())
    if math.isnan(value):
        raise RuntimeError(f"tolerance={tolerance}: not reached in {MAX_ITERATIONS} iterations. Raise it.")
    return value


def prepare_rock(pore: Bool[Tensor, "b x y z"], dtype: torch.dtype = torch.float32) -> Rock:
    """The operators' view of a pore space, walls as the head of this file says."""
    solid = (~pore).to(dtype)
    open_face = torch.stack([(pore & pore.roll(1, i - 3)).to(dtype) for i in range(3)], 1)
    buried = torch.stack([solid * solid.roll(1, i - 3) for i in range(3)], 1)
    diagonal = torch.full_like(open_face, 6.0)
    for dim in (-3, -2, -1):  # a wall half a cell away mirrors the velocity: its neighbour is -u
        diagonal = diagonal + buried.roll(1, dim) + buried.roll(-1, dim)
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


def _draw_case(config: PorousMediaConfig, index: int) -> tuple[np.ndarray, tuple[float, ...]]:
    """Pore space, and the values of ``Forcing``, of one trajectory."""
    rng = np.random.default_rng([config.seed, index])
    pore = draw_pore_space(rng, config.resolution, config.porosity, config.blobiness)
    viscosity = float(np.exp(rng.uniform(*np.log(config.viscosity))))
    wetted = sum(np.count_nonzero(pore ^ np.roll(pore, 1, axis)) for axis in range(3))
    hydraulic_radius = np.count_nonzero(pore) / (wetted * config.resolution)
    strength = viscosity / (2 * hydraulic_radius) ** 2
    amplitude, frequency = rng.uniform(*config.amplitude), rng.uniform(*config.frequency)
    return pore, (viscosity, strength, amplitude, frequency, rng.uniform(0, 2 * math.pi))


def _advance_interval(state: State, rock: Rock, forcing: Forcing, config: PorousMediaConfig, interval: int) -> State:
    step = config.snapshot_interval / config.num_steps
    for k in range(1, config.num_steps + 1):
        time = interval * config.snapshot_interval + k * step
        state = advance(state, rock, forcing.viscosity, forcing.at(time), step)
    return state


def _stored_flux(velocity: Float[Tensor, "b 3 x y z"], rock: Rock) -> np.ndarray:
    """Flux u * area in FP32, its divergence removed in FP64 to below FP32 round-off."""
    exact = Rock(*(part.double() for part in rock))
    flux = project(velocity.double(), exact, STORED_TOLERANCE)[0] / velocity.shape[-3] ** 2
    return flux.float().cpu().numpy()


def _refuse_blow_up(state: State, indices: Sequence[int], time: float) -> None:
    finite = torch.isfinite(state.velocity).flatten(1).all(1)
    if not bool(finite.all()):
        lost = indices[int(torch.nonzero(~finite)[0])]
        raise RuntimeError(f"trajectory {lost} blew up before time {time:g}: raise viscosity or resolution.")


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
