"""Flux through the pores of a solid: none through the solid and no divergence, both bit for bit.

    F' = M (F - w d phi),  d F' = 0,  M the faces between two pore cells, w = area / distance

is the flux nearest to F by kinetic energy. It is solved in FP64, rounded to a lattice 2^-k, and what rounding left in
each cell is then led through the pores to where it is missing, in whole steps of the lattice. So the divergence of the
stored FP32 flux, evaluated in FP64, is 0.0. Runs on the CPU, one sample after the other.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import LinearOperator, cg, splu
from torch import Tensor

from shodh.fields import Boundary, DecodedFields, DomainSpec, Grid

PORE_SPACE = "pore_space"  # name of a medium that is 1 in pore cells and 0 in solid ones
MAX_ITERATIONS = 20_000  # of the conjugate gradients; rocks of 32^3 to 128^3 take about a hundred
NUM_BLOCKS = 4096  # of the coarse equations


class PoreNetwork(NamedTuple):
    """The pore cells of one sample, numbered from 0, and the open faces between them."""

    face: Int[np.ndarray, "m"]  # place in the flattened (3, x, y, z)
    lower: Int[np.ndarray, "m"]  # pore cell on the lower side of each face
    upper: Int[np.ndarray, "m"]
    cell: Int[np.ndarray, "n"]  # place of each pore cell in the flattened (x, y, z)

    @property
    def num_cells(self) -> int:
        return len(self.cell)

    def divergence(self, flux: np.ndarray) -> np.ndarray:
        """Net flux (num_cells,) out of each pore cell, of fluxes (m,) through the open faces, in their dtype."""
        total = np.zeros(self.num_cells, flux.dtype)
        np.add.at(total, self.lower, flux)
        np.subtract.at(total, self.upper, flux)
        return total


def has_solid(domain: DomainSpec) -> bool:
    """Whether the domain's medium says which cells are pore and which solid."""
    return domain.medium.name == PORE_SPACE


def find_pores(medium: Float[Tensor, "b 1 x y z"], mean: float = 0.0, scale: float = 1.0) -> Bool[Tensor, "b x y z"]:
    """Which cells are pore, from a medium stored as (m - mean) / scale, m = 1 in pores and 0 in the solid.

    Raises ValueError where m is neither, beyond FP32 round-off of the normalisation.
    """
    indicator = medium.squeeze(1).double() * scale + mean
    pore = indicator > 0.5
    if not bool(((indicator - pore.double()).abs() <= 1e-5 * max(1.0, abs(mean))).all()):
        raise ValueError("medium: not 0 or 1 everywhere, so it is no pore space. Give the mean and scale it has.")
    return pore


def open_faces(pore: Bool[Tensor, "*b x y z"], boundary: Sequence[Boundary]) -> Bool[Tensor, "*b 3 x y z"]:
    """Lower faces that fluid can pass: between two pore cells, and none on a wall."""
    faces = []
    for axis in range(3):
        passable = pore & torch.roll(pore, 1, axis - 3)
        if boundary[axis] != "periodic":
            passable.select(axis - 3, 0).fill_(False)
        faces.append(passable)
    return torch.stack(faces, -4)


def project_fields(fields: DecodedFields, pore: Bool[Tensor, "b x y z"], grid: Grid) -> DecodedFields:
    """Decoded fields whose flux and velocity keep out of the solid; see ``project_into_pores``."""
    flux = project_into_pores(fields.flux, pore, grid.relative)
    area = torch.from_numpy(grid.relative.face_area).to(flux.device, torch.float32)
    return DecodedFields(flux, flux / area, fields.pressure)


def project_into_pores(
    flux: Float[Tensor, "b 3 x y z"], pore: Bool[Tensor, "b x y z"], grid: Grid
) -> Float[Tensor, "b 3 x y z"]:
    """The nearest FP32 flux with exactly none through faces that touch solid, and with exactly zero divergence.

    The lattice's step is at most 2^-22 of the largest value, or 2^-28 of the largest given. Raises ValueError for an
    open axis and for values that are not finite, RuntimeError where the iteration does not converge.
    """
    if "open" in grid.boundary:
        raise ValueError(f"grid.boundary={grid.boundary}: flux through an open side has no projection. Use wall.")
    if not bool(torch.isfinite(flux).all()):
        raise ValueError("flux: not finite, so it has no projection. Check the decoder's input and weights.")
    projected = np.zeros(flux.shape, np.float32)
    for sample, (values, cells) in enumerate(zip(flux.detach().cpu().double(), pore.cpu(), strict=True)):
        network = connect_pores(cells, grid.boundary)
        if not len(network.face):
            continue
        given = values.numpy().ravel()[network.face]
        nearest = remove_divergence_in_pores(given, network, grid)
        # where hardly anything can flow, what comes out is the solver's remainder, which is no flow to resolve
        step = lattice_step(max(np.abs(nearest).max(), np.abs(given).max() / 64))
        projected[sample].reshape(-1)[network.face] = balance(nearest, network, step)
    return torch.from_numpy(projected).to(flux.device)


def connect_pores(pore: Bool[Tensor, "x y z"], boundary: Sequence[Boundary]) -> PoreNetwork:
    """The open faces of a pore space and the pore cells on either side of them."""
    cells = pore.numpy()
    number = np.cumsum(cells).reshape(cells.shape) - 1
    below = np.stack([np.roll(number, 1, axis) for axis in range(3)])
    face = np.flatnonzero(open_faces(pore, boundary).numpy())
    return PoreNetwork(face, below.ravel()[face], number.ravel()[face % cells.size], np.flatnonzero(cells))


def remove_divergence_in_pores(
    flux: Float[np.ndarray, "m"], network: PoreNetwork, grid: Grid
) -> Float[np.ndarray, "m"]:
    """Fluxes through the open faces without divergence, the nearest by kinetic energy, in FP64.

    The divergence left has a root sum of squares of at most half a step of the given flux's lattice. Where little of
    it can flow, the result may be put on a lattice up to 64 times finer; ``balance`` leads away what is left.
    """
    largest = float(np.abs(flux).max(initial=0.0))
    if largest == 0:
        return flux
    conductance = np.broadcast_to(grid.face_area / grid.face_distance, (3, *grid.shape)).ravel()[network.face]
    rows = np.concatenate([network.lower, network.upper])
    columns = np.tile(np.arange(len(flux)), 2)
    signs = np.repeat([1.0, -1.0], len(flux))
    incidence = sparse.csr_array((signs, (rows, columns)), shape=(network.num_cells, len(flux)))
    matrix = sparse.csr_array(incidence @ (incidence.T.tocsr() * conductance[:, None]))
    potential, unsolved = cg(
        matrix,
        incidence @ flux,
        rtol=0.0,
        atol=lattice_step(largest) / 2,
        maxiter=MAX_ITERATIONS,
        M=_precondition(matrix, network, grid),
    )
    if unsolved:
        raise RuntimeError(f"projection into the pores: not converged after {MAX_ITERATIONS} iterations.")
    return flux - conductance * (potential[network.lower] - potential[network.upper])


def _precondition(matrix: sparse.csr_array, network: PoreNetwork, grid: Grid) -> LinearOperator:
    """Two levels, added: the diagonal, and the same equations for one potential a block of cells, solved directly.

    Source: Nicolaides, Deflation of conjugate gradients with applications to boundary value problems (1987).
    """
    size = math.ceil((math.prod(grid.shape) / NUM_BLOCKS) ** (1 / 3))
    place = np.unravel_index(network.cell, grid.shape)
    block = np.unique(np.ravel_multi_index([p // size for p in place], grid.shape), return_inverse=True)[1]
    gather = sparse.csr_array((np.ones(len(block)), (block, np.arange(len(block)))))
    spread = gather.T.tocsr()
    coarse = (gather @ matrix @ spread).tocsc()
    stiffness = coarse.diagonal()  # singular, as a constant potential drives nothing; a little more makes it definite
    solve = splu(coarse + sparse.diags_array(np.where(stiffness > 0, 1e-8 * stiffness, 1.0), format="csc")).solve
    diagonal = matrix.diagonal()
    inverse = np.divide(1.0, diagonal, out=np.zeros_like(diagonal), where=diagonal > 0)  # 0: a cell cut off from all

    def apply(residual: np.ndarray) -> np.ndarray:
        return inverse * residual + spread @ solve(gather @ residual)

    return LinearOperator(matrix.shape, matvec=apply)  # type: ignore[call-arg]  # scipy's stubs know only __init__


def balance(flux: Float[np.ndarray, "m"], network: PoreNetwork, step: float) -> Float[np.ndarray, "m"]:
    """Fluxes of nearly no divergence as FP32 of exactly none: rounded to whole steps, the remainders led away.

    Each connected set of pores keeps a spanning tree of shortest paths; from its leaves to its root every cell hands
    its remainder on through one face. They add up to 0, as nothing enters or leaves the set.
    """
    steps = np.rint(flux / step).astype(np.int64)
    order, parent, ends = _span(network)
    net = np.append(network.divergence(steps), 0)[order]
    for end, begin in pairwise(reversed(ends[1:])):
        np.add.at(net, parent[begin:end], net[begin:end])
    trees = parent == 0
    assert not net[1:][trees[1:]].any(), "the pores of a connected set do not balance"
    inner = np.flatnonzero(~trees)
    steps += _flows(order[inner], order[parent[inner]], net[inner], network)
    assert np.abs(steps).max(initial=0) < 2**24 and not network.divergence(steps).any()
    return (steps * step).astype(np.float32)


class _Tree(NamedTuple):
    order: Int[np.ndarray, "n"]  # cells by depth; the first is an auxiliary root above one cell of each connected set
    parent: Int[np.ndarray, "n"]  # place in ``order`` of each one's parent; 0 for the root itself
    ends: list[int]  # where in ``order`` each depth begins, and the end


def _span(network: PoreNetwork) -> _Tree:
    root = network.num_cells
    pairs = np.concatenate([network.lower, network.upper]), np.concatenate([network.upper, network.lower])
    graph = sparse.coo_array((np.ones(len(pairs[0]), np.int8), pairs), shape=(root + 1, root + 1))
    _, label = csgraph.connected_components(graph.tocsr()[:root, :root], directed=False)
    first = np.unique(label, return_index=True)[1]
    tops = np.full(len(first), root)
    rows, columns = np.concatenate([pairs[0], tops]), np.concatenate([pairs[1], first])
    graph = sparse.csr_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(root + 1, root + 1))
    order, predecessor = csgraph.breadth_first_order(graph, root)
    place = np.empty(root + 1, np.int64)
    place[order] = np.arange(root + 1)
    parent = np.append(0, place[predecessor[order[1:]]])  # ascending, because the search is breadth first
    ends = [0, 1]
    while ends[-1] <= root:
        ends.append(int(np.searchsorted(parent[1:], ends[-1])) + 1)
    return _Tree(order.astype(np.int64), parent, ends)


def _flows(child: np.ndarray, parent: np.ndarray, surplus: np.ndarray, network: PoreNetwork) -> np.ndarray:
    """What to add to each face's flux (m,) so that each child cell is rid of its surplus divergence to its parent."""
    key = network.lower * network.num_cells + network.upper
    ascending = np.argsort(key, kind="stable")
    total, done = np.zeros(len(key), np.int64), np.zeros(len(child), bool)
    for low, high, sign in ((child, parent, -1), (parent, child, 1)):
        wanted = low * network.num_cells + high
        place = ascending[np.minimum(np.searchsorted(key, wanted, sorter=ascending), len(key) - 1)]
        found = (key[place] == wanted) & ~done  # two faces lie between cells on an axis of 2; one is enough
        done |= found
        total[place[found]] = sign * surplus[found]
    return total


def lattice_step(largest: float) -> float:
    """The step of a lattice, a power of two: ``largest`` is at most 2^23 steps, half of what FP32 counts exactly."""
    return float(np.ldexp(1.0, max(int(np.frexp(largest)[1]) - 23, -120)))
