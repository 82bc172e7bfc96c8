"""The layout is what xarray reads, and its check names every kind of damage in one line."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

from data.chunks import ArrayLayout, write_chunk
from data.digests import seal
from data.layout import MAX_DEFECT, StoreHeader, check, field_arrays, main, measure_defect, split_trajectories
from data.reader import open_store
from shodh.config import ConfigError

FIRST_FLUX = "flux/c.0.0.0.0.0.0"


def test_xarray_reads_the_same_numbers_with_names_units_and_coordinates(stores, channel):
    expected = stores.trajectory(channel.plan, 2)
    with xarray.open_zarr(channel.path, consolidated=False) as dataset:
        assert dataset["flux"].dims == ("trajectory", "time", "component", "x", "y", "z")
        np.testing.assert_array_equal(dataset["flux"][2], expected.velocity)
        np.testing.assert_array_equal(dataset["pressure"][2], expected.pressure)
        np.testing.assert_array_equal(dataset["wall_distance"][2], expected.medium)
        np.testing.assert_array_equal(dataset["time"][2], expected.time)
        np.testing.assert_array_equal(dataset["x"], (np.arange(4) + 0.5) * 0.5)
        assert float(dataset["viscosity"][2]) == expected.parameters["viscosity"]
        assert int(dataset["seed"][2]) == expected.seed
        assert dataset["component"].attrs["flag_meanings"] == "x y z"
        assert all({"units", "long_name"} <= set(variable.attrs) for variable in dataset.variables.values())
        assert dataset.attrs["split"] == {"train": [0, 1, 2], "test": [3]}


def test_zarr_python_and_tensorstore_read_the_same_numbers(stores, plume):
    tensorstore = pytest.importorskip("tensorstore")
    expected = stores.trajectory(plume.plan, 3)
    fields = {"flux": expected.velocity, "pressure": expected.pressure, **expected.scalars}
    group = zarr.open_group(plume.path, mode="r")
    for name, values in fields.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        np.testing.assert_array_equal(array[3, 1:4], values[1:4])
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{plume.path / name}/"}}
        np.testing.assert_array_equal(tensorstore.open(spec, read=True).result()[3].read().result(), values)


def test_a_flipped_bit_raises_in_zarr_python_too(channel):
    _flip_bit(channel.path)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(channel.path, mode="r")["flux"][0]


def test_a_trajectory_of_a_field_is_one_file_whose_inner_chunks_are_snapshots(channel):
    files = [p.name for p in (channel.path / "flux").iterdir()]
    assert sorted(files) == [*(f"c.{i}.0.0.0.0.0" for i in range(4)), "zarr.json"]
    flux = zarr.open_group(channel.path, mode="r")["flux"]
    assert isinstance(flux, zarr.Array)
    assert (flux.shards, flux.chunks) == ((1, 5, 3, 4, 6, 8), (1, 1, 3, 4, 6, 8))


def test_scale_factor_reaches_xarray_and_reader_alike(stores, tmp_path):
    store = stores.make(tmp_path / "scaled", "channel", velocity_scale=0.125)
    stored = stores.trajectory(store.plan, 1).velocity[3]
    with xarray.open_zarr(store.path, consolidated=False) as dataset:
        np.testing.assert_array_equal(dataset["flux"][1, 3], stored * 0.125)
    area = np.array([0.25 * 2.0, 0.5 * 2.0, 0.5 * 0.25], np.float32).reshape(3, 1, 1, 1)
    np.testing.assert_array_equal(store.snapshot(1, 3)[0], stored * np.float32(0.125) / area)  # powers of two: exact
    np.testing.assert_array_equal(store.stored_velocity(1, 3), stored)


def test_sound_stores_have_no_problems(channel, sound, plume, capsys):
    assert check(channel.path) == check(sound.path) == check(plume.path) == []
    assert main([str(channel.path), str(sound.path)]) == 0


def test_a_missing_chunk_shows_as_nan_even_to_xarray(channel):
    (channel.path / FIRST_FLUX).unlink()
    with xarray.open_zarr(channel.path, consolidated=False) as dataset:
        assert np.isnan(dataset["flux"][0, 0]).all()


def _truncate(path):
    file = path / FIRST_FLUX
    file.write_bytes(file.read_bytes()[:-1])


def _flip_bit(path):
    file = path / FIRST_FLUX
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _edit_json(name, edit):
    def damage(path):
        node = json.loads((path / name).read_text())
        edit(node)
        (path / name).write_text(json.dumps(node))

    return damage


SHALLOW_DAMAGE = {
    "missing chunk": (lambda path: (path / FIRST_FLUX).unlink(), f"{FIRST_FLUX}: missing"),
    "truncated chunk": (_truncate, f"{FIRST_FLUX}: "),
    "extra chunk": (lambda path: shutil.copy(path / FIRST_FLUX, path / "flux/c.0.0.0.0.0.1"), "not part of the layout"),
    "missing array": (lambda path: shutil.rmtree(path / "pressure"), "array 'pressure' is missing"),
    "no digests": (lambda path: shutil.rmtree(path / "digests"), "digests/zarr.json: cannot be read"),
    "altered digests": (
        _edit_json("digests/zarr.json", lambda node: node["attributes"]["files"].pop(FIRST_FLUX)),
        "altered since it was written",
    ),
    "unit missing": (
        _edit_json("flux/zarr.json", lambda node: node["attributes"].pop("units")),
        "attribute units is None, must be '1'",
    ),
    "wrong dtype": (_edit_json("flux/zarr.json", lambda node: node.update(data_type="float64")), "dtype is 'float64'"),
    "wrong dims": (_edit_json("flux/zarr.json", lambda node: node["dimension_names"].reverse()), "dims is ['z',"),
    "wrong shape": (_edit_json("flux/zarr.json", lambda node: node["shape"].pop()), "shape is [4, 5, 3, 4, 6]"),
    "no checksum": (_edit_json("flux/zarr.json", lambda node: node["codecs"].pop()), "codecs is []"),
    "old layout": (
        _edit_json("zarr.json", lambda node: node["attributes"].update(layout_version=0)),
        "layout version 0, not 2",
    ),
    "other boundary": (
        _edit_json("zarr.json", lambda node: node["attributes"]["grid"].update(boundary=["periodic"] * 3)),
        "its grid ends in ('periodic', 'periodic', 'periodic'), its domain in ('periodic', 'wall', 'periodic')",
    ),
    "header cut": (_edit_json("zarr.json", lambda node: node["attributes"].pop("domain")), "domain: missing"),
    "header altered": (
        lambda path: (path / "zarr.json").write_text(
            (path / "zarr.json").read_text().replace("potentials", "potemtials")
        ),
        "/zarr.json: differs from its digest",
    ),
    "scale added": (
        _edit_json("flux/zarr.json", lambda node: node["attributes"].update(scale_factor=2.0)),
        "attribute scale_factor is 2.0, must be None",
    ),
    "no group": (lambda path: (path / "zarr.json").unlink(), "zarr.json: cannot be read"),
}


@pytest.mark.parametrize("kind", SHALLOW_DAMAGE)
def test_damage_to_structure_is_named_and_refused_on_opening(kind, channel):
    damage, message = SHALLOW_DAMAGE[kind]
    damage(channel.path)
    problems = check(channel.path, deep=False)
    assert any(message in line for line in problems), problems
    assert all("\n" not in line and str(channel.path) in line or "domain" in line for line in problems)
    with pytest.raises(ConfigError) as caught:
        open_store(channel.path)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_found_by_the_deep_check_alone(channel, capsys):
    _flip_bit(channel.path)
    assert check(channel.path, deep=False) == []
    assert [FIRST_FLUX in line and "differs from its digest" in line for line in check(channel.path)] == [True]
    assert main([str(channel.path)]) == 1


def _read_chunk(path: Path, array: ArrayLayout, index: Sequence[int]) -> np.ndarray:
    """One whole chunk as zarr reads it."""
    place = tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, array.chunk, strict=True))
    return np.array(zarr.open_array(path / array.name, mode="r")[place])


def _rewrite(store, name, trajectory, change):
    """Change a trajectory's values and seal again, as a faulty writer would."""
    arrays = field_arrays(StoreHeader(store.plan, store.grid))
    index = (trajectory, *(0,) * (len(arrays[name].shape) - 1))
    values = _read_chunk(store.path, arrays[name], index)
    change(values[0])
    write_chunk(store.path, arrays[name], index, values)
    chunks = {}
    for array in arrays.values():
        for place in array.chunk_indices():
            chunks |= write_chunk(store.path, array, place, _read_chunk(store.path, array, place))
    seal(store.path, chunks)


def test_values_that_are_not_finite_are_named_by_trajectory_and_snapshot(channel):
    _rewrite(channel, "pressure", 2, lambda values: values.__setitem__((4, 1, 2, 3), np.inf))
    (line,) = check(channel.path)
    assert "pressure of trajectory 2, snapshot 4, is not finite" in line


@pytest.mark.parametrize("name", ["channel", "sound", "plume"])
def test_a_velocity_that_breaks_its_constraint_is_named(name, request):
    store = request.getfixturevalue(name)
    place = (2, 0, 2, 3, 4)
    _rewrite(store, store.domain.velocity.name, 1, lambda v: v.__setitem__(place, v[place] + np.float32(1e-3)))
    (line,) = check(store.path)
    assert "of trajectory 1, snapshot 2, has " + ("curl" if name == "sound" else "divergence") in line


def test_rounding_to_fp32_stays_below_the_limit_and_flux_through_a_wall_does_not(stores):
    for name in ("channel", "sound"):
        plan = stores.plan(name, shape=(16, 16, 16))
        trajectory = stores.trajectory(plan, 0)
        header = StoreHeader(plan, trajectory.grid)
        defect = measure_defect(trajectory.velocity[0], header)
        assert 0 < defect <= 6 * 2.0**-24 < MAX_DEFECT  # six terms, each rounded to half a unit in the last place
    plan = stores.plan("channel")
    velocity = stores.trajectory(plan, 0).velocity[0]
    velocity[1, :, 0] = 1e-3
    assert measure_defect(velocity, StoreHeader(plan, stores.trajectory(plan, 0).grid)) > MAX_DEFECT


def test_splits_are_disjoint_and_hold_every_trajectory():
    split = split_trajectories(7, 2)
    assert split["train"] + split["test"] == list(range(7)) and len(split["test"]) == 2
