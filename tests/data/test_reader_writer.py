"""What is written is read back to the last bit; what is damaged raises; what was interrupted continues."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.chunks import StoreError
from data.layout import check
from data.reader import open_store
from data.writer import write_store
from shodh.config import ConfigError
from shodh.fields import PARAMETERS, Grid


def test_velocity_is_flux_over_face_area_or_circulation_over_spacing(stores, channel, sound):
    flux, circulation = stores.trajectory(channel.plan, 1).velocity[2], stores.trajectory(sound.plan, 1).velocity[2]
    hx, hy, hz = 0.5, 0.25, 2.0  # powers of two, so that division is exact
    for i, area in enumerate((hy * hz, hx * hz, hx * hy)):
        np.testing.assert_array_equal(channel.snapshot(1, 2)[0][i], flux[i] / np.float32(area))
    for i, spacing in enumerate((hx, hy, hz)):
        np.testing.assert_array_equal(sound.snapshot(1, 2)[0][i], circulation[i] / np.float32(spacing))


def test_the_factor_varies_along_a_stretched_axis(stores, tmp_path):
    store = stores.make(tmp_path / "a", "plume", config={"seed": 1, "stretched": True})
    flux = stores.trajectory(store.plan, 1).velocity[2]
    hy = np.array([0.25, 0.5, 1.0, 1.0, 0.5, 0.25], np.float32)[:, None]
    hx, hz = np.float32(0.5), np.float32(2.0)
    for i, area in enumerate((hy * hz, hx * hz, hx * hy)):  # powers of two, so that division is exact
        np.testing.assert_array_equal(store.snapshot(1, 2)[0][i], flux[i] / area)


def test_blocks_of_a_large_snapshot_are_hashed_and_scaled_as_one(stores, tmp_path):
    shape = (40, 48, 64)  # 1.5 MB of velocity: several blocks, the last not full
    store = stores.make(tmp_path / "a", "channel", shape=shape, num_trajectories=2, num_snapshots=2)
    flux = stores.trajectory(store.plan, 1).velocity[1]
    area = np.array([0.5, 1.0, 0.125], np.float32).reshape(3, 1, 1, 1)
    np.testing.assert_array_equal(store.snapshot(1, 1)[0], flux / area)
    np.testing.assert_array_equal(store.stored_velocity(1, 1), flux)


def test_a_snapshot_is_read_into_the_places_of_a_batch(channel):
    velocity, pressure = np.full((2, 3, 4, 6, 8), np.nan, np.float32), np.full((2, 4, 6, 8), np.nan, np.float32)
    for place, index in enumerate(((2, 3), (0, 1))):
        channel.read_snapshot(*index, velocity[place], pressure[place])
        np.testing.assert_array_equal(velocity[place], channel.snapshot(*index)[0])
        np.testing.assert_array_equal(pressure[place], channel.snapshot(*index)[1])


def test_scalars_come_back_to_the_last_bit_in_the_order_of_the_domain(stores, plume, channel):
    expected = stores.trajectory(plume.plan, 1).scalars
    values = plume.scalars(1, 2)
    np.testing.assert_array_equal(values, [expected["temperature"][2], expected["salinity"][2]])
    assert values.dtype == np.float32 and channel.scalars(1, 2).shape == (0, 4, 6, 8)


def test_pressure_medium_time_and_parameters_come_back_to_the_last_bit(stores, channel):
    for i in range(channel.num_trajectories):
        expected = stores.trajectory(channel.plan, i)
        np.testing.assert_array_equal(channel.medium(i), expected.medium)
        np.testing.assert_array_equal(channel.time(i), expected.time)
        wanted = [np.float32(expected.parameters.get(name, 0)) for name in PARAMETERS]
        repeats = [float(kind == "periodic") for kind in channel.domain.boundary]
        np.testing.assert_array_equal(channel.parameters(i), [*wanted, *repeats])
        for t in range(channel.num_snapshots):
            velocity, pressure = channel.snapshot(i, t)
            np.testing.assert_array_equal(pressure, expected.pressure[t])
            assert velocity.dtype == pressure.dtype == np.float32 and velocity.flags.writeable


def test_indices_outside_the_store_raise(channel):
    for trajectory, time in ((4, 0), (0, 5), (-1, 0), (0, -1)):
        with pytest.raises(IndexError):
            channel.snapshot(trajectory, time)


def test_no_flipped_bit_and_no_truncation_of_a_chunk_changes_what_is_read(stores, tmp_path):
    store = stores.make(tmp_path / "a", "channel", shape=(2, 3, 4), num_trajectories=2, num_snapshots=1)
    file = store.path / "pressure/c.0.0.0.0.0"
    sound, expected = file.read_bytes(), store.snapshot(0, 0)[1]
    num_values, size = 8 * expected.nbytes, len(sound)
    for bit in range(8 * size):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        if bit < num_values:
            with pytest.raises(StoreError, match="differs from its digest"):
                store.snapshot(0, 0)
        else:  # zarr's own checksum and index, which are not needed here
            np.testing.assert_array_equal(store.snapshot(0, 0)[1], expected)
            assert bit % 16 or [str(file) in line for line in check(store.path)] == [True]
    for length in range(expected.nbytes):
        file.write_bytes(sound[:length])
        with pytest.raises(StoreError, match="truncated"):
            store.snapshot(0, 0)


def test_a_missing_chunk_raises_and_is_named(channel):
    (channel.path / "flux/c.1.0.0.0.0.0").unlink()
    with pytest.raises(
        StoreError, match=r"flux/c\.1\.0\.0\.0\.0\.0: cannot be read \(No such file or directory\)\. Rest"
    ):
        channel.snapshot(1, 2)


def test_a_store_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        open_store(tmp_path / "nothing")


def _interrupted(simulate, after):
    def simulate_some(indices):
        for count, item in enumerate(simulate(indices)):
            if count == after:
                raise RuntimeError("blown up")
            yield item

    return simulate_some


def _recording(simulate, asked):
    def simulate_all(indices):
        asked.extend(indices)
        return simulate(indices)

    return simulate_all


def test_an_interrupted_store_continues_and_ends_with_the_digest_of_an_uninterrupted_one(stores, tmp_path):
    plan, asked = stores.plan("channel"), []
    simulate = stores.simulate(plan)
    with pytest.raises(RuntimeError, match="blown up"):
        write_store(tmp_path / "a", plan, _interrupted(simulate, after=2))
    with pytest.raises(ConfigError, match="incomplete, see a.partial"):
        open_store(tmp_path / "a")
    continued = write_store(tmp_path / "a", plan, _recording(simulate, asked))
    assert asked == [2, 3] and continued.num_written == 2
    assert continued.digest == write_store(tmp_path / "b", plan, simulate).digest
    assert check(tmp_path / "a") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_what_was_damaged_while_interrupted_is_simulated_again(stores, tmp_path):
    plan, asked = stores.plan("channel"), []
    simulate = stores.simulate(plan)
    with pytest.raises(RuntimeError):
        write_store(tmp_path / "a", plan, _interrupted(simulate, after=3))
    (tmp_path / "a.partial/flux/c.0.0.0.0.0.0").write_bytes(b"torn")
    with open(tmp_path / "a.partial/.journal-0-of-1.jsonl", "r+b") as journal:
        journal.truncate(journal.seek(0, os.SEEK_END) - 10)  # tears the line about trajectory 2
    write_store(tmp_path / "a", plan, _recording(simulate, asked))
    assert asked == [0, 2, 3] and check(tmp_path / "a") == []


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest
from data.writer import write_store
plan = conftest.make_plan("channel")
def simulate(indices):
    for i in indices:
        if i == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield i, conftest.make_trajectory(plan, i)
write_store(Path(sys.argv[2]), plan, simulate)
"""


def test_a_killed_process_leaves_its_finished_trajectories(stores, tmp_path):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "a")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    plan, asked = stores.plan("channel"), []
    write_store(tmp_path / "a", plan, _recording(stores.simulate(plan), asked))
    assert asked == [2, 3] and check(tmp_path / "a") == []


def test_a_complete_store_is_left_alone(stores, channel):
    written = write_store(channel.path, channel.plan, lambda indices: pytest.fail("simulated again"))
    assert written == (channel.digest, 0, ())


def test_another_config_is_refused_naming_the_value(stores, channel, tmp_path):
    plan = stores.plan("channel", config={"seed": 8, "ranges": [1.0, 2.0]})
    with pytest.raises(ConfigError, match="config.seed is 7 in channel, 8 now"):
        write_store(channel.path, plan, stores.simulate(plan))
    with pytest.raises(RuntimeError):
        write_store(tmp_path / "half", channel.plan, _interrupted(stores.simulate(channel.plan), after=1))
    with pytest.raises(ConfigError, match="config.seed is 7 in half.partial, 8 now"):
        write_store(tmp_path / "half", plan, stores.simulate(plan))


def test_a_store_larger_than_the_disk_is_refused_before_it_starts(stores, tmp_path):
    plan = stores.plan("channel", shape=(2048, 2048, 2048), num_trajectories=10**4)
    with pytest.raises(ConfigError, match=r"needs \S+ GB, \S+ GB are free"):
        write_store(tmp_path / "a", plan, lambda indices: pytest.fail("simulated"))


def test_the_forecast_of_the_size_is_that_on_disk(stores, tmp_path):
    store = stores.make(tmp_path / "a", "channel", shape=(16, 16, 16))
    on_disk = sum(p.stat().st_size for p in store.path.rglob("c.*"))
    # 20 bytes of checksum and index for each snapshot of 16 KiB and more, and the small arrays
    assert store.plan.num_bytes < on_disk < 1.01 * store.plan.num_bytes


def test_two_writers_of_one_store_exclude_each_other(stores, tmp_path):
    plan = stores.plan("channel")

    def simulate(indices):
        with pytest.raises(ConfigError, match="another process is writing it"):
            write_store(tmp_path / "a", plan, stores.simulate(plan))
        return stores.simulate(plan)(indices)

    assert write_store(tmp_path / "a", plan, simulate).num_written == 4


def _spoil(trajectory, kind):
    velocity = trajectory.velocity.copy()
    if kind == "not finite":
        velocity[1, 0, 0, 1, 0] = np.nan
    elif kind == "must be float32":
        velocity = velocity.astype(np.float64)
    elif kind == "divergence":
        velocity[1, 0, 1, 1, 1] += 1e-3
    elif kind == "its grid ends in":
        grid = Grid(
            shape=trajectory.grid.shape, spacing=trajectory.grid.spacing, boundary=("periodic", "periodic", "periodic")
        )
        return trajectory._replace(grid=grid)
    elif kind == "its scalars are":
        return trajectory._replace(scalars={"temperature": trajectory.pressure})
    else:
        return trajectory._replace(parameters={})
    return trajectory._replace(velocity=velocity)


@pytest.mark.parametrize(
    "kind",
    ["not finite", "must be float32", "divergence", "its grid ends in", "its parameters are", "its scalars are"],
)
def test_a_trajectory_that_breaks_the_layout_is_refused_by_name(kind, stores, tmp_path):
    plan = stores.plan("channel")
    with pytest.raises(RuntimeError, match=f"trajectory 3.*{kind}"):
        write_store(tmp_path / "a", plan, lambda indices: iter([(3, _spoil(stores.trajectory(plan, 3), kind))]))


def test_no_trajectory_may_be_all_of_a_split(stores):
    with pytest.raises(ValueError, match="num_test=4"):
        stores.plan("channel", num_test=4)
