"""The linear system of steady Stokes flow on the voxels of a rock: sparse matrices over the pores only.

Staggered cells, cell size and viscosity 1, mean flow along axis 0. A face that touches a solid cell carries no flux.
"""

from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array, csr_array

Boundary = Literal["periodic", "confined"]  # confined: pressure planes at both ends, no-slip walls on the four sides
Walls = Literal["smooth", "voxel"]  # where a tangential neighbour of a half solid face sees u = 0: 1 or 1/2 cell away
WALL_WEIGHT: dict[Walls, float] = {"smooth": 1.0, "voxel": 2.0}


class StokesSystem(NamedTuple):
    """laplacian u - divergence' p = force, divergence u = 0, for the faces and cells that are unknowns."""

    laplacian: csr_array  # minus the vector Laplacian
    divergence: csr_array
    force: Float[np.ndarray, "u"]  # unit force along axis 0
    face_place: Int[np.ndarray, "4 u"]  # axis and index of each velocity
    cell_place: Int[np.ndarray, "4 p"]  # 0 and index of each pressure


class Faces(NamedTuple):
    """Lower faces of every cell, by the axis that they are normal to."""

    number: Int[np.ndarray, "3 x y z"]  # of the unknown; -1 where closed
    buried: Bool[np.ndarray, "3 x y z"]  # between two solid cells


def assemble_stokes(pore: Bool[np.ndarray, "x y z"], boundary: Boundary, walls: Walls) -> StokesSystem:
    """The system for a block of pores (True); a confined one gets a layer of solid at its upper sides and ends.

    At a pressure plane all components of velocity have zero gradient along the flow: the faces in it are unknowns with
    half a control volume.
    """
    cell = np.pad(pore, (0, 1)) if boundary == "confined" else pore
    faces = _number_faces(cell, boundary)
    is_open = faces.number >= 0
    force = np.zeros(np.count_nonzero(is_open))
    along = is_open[0].astype(float)
    if boundary == "confined":
        along[[0, -1]] /= 2
    force[: np.count_nonzero(is_open[0])] = along[is_open[0]]
    cells = np.stack([np.zeros(np.count_nonzero(cell), dtype=np.int64), *np.nonzero(cell)])
    matrix = _laplacian(faces, boundary, WALL_WEIGHT[walls])
    return StokesSystem(matrix, _divergence(cell, faces.number), force, np.stack(np.nonzero(is_open)), cells)


def _number_faces(cell: Bool[np.ndarray, "x y z"], boundary: Boundary) -> Faces:
    is_open = np.stack([cell & np.roll(cell, 1, axis) for axis in range(3)])
    buried = np.stack([~cell & ~np.roll(cell, 1, axis) for axis in range(3)])
    if boundary == "confined":  # beyond a pressure plane the rock goes on as its mirror image
        for plane, inside in ((0, 0), (-1, -2)):
            is_open[0, plane], buried[0, plane] = cell[inside], ~cell[inside]
    number = np.full(is_open.shape, -1, dtype=np.int32)
    number[is_open] = np.arange(np.count_nonzero(is_open))
    return Faces(number, buried)


def _laplacian(faces: Faces, boundary: Boundary, wall_weight: float) -> csr_array:
    """Sum over all pairs of neighbouring faces of one axis; what a closed one adds to the diagonal is the wall rule."""
    size = np.count_nonzero(faces.number >= 0)
    diagonal = np.zeros(size)
    rows, columns, values = [], [], []
    for normal, along in product(range(3), repeat=2):
        share = _shared_side(faces.number.shape[1:], boundary, normal, along)
        here, there = faces.number[normal], np.roll(faces.number[normal], -1, along)
        # the next closed face along the velocity lies on the wall exactly, one cell away
        wall = np.where(faces.buried[normal], 2.0, 1.0 if normal == along else wall_weight)
        both = (here >= 0) & (there >= 0) & (share > 0)
        for one, other, weight in ((here, there, np.roll(wall, -1, along)), (there, here, wall)):
            meets_wall = (one >= 0) & (other < 0)
            diagonal += np.bincount(one[meets_wall], (share * weight)[meets_wall], size)
            diagonal += np.bincount(one[both], share[both], size)
            rows.append(one[both])
            columns.append(other[both])
            values.append(-share[both])
    every = np.arange(size)
    entries = np.concatenate([*values, diagonal]), (np.concatenate([*rows, every]), np.concatenate([*columns, every]))
    return csr_array(coo_array(entries, shape=(size, size)))


def _shared_side(shape: tuple[int, ...], boundary: Boundary, normal: int, along: int) -> Float[np.ndarray, "x y z"]:
    """The side that the control volumes of two neighbouring faces share, as a part of a full one."""
    share = np.ones(shape)
    if boundary == "confined":
        if along == 0:  # nothing pulls from beyond a pressure plane; the tangential faces end a cell earlier
            share[-1 if normal == 0 else slice(-2, None)] = 0
        elif normal == 0:
            share[[0, -1]] = 0.5
    return share


def _divergence(cell: Bool[np.ndarray, "x y z"], number: Int[np.ndarray, "3 x y z"]) -> csr_array:
    cell_number = np.full(cell.shape, -1, dtype=np.int32)
    cell_number[cell] = np.arange(np.count_nonzero(cell))
    rows, columns, values = [], [], []
    for axis in range(3):
        for face, sign in ((number[axis], -1.0), (np.roll(number[axis], -1, axis), 1.0)):
            bounds = cell & (face >= 0)
            rows.append(cell_number[bounds])
            columns.append(face[bounds])
            values.append(np.full(np.count_nonzero(bounds), sign))
    entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    return csr_array(coo_array(entries, shape=(np.count_nonzero(cell), np.count_nonzero(number >= 0))))
