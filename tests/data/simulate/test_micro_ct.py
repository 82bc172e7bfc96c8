"""Micro-CT images as geometry: crops of an ingested store, mirrored, and refusals in one line."""

from pathlib import Path

import numpy as np
import pytest

import data.rocks
import data.simulate.porous_media as porous
from data.ingest import digital_rocks
from data.ingest.digital_rocks import DigitalRocksConfig
from data.simulate.micro_ct import draw_crop, mirror, open_source
from data.simulate.porous_media import PorousMediaConfig

PORE = np.random.default_rng(0).random((6, 5, 4)) < 0.3


def write_store(folder: Path, pore: np.ndarray, value: int = 1) -> str:
    np.savez_compressed(folder / "rock.npz", pore=pore.astype(np.uint8))
    config = DigitalRocksConfig(pore=value, unverified="accept")
    digital_rocks.ingest(folder / "rock.npz", folder / "store", config, lambda line: None)
    return str(folder / "store")


def test_crops_are_parts_of_the_image_placed_by_seed(tmp_path):
    values = np.random.default_rng(1).random((9, 8, 10)) < 0.4
    rock = open_source(write_store(tmp_path, values))
    windows = np.lib.stride_tricks.sliding_window_view(values, (4, 4, 4))
    crops = [draw_crop(np.random.default_rng(seed), rock, 4) for seed in (0, 0, 1, 2)]
    assert np.array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2]) or not np.array_equal(crops[0], crops[3])
    for crop in crops:
        assert (windows == crop).all(axis=(3, 4, 5)).any()


def test_crop_reads_no_more_slices_than_it_holds(tmp_path, monkeypatch):
    source = write_store(tmp_path, np.random.default_rng(1).random((40, 8, 8)) < 0.4)
    read: list[int] = []
    slices = data.rocks.open_arrays(Path(source), data.rocks.rock_arrays({"shape": (40, 8, 8)}))["pore"].__class__
    original = slices.read
    monkeypatch.setattr(
        slices, "read", lambda self, chunk=0, inner=0: (read.append(chunk), original(self, chunk, inner))[1]
    )
    draw_crop(np.random.default_rng(0), open_source(source), 4)
    assert len(read) == 4 and max(read) - min(read) == 3


def test_mirrored_block_is_the_same_from_either_side_and_wraps_onto_itself():
    whole = mirror(PORE)
    assert np.array_equal(whole[:6, :5, :4], PORE)
    for axis in range(3):
        assert np.array_equal(np.flip(whole, axis), whole)
        assert np.array_equal(whole.take(0, axis), whole.take(-1, axis))


def test_file_missing_store_and_swapped_phases_are_refused_in_one_line(tmp_path):
    swapped = write_store(tmp_path, PORE, value=0)
    sources = {
        str(
            tmp_path / "rock.npz"
        ): "a file, must be a store. Ingest it first: python launch/ingest_data.py digital_rocks",
        str(tmp_path / "none"): "no such folder. Ingest it first",
        swapped: "of the voxels are pores. Ingest the image again with pore= set to its other value",
    }
    for source, message in sources.items():
        with pytest.raises(ValueError, match=message) as error:
            open_source(source)
        assert "\n" not in str(error.value)


def test_image_that_does_not_percolate_or_is_too_small_is_refused(tmp_path):
    values = np.zeros((8, 8, 8), dtype=np.uint8)
    values[::2] = 1  # layers across x
    source = write_store(tmp_path, values)
    config = PorousMediaConfig(resolution=10, geometry="micro_ct", source=source)
    with pytest.raises(RuntimeError, match="^source=.*none of 100 rocks percolates along x"):
        porous.draw_pore_space(config, np.random.default_rng(0))
    large = PorousMediaConfig(resolution=18, geometry="micro_ct", source=source)
    with pytest.raises(ValueError, match="^resolution=18: half of it exceeds"):
        porous.draw_pore_space(large, np.random.default_rng(0))
