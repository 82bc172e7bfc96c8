"""A cache of latents holds what the encoder gave, names whose it is, and is refused when it is stale."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray

from data.chunks import StoreError
from data.journal import Share
from data.latents import BATCH_SIZE, open_latents, write_latents
from data.layout import main
from data.reader import open_store
from data.writer import write_store
from shodh.config import ConfigError


def test_the_cache_holds_what_the_encoder_gives(stores, tmp_path):
    store = stores.make(tmp_path / "fields", "channel", num_snapshots=BATCH_SIZE + 3)  # a full and a partial batch
    counted = []
    write_latents(tmp_path / "latents", store, stores.encode, "abc", counted.append)
    assert sum(counted) == store.num_trajectories * store.num_snapshots
    latents = open_latents(tmp_path / "latents", "abc", store.digest)
    for i in range(store.num_trajectories):
        velocity, pressure = store.snapshot(i, BATCH_SIZE)
        fields = [torch.from_numpy(a)[None] for a in (velocity, pressure[None], store.medium(i)[None])]
        latent, medium = stores.encode(*fields)
        np.testing.assert_array_equal(latents.latent(i, BATCH_SIZE), latent[0].numpy())
        np.testing.assert_array_equal(latents.medium(i), medium[0].numpy())
        np.testing.assert_array_equal(latents.parameters(i), store.parameters(i))
    assert latents.domain == store.domain
    assert latents.trajectories("test") == store.trajectories("test")
    with xarray.open_zarr(tmp_path / "latents", consolidated=False) as dataset:
        assert dataset["latent"].dims == ("trajectory", "time", "channel", "x", "y", "z")
        np.testing.assert_array_equal(dataset["latent"][1, 2], latents.latent(1, 2))
        np.testing.assert_array_equal(dataset["time"][0], store.time(0))
        assert dataset.attrs["field_digest"] == store.digest


def test_a_stale_cache_is_refused_in_one_line(stores, channel, tmp_path):
    write_latents(tmp_path / "latents", channel, stores.encode, "abc")
    with pytest.raises(ConfigError, match=r"stale, made with tokenizer abc, not abd\. Run"):
        open_latents(tmp_path / "latents", "abd")
    with pytest.raises(ConfigError, match="stale, made with store"):
        open_latents(tmp_path / "latents", "abc", "0" * 64)
    with pytest.raises(ConfigError, match="holds 'fields', not 'latents'"):
        open_latents(channel.path)
    with pytest.raises(ConfigError, match="no such folder"):
        open_latents(tmp_path / "nothing")


def test_a_current_cache_is_left_and_a_stale_one_replaced(stores, channel, tmp_path):
    first = write_latents(tmp_path / "latents", channel, stores.encode, "abc")
    assert write_latents(tmp_path / "latents", channel, lambda *fields: pytest.fail("encoded again"), "abc") == first
    assert write_latents(tmp_path / "latents", channel, stores.encode, "abd") != first
    assert open_latents(tmp_path / "latents").header.tokenizer_hash == "abd"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["channel", "latents"]


def test_a_damaged_cache_is_refused_and_written_again(stores, channel, tmp_path):
    digest = write_latents(tmp_path / "latents", channel, stores.encode, "abc")
    (tmp_path / "latents/latent/c.2.0.0.0.0.0").unlink()
    with pytest.raises(ConfigError, match=r"latent/c\.2\.0\.0\.0\.0\.0: missing"):
        open_latents(tmp_path / "latents", "abc")
    assert write_latents(tmp_path / "latents", channel, stores.encode, "abc") == digest
    open_latents(tmp_path / "latents", "abc")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest
from data.latents import write_latents
from data.reader import open_store
store, calls = open_store(sys.argv[2]), []
def encode(*fields):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return conftest.encode_blocks(*fields)
write_latents(Path(sys.argv[3]), store, encode, "abc")
"""


def _killed_writer(store, path):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(store.path), str(path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


def test_a_killed_writer_continues_with_the_trajectories_that_are_missing(stores, channel, tmp_path):
    _killed_writer(channel, tmp_path / "latents")
    encoded = []

    def encode(velocity, pressure, medium):
        encoded.append(len(velocity))
        return stores.encode(velocity, pressure, medium)

    digest = write_latents(tmp_path / "latents", channel, encode, "abc")
    assert encoded == [5, 5]  # the snapshots of trajectories 2 and 3
    assert digest == write_latents(tmp_path / "whole", channel, stores.encode, "abc")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["channel", "latents", "whole"]


def test_what_another_tokenizer_left_half_way_is_not_continued(stores, channel, tmp_path):
    _killed_writer(channel, tmp_path / "latents")
    digest = write_latents(tmp_path / "latents", channel, stores.encode, "abd")
    assert digest == write_latents(tmp_path / "whole", channel, stores.encode, "abd")


def test_the_check_knows_latents(stores, channel, tmp_path, capsys):
    write_latents(tmp_path / "latents", channel, stores.encode, "abc")
    assert main([str(tmp_path / "latents")]) == 0
    file = tmp_path / "latents/latent/c.1.0.0.0.0.0"
    content = bytearray(file.read_bytes())
    content[7] ^= 4
    file.write_bytes(content)
    assert main([str(tmp_path / "latents")]) == 1
    assert "latent/c.1.0.0.0.0.0: differs from its digest" in capsys.readouterr().out
    with pytest.raises(StoreError, match="inner chunk 0 differs from its digest"):
        open_latents(tmp_path / "latents").latent(1, 0)


def test_an_encoder_that_fails_leaves_the_old_cache(stores, channel, tmp_path):
    write_latents(tmp_path / "latents", channel, stores.encode, "abc")

    def diverged(velocity, pressure, medium):
        latent, still = stores.encode(velocity, pressure, medium)
        return latent / 0, still

    with pytest.raises(RuntimeError, match="trajectory 0: not finite"):
        write_latents(tmp_path / "latents", channel, diverged, "abd")
    assert open_latents(tmp_path / "latents").header.tokenizer_hash == "abc"


def test_what_is_no_cache_of_latents_is_never_replaced(stores, channel, tmp_path):
    before, digest = sorted(channel.path.rglob("*")), channel.digest
    with pytest.raises(ConfigError, match="a store of fields stands there. Choose another folder"):
        write_latents(channel.path, channel, stores.encode, "abc")
    assert sorted(channel.path.rglob("*")) == before and open_store(channel.path).digest == digest
    notes = tmp_path / "thesis/chapter.tex"
    notes.parent.mkdir()
    notes.write_text("years of work")
    with pytest.raises(ConfigError, match="something that is no cache of latents stands there"):
        write_latents(notes.parent, channel, stores.encode, "abc")
    assert notes.read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["channel", "thesis"]


def test_a_store_half_written_beside_the_cache_is_never_replaced(stores, channel, tmp_path):
    plan = stores.plan("channel")
    write_store(tmp_path / "fields", plan, stores.simulate(plan), Share(0, 2))
    before = sorted((tmp_path / "fields.partial").rglob("*"))
    with pytest.raises(ConfigError, match=r"fields\.partial is a store half written. Choose another folder"):
        write_latents(tmp_path / "fields", channel, stores.encode, "abc")
    assert sorted((tmp_path / "fields.partial").rglob("*")) == before


def test_replacing_a_cache_leaves_the_users_copies_of_it(stores, channel, tmp_path):
    write_latents(tmp_path / "latents", channel, stores.encode, "abc")
    shutil.copytree(tmp_path / "latents", tmp_path / "latents.old")
    write_latents(tmp_path / "latents", channel, stores.encode, "abd")
    assert open_latents(tmp_path / "latents.old").header.tokenizer_hash == "abc"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["channel", "latents", "latents.old"]
