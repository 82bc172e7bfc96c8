"""Sources are verified against their manifests, and what is not in them is named in one line."""

import h5py
import numpy as np
import pytest

from data.ingest.source import (
    find_files,
    natural_order,
    open_hdf5,
    open_npy,
    refuse_outliers,
    require_dataset,
    spacing_of,
    verify_files,
)
from shodh.config import ConfigError


def test_files_come_in_the_order_of_their_numbers():
    names = ["data10.npy", "data2.npy", "data1.npy"]
    assert sorted(names, key=natural_order) == ["data1.npy", "data2.npy", "data10.npy"]


def test_a_manifest_vouches_for_its_files_and_for_no_others(tmp_path, published, said):
    (tmp_path / "a.npy").write_bytes(b"one")
    files = find_files(tmp_path, (".npy",))
    assert not verify_files(files, tmp_path, "accept", said.append).verified and "accepted" in said[0]
    with pytest.raises(ConfigError, match=r"no digest vouches for it, .* \(sha256sum FILES > SHA256SUMS"):
        verify_files(files, tmp_path, "refuse", said.append)
    published.manifest(tmp_path)
    assert verify_files(files, tmp_path, "refuse", said.append).verified and len(said) == 1
    (tmp_path / "a.npy").write_bytes(b"onf")
    with pytest.raises(ConfigError, match=r"a.npy: its SHA-256 is .* its manifest says"):
        verify_files(files, tmp_path, "accept", said.append)
    (tmp_path / "b.npy").write_bytes(b"two")
    with pytest.raises(ConfigError, match=r"b.npy: not listed in .*SHA256SUMS"):
        verify_files([tmp_path / "b.npy"], tmp_path, "accept", said.append)


def test_a_manifest_of_one_file_is_read_with_and_without_its_name(tmp_path, said):
    digest = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"  # of b"one", by sha256sum
    (tmp_path / "a.npy").write_bytes(b"one")
    for line in (digest, f"{digest}  a.npy\n"):
        (tmp_path / "a.npy.sha256").write_text(line)
        assert verify_files([tmp_path / "a.npy"], tmp_path, "accept", said.append).sha256 == {"a.npy": digest}
    (tmp_path / "a.npy.sha256").write_text("no digest")
    with pytest.raises(ConfigError, match="'no digest' is no"):
        verify_files([tmp_path / "a.npy"], tmp_path, "accept", said.append)


def test_a_manifest_at_the_head_of_the_source_names_files_below_it(tmp_path, said):
    digest = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"  # of b"one", by sha256sum
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.npy").write_bytes(b"one")
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  ./data/a.npy\n")
    assert verify_files([tmp_path / "data/a.npy"], tmp_path, "refuse", said.append).verified and not said
    (tmp_path / "data/a.npy").write_bytes(b"onf")
    with pytest.raises(ConfigError, match="its manifest says"):
        verify_files([tmp_path / "data/a.npy"], tmp_path, "accept", said.append)


def test_a_file_that_the_manifest_lists_may_not_be_missing(tmp_path, published):
    for name in ("a.npy", "b.npy"):
        (tmp_path / name).write_bytes(b"x")
    published.manifest(tmp_path)
    (tmp_path / "b.npy").unlink()
    with pytest.raises(ConfigError, match="b.npy: listed in SHA256SUMS, but missing"):
        find_files(tmp_path, (".npy",))
    (tmp_path / "head").mkdir()
    (tmp_path / "a.npy").rename(tmp_path / "head/a.npy")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  head/a.npy\n{'0' * 64}  head/b.npy\n")
    with pytest.raises(ConfigError, match="head/b.npy: listed in SHA256SUMS, but missing"):
        verify_files([tmp_path / "head/a.npy"], tmp_path, "refuse", print)


def test_npy_is_refused_unless_it_is_float32_in_c_order_of_the_right_length(tmp_path):
    path = tmp_path / "a.npy"
    for array, reason in (
        (np.zeros(4), "float64, not float32"),
        (np.zeros((3, 4), np.float32, order="F"), "Fortran"),
        (np.array([None]), "cannot be read"),
    ):
        np.save(path, array)
        with pytest.raises(ConfigError, match=reason):
            open_npy(path)
    np.save(path, np.zeros(4, np.float32))
    path.write_bytes(path.read_bytes() + b"tail")
    with pytest.raises(ConfigError, match="148 bytes, its header says 144"):
        open_npy(path)


def test_a_dataset_that_is_not_wholly_in_the_file_is_refused(tmp_path):
    """HDF5 itself reads chunks that were never written as zeros."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        sparse = file.create_dataset("sparse", (8, 8), np.float32, chunks=(4, 4))
        sparse[:4] = 1
        file.create_dataset("late", (8,), np.float32)  # space is allotted at the first write
        file["odd"] = np.zeros(3, np.float16)
    for name, reason in (
        ("sparse", "not wholly"),
        ("late", "not wholly"),
        ("odd", "float16"),
        ("none", "there are: late"),
    ):
        with pytest.raises(ConfigError, match=reason), open_hdf5(tmp_path / "a.h5") as file:
            require_dataset(file, name, tmp_path / "a.h5")


def test_coordinates_must_ascend_evenly(tmp_path):
    even = (0.1 * np.arange(1000)).astype(np.float32)
    assert spacing_of(even, "x", tmp_path) == pytest.approx(0.1, rel=1e-6)
    for values, reason in ((even[::-1], "ascend"), (even**2, "evenly"), (np.append(even, np.nan), "NaN")):
        with pytest.raises(ConfigError, match=reason):
            spacing_of(values, "x", tmp_path)


def test_one_value_with_a_flipped_exponent_is_an_outlier_and_turbulence_has_none(tmp_path):
    values = np.random.default_rng(0).standard_t(3, 30000).astype(np.float32)  # heavier tails than velocity has
    refuse_outliers(values, "u", tmp_path)
    values.view(np.uint32)[77] ^= 1 << 30
    with pytest.raises(ConfigError, match="a value of u lies"):
        refuse_outliers(values, "u", tmp_path)
