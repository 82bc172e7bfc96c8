"""Several processes write one store side by side: what they make is, to the last bit, what one process makes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import journal, writer
from data.chunks import StoreError
from data.journal import Share, parse_share, read_records
from data.layout import check
from data.reader import open_store
from data.writer import write_store
from shodh.config import ConfigError

# Writes a share; before its trajectory argv[4] it says so and waits to be killed.
WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest
from data.journal import parse_share
from data.writer import write_store
plan = conftest.make_plan("plume", num_trajectories=7)
def simulate(indices):
    for i in indices:
        if i == int(sys.argv[4]):
            print("waiting", flush=True)
            time.sleep(600)
        yield i, conftest.make_trajectory(plan, i)
written = write_store(Path(sys.argv[2]), plan, simulate, parse_share(sys.argv[3]))
print(written.digest or "missing", *written.missing)
"""


def _start(path, share, wait_before=-1) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(path), share, str(wait_before)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(process) -> str:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    return output.strip()


def test_three_processes_one_of_them_killed_make_the_store_that_one_process_makes(stores, tmp_path):
    first, second, third = (_start(tmp_path / "a", f"{i}/3", wait) for i, wait in ((0, -1), (1, 4), (2, -1)))
    assert second.stdout is not None and second.stdout.readline() == "waiting\n"  # 1 is written, 4 is not
    second.send_signal(signal.SIGKILL)
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    assert "4" in _finish(first).split() and _finish(third).startswith("missing")
    with pytest.raises(ConfigError, match="incomplete, see a.partial"):
        open_store(tmp_path / "a")
    digest = _finish(_start(tmp_path / "a", "1/3"))
    assert digest == stores.make(tmp_path / "b", "plume", num_trajectories=7).digest
    assert check(tmp_path / "a") == []
    assert [p.name for p in (tmp_path / "a").glob(".*")] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_processes_that_finish_together_publish_once(stores, tmp_path):
    writers = [_start(tmp_path / "a", f"{i}/4") for i in range(4)]
    digest = stores.make(tmp_path / "b", "plume", num_trajectories=7).digest
    assert digest in [_finish(writer) for writer in writers]
    assert open_store(tmp_path / "a").digest == digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def _write(stores, path, share, **changes):
    plan = stores.plan("plume", num_trajectories=7, **changes)
    return write_store(path, plan, stores.simulate(plan), share)


def test_each_share_says_what_is_missing_and_the_last_completes(stores, tmp_path):
    assert _write(stores, tmp_path / "a", Share(0, 2)) == ("", 4, (1, 3, 5))
    assert _write(stores, tmp_path / "a", Share(0, 2)) == ("", 0, (1, 3, 5))
    done = _write(stores, tmp_path / "a", Share(1, 2))
    assert done == (_write(stores, tmp_path / "b", Share()).digest, 3, ())
    assert _write(stores, tmp_path / "a", Share(0, 2)) == (done.digest, 0, ())


def test_another_number_of_processes_continues_what_the_first_ones_left(stores, tmp_path):
    assert _write(stores, tmp_path / "a", Share(2, 3)).num_written == 2
    assert _write(stores, tmp_path / "a", Share(0, 2)) == ("", 3, (1, 3))  # of 0, 2, 4, 6 there is 2
    assert _write(stores, tmp_path / "a", Share()).num_written == 2
    assert check(tmp_path / "a") == []


def test_what_was_damaged_in_another_share_is_found_before_publishing_and_written_again(stores, tmp_path):
    _write(stores, tmp_path / "a", Share(0, 2))
    file = tmp_path / "a.partial/temperature/c.2.0.0.0.0"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert _write(stores, tmp_path / "a", Share(1, 2)) == ("", 3, (2,))
    assert _write(stores, tmp_path / "a", Share(0, 2)).num_written == 1
    assert check(tmp_path / "a") == []


def test_a_line_of_the_journal_that_was_altered_does_not_count(stores, tmp_path):
    _write(stores, tmp_path / "a", Share(0, 2))
    (journal,) = (tmp_path / "a.partial").glob(".journal*")
    journal.write_text(journal.read_text().replace('"seed": 7', '"seed": 8', 1))
    assert len(read_records(tmp_path / "a.partial")) == 3
    assert _write(stores, tmp_path / "a", Share(0, 2)).num_written == 1


def test_a_share_that_is_being_written_is_refused_and_so_is_another_division(stores, tmp_path):
    writer = _start(tmp_path / "a", "0/2", wait_before=2)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "waiting\n"
        with pytest.raises(ConfigError, match=r"another process is writing it \(shard=0/2\)"):
            _write(stores, tmp_path / "a", Share(0, 2))
        with pytest.raises(ConfigError, match="as shard=0/2. Wait for it, or give all processes the same number"):
            _write(stores, tmp_path / "a", Share())
        assert _write(stores, tmp_path / "a", Share(1, 2)) == ("", 3, (2, 4, 6))
    finally:
        writer.kill()
        writer.communicate()


def test_another_plan_is_refused_before_anything_is_simulated(stores, tmp_path):
    writer = _start(tmp_path / "a", "0/2", wait_before=0)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "waiting\n"
        with pytest.raises(ConfigError, match="config.seed is 7 in a.partial, 8 now"):
            _write(stores, tmp_path / "a", Share(1, 2), config={"seed": 8, "ranges": [1.0, 2.0]})
    finally:
        writer.kill()
        writer.communicate()


def test_what_another_version_began_is_refused_before_anything_is_simulated(stores, tmp_path):
    (tmp_path / "a.partial/flux/c/0/0").mkdir(parents=True)
    with pytest.raises(ConfigError, match="a.partial: begun by another version of Shodh. Remove it"):
        _write(stores, tmp_path / "a", Share())


def test_grids_that_differ_between_shares_are_refused(stores, tmp_path):
    plan = stores.plan("plume", num_trajectories=2)
    stretched = stores.trajectory(stores.plan("plume", config={"seed": 1, "stretched": True}), 1)
    write_store(tmp_path / "a", plan, stores.simulate(plan), Share(0, 2))
    with pytest.raises(RuntimeError, match="the grids of trajectories 0 and 1 differ"):
        write_store(tmp_path / "a", plan, lambda indices: iter([(1, stretched)]), Share(1, 2))


@pytest.mark.parametrize("text", ["2/2", "0/0", "1", "-1/2", "a/b", "1/2/3"])
def test_a_share_that_makes_no_sense_is_one_line(text):
    with pytest.raises(ConfigError, match=f"shard={text}: not i/n with 0 <= i < n"):
        parse_share(text)


def test_a_store_of_thousands_of_files_opens_within_a_second(stores, tmp_path):
    store = stores.make(tmp_path / "a", "sound", num_trajectories=700, num_snapshots=1, shape=(2, 2, 2))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        open_store(store.path)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.0  # the demand on 2100 files; CPU time, as the machine may be busy
    (tmp_path / "a/pressure/c.567.0.0.0.0").unlink()
    with pytest.raises(ConfigError, match=r"pressure/c\.567\.0\.0\.0\.0: missing"):
        open_store(store.path)
    with pytest.raises(StoreError):
        store.snapshot(567, 0)


@pytest.mark.parametrize("moment", ["before the lock", "while it waits for the lock", "while it verifies"])
def test_a_share_started_again_while_another_completes_the_store_finds_it_complete(
    moment, stores, tmp_path, monkeypatch
):
    _write(stores, tmp_path / "a", Share(0, 2))
    place, name = {
        "before the lock": (journal, "lock"),
        "while it waits for the lock": (journal.fcntl, "flock"),
        "while it verifies": (journal, "first_intact"),
    }[moment]
    original, digests = getattr(place, name), []

    def publish_first(*arguments):
        monkeypatch.undo()
        digests.append(_write(stores, tmp_path / "a", Share(1, 2)).digest)
        return original(*arguments)

    monkeypatch.setattr(place, name, publish_first)
    assert _write(stores, tmp_path / "a", Share(0, 2)) == (digests[0], 0, ())
    assert digests[0] and check(tmp_path / "a") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_two_shares_that_verify_at_the_same_time_publish_once(stores, tmp_path, monkeypatch):
    _write(stores, tmp_path / "a", Share(0, 3))
    _write(stores, tmp_path / "a", Share(1, 3))
    original, digests = writer.first_intact, []

    def complete_first(folder, records):
        monkeypatch.undo()
        digests.append(_write(stores, tmp_path / "a", Share(0, 3)).digest)  # sees all that the other has written
        return original(folder, records)

    monkeypatch.setattr(writer, "first_intact", complete_first)
    assert _write(stores, tmp_path / "a", Share(2, 3)).digest == digests[0]
    assert check(tmp_path / "a") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
