"""Drawn rocks: spheres that touch but do not overlap, porosities as asked for, and only pores that carry flow."""

import math
import tracemalloc

import numpy as np
import pytest

from data.simulate.pore_space import (
    OVERLAP,
    draw_blobs,
    draw_gaussian,
    draw_percolating,
    draw_sphere_pack,
    keep_percolating,
    keep_winding,
    label_pores,
    place_spheres,
    read_sphere_pack,
)


def nearest(spheres: np.ndarray) -> float:
    """Smallest distance of two centres in the periodic box, per diameter."""
    apart = spheres[:, None, :3] - spheres[None, :, :3]
    distance = np.linalg.norm(apart - np.round(apart), axis=-1) + 9 * np.eye(len(spheres))
    return float(distance.min() / spheres[0, 3])


@pytest.mark.parametrize("porosity", [0.45, 0.7])
def test_packed_spheres_do_not_overlap_and_fill_what_was_asked_for(porosity):
    for seed in range(5):
        spheres = draw_sphere_pack(np.random.default_rng(seed), (porosity, porosity), (0.25, 0.4))
        assert nearest(spheres) >= 1 - OVERLAP
        assert len(spheres) * math.pi / 6 * spheres[0, 3] ** 3 == pytest.approx(1 - porosity)
        # a cell is decided at its centre: the share of 32^3 cells scatters by about the surface's cells ^ -1/2
        assert place_spheres(spheres, 32).mean() == pytest.approx(porosity, abs=0.01)


@pytest.mark.parametrize("resolution", [9, 16])
def test_gaussian_rock_is_the_cut_of_a_slowly_blurred_noise(resolution):
    pore = draw_gaussian(np.random.default_rng(3), resolution, (0.6, 0.6), (0.1, 0.1))
    rng = np.random.default_rng(3)
    rng.uniform(), rng.uniform()  # porosity and blobiness
    noise, width = rng.standard_normal((resolution,) * 3), resolution / 4
    # the blur in space, summed over images of the box until nothing is left of it
    apart = np.arange(resolution)[:, None] - np.arange(resolution)
    kernel = sum(np.exp(-((apart + image * resolution) ** 2) / 2 / width**2) for image in range(-3, 4))
    field = np.einsum("ai,bj,ck,ijk->abc", kernel, kernel, kernel, noise)
    cut = np.sort(field.ravel())[round(0.6 * (field.size - 1))]
    unlike = pore != (field < cut)
    assert unlike.sum() <= 1  # the cell that the quantile runs through
    assert abs(pore.mean() - 0.6) <= 1 / field.size


def test_gaussian_rock_has_the_pores_of_porespy_s_blobs():
    def wetted(draw) -> np.ndarray:
        rocks = [draw(np.random.default_rng([9, seed]), 32, (0.575, 0.575), (0.4, 0.4)) for seed in range(20)]
        return np.array([sum(np.count_nonzero(p ^ np.roll(p, 1, axis)) for axis in range(3)) / p.size for p in rocks])

    ours, theirs = wetted(draw_gaussian), wetted(draw_blobs)
    error = math.hypot(ours.std(ddof=1), theirs.std(ddof=1)) / math.sqrt(20)
    assert abs(ours.mean() - theirs.mean()) < 3 * error < 0.05 * theirs.mean()


def test_spheres_that_find_no_room_are_refused():
    with pytest.raises(RuntimeError, match=r"^porosity=\(0.2, 0.2\): .* Raise it"):
        draw_sphere_pack(np.random.default_rng(0), (0.2, 0.2), (0.4, 0.4))


def test_sphere_placed_across_the_box_is_the_shifted_sphere():
    centred = place_spheres(np.array([[0.5, 0.5, 0.5, 0.45]]), 16)
    cornered = place_spheres(np.array([[0.0, 0.0, 0.0, 0.45]]), 16)
    assert np.array_equal(np.roll(centred, (8, 8, 8), (0, 1, 2)), cornered)
    x = (np.arange(16) + 0.5) / 16 - 0.5
    assert np.array_equal(centred, x[:, None, None] ** 2 + x[:, None] ** 2 + x**2 > 0.225**2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x y z diameter\n0.1 0.2 0.3\n", "four numbers a line"),
        ("id x y z\n1 0.2 0.3 0.4\n", "four numbers a line"),
        ("10 20 30 4\n", "Scale the box to 1"),
        ("0.1 0.2 0.3 -0.1\n", "Scale the box to 1"),
        ("x y z diameter\n", "Scale the box to 1"),
    ],
)
def test_sphere_pack_of_another_layout_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "pack.dat"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_sphere_pack(path)
    assert str(error.value).startswith(f"source={path}: ") and "\n" not in str(error.value)


def test_missing_sphere_pack_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_sphere_pack(tmp_path / "none.dat")


@pytest.mark.shared_data
def test_public_sphere_pack_is_read_and_percolates(shared_data):
    spheres = read_sphere_pack(shared_data / "porous" / "periodic_spherepack_2_info.dat")
    assert spheres.shape == (120, 4)
    assert nearest(spheres) > 1 - 1e-3  # in contact across the faces of the box too
    pore = place_spheres(spheres, 64)
    assert pore.mean() == pytest.approx(1 - 120 * math.pi / 6 * spheres[0, 3] ** 3, abs=0.01)
    assert keep_percolating(pore).any()


def test_global_random_state_is_left_alone():
    np.random.seed(1)
    expected = np.random.random()
    np.random.seed(1)
    draw_blobs(np.random.default_rng(0), 8, (0.6, 0.6), (0.3, 0.3))
    assert np.random.random() == expected


def test_only_pores_that_percolate_along_x_are_kept():
    pore = np.zeros((8, 8, 8), dtype=bool)
    pore[:4, 0, 0] = pore[4:, 7, 0] = True  # a path whose halves meet across the periodic y boundary only
    pore[2, 0, 0:3] = True  # a dead end of it
    path = pore.copy()
    pore[:, 4, 4], pore[6, 4, 4] = True, False  # a path that is blocked, but for a periodic x boundary
    pore[2:4, 2, 6] = True  # a pocket
    assert not keep_percolating(path ^ pore).any()
    path[3:5, 7, 0] = path[4, 0, 0] = path[0, 7, 0] = path[7, 0, 0] = True
    assert np.array_equal(keep_percolating(path | pore), path)


def brute_winding(pore: np.ndarray, num_boxes: int = 7) -> np.ndarray:
    """Pores from which a copy of themselves in another box along x is reached, in a row of boxes; slow and obvious."""
    row = np.concatenate([pore] * num_boxes, axis=0)
    label = label_pores(row, (False, True, True)).reshape(num_boxes, *pore.shape)
    middle = num_boxes // 2
    return pore & (np.count_nonzero(label == label[middle], axis=0) > 1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pores_that_go_around_are_those_that_reach_their_own_copy(axis):
    found = 0
    for seed in range(60):
        pore = np.random.default_rng(seed).random((5, 4, 3)) < 0.33
        expected = np.moveaxis(brute_winding(np.moveaxis(pore, axis, 0)), 0, axis)
        assert np.array_equal(keep_winding(pore, axis), expected), seed
        found += bool(expected.any())
    assert 5 < found < 50  # both outcomes occur


def test_helix_that_closes_after_two_turns_goes_around_and_a_blocked_staircase_does_not():
    helix = np.zeros((8, 8, 8), dtype=bool)
    helix[:, 0, 0] = helix[:, 4, 0] = True
    helix[3:5, 0:5, 0], helix[4:, 0, 0], helix[:4, 4, 0] = False, False, False
    helix[3, 0:5, 0] = True  # from (0..3, y=0) to (3.., y=4)
    helix[4:, 4, 0] = True
    helix[7, 4:, 0] = helix[0, 4, 0] = helix[7, 0, 0] = True  # and around y back to its start
    assert np.array_equal(keep_winding(helix, 0), brute_winding(helix)) and helix[:, 4, 0].any()
    staircase = np.zeros((8, 8, 8), dtype=bool)
    staircase[:5, 0, 0] = staircase[4, 0:3, 0] = staircase[4:, 2, 0] = True  # meets every slice, ends nowhere
    assert not keep_winding(staircase, 0).any()


def test_small_spheres_are_packed_in_memory_that_grows_with_their_number():
    """At 10 000 spheres all pairs would be 5e7, of 24 bytes a distance vector alone: 1.2 GB."""
    tracemalloc.start()
    spheres = draw_sphere_pack(np.random.default_rng(0), (0.7, 0.7), (0.0385, 0.0385))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(spheres) > 9000 and peak < 1e4 * len(spheres)


def test_pores_are_joined_around_wrapped_axes_only():
    pore = np.zeros((4, 4, 4), dtype=bool)
    pore[0, 1, 1] = pore[3, 1, 1] = True
    for wrapped, joined in (((True, False, False), True), ((False, True, True), False)):
        label = label_pores(pore, wrapped)
        assert (label[0, 1, 1] == label[3, 1, 1]) == joined


def test_rock_that_never_percolates_is_refused_by_its_setting():
    with pytest.raises(RuntimeError, match="^porosity=0: none of 100 rocks percolates along x. Raise it."):
        draw_percolating(lambda: np.zeros((4, 4, 4), dtype=bool), "porosity=0", "Raise it.")
