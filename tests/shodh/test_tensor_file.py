"""Files of named tensors: parts stay apart, and a failed write takes nothing away."""

import hashlib
import os

import pytest
import torch

from shodh.config import ConfigError
from shodh.tensor_file import TensorPart, digest_tensors, join_parts, read_part, write_tensors

TENSORS = {"b.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor(1.5), "c": torch.zeros(0, 4)}


def test_digest_is_that_of_text_names_and_bytes_in_the_order_of_names():
    whole = b"said" + b"".join(name.encode() + TENSORS[name].numpy().tobytes() for name in ("a.bias", "b.weight", "c"))
    assert digest_tensors(TENSORS, "said") == hashlib.sha256(whole).hexdigest()


def test_digest_does_not_depend_on_how_a_tensor_lies_in_memory():
    turned = TENSORS | {"b.weight": TENSORS["b.weight"].T.contiguous().T}
    assert not turned["b.weight"].is_contiguous() and digest_tensors(turned) == digest_tensors(TENSORS)


def test_parts_of_a_joined_file_come_back_apart_and_a_file_of_one_whole(tmp_path):
    one = TensorPart(TENSORS, {"one": "first", "digest": "1"})
    other = TensorPart({"c": torch.ones(2)}, {"other": "second"})
    write_tensors(tmp_path / "joined.safetensors", join_parts({"one": one, "other": other}))
    write_tensors(tmp_path / "alone.safetensors", one)
    for file in ("joined", "alone"):
        found = read_part(tmp_path / f"{file}.safetensors", "one", ("one", "digest", "absent"), "")
        assert found.metadata == one.metadata and found.tensors.keys() == TENSORS.keys()
        assert all(torch.equal(found.tensors[name], TENSORS[name]) for name in TENSORS)
    found = read_part(tmp_path / "joined.safetensors", "other", ("other",), "")
    assert found.metadata == other.metadata and torch.equal(found.tensors["c"], torch.ones(2))


def test_failed_write_is_one_line_and_leaves_nothing_half_done(tmp_path):
    folder = tmp_path / "taken.safetensors"
    (folder / "kept").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"^file=.*taken.safetensors: cannot be written [^\n]*\. Free disk space"):
        write_tensors(folder, TensorPart(TENSORS, {}))
    assert [path.name for path in tmp_path.iterdir()] == ["taken.safetensors"]


def test_file_is_on_disk_before_it_takes_its_name_and_the_name_before_writing_returns(tmp_path, monkeypatch):
    file, synced, fsync = tmp_path / "model.safetensors", [], os.fsync

    def watch(descriptor: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), file.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write_tensors(file, TensorPart(TENSORS, {}))
    assert synced == [(str(file.with_suffix(".tmp")), False), (str(tmp_path), True)]
