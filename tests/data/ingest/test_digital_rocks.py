"""Every format of one image gives the same pores; shape and phase are given or inferred and said aloud."""

import h5py
import numpy as np
import pytest
import tifffile

from data.ingest.digital_rocks import DigitalRocksConfig, ingest
from data.rocks import open_rock
from shodh.config import ConfigError

DEFAULT = DigitalRocksConfig(unverified="accept")


def as_raw(path, pore):
    pore.tofile(path / "rock_14x12x10_u8.raw")


def as_stack(path, pore):
    tifffile.imwrite(path / "rock.tif", pore * 255, photometric="minisblack")


def as_slices(path, pore):
    for x, values in enumerate(pore):
        tifffile.imwrite(path / f"slice_{x + 1}.tiff", values)


def as_mat(path, pore):
    with h5py.File(path / "rock.mat", "w", userblock_size=512) as file:  # a v7.3 file begins with MATLAB's own header
        file.create_dataset("bin", data=pore.T, chunks=(10, 12, 1), compression="gzip")


def as_npz(path, pore):
    np.savez_compressed(path / "rock.npz", pore=pore)


@pytest.mark.parametrize("write", [as_raw, as_stack, as_slices, as_mat, as_npz])
def test_every_format_of_one_image_gives_the_same_pores(write, published, tmp_path, said):
    pore = published.draw_rock()
    (tmp_path / "source").mkdir()
    write(tmp_path / "source", pore)
    ingest(tmp_path / "source", tmp_path / "rock", DEFAULT, said.append)
    rock = open_rock(tmp_path / "rock", deep=True)
    np.testing.assert_array_equal(rock.crop(), pore == 1)
    np.testing.assert_array_equal(rock.crop((2, 3, 1), (9, 5, 7)), pore[2:11, 3:8, 1:8] == 1)
    assert rock.porosity == pytest.approx(float(pore.mean())) and rock.voxel_size is None
    assert any("taken for pore (inferred)" in line and "percolates along x, y" in line for line in said)


def test_the_phase_is_what_the_user_says(published, tmp_path, said):
    pore = published.draw_rock()
    np.savez(tmp_path / "rock.npz", pore=1 - pore)  # 0 in pores
    ingest(
        tmp_path / "rock.npz",
        tmp_path / "given",
        DigitalRocksConfig(unverified="accept", pore=1, voxel_size=2e-6),
        said.append,
    )
    given = open_rock(tmp_path / "given")
    np.testing.assert_array_equal(given.crop(), pore == 0)
    assert given.voxel_size == 2e-6 and "value 1 taken for pore (given)" in said[-1]
    ingest(tmp_path / "rock.npz", tmp_path / "inferred", DEFAULT, said.append)
    np.testing.assert_array_equal(open_rock(tmp_path / "inferred").crop(), pore == 1)


def random_halves():
    return (np.random.default_rng(0).random((12, 12, 12)) < 0.48).astype(np.uint8)


def isolated_pores():
    pore = np.zeros((12, 12, 12), np.uint8)
    pore[2:4, 2:4, 2:4] = 1
    return pore


def grey():
    return np.arange(1000, dtype=np.uint16).reshape(10, 10, 10)


def vuggy_text():
    return np.zeros((4, 4, 4), np.float32)


REFUSED = {
    random_halves: "too near a half",
    isolated_pores: "it percolates along no axis",
    grey: "more than two values",
    vuggy_text: "must be whole numbers",
}


@pytest.mark.parametrize("draw", REFUSED, ids=lambda draw: draw.__name__)
def test_an_image_whose_pores_are_not_evident_is_refused(draw, tmp_path, said):
    np.savez(tmp_path / "rock.npz", pore=draw())
    with pytest.raises(ConfigError, match=REFUSED[draw]):
        ingest(tmp_path / "rock.npz", tmp_path / "rock", DEFAULT, said.append)


def test_a_raw_file_needs_a_shape_that_its_size_confirms(published, tmp_path, said):
    path = tmp_path / "rock.raw"
    published.draw_rock().tofile(path)
    for config, reason in (
        (DEFAULT, "1680 bytes, no cube"),
        (DigitalRocksConfig(unverified="accept", shape=(14, 12, 11)), r"\(14, 12, 11\) voxels of one byte are 1848"),
    ):
        with pytest.raises(ConfigError, match=reason):
            ingest(path, tmp_path / "rock", config, said.append)
    ingest(path, tmp_path / "rock", DigitalRocksConfig(unverified="accept", shape=(14, 12, 10)), said.append)
    assert open_rock(tmp_path / "rock").shape == (14, 12, 10)


def test_a_shape_that_contradicts_the_name_of_a_raw_file_is_refused(published, tmp_path, said):
    """Another order of the same lengths has the same size."""
    path = tmp_path / "rock_14x12x10_u8.raw"
    published.draw_rock().tofile(path)
    with pytest.raises(ConfigError, match=r"shape=\[10, 12, 14\]: the name of .* says \[14, 12, 10\]"):
        ingest(path, tmp_path / "rock", DigitalRocksConfig(unverified="accept", shape=(10, 12, 14)), said.append)


def test_a_missing_slice_is_named(published, tmp_path, said):
    (tmp_path / "source").mkdir()
    as_slices(tmp_path / "source", published.draw_rock())
    (tmp_path / "source/slice_7.tiff").unlink()
    with pytest.raises(ConfigError, match="slice 7 is missing"):
        ingest(tmp_path / "source", tmp_path / "rock", DEFAULT, said.append)


def test_a_box_beyond_the_image_is_refused(published, tmp_path, said):
    ingest(published.rock(tmp_path / "source"), tmp_path / "rock", DEFAULT, said.append)
    with pytest.raises(ConfigError, match="beyond the image"):
        open_rock(tmp_path / "rock").crop((10, 0, 0), (5, 4, 4))


@pytest.mark.shared_data
def test_real_rocks_have_the_pores_of_their_files(shared_data, tmp_path, said):
    source = shared_data / "porous/berea_pore_110x110x110_u8.raw"
    ingest(source, tmp_path / "berea", DEFAULT, said.append)
    voxels = np.fromfile(source, np.uint8).reshape(110, 110, 110)
    rock = open_rock(tmp_path / "berea")
    np.testing.assert_array_equal(rock.crop(), voxels == 0)
    assert rock.porosity == pytest.approx(0.178, abs=5e-4) and rock.attributes["percolates"] == ["x", "y", "z"]
    with pytest.raises(ConfigError, match="one slice, no volume"):
        ingest(shared_data / "porous/microct_slice_35_1_u16.tiff", tmp_path / "slice", DEFAULT, said.append)


@pytest.mark.shared_data
def test_a_real_mat_file_has_its_axes_reversed(shared_data, tmp_path, said):
    source = shared_data / "porous/drp374_06_00_256.mat"
    ingest(source, tmp_path / "rock", DEFAULT, said.append)
    with h5py.File(source) as file:
        corner = file["bin"][:30, :20, :10]
    np.testing.assert_array_equal(open_rock(tmp_path / "rock").crop((0, 0, 0), (10, 20, 30)), corner.T == 0)
    assert open_rock(tmp_path / "rock").porosity == pytest.approx(0.100, abs=5e-4)
