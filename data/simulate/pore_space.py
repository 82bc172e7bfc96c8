"""Random periodic rocks, and what of a rock a steady flow can reach. Pore spaces are bool (x, y, z), True in pores."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components
from scipy.spatial import KDTree

NUM_DRAWS = 100  # before a kind of rock is called closed
OVERLAP = 1e-3  # of a diameter, that spheres may share once pushed apart
NUM_PUSHES = 3000


def draw_percolating(
    draw: Callable[[], Bool[np.ndarray, "x y z"]], setting: str, advice: str
) -> Bool[np.ndarray, "x y z"]:
    """The first drawn rock that percolates along x, reduced to what does.

    Raises RuntimeError after 100 that do not, naming the setting and what to do.
    """
    for _ in range(NUM_DRAWS):
        kept = keep_percolating(draw())
        if kept.any():
            return kept
    raise RuntimeError(f"{setting}: none of {NUM_DRAWS} rocks percolates along x. {advice}")


def draw_blobs(
    rng: np.random.Generator, resolution: int, porosity: tuple[float, float], blobiness: tuple[float, float]
) -> Bool[np.ndarray, "x y z"]:
    """Gaussian blobs; porosity and blobiness (porespy's: the blur is box / (40 blobiness)) uniform in their ranges."""
    try:
        from porespy.generators import blobs  # takes seconds to import
    except ModuleNotFoundError:
        raise RuntimeError("geometry=blobs: porespy is not installed. Install it, or set geometry=gaussian.") from None

    others = np.random.get_state()  # blobs seeds NumPy's global generator
    pore = blobs(
        [resolution] * 3,
        porosity=rng.uniform(*porosity),
        blobiness=rng.uniform(*blobiness),  # pyright: ignore[reportArgumentType] (declared int, works for float)
        periodic=True,
        seed=int(rng.integers(2**31)),
    )
    np.random.set_state(others)
    return pore


def draw_gaussian(
    rng: np.random.Generator, resolution: int, porosity: tuple[float, float], blobiness: tuple[float, float]
) -> Bool[np.ndarray, "x y z"]:
    """White noise blurred by a periodic Gaussian of box / (40 blobiness) and cut at a quantile.

    Porosity and blobiness uniform in their ranges; the porosity is met to a cell. Draws the kind of rock that
    ``draw_blobs`` does, not the same rocks.
    """
    share, width = rng.uniform(*porosity), 1 / (40 * rng.uniform(*blobiness))
    axes = [np.fft.fftfreq(resolution, 1 / resolution)] * 2 + [np.fft.rfftfreq(resolution, 1 / resolution)]
    squared = sum(waves**2 for waves in np.meshgrid(*axes, indexing="ij", sparse=True))
    response = np.exp(-2 * (np.pi * width) ** 2 * squared)
    noise = rng.standard_normal((resolution,) * 3)
    field = np.fft.irfftn(np.fft.rfftn(noise) * response, noise.shape, range(3))
    return field < np.quantile(field, share)


def draw_sphere_pack(
    rng: np.random.Generator, porosity: tuple[float, float], diameter: tuple[float, float]
) -> Float[np.ndarray, "n 4"]:
    """Centre and diameter of equal spheres at random in the periodic unit box, pushed apart until they only touch.

    Diameter is drawn first, then adjusted so that a whole number of spheres leaves the drawn porosity. Raises
    RuntimeError where they find no room, as below a porosity of about 0.4 (random close packing: 0.36).
    """
    solid, wanted = 1 - rng.uniform(*porosity), rng.uniform(*diameter)
    num = max(1, round(6 * solid / (np.pi * wanted**3)))
    size = (6 * solid / (np.pi * num)) ** (1 / 3)
    centre = rng.uniform(size=(num, 3))
    for _ in range(NUM_PUSHES):
        first, second = KDTree(centre, boxsize=1.0).query_pairs(size, output_type="ndarray").T
        apart = centre[first] - centre[second]
        apart -= np.round(apart)
        distance = np.linalg.norm(apart, axis=1)
        if not (distance < size * (1 - OVERLAP)).any():
            return np.column_stack([centre, np.full(num, size)])
        push = (0.5 * (size - distance) / distance)[:, None] * apart
        for axis in range(3):
            centre[:, axis] += np.bincount(first, push[:, axis], num)
            centre[:, axis] -= np.bincount(second, push[:, axis], num)
        centre %= 1
        centre[centre == 1] = 0  # of a negative coordinate below round-off; the tree's box is [0, 1)
    raise RuntimeError(f"porosity={porosity}: {num} spheres of diameter {size:.3g} do not fit the box. Raise it.")


@cache
def read_sphere_pack(path: str | Path) -> Float[np.ndarray, "n 4"]:
    """Centre and diameter of spheres in the periodic unit box, from a text file of lines ``x y z diameter``.

    One line of names may stand first. Raises ValueError in one line for anything else.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"source={path}: cannot be read ({error}). Name a text file of spheres.") from None
    skipped = 1 if lines and lines[0].split() == ["x", "y", "z", "diameter"] else 0
    try:
        rows = [[float(word) for word in line.split()] for line in lines[skipped:] if line.strip()]
        spheres = np.array(rows, dtype=float).reshape(len(rows), 4)
    except ValueError:
        raise ValueError(f"source={path}: not lines of x y z diameter. Write four numbers a line.") from None
    if not len(spheres) or not ((spheres[:, :3] >= 0) & (spheres[:, :3] <= 1)).all() or not (spheres[:, 3] > 0).all():
        raise ValueError(f"source={path}: centres must lie in [0, 1] and diameters be positive. Scale the box to 1.")
    return spheres


def place_spheres(spheres: Float[np.ndarray, "n 4"], resolution: int) -> Bool[np.ndarray, "x y z"]:
    """The pore space around spheres in the periodic unit box: cells whose centre lies in none."""
    pore = np.ones((resolution,) * 3, dtype=bool)
    for *centre, diameter in spheres:
        reach = int(np.ceil(diameter / 2 * resolution)) + 1
        near = [np.arange(-reach, reach + 1) + int(c * resolution) for c in centre]
        offset = [(index + 0.5) / resolution - c for index, c in zip(near, centre, strict=True)]
        inside = offset[0][:, None, None] ** 2 + offset[1][:, None] ** 2 + offset[2] ** 2 <= diameter**2 / 4
        cells = (index[inside] % resolution for index in np.meshgrid(*near, indexing="ij"))
        pore[tuple(cells)] = False
    return pore


def keep_percolating(pore: Bool[np.ndarray, "x y z"]) -> Bool[np.ndarray, "x y z"]:
    """The pores connected to a path that crosses the box along x and meets its own start; all others become solid.

    Where several such systems of pores are apart, the largest: one system has one pressure.
    """
    winding = keep_winding(pore, 0)
    if not winding.any():
        return winding
    label = label_pores(winding, (True, True, True))
    sizes = np.bincount(label[winding])
    return winding & (label == sizes.argmax())


def keep_winding(pore: Bool[np.ndarray, "x y z"], axis: int) -> Bool[np.ndarray, "x y z"]:
    """The pores of periodic rock connected to a path that goes around the box along ``axis`` and meets its own start.

    Cut open there, a rock falls into pieces. Each is given a number of turns such that stepping over the cut adds one;
    pieces that no such numbers fit go around.
    """
    piece = label_pores(pore, (axis != 0, axis != 1, axis != 2))
    joined = pore.take(0, axis) & pore.take(-1, axis)
    below, above = np.unique(np.stack([piece.take(-1, axis)[joined], piece.take(0, axis)[joined]]), axis=1)
    num = int(piece.max()) + 1
    graph = coo_array((np.ones(len(below)), (below, above)), shape=(num, num)).tocsr()
    system = connected_components(graph, directed=False)[1]
    turns = _count_turns(graph, system, np.unique(below))
    winding = np.unique(system[below[turns[above] != turns[below] + 1]])
    return pore & np.isin(system, winding)[piece]


def _count_turns(graph: csr_array, system: Int[np.ndarray, "n"], nodes: Int[np.ndarray, "k"]) -> Int[np.ndarray, "n"]:
    """Turns of each piece along a spanning tree from the first piece of its system."""
    turns = np.zeros(len(system), dtype=np.int64)
    for start in nodes[np.unique(system[nodes], return_index=True)[1]]:
        order, parents = breadth_first_order(graph, start, directed=False)
        for node in order[1:]:
            parent = parents[node]
            turns[node] = turns[parent] + (1 if graph[parent, node] else -1)
    return turns


def label_pores(pore: Bool[np.ndarray, "x y z"], wrapped: tuple[bool, bool, bool]) -> Int[np.ndarray, "x y z"]:
    """A label per cell: equal where pores are connected through faces, also around the box along ``wrapped`` axes."""
    cell = np.arange(pore.size).reshape(pore.shape)
    pairs = []
    for axis in range(3):
        joined = pore & np.roll(pore, 1, axis)
        if not wrapped[axis]:
            joined[(slice(None),) * axis + (0,)] = False
        pairs.append(np.stack([cell[joined], np.roll(cell, 1, axis)[joined]]))
    rows, columns = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(pore.size, pore.size))
    return connected_components(graph, directed=False)[1].reshape(pore.shape)
