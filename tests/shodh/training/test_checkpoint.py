"""Checkpoints are complete or absent; damage is named, and the newest intact one is found."""

import pytest
import torch

from shodh.training import checkpoint
from shodh.training.checkpoint import (
    CheckpointError,
    find_newest,
    list_checkpoints,
    load_parameters,
    read_checkpoint,
    read_newest,
    write_checkpoint,
)

RUN = {"git_sha": "x", "record": {"config": {"seed": 0}}}


def state(value: float) -> dict[str, torch.Tensor]:
    return {"parameter/weight": torch.full((64, 8), value), "optimizer/step": torch.tensor(3)}


@pytest.fixture
def folder(tmp_path):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step, state(step), RUN, keep=3)
    return tmp_path


def damage(path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "bit":
        data = bytearray(path.read_bytes())
        data[-9] ^= 4
        path.write_bytes(data)
    else:
        path.unlink()


def test_newest_checkpoint_comes_back_as_written(folder):
    tensors, run = read_newest(folder)
    assert torch.equal(tensors["parameter/weight"], state(30)["parameter/weight"])
    assert run == {"step": 30, **RUN}


@pytest.mark.parametrize("how", ["truncated", "bit", "missing"])
@pytest.mark.parametrize("name", ["state.safetensors", "run.json", "manifest.json"])
def test_damaged_checkpoint_is_skipped_aloud_for_the_one_before(folder, how, name):
    damage(folder / "step-30" / name, how)
    said = []
    assert find_newest(folder, said.append) == folder / "step-20"
    assert len(said) == 1 and "step-30" in said[0] and "Skipped" in said[0]
    with pytest.raises(CheckpointError, match="step-30"):
        read_checkpoint(folder / "step-30")


def test_training_never_restarts_silently_when_all_checkpoints_are_damaged(folder):
    for path in list_checkpoints(folder):
        damage(path / "state.safetensors", "bit")
    with pytest.raises(CheckpointError, match="none of 3 is intact"):
        find_newest(folder, lambda message: None)


def test_an_unfinished_write_is_no_checkpoint(folder, monkeypatch):
    def die(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "sync", die)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(folder, 40, state(40), RUN)
    monkeypatch.undo()
    assert find_newest(folder, print) == folder / "step-30" and list(folder.glob("step-40.tmp"))
    # of another step, which after a change of the interval is all that comes: nothing is left lying about
    assert write_checkpoint(folder, 45, state(45), RUN) == find_newest(folder, print)
    assert not list(folder.glob("*.tmp"))


def test_full_disk_is_one_line_and_older_checkpoints_stay(folder, monkeypatch):
    def fill(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fill)
    with pytest.raises(CheckpointError, match="No space left.*untouched"):
        write_checkpoint(folder, 40, state(40), RUN)
    assert find_newest(folder, print) == folder / "step-30" and not list(folder.glob("*.tmp"))


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        write_checkpoint(tmp_path, step, state(step), RUN, keep=2)
    assert {path.name for path in list_checkpoints(tmp_path)} == {"step-3", "step-10"}


def test_no_checkpoint_at_all_is_said_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        read_newest(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        read_checkpoint(tmp_path / "step-1")


def test_parameters_of_another_model_are_refused_in_one_line():
    with pytest.raises(CheckpointError, match="does not fit the model") as caught:
        load_parameters(torch.nn.Linear(3, 3), state(1.0))
    assert "\n" not in str(caught.value)
