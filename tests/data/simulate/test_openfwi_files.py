"""Files in OpenFWI's layout: what a public loader expects, resumable, shardable, and never written over or misread."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.simulate.openfwi_files import DIGESTS, GATHER_SHAPE, MANIFEST, GathersConfig, plan_files, write_files
from shodh.config import ConfigError


class Killed(Exception):
    """Stands for a process that stops."""


def record(maps: np.ndarray) -> np.ndarray:
    """Traces that name their map: the files are what is tested here, not the waves."""
    return np.broadcast_to(maps[:, :, :1, :] / 100, (len(maps), *GATHER_SHAPE)).astype(np.float32)


def make_config(folder: Path, **changes) -> GathersConfig:
    config = GathersConfig(
        folder=folder, families=("flatvel-a", "flatfault-b"), num_files=3, maps_per_file=3, maps_per_batch=2
    )
    return replace(config, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.npy")}


def test_files_have_the_published_names_shapes_and_types(tmp_path: Path):
    config = make_config(tmp_path, num_files=4)
    assert write_files(config, record) == (8, 0)
    assert set(contents(tmp_path)) == {
        *(f"FlatVel_A/{kind}/{kind}{n}.npy" for kind in ("data", "model") for n in (1, 2, 3, 4)),
        *(f"FlatFault_B/{kind}{k}_1_{i}.npy" for kind in ("seis", "vel") for k, i in ((6, 0), (7, 0), (8, 0), (6, 1))),
    }
    for pair in plan_files(config):
        gathers, maps = np.load(tmp_path / pair.gathers), np.load(tmp_path / pair.maps)
        assert gathers.shape == (3, 5, 1000, 70) and gathers.dtype == np.float32
        assert maps.shape == (3, 1, 70, 70) and maps.dtype == np.float32
        np.testing.assert_array_equal(gathers, record(maps))
        assert pair.num_layers is None or len(np.unique(maps[0])) <= pair.num_layers
    firsts = [np.load(tmp_path / pair.maps)[0] for pair in plan_files(config)]
    assert len({first.tobytes() for first in firsts}) == 8, "two files hold the same map"


def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path):
    whole, killed = make_config(tmp_path / "whole"), make_config(tmp_path / "killed")
    write_files(whole, record)
    for survivors in (1, 5, 7):
        calls = iter(range(survivors))

        def die(maps: np.ndarray, calls=calls) -> np.ndarray:
            if next(calls, None) is None:
                raise Killed
            return record(maps)

        with pytest.raises(Killed):
            write_files(killed, die)
        half_done = contents(killed.folder)
        named = {name: data for name, data in half_done.items() if not Path(name).name.startswith(".")}
        assert named.items() <= contents(whole.folder).items(), "a file is incomplete under its final name"
    assert write_files(killed, record).num_intact > 0
    assert contents(killed.folder) == contents(whole.folder)


def test_shards_together_write_what_one_process_does(tmp_path: Path):
    whole, shared = make_config(tmp_path / "whole"), make_config(tmp_path / "shared")
    write_files(whole, record)
    counts = [write_files(replace(shared, shard=f"{i}/4"), record).num_written for i in range(4)]
    assert sum(counts) == 6 and max(counts) == 2
    assert contents(shared.folder) == contents(whole.folder)
    assert write_files(shared, record) == (0, 6)


def test_batches_do_not_change_what_is_written(tmp_path: Path):
    one, three = make_config(tmp_path / "1", maps_per_batch=1), make_config(tmp_path / "3", maps_per_batch=3)
    write_files(one, record)
    write_files(three, record)
    assert contents(one.folder) == contents(three.folder)


def test_complete_files_are_verified_and_not_made_again(tmp_path: Path):
    config = make_config(tmp_path)
    write_files(config, record)
    done: list[int] = []

    def refuse(maps: np.ndarray) -> np.ndarray:
        raise AssertionError("simulated again")

    assert write_files(config, refuse, progress=done.append) == (0, 6)
    assert sum(done) == 6 * config.maps_per_file


@pytest.mark.parametrize("name", ["FlatVel_A/data/data2.npy", "FlatFault_B/vel7_1_0.npy"])
def test_one_flipped_bit_or_a_lost_tail_is_named(tmp_path: Path, name: str):
    config = make_config(tmp_path)
    write_files(config, record)
    sound = (tmp_path / name).read_bytes()
    flipped = bytearray(sound)
    flipped[-1000] ^= 1
    for altered in (bytes(flipped), sound[:-4]):
        (tmp_path / name).write_bytes(altered)
        with pytest.raises(ConfigError, match=f"{name}: truncated or altered"):
            write_files(config, record)
        assert (tmp_path / name).read_bytes() == altered, "the evidence was written over"
    (tmp_path / name).unlink()
    assert write_files(config, record) == (1, 5)
    assert (tmp_path / name).read_bytes() == sound


def test_each_family_has_the_digests_that_sha256sum_verifies(tmp_path: Path):
    config = make_config(tmp_path)
    write_files(replace(config, shard="1/2"), record)
    write_files(replace(config, shard="0/2"), record)
    for family, num in (("FlatVel_A", 6), ("FlatFault_B", 6)):
        call = ["sha256sum", "--check", "--strict", "--quiet", DIGESTS]
        done = subprocess.run(call, cwd=tmp_path / family, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert len((tmp_path / family / DIGESTS).read_text().splitlines()) == num
    (tmp_path / "FlatVel_A" / DIGESTS).unlink()
    with pytest.raises(ConfigError, match=r"has no line in SHA256SUMS"):
        write_files(config, record)


def test_foreign_files_are_never_written_over(tmp_path: Path):
    published = tmp_path / "FlatVel_A/data/data1.npy"
    published.parent.mkdir(parents=True)
    published.write_bytes(b"downloaded for a week")
    with pytest.raises(ConfigError, match=r"data1.npy: is not in manifest.jsonl, so it is none of ours"):
        write_files(make_config(tmp_path), record)
    assert published.read_bytes() == b"downloaded for a week"


@pytest.mark.parametrize(
    ("key", "value", "said"), [("seed", 5, "seed=0, now 5"), ("maps_per_file", 2, "gathers_shape")]
)
def test_another_config_s_files_are_refused(tmp_path: Path, key: str, value: int, said: str):
    write_files(make_config(tmp_path), record)
    with pytest.raises(ConfigError, match=said):
        write_files(make_config(tmp_path, **{key: value}), record)


def test_a_torn_line_of_the_manifest_costs_one_file_at_most(tmp_path: Path):
    config = make_config(tmp_path)
    write_files(config, record)
    before, manifest = contents(tmp_path), tmp_path / MANIFEST
    lost = json.loads(manifest.read_text().splitlines()[-1])
    manifest.write_bytes(manifest.read_bytes()[:-50])
    with pytest.raises(ConfigError, match="is not in manifest.jsonl"):
        write_files(config, record)
    for kind in ("gathers", "maps"):
        (tmp_path / lost[kind]).unlink()
    assert write_files(config, record) == (1, 5)
    assert contents(tmp_path) == before
    assert write_files(config, record) == (0, 6)


def test_a_gather_that_is_not_finite_is_not_written(tmp_path: Path):
    with pytest.raises(RuntimeError, match="not finite"):
        write_files(make_config(tmp_path), lambda maps: record(maps) * np.float32(np.nan))
    assert not [name for name in contents(tmp_path) if not Path(name).name.startswith(".")]


def test_config_errors_say_what_to_do(tmp_path: Path):
    with pytest.raises(ValueError, match="flatvel-a is named twice"):
        make_config(tmp_path, families=("flatvel-a", "style-a", "flatvel-a"))
    with pytest.raises(ValueError, match="seed=-1: must not be negative"):
        make_config(tmp_path, seed=-1)
    for shard in ("2/2", "1", "a/b", "-1/2"):
        with pytest.raises(ValueError, match=f"shard={shard}: not i/n"):
            make_config(tmp_path, shard=shard)
    with pytest.raises(ValueError, match="maps_per_file=0"):
        make_config(tmp_path, maps_per_file=0)
    with pytest.raises(ConfigError, match=r"needs 1\.42e\+06 GB"):
        write_files(make_config(tmp_path, num_files=1000, maps_per_file=500_000), record)
