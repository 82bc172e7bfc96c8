"""A file of The Well becomes a store with its own boundaries, fields and times; what no store can hold is refused."""

import h5py
import numpy as np
import pytest

from data.ingest.the_well import TheWellConfig, ingest
from data.layout import check
from data.reader import open_store
from shodh.config import ConfigError

DEFAULT = TheWellConfig(unverified="accept")
SOLENOIDAL = TheWellConfig(velocity_space="solenoidal", unverified="accept")


def test_walls_and_periodic_sides_fields_and_times_are_those_of_the_file(published, tmp_path, said):
    source = published.the_well(tmp_path / "source", walls="z")
    ingest(source, tmp_path / "flow", DEFAULT, said.append)
    store = open_store(tmp_path / "flow")
    assert check(store.path) == [] and store.grid.boundary == ("periodic", "periodic", "wall")
    assert store.domain.pressure.name == "density" and [s.name for s in store.domain.scalars] == ["tracer"]
    assert any("left out" in line and "stress" in line for line in said)
    with h5py.File(source / "flow_train.hdf5") as file:
        density, velocity = file["t0_fields/density"][1, 2], file["t1_fields/velocity"][1, 2]
    stored, cells = store.snapshot(1, 2)
    np.testing.assert_array_equal(cells, density)
    np.testing.assert_allclose(stored[0, 1:], (velocity[1:, ..., 0] + velocity[:-1, ..., 0]) / 2, atol=1e-6)
    assert not stored[2, :, :, 0].any()
    np.testing.assert_allclose(store.time(0), [0, 0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(store.medium(0)[0, 0], [0.125 + 0.25 * min(k, 11 - k) for k in range(12)], rtol=1e-6)
    assert store.plan.config["simulation_parameters"] == {"flow_train.hdf5": {"Atwood": 0.5}}


def test_a_solenoidal_flow_is_projected_and_its_loss_kept_and_a_compressible_one_refused(published, tmp_path, said):
    spacing = 2 * np.pi / 16
    source = published.the_well(tmp_path / "source", (16, 16, 16), walls="", spacing=spacing, solenoidal=True)
    ingest(source, tmp_path / "flow", SOLENOIDAL, said.append)
    store = open_store(tmp_path / "flow")
    removed = store.plan.config["divergence_share_removed"]
    assert check(store.path) == [] and 0.02 < removed[0] < 0.1  # (k h)^2 / 8 at k = 2 is 0.08
    with h5py.File(source / "flow_train.hdf5", "r+") as file:
        file["t1_fields/velocity"][...] = file["t1_fields/velocity"][...][..., ::-1]
    with pytest.raises(ConfigError, match="Its axes are swapped"):
        ingest(source, tmp_path / "other", SOLENOIDAL, said.append)


def remove(name):
    def change(file):
        del file[name]

    return change


def set_attribute(place, name, value):
    def change(file):
        (file[place] if place else file).attrs[name] = value

    return change


def rewrite(name, change_values):
    def change(file):
        values, attributes = file[name][...], dict(file[name].attrs)
        del file[name]
        file[name] = change_values(values)
        file[name].attrs.update(attributes)

    return change


REFUSED = {
    "two-dimensional": (set_attribute("", "n_spatial_dims", 2), "2-D. Shodh takes 3-D flow"),
    "spherical": (set_attribute("", "grid_type", "spherical"), "its grid is spherical"),
    "unknown boundary": (set_attribute("boundary_conditions/x_boundary", "bc_type", "SLIP"), "x has boundaries"),
    "no boundary": (remove("boundary_conditions/y_boundary"), "y has boundaries"),
    "open sides": (
        set_attribute("boundary_conditions/x_boundary", "bc_type", "OPEN"),
        "velocity_space=full: .* has open",
    ),
    "missing group": (remove("t1_fields"), "has no group 't1_fields'"),
    "missing velocity": (remove("t1_fields/velocity"), "has no dataset 'velocity'"),
    "another shape": (rewrite("t1_fields/velocity", lambda v: v[:, :, 1:]), "Check the order of its axes"),
    "another shape of a scalar": (rewrite("t0_fields/density", lambda v: v[:, :, 1:]), "density is"),
    "swapped axes": (rewrite("t1_fields/velocity", lambda v: v.swapaxes(2, 4)), "with the velocity as zyx"),
    "swapped axes of a scalar": (rewrite("t0_fields/density", lambda v: v.swapaxes(2, 3)), "with density as yxz"),
    "a reversed axis": (rewrite("t1_fields/velocity", lambda v: -v), "with time reversed"),
    "NaN": (rewrite("t0_fields/tracer", lambda v: np.where(v > v.min(), v, np.nan)), "tracer of trajectory"),
    "negative density": (rewrite("t0_fields/density", lambda v: -v), "is negative"),
    "attribute of an odd type": (set_attribute("", "Atwood", np.longdouble(0.5)), "attribute Atwood is"),
    "uneven axis": (rewrite("dimensions/y", lambda v: v**2), "not evenly spaced"),
    "one time": (rewrite("dimensions/time", lambda v: v[:1]), "velocity is"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_store_can_hold_is_refused_in_one_line(kind, published, tmp_path, said):
    source = published.the_well(tmp_path / "source")
    change, reason = REFUSED[kind]
    with h5py.File(source / "flow_train.hdf5", "r+") as file:
        change(file)
    with pytest.raises(ConfigError, match=reason) as error:
        ingest(source, tmp_path / "flow", DEFAULT, said.append)
    assert "\n" not in str(error.value)


def test_a_solenoidal_flow_through_open_sides_becomes_a_store_without_divergence(published, tmp_path, said):
    spacing = 2 * np.pi / 16
    source = published.the_well(tmp_path / "source", (16, 12, 14), walls="z", spacing=spacing, solenoidal=True)
    with h5py.File(source / "flow_train.hdf5", "r+") as file:
        file["boundary_conditions/x_boundary"].attrs["bc_type"] = "OPEN"
        file["boundary_conditions/z_boundary"].attrs["bc_type"] = "OPEN"
    ingest(
        source,
        tmp_path / "flow",
        TheWellConfig(velocity_space="solenoidal", max_removed=0.5, unverified="accept"),
        said.append,
    )
    store = open_store(tmp_path / "flow")
    assert check(store.path) == [] and store.grid.boundary == ("open", "periodic", "open")
    flux = store.stored_velocity(1, 2).astype(float)
    inside = (slice(-1), slice(None), slice(-1))
    net = (
        np.diff(flux[0], axis=0)[:, :, :-1]
        + np.diff(flux[2], axis=2)[:-1]
        + (np.roll(flux[1], -1, 1) - flux[1])[inside]
    )
    assert np.abs(net).max() < 64 * np.finfo(np.float32).eps * np.abs(flux).max()


def test_a_flow_without_a_density_says_that_its_axes_are_not_verified(published, tmp_path, said):
    source = published.the_well(tmp_path / "source")
    with h5py.File(source / "flow_train.hdf5", "r+") as file:
        file.move("t0_fields/density", "t0_fields/pressure")
    ingest(source, tmp_path / "flow", DEFAULT, said.append)
    assert any("order of axes not verified" in line for line in said)
