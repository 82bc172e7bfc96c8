"""Gathers and images of rock are held to the same: what was moved or damaged is not read."""

import numpy as np
import pytest

from data.array_store import write_array_store
from data.chunks import StoreError
from data.gathers import gather_arrays, open_gathers
from data.rocks import open_rock, rock_arrays


def _values(array, index):
    random = np.random.default_rng([len(array.name), *index])
    return random.integers(0, 2, array.chunk).astype(array.dtype)


def _write(path, kind, layout, attributes):
    arrays = layout(attributes)

    def produce(is_done):
        for name, array in arrays.items():
            yield from ((name, index, _values(array, index)) for index in array.chunk_indices())

    write_array_store(path, kind, arrays, attributes, produce)
    return arrays


def _swap(first, second):
    spare = first.with_name(".spare")
    first.rename(spare), second.rename(first), spare.rename(second)


def test_gathers_that_changed_places_raise(tmp_path):
    attributes = {"num_trajectories": 3, "num_test": 1, "gather_shape": [2, 5, 4], "model_shape": [4, 6]}
    arrays = _write(tmp_path / "a", "gathers", gather_arrays, attributes)
    gathers = open_gathers(tmp_path / "a")
    np.testing.assert_array_equal(gathers.seismogram(1), _values(arrays["seismogram"], (1, 0, 0, 0))[0])
    np.testing.assert_array_equal(gathers.wave_speed(2), _values(arrays["wave_speed"], (2, 0, 0))[0])
    _swap(*(tmp_path / f"a/seismogram/c.{i}.0.0.0" for i in (1, 2)))
    with pytest.raises(StoreError, match=r"seismogram/c\.1\.0\.0\.0: damaged"):
        open_gathers(tmp_path / "a").seismogram(1)


def test_slices_of_rock_that_changed_places_raise(tmp_path):
    attributes = {"shape": [5, 16, 16], "porosity": 0.5, "voxel_size": None}
    arrays = _write(tmp_path / "a", "rock", rock_arrays, attributes)
    expected = np.stack([_values(arrays["pore"], (x, 0, 0))[0, 2:6, 1:9] == 1 for x in range(1, 4)])
    np.testing.assert_array_equal(open_rock(tmp_path / "a").crop((1, 2, 1), (3, 4, 8)), expected)
    _swap(*(tmp_path / f"a/pore/c.{x}.0.0" for x in (2, 4)))
    with pytest.raises(StoreError, match=r"pore/c\.2\.0\.0: damaged"):
        open_rock(tmp_path / "a").crop((1, 2, 1), (3, 4, 8))
