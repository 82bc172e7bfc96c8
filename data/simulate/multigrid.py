"""Aggregation multigrid for Laplacians on the pores of a rock, whose convergence does not depend on the rock's size.

Blocks of 2^3 cells become one unknown for each connected piece of pore in them, so that coarse grids never couple pores
across a grain. Smoothed aggregation: Vanek, Mandel, Brezina 1996, Computing 56, 179.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array, diags_array
from scipy.sparse.csgraph import connected_components

BLOCK = 2  # cells per axis that become one; 3 is cheaper a cycle, but takes more of them on larger grids
COARSEST = 400  # unknowns that are solved for directly
SHIFT = 1e-8  # of the diagonal, added on the coarsest grid: a constant pressure has no other bound
POWER_ITERATIONS = 12
MARGIN = 1.1  # by which so few power iterations may miss the largest eigenvalue


class Level(NamedTuple):
    """One grid of the hierarchy and the way down to the next."""

    matrix: csr_array
    damping: Float[np.ndarray, "n"]  # what a Jacobi sweep multiplies a residual by
    prolongation: csr_array
    restriction: csr_array


class Multigrid(NamedTuple):
    """A symmetric positive definite approximation of a matrix's inverse."""

    levels: tuple[Level, ...]
    coarsest: Float[np.ndarray, "m m"]  # inverse

    def solve(self, right: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """One V-cycle from zero, with one damped Jacobi sweep before and after each coarse correction."""
        sides, guesses = [], []
        for level in self.levels:
            guess = level.damping * right
            sides.append(right)
            guesses.append(guess)
            right = level.restriction @ (right - level.matrix @ guess)
        solution = self.coarsest @ right
        for level, side, guess in zip(reversed(self.levels), reversed(sides), reversed(guesses), strict=True):
            solution = guess + level.prolongation @ solution
            solution += level.damping * (side - level.matrix @ solution)
        return solution


def build_multigrid(matrix: csr_array, place: Int[np.ndarray, "4 n"]) -> Multigrid:
    """The hierarchy of a symmetric matrix; ``place``: each unknown's kind (kinds never mix) and its cell x, y, z."""
    levels = []
    while place.shape[1] > COARSEST:
        place = np.concatenate([place[:1], place[1:] // BLOCK])
        member, num = _aggregate(matrix, place)
        if num > 0.9 * len(member):
            raise RuntimeError(f"{num} separate pores cannot be coarsened further: keep only those that percolate.")
        damping = _damped_inverse(matrix)
        rough = csr_array((np.ones(len(member)), (np.arange(len(member)), member)), shape=(len(member), num))
        prolongation = csr_array(rough - diags_array(damping) @ (matrix @ rough))
        restriction = csr_array(prolongation.T)
        levels.append(Level(matrix, damping, prolongation, restriction))
        matrix = csr_array(restriction @ (matrix @ prolongation))
        first = np.zeros(num, dtype=np.int64)
        first[member] = np.arange(len(member))
        place = place[:, first]
    dense = matrix.toarray()
    return Multigrid(tuple(levels), np.linalg.inv(dense + SHIFT * np.diag(np.diag(dense))))


def _aggregate(matrix: csr_array, block: Int[np.ndarray, "4 n"]) -> tuple[Int[np.ndarray, "n"], int]:
    """A label for each unknown, equal where they are connected inside one block; and how many labels there are."""
    key = np.asarray(np.ravel_multi_index(tuple(block), tuple(block.max(axis=1) + 1)))
    row = np.repeat(np.arange(len(key)), np.diff(matrix.indptr))
    inside = key[row] == key[matrix.indices]
    entries = (np.ones(np.count_nonzero(inside), dtype=np.int8), (row[inside], matrix.indices[inside]))
    graph = csr_array(entries, shape=(len(key), len(key)))
    num, member = connected_components(graph, directed=False, return_labels=True)
    return np.asarray(member), int(num)


def _damped_inverse(matrix: csr_array) -> Float[np.ndarray, "n"]:
    """4 / (3 diagonal largest), with the largest eigenvalue of matrix / diagonal; 4/3: Vanek, Mandel, Brezina."""
    diagonal = matrix.diagonal()
    vector = np.random.default_rng(0).normal(size=len(diagonal))
    for _ in range(POWER_ITERATIONS):
        vector = matrix @ (vector / np.linalg.norm(vector)) / diagonal
    return 4 / 3 / (MARGIN * np.linalg.norm(vector)) / diagonal
