"""Axes of a cut-out are found by divergence and lengths, its flux has no divergence, and its units are checked."""

import h5py
import numpy as np
import pytest

from data.ingest.jhtdb import JHTDBConfig, find_states, ingest, inspect_cutout, make_grid, read_snapshot
from data.layout import check
from data.reader import open_store
from shodh.config import ConfigError

ISOTROPIC = JHTDBConfig(dataset="isotropic1024coarse", unverified="accept")
BOX = 2 * np.pi / 16  # a stride that makes 16 points the whole periodic box


def divergence_inside(flux: np.ndarray) -> float:
    """Largest |div F| over the cells whose six faces are all stored, over the largest |F|."""
    inside = tuple(slice(n - 1) for n in flux.shape[1:])
    total = sum(np.diff(flux[i].astype(float), axis=i)[inside] for i in range(3))
    return float(np.abs(total).max() / np.abs(flux).max())


@pytest.mark.parametrize("axes", ["zyx", "xyz", "yxz"])
@pytest.mark.parametrize("shape", [(16, 12, 10), (14, 14, 14)], ids=["box", "cube"])
def test_axes_are_found_whatever_order_they_were_written_in(axes, shape, published, tmp_path):
    source = published.jhtdb(tmp_path / "a", shape, axes=axes, files=1)
    part = inspect_cutout(source / "cutout0.h5", ISOTROPIC)
    assert part.order == axes and part.divergence < 0.1
    grid = make_grid(part, ISOTROPIC)
    assert grid.shape == tuple(n - 1 for n in shape) and grid.boundary == ("open", "open", "open")
    state = read_snapshot(part, 0, grid)
    assert state.removed < 1e-3 and divergence_inside(state.flux) < 64 * np.finfo(np.float32).eps
    points = np.meshgrid(*published.points(shape, 0.125, 0.3), indexing="ij")
    corner = published.velocity(*points, phase=0.1)[0]
    num_y, num_z = grid.shape[1:]
    four = [corner[:-1, a : a + num_y, b : b + num_z] for a in (0, 1) for b in (0, 1)]
    face = (state.flux / grid.face_area)[0]
    # the mean of a face's corners is off by h^2 / 12 (u_yy + u_zz), at most 5 for this field
    assert np.abs(face - sum(four) / 4).max() < 0.125**2 / 12 * 5 * 1.5


def test_a_whole_periodic_box_becomes_a_sound_store(published, tmp_path, said):
    source = published.jhtdb(tmp_path / "a", (16, 16, 16), spacing=BOX, start=0.0)
    ingest(source, tmp_path / "box", ISOTROPIC, said.append)
    store = open_store(tmp_path / "box")
    assert check(store.path) == [] and store.grid.boundary == ("periodic", "periodic", "periodic")
    assert store.trajectory_array("viscosity")[0] == 1.85e-4
    np.testing.assert_allclose(store.time(0), [0, 0.002])
    # float32 coordinates and values: round-off of 1e-7 each, nothing else, as the series is exact
    assert max(store.plan.config["divergence_share_removed"]) < 1e-5
    assert any("axes zyx, divergence 0.0" in line for line in said)


def test_a_cut_out_with_open_sides_becomes_a_sound_store(published, tmp_path, said):
    ingest(published.jhtdb(tmp_path / "a"), tmp_path / "store", ISOTROPIC, said.append)
    store = open_store(tmp_path / "store")
    assert check(store.path) == [] and store.grid.boundary == ("open", "open", "open")
    assert divergence_inside(store.stored_velocity(1, 1)) < 64 * np.finfo(np.float32).eps


def write_older(path, published, numbers, start):
    """A cut-out of the older service: names are ten times the index of a stored state, as in the genuine sample."""
    points = [2 * np.pi / 1024 * 16 * np.arange(n) for n in (64, 64, 64)]
    velocity = published.velocity(*np.meshgrid(*[p / 1 for p in points], indexing="ij"))[:, 20:34, 10:22, 30:40]
    with h5py.File(path, "w") as file:
        for number in numbers:
            values = np.moveaxis(velocity, 0, -1).transpose(2, 1, 0, 3).astype(np.float32)
            file[f"u{number:05d}"], file[f"p{number:05d}"] = values, values[..., :1]
        file["_start"] = np.array([start, 20, 10, 30], np.int32)
        file["_size"] = np.array([len(numbers), 14, 12, 10], np.int32)
        file["_contents"], file["_dataset"] = np.array([3], np.int32), np.array([4], np.int32)
    return path


@pytest.mark.parametrize(("numbers", "start"), [((1000, 1010), 100), ((0, 10), 0), ((1000, 1010, 1020), 100)])
def test_the_older_layout_states_place_and_time_by_index(numbers, start, published, tmp_path, said):
    (tmp_path / "a").mkdir()
    for number in (1, 2):
        path = write_older(tmp_path / f"a/old{number}.h5", published, numbers, start)
    part = inspect_cutout(path, ISOTROPIC)
    assert part.order == "zyx" and part.indices == tuple(start + k for k in range(len(numbers)))
    np.testing.assert_allclose(part.points[1], 2 * np.pi / 1024 * np.arange(10, 22))
    ingest(tmp_path / "a", tmp_path / "store", ISOTROPIC, said.append)
    store = open_store(tmp_path / "store")
    np.testing.assert_allclose(store.time(0), 0.002 * np.arange(len(numbers)))
    assert store.trajectory_array("dt")[0] == 0.002


@pytest.mark.parametrize(("numbers", "start"), [((1000, 1010), 99), ((1000, 1015), 100), ((10, 20), 0)])
def test_names_that_contradict_the_stated_index_are_refused(numbers, start, published, tmp_path):
    path = write_older(tmp_path / "old.h5", published, numbers, start)
    with pytest.raises(ConfigError, match="_start says that the first is"):
        inspect_cutout(path, ISOTROPIC)


@pytest.mark.shared_data
def test_names_of_a_genuine_cut_out_are_ten_times_its_index(shared_data):
    path = shared_data / "turbulence/jhtdb_isotropic1024coarse_cutout_10x10x1.h5"
    with h5py.File(path) as file:
        assert "u01000" in file and file["_start"][0] == 100 and file["_size"][0] == 1
        assert find_states(file, path) == ((("u01000", "p01000"),), (100,))


def test_open_axes_are_cropped_to_a_multiple_of_cells(published, tmp_path):
    source = published.jhtdb(tmp_path / "a", (19, 12, 10), files=1)
    config = JHTDBConfig(dataset="isotropic1024coarse", multiple=8, unverified="accept")
    grid = make_grid(inspect_cutout(source / "cutout0.h5", config), config)
    assert grid.shape == (16, 8, 8)


def edit_velocity(change):
    def damage(file):
        values = change(file["Velocity_0001"][...])
        del file["Velocity_0001"]
        file["Velocity_0001"] = values

    return damage


def remove(name):
    def damage(file):
        del file[name]

    return damage


def reverse_coordinate(file):
    file["ycoor"][...] = file["ycoor"][...][::-1]


def test_one_state_of_a_cube_with_swapped_axes_is_refused(published, tmp_path, said):
    source = published.jhtdb(tmp_path / "a", (14, 14, 14))
    with h5py.File(source / "cutout1.h5", "r+") as file:
        file["Velocity_0002"][...] = file["Velocity_0002"][...].swapaxes(0, 2)
    with pytest.raises(ConfigError, match="Velocity_0002 has a divergence of .* axes are swapped"):
        ingest(source, tmp_path / "store", ISOTROPIC, said.append)


def flip_exponent(values):
    values[3, 4, 5, 1] *= 2.0**60
    return values


REFUSED = {
    "components swapped": (edit_velocity(lambda v: v[..., ::-1].copy()), "in every order of axes"),
    "axes swapped in one state": (edit_velocity(lambda v: v.swapaxes(0, 2).copy()), "must be .z, y, x, 3."),
    "cm/s": (edit_velocity(lambda v: v * 100), "times that of isotropic1024coarse"),
    "NaN": (edit_velocity(lambda v: np.where(v == v.max(), np.nan, v)), "NaN or infinite"),
    "two components": (edit_velocity(lambda v: v[..., :2].copy()), "must be .z, y, x, 3."),
    "flipped exponent": (edit_velocity(flip_exponent), "a value of Velocity_0001 lies"),
    "no pressure": (remove("Pressure_0002"), "state 2 has no pressure"),
    "no velocity": (remove("Velocity_0001"), "state 1 has no velocity"),
    "no coordinate": (remove("zcoor"), "has no dataset 'zcoor'"),
    "reversed axis": (reverse_coordinate, "does not ascend"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_sound_cut_out_is_refused_in_one_line(kind, published, tmp_path, said):
    source = published.jhtdb(tmp_path / "a")
    damage, reason = REFUSED[kind]
    with h5py.File(source / "cutout1.h5", "r+") as file:
        damage(file)
    with pytest.raises(ConfigError, match=reason) as error:
        ingest(source, tmp_path / "store", ISOTROPIC, said.append)
    assert "\n" not in str(error.value)


def test_too_coarse_a_stride_is_refused_by_its_divergence(published, tmp_path):
    source = published.jhtdb(tmp_path / "a", (12, 10, 8), spacing=1.3, files=1)
    with pytest.raises(ConfigError, match="points too far apart"):
        inspect_cutout(source / "cutout0.h5", ISOTROPIC)


def test_a_data_set_that_is_not_known_needs_its_figures():
    with pytest.raises(ValueError, match="Give viscosity=VALUE and time_step=VALUE"):
        JHTDBConfig(dataset="other", viscosity=1e-4)


@pytest.mark.shared_data
def test_a_genuine_cut_out_of_one_slice_is_read_as_far_as_it_goes(shared_data, tmp_path, said):
    source = shared_data / "turbulence/jhtdb_isotropic1024coarse_cutout_10x10x1.h5"
    with pytest.raises(ConfigError, match=r"\(1, 10, 10\) points are no box"):
        ingest(source, tmp_path / "store", ISOTROPIC, said.append)


@pytest.mark.shared_data
def test_turbulence_between_walls_in_the_layout_of_a_cut_out(shared_data, tmp_path):
    """A DNS of a walled flow, on its own Chebyshev grid, written as JHTDB would give a box out of it."""
    with h5py.File(shared_data / "turbulence/channelflow_ufinal.nc") as file:
        velocity = np.stack([file[f"Velocity_{c}"][...][:, ::-1] for c in "XYZ"], -1)  # (z, y, x, 3), y from -1 up
        points = [file["X"][...], file["Y"][...][::-1], file["Z"][...]]
    velocity, points[1] = velocity[:, 1:-1], points[1][1:-1]
    with h5py.File(tmp_path / "cutout.h5", "w") as file:
        for number in (1, 2):
            file[f"Velocity_{number:04d}"] = velocity.astype(np.float32)
            file[f"Pressure_{number:04d}"] = velocity[..., :1].astype(np.float32)
        for axis, coordinate in zip("xyz", points, strict=True):
            file[f"{axis}coor"] = coordinate.astype(np.float32)
    config = JHTDBConfig(dataset="other", viscosity=1 / 400, time_step=1.0)
    part = inspect_cutout(tmp_path / "cutout.h5", config)
    grid = make_grid(part, config)
    state = read_snapshot(part, 0, grid)
    print(f"channelflow DNS: divergence {part.divergence:.4f} of the gradient, removed {state.removed:.2e}")
    assert part.order == "zyx" and not grid.is_uniform(1)
    assert divergence_inside(state.flux) < 64 * np.finfo(np.float32).eps
    assert state.removed < 0.02
