"""Random periodic rocks, and what of a rock a steady flow can reach."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def draw_pore_space(
    rng: np.random.Generator, resolution: int, porosity: tuple[float, float], blobiness: tuple[float, float]
) -> np.ndarray:
    """A random rock, bool (x, y, z), True in pores: Gaussian blobs, of which only what percolates along x is kept.

    Porosity (before that) and blobiness (porespy's: the blur is box / (40 blobiness)) are uniform in their ranges.
    Draws again where nothing percolates; raises RuntimeError after 100 times.
    """
    from porespy.generators import blobs  # takes seconds to import

    for _ in range(100):
        others = np.random.get_state()  # blobs seeds NumPy's global generator
        pore = blobs(
            [resolution] * 3,
            porosity=rng.uniform(*porosity),
            blobiness=rng.uniform(*blobiness),  # pyright: ignore[reportArgumentType] (declared int, works for float)
            periodic=True,
            seed=int(rng.integers(2**31)),
        )
        np.random.set_state(others)
        kept = keep_percolating(pore)
        if kept.any():
            return kept
    raise RuntimeError(f"porosity={porosity}: none of 100 rocks percolates along x. Raise it.")


def keep_percolating(pore: np.ndarray) -> np.ndarray:
    """The pores connected to a path that crosses the box along x and meets its own start; all others become solid.

    Where several such systems of pores are apart, the largest: one system has one pressure.
    """
    crossing = _components(pore, wrap_x=False)
    both_ends = pore[0] & pore[-1] & (crossing[0] == crossing[-1])
    label = _components(pore, wrap_x=True)
    candidates = np.unique(label[0][both_ends])
    if not len(candidates):
        return np.zeros_like(pore)
    largest = max(candidates, key=lambda candidate: np.count_nonzero(pore & (label == candidate)))
    return pore & (label == largest)


def _components(pore: np.ndarray, *, wrap_x: bool) -> np.ndarray:
    """A label per cell: equal where pores are connected through faces, periodically in y, z and, on request, x."""
    cell = np.arange(pore.size).reshape(pore.shape)
    pairs = []
    for axis in range(3):
        joined = pore & np.roll(pore, 1, axis)
        if axis == 0 and not wrap_x:
            joined[0] = False
        pairs.append(np.stack([cell[joined], np.roll(cell, 1, axis)[joined]]))
    rows, columns = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(pore.size, pore.size))
    return connected_components(graph, directed=False)[1].reshape(pore.shape)
