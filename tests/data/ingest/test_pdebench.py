"""PDEBench's compressible flow keeps every cell value, in its own order of axes, and says what it is made of."""

import h5py
import numpy as np
import psutil
import pytest

from data.ingest.pdebench import PDEBenchConfig, ingest
from data.layout import check
from data.reader import open_store
from shodh.config import ConfigError

DEFAULT = PDEBenchConfig(unverified="accept")
NAME = "3D_CFD_Rand_M1.0_Eta1e-08_Zeta1e-08_periodic_Train.hdf5"


@pytest.fixture
def source(published, tmp_path):
    return published.pdebench(tmp_path / "source")


def edit(source, name, change):
    with h5py.File(source / NAME, "r+") as file:
        values = file[name][...]
        del file[name]
        file[name] = change(values)


def test_faces_take_the_mean_of_their_cells_and_cells_come_back_to_the_last_bit(source, tmp_path, said):
    ingest(source, tmp_path / "flow", DEFAULT, said.append)
    store = open_store(tmp_path / "flow")
    assert check(store.path) == [] and store.domain.name == "flow" and store.domain.velocity_space == "full"
    with h5py.File(source / NAME) as file:
        fields = {name: file[name][1, 2] for name in ("pressure", "density", "Vx", "Vy", "Vz")}
    velocity, pressure = store.snapshot(1, 2)
    np.testing.assert_array_equal(pressure, fields["pressure"])
    np.testing.assert_array_equal(store.scalars(1, 2), fields["density"][None])
    for axis, name in enumerate(("Vx", "Vy", "Vz")):
        mean = (fields[name] + np.roll(fields[name], 1, axis)) / 2
        np.testing.assert_allclose(velocity[axis], mean, rtol=0, atol=1e-6)  # 3 roundings of values below 4
    assert store.grid.spacing == pytest.approx((1 / 16,) * 3, rel=1e-6)


def test_times_and_parameters_come_from_the_file_and_its_name(source, tmp_path, said):
    ingest(source, tmp_path / "flow", DEFAULT, said.append)
    store = open_store(tmp_path / "flow")
    np.testing.assert_allclose(store.time(0), [0, 0.05, 0.1], rtol=1e-6)
    assert store.trajectory_array("viscosity")[0] == 1e-8 and store.plan.config["mach"] == [1.0]
    assert store.plan.config["source"]["verified_by_manifest"] is False and "accepted as they are" in said[0]
    assert "order of axes verified" in said[1]
    assert len(store.plan.config["divergence_share_kept"]) == 2


def test_what_contradicts_the_layout_is_refused_in_one_line(published, tmp_path, said):
    changes = {
        "another shape": ("Vy", lambda v: v[:, :, 1:], "Vy is"),
        "swapped axes": ("Vx", lambda v: v.swapaxes(2, 4), "mass is conserved to .* with the velocity along x as zyx"),
        "swapped axes of a scalar": ("density", lambda v: v.swapaxes(2, 3), "with density as yxz"),
        "reversed component": ("Vz", lambda v: -v, "with z reversed"),
        "reversed time": ("density", lambda v: v[:, ::-1], "mass is conserved to"),
        "wrong unit of velocity": ("Vx", lambda v: v * 1000, "starts at Mach"),
        "negative density": ("density", lambda v: v - 1, "density of sample 0, time 0 is not positive"),
        "NaN": ("pressure", lambda v: np.where(v > v.min(), v, np.nan), "pressure of sample ., time ., has 1 values"),
        "reversed axis": ("y-coordinate", lambda v: v[::-1], "does not ascend"),
        "two-dimensional": ("Vz", None, "1-D or 2-D"),
        "half precision": ("Vy", lambda v: v.astype(np.float16), "float16, no plain number"),
    }
    for number, (name, change, reason) in enumerate(changes.values()):
        source = published.pdebench(tmp_path / str(number))
        if change is None:
            with h5py.File(source / NAME, "r+") as file:
                del file[name]
        else:
            edit(source, name, change)
        with pytest.raises(ConfigError, match=reason) as error:
            ingest(source, tmp_path / "flow", DEFAULT, said.append)
        assert "\n" not in str(error.value)


def test_all_fields_of_a_cube_swapped_alike_are_told_by_mass_conservation(published, tmp_path, said):
    for number, axes in enumerate([(2, 4), (2, 3), (3, 4)]):
        source = published.pdebench(tmp_path / str(number))
        for name in ("density", "pressure", "Vx", "Vy", "Vz"):
            edit(source, name, lambda v, axes=axes: np.ascontiguousarray(v.swapaxes(*axes)))
        with pytest.raises(ConfigError, match="with all fields as"):
            ingest(source, tmp_path / "flow", DEFAULT, said.append)


def test_all_fields_swapped_alike_are_told_by_their_coordinates(published, tmp_path, said):
    source = published.pdebench(tmp_path / "box", (6, 5, 4))
    for name in ("density", "pressure", "Vx", "Vy", "Vz"):
        edit(source, name, lambda v: np.ascontiguousarray(v.swapaxes(2, 4)))
    with pytest.raises(ConfigError, match="x-coordinate has 6 values, the fields 4 cells"):
        ingest(source, tmp_path / "flow", DEFAULT, said.append)


def test_boundary_and_parameters_that_nothing_states_must_be_given(source, tmp_path, said):
    renamed = (source / NAME).rename(source / "flow.hdf5")
    with pytest.raises(ConfigError, match="give boundary=periodic"):
        ingest(renamed, tmp_path / "flow", DEFAULT, said.append)
    with pytest.raises(ConfigError, match="viscosity=None: flow.hdf5 does not state it"):
        ingest(renamed, tmp_path / "flow", PDEBenchConfig(unverified="accept", boundary="periodic"), said.append)
    config = PDEBenchConfig(unverified="accept", boundary="periodic", viscosity=1e-8, mach=1.0)
    assert ingest(renamed, tmp_path / "flow", config, said.append).num_written == 2
    trans = renamed.rename(source / NAME.replace("periodic", "trans"))
    with pytest.raises(ConfigError, match="outgoing sides"):
        ingest(trans, tmp_path / "flow", config, said.append)


def test_a_trajectory_that_does_not_fit_into_memory_is_refused_before_anything_is_written(
    source, tmp_path, said, monkeypatch
):
    free = psutil.virtual_memory()._replace(available=2 * 3 * 5 * 4 * 16**3 - 1)  # copies, states, fields, bytes, cells
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(ConfigError, match="a trajectory of 3 states .* of memory, .* are free. Cut out fewer"):
        ingest(source, tmp_path / "flow", DEFAULT, said.append)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
