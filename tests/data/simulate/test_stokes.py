"""The steady solver against analytic flows, a published drag table, public permeabilities and a direct solution."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import block_array, eye_array
from scipy.sparse.linalg import spsolve

from data.simulate.micro_ct import mirror
from data.simulate.multigrid import build_multigrid
from data.simulate.stokes import permeabilities, solve_stokes
from data.simulate.stokes_system import assemble_stokes


def slab(num_pore: int, num_solid: int, num_along: int = 4) -> np.ndarray:
    """A plane channel along x (and z) between solid slabs, normal to y."""
    pore = np.zeros((num_along, num_pore + num_solid, num_along), dtype=bool)
    pore[:, :num_pore] = True
    return pore


def sphere(resolution: int, concentration: float) -> np.ndarray:
    """The pore space around one sphere: a simple cubic array. Its radius per box is (3 c / 4 pi)^(1/3)."""
    x = (np.arange(resolution) + 0.5) / resolution - 0.5
    distance = x[:, None, None] ** 2 + x[:, None] ** 2 + x**2
    return distance > (3 * concentration / (4 * math.pi)) ** (2 / 3)


def random_block(resolution: int, seed: int = 0) -> np.ndarray:
    """Smoothed noise of porosity 0.5: not periodic."""
    noise = np.random.default_rng(seed).normal(size=(resolution,) * 3)
    for axis in range(3):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, -1, axis)
    return noise > 0


def test_poiseuille_permeability_is_second_order_down_to_its_constant():
    # with the wall half a cell off, the profile is the parabola + 1/8 and its mean (w^2 + 2) / 12: error 2 / w^2
    for width in (3, 4, 8, 16):
        expected = width / (width + 2) * (width**2 + 2) / 12
        for walls in ("smooth", "voxel"):
            assert solve_stokes(slab(width, 2), 0, walls=walls).permeability == pytest.approx(expected, rel=1e-6)


def duct_permeability(width: int) -> float:
    """Mean of the five-point solution for a square duct with walls half a cell away, by its sine modes."""
    mode = np.arange(1, width + 1) * math.pi / (2 * width)
    first = np.sin(2 * np.outer(mode, np.arange(width) + 0.5)).sum(axis=1)
    weight = np.where(np.arange(1, width + 1) < width, 2 / width, 1 / width)
    eigenvalue = 4 * (np.sin(mode)[:, None] ** 2 + np.sin(mode) ** 2)
    return float((np.outer(first**2 * weight, first**2 * weight) / eigenvalue).sum() / width**2)


def test_confined_open_block_is_a_square_duct_along_every_axis():
    straight = np.zeros((5, 8, 8), dtype=bool)
    straight[:, :6, :6] = True
    for axis in range(3):
        measured = solve_stokes(np.moveaxis(straight, 0, axis), axis, boundary="confined").permeability
        # solid at the upper sides, the block's own walls at the lower ones
        assert measured == pytest.approx(duct_permeability(6) * 36 / 64, rel=1e-6)


@pytest.mark.parametrize("boundary", ["periodic", "confined"])
@pytest.mark.parametrize("walls", ["smooth", "voxel"])
def test_permeability_is_that_of_a_direct_solution(boundary, walls):
    pore = random_block(8)
    system = assemble_stokes(pore, boundary, walls)
    divergence = system.divergence
    num_cells = system.cell_place.shape[1]
    ground = 1e-9 * eye_array(
        num_cells
    )  # a compressibility, which fixes the pressure of pores without a pressure plane
    matrix = block_array([[system.laplacian, -divergence.T], [divergence, ground]], format="csc")
    right = np.concatenate([system.force, np.zeros(num_cells)])
    velocity = np.asarray(spsolve(matrix, right))[: len(system.force)]
    expected = float(system.force @ velocity) / pore.size
    measured = solve_stokes(pore, 0, boundary=boundary, walls=walls).permeability
    assert measured == pytest.approx(expected, rel=1e-6)


def test_system_is_symmetric_and_dissipates():
    for boundary in ("periodic", "confined"):
        laplacian = assemble_stokes(random_block(8), boundary, "voxel").laplacian.toarray()
        assert np.array_equal(laplacian, laplacian.T)
        assert np.linalg.eigvalsh(laplacian).min() > 0


@pytest.mark.parametrize(("concentration", "published"), [(0.125, 4.292), (0.343, 15.4), (0.5236, 42.1)])
def test_drag_of_simple_cubic_spheres_is_within_2_percent_of_zick_and_homsy(concentration, published):
    """Zick and Homsy 1982, J. Fluid Mech. 115, table 2: K of the force F = 6 pi mu a K U = mu U L^3 / k."""
    k = solve_stokes(sphere(32, concentration), axis=0).permeability / 32**2
    measured = 1 / (6 * math.pi * (3 * concentration / (4 * math.pi)) ** (1 / 3) * k)
    print(f"c {concentration}: K {measured:.3f}, published {published}, error {measured / published - 1:+.2%}")
    assert measured == pytest.approx(published, rel=0.02)


def test_permeability_turns_with_the_rock():
    pore = random_block(12)
    turned = np.transpose(pore, (1, 2, 0))
    for boundary in ("periodic", "confined"):
        along_x, along_y, along_z = permeabilities(pore, boundary=boundary)
        assert permeabilities(turned, boundary=boundary) == pytest.approx((along_y, along_z, along_x), rel=1e-6)
        assert permeabilities(pore[::-1, ::-1, ::-1], boundary=boundary) == pytest.approx(
            (along_x, along_y, along_z), rel=1e-6
        )


def test_pressure_planes_are_planes_of_mirror_symmetry():
    # in a straight tube of any section nothing tells a plane of constant pressure from a mirror
    section = random_block(12)[0]
    pore = np.repeat(section[None], 6, axis=0)
    walled = np.pad(pore, ((0, 0), (0, 1), (0, 1)))
    periodic = solve_stokes(walled, 0).permeability * walled.size / pore.size
    assert solve_stokes(pore, 0, boundary="confined").permeability == pytest.approx(periodic, rel=1e-6)


@pytest.mark.parametrize("shape", ["sphere", "rock"])
def test_iterations_hardly_grow_with_resolution(shape):
    counts = []
    for factor in (1, 2):
        rock = mirror(random_block(16)).repeat(factor, 0).repeat(factor, 1).repeat(factor, 2)
        pore = sphere(32 * factor, 0.343) if shape == "sphere" else rock
        counts.append(solve_stokes(pore, 0).num_iterations)
    print(f"{shape}: iterations at 32^3 and 64^3: {counts}")
    assert counts[1] < 1.3 * counts[0]


def test_multigrid_cycle_is_a_symmetric_positive_inverse():
    system = assemble_stokes(random_block(12), "periodic", "smooth")
    cycle = build_multigrid(system.laplacian, system.face_place)
    assert len(cycle.levels) >= 2
    size = len(system.force)
    first, second = np.random.default_rng(0).normal(size=(2, size))
    assert first @ cycle.solve(second) == pytest.approx(second @ cycle.solve(first), rel=1e-10)
    assert first @ cycle.solve(first) > 0
    error = first  # of a stationary iteration for a right side of 0
    for _ in range(20):
        error = error - cycle.solve(system.laplacian @ error)
    assert np.linalg.norm(error) < 0.7**20 * np.linalg.norm(first)


def test_block_without_a_way_through_has_no_permeability():
    pore = random_block(8)
    pore[3] = False
    for boundary in ("periodic", "confined"):
        assert solve_stokes(pore, 0, boundary=boundary).permeability == 0
        assert solve_stokes(pore, 1, boundary=boundary).permeability > 0


def test_staircase_that_meets_every_slice_but_is_blocked_has_no_permeability():
    pore = np.zeros((8, 8, 8), dtype=bool)
    pore[:5, 0, 0] = pore[4, 0:3, 0] = pore[4:, 2, 0] = True
    assert np.all(pore.any(axis=(1, 2)))
    assert solve_stokes(pore, 0).permeability == 0
    pore[0, 0:3, 0] = True  # joins its ends around the box
    assert solve_stokes(pore, 0).permeability > 0


def test_block_without_grains_is_refused():
    with pytest.raises(ValueError, match="^pore: no solid cell"):
        solve_stokes(np.ones((4, 4, 4), dtype=bool), 0)


def read_berea(shared_data: Path) -> np.ndarray:
    with np.load(shared_data / "porous" / "berea_rows000_256.npz") as file:
        return file["pore"] == 1


@pytest.mark.shared_data
def test_voxel_walls_are_nearer_than_smooth_ones_to_the_refined_voxels_of_berea(shared_data):
    pore = read_berea(shared_data)[:40, :40, :40]
    refined = pore.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    finer = solve_stokes(refined, 0, boundary="confined", walls="voxel").permeability / 4
    voxel, smooth = (solve_stokes(pore, 0, boundary="confined", walls=w).permeability for w in ("voxel", "smooth"))
    print(f"40^3 of Berea: smooth {smooth:.4f}, voxel {voxel:.4f}, refined {finer:.4f}")
    assert finer < voxel < smooth


@pytest.mark.slow
@pytest.mark.shared_data
def test_permeability_of_a_berea_block_is_within_15_percent_of_its_label_along_every_axis(shared_data):
    """Labels: Mosser, Dubrule, Blunt 2017, Phys. Rev. E 96, 043309; benchmarks/permeability.py does all 18 blocks."""
    folder = shared_data / "porous"
    row = (folder / "berea_perm_labels.csv").read_text().splitlines()[1].split(",")
    x, y, z = (int(word) for word in row[1:4])
    pore = read_berea(shared_data)[x : x + 128, y : y + 128, z : z + 128]
    measured = permeabilities(pore, boundary="confined", walls="voxel")
    assert measured == pytest.approx([float(word) for word in row[8:11]], rel=0.15)
