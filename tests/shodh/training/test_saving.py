"""What training does while its checkpoint is written is not in it; a write that fails or dies leaves those before."""

import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from conftest import cpu_environment

from shodh.training import checkpoint
from shodh.training.checkpoint import (
    CheckpointError,
    SaveCheckpoint,
    collect_state,
    find_newest,
    list_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from shodh.training.engine import EngineConfig, build_engine, distributed, set_learning_rate
from shodh.training.loop import StepRecord

RUN = {"git_sha": "x", "record": {"config": {"seed": 0}}}
LIMIT = 60  # s, for what must happen
# Of torch itself, which ZeRO imports on the way.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")


@pytest.fixture(params=[0, 1])
def engine(request):
    """One that has stepped once, at ZeRO 0 and 1; every tensor of its state changes with every step."""
    with distributed(threads_per_rank=1) as group:
        layers = torch.nn.Linear(8, 16, bias=False), torch.nn.BatchNorm1d(16), torch.nn.SiLU(), torch.nn.Linear(16, 4)
        model = torch.nn.Sequential(*layers)
        engine = build_engine(model, EngineConfig(batch_size=16, zero_stage=request.param), group.device)
        set_learning_rate(engine, 0.01)
        train_step(engine)
        yield engine


def train_step(engine) -> None:
    engine.backward(engine(torch.randn(16, 8)).square().mean())
    engine.step()


@contextmanager
def saving(engine, folder, interval=1, num_steps=100):
    save = SaveCheckpoint(engine, folder, interval, num_steps, RUN)
    try:
        yield save
    finally:
        save.close()


class HeldWrite:
    """In the place of ``write_checkpoint``: begins to write when let."""

    def __init__(self) -> None:
        self.let, self.events = threading.Event(), []

    def __call__(self, folder, step, *rest):
        self.events.append(f"step {step} begun")
        assert self.let.wait(LIMIT), "never let"
        write_checkpoint(folder, step, *rest)
        self.events.append(f"step {step} written")

    def let_soon(self) -> None:
        threading.Timer(0.2, self.let.set).start()


@pytest.fixture
def held(monkeypatch):
    held = HeldWrite()
    monkeypatch.setattr(checkpoint, "write_checkpoint", held)
    yield held
    held.let.set()


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_what_is_written_is_the_state_at_the_save_not_what_training_makes_of_it(engine, held, tmp_path):
    with saving(engine, tmp_path) as save:
        before = {name: value.clone() for name, value in collect_state(engine).items()}
        save.save(1)
        for _ in range(3):
            train_step(engine)
        unchanged = [name for name, value in collect_state(engine).items() if torch.equal(value, before[name])]
        assert not unchanged and not list_checkpoints(tmp_path)
        held.let.set()
        save.wait()
        found, run = read_checkpoint(tmp_path / "step-1")
    assert_same(found, before)
    assert run == {"step": 1, **RUN}


def test_training_goes_on_as_if_nothing_were_written(engine, held, tmp_path):
    """Three steps with a save under way, then the same three from the saved state: one end, bit for bit."""
    with saving(engine, tmp_path) as save:
        save.save(1)
        torch.manual_seed(1)
        for _ in range(3):
            train_step(engine)
        held.let.set()
        save.wait()
    end = collect_state(engine)
    checkpoint.restore_state(engine, read_checkpoint(tmp_path / "step-1")[0])
    torch.manual_seed(1)
    for _ in range(3):
        train_step(engine)
    assert_same(collect_state(engine), end)


def test_a_second_save_waits_for_the_first_and_both_are_committed_in_order(engine, held, tmp_path):
    with saving(engine, tmp_path) as save:
        first = collect_state(engine)
        save.save(1)
        train_step(engine)
        held.let_soon()
        second = collect_state(engine)
        save.save(2)
        assert held.events[:2] == ["step 1 begun", "step 1 written"]
        assert_same(read_checkpoint(tmp_path / "step-1")[0], first)
        save.wait()
        assert held.events[2:] == ["step 2 begun", "step 2 written"]
        assert_same(read_checkpoint(tmp_path / "step-2")[0], second)


def test_close_waits_for_what_is_being_written_and_ends_the_thread(engine, held, tmp_path):
    save = SaveCheckpoint(engine, tmp_path, 1, 100, RUN)
    save.save(1)
    held.let_soon()
    save.close()
    assert held.events == ["step 1 begun", "step 1 written"]
    assert find_newest(tmp_path, pytest.fail) == tmp_path / "step-1"
    assert not writers()


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


@contextmanager
def small_files():
    """Nothing that this process writes may grow beyond 512 bytes meanwhile; a state does, all else does not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("end", [SaveCheckpoint.wait, SaveCheckpoint.close])
def test_a_write_that_fails_is_said_in_one_line_and_older_checkpoints_stay(engine, end, tmp_path):
    with saving(engine, tmp_path) as save:
        save.save(1)
        save.wait()
        kept = {path: path.read_bytes() for path in (tmp_path / "step-1").iterdir()}
        train_step(engine)
        with small_files(), pytest.raises(CheckpointError, match="step-2: .*too large.*are untouched") as caught:
            save.save(2)
            end(save)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "step-1"] and len(kept) == 4
    assert {path: path.read_bytes() for path in (tmp_path / "step-1").iterdir()} == kept
    assert find_newest(tmp_path, pytest.fail) == tmp_path / "step-1" and not writers()


def test_a_write_that_failed_is_said_once_and_stays_known_and_nothing_is_written_after_it(engine, tmp_path):
    with saving(engine, tmp_path) as save:
        with small_files(), pytest.raises(CheckpointError, match="step-1"):
            save.save(1)
            save.wait()
        save.wait()  # said once
        save.save(2)
        assert isinstance(save.fault, CheckpointError) and not save.is_writing
    assert not list_checkpoints(tmp_path)


def test_a_folder_that_cannot_be_made_is_said_in_one_line(engine, tmp_path):
    (tmp_path / "file").touch()
    save = SaveCheckpoint(engine, tmp_path / "file" / "checkpoints", 1, 100, RUN)
    save.save(1)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/file/checkpoints/step-1: cannot be written") as caught:
        save.close()
    assert "\n" not in str(caught.value) and not writers()


def test_checkpoints_are_taken_every_interval_and_after_the_last_step(engine, tmp_path):
    with saving(engine, tmp_path, interval=3, num_steps=7) as save:
        assert [step for step in range(1, 8) if save.is_due(step)] == [3, 6, 7]
        for step in range(1, 8):
            save.after_step(StepRecord(step, {}, 0.0, []))
    assert {path.name for path in list_checkpoints(tmp_path)} == {"step-6", "step-7"}  # the newest two are kept


HALF_WRITTEN = """
import sys, time
from pathlib import Path
import torch
from shodh.training import checkpoint
from shodh.training.engine import EngineConfig, build_engine, distributed

def stall(path):
    print("in the midst", flush=True)
    time.sleep(600)

with distributed(threads_per_rank=1) as group:
    engine = build_engine(torch.nn.Linear(8, 8), EngineConfig(batch_size=4), group.device)
    save = checkpoint.SaveCheckpoint(engine, Path(sys.argv[1]), 1, 9, {"record": {"config": {}}})
    save.save(1)
    save.wait()
    setattr(checkpoint, sys.argv[2], stall)
    save.save(2)
    save.wait()
"""


@pytest.mark.parametrize("where", ["digest_file", "sync"])  # before its manifest is there; before it is renamed
def test_a_process_killed_in_the_midst_of_a_write_leaves_the_checkpoint_before(where, tmp_path):
    command = [sys.executable, "-c", HALF_WRITTEN, tmp_path, where]
    with subprocess.Popen(command, env=cpu_environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert any("in the midst" in line for line in process.stdout)  # ends with the process
        finally:
            os.kill(process.pid, signal.SIGKILL)
    half = tmp_path / "step-2.tmp"
    assert (half / "state.safetensors").is_file() and (half / "manifest.json").is_file() == (where == "sync")
    assert find_newest(tmp_path, pytest.fail) == tmp_path / "step-1"
    state, run = read_checkpoint(tmp_path / "step-1")
    assert write_checkpoint(tmp_path, 2, state, run) == find_newest(tmp_path, pytest.fail)
    assert not half.exists()
