"""A cache of latents holds what the encoder gave, names whose it is, and is refused when it is stale."""

import numpy as np
import pytest
import torch
import xarray

from data.latents import BATCH_SIZE, open_latents, write_latents
from shodh.config import ConfigError


def _encode(velocity, pressure, medium):
    """Block sums over 2^3 cells: linear, and different for every input."""
    blocks = torch.nn.functional.avg_pool3d(torch.cat([velocity, pressure], 1), 2)
    return blocks, torch.nn.functional.avg_pool3d(medium, 2)


def test_the_cache_holds_what_the_encoder_gives(stores, tmp_path):
    store = stores.make(tmp_path / "fields", "channel", num_snapshots=BATCH_SIZE + 3)  # a full and a partial batch
    counted = []
    write_latents(tmp_path / "latents", store, _encode, "abc", counted.append)
    assert sum(counted) == store.num_trajectories * store.num_snapshots
    latents = open_latents(tmp_path / "latents", "abc", store.digest)
    for i in range(store.num_trajectories):
        velocity, pressure = store.snapshot(i, BATCH_SIZE)
        fields = [torch.from_numpy(a)[None] for a in (velocity, pressure[None], store.medium(i)[None])]
        latent, medium = _encode(*fields)
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
    write_latents(tmp_path / "latents", channel, _encode, "abc")
    with pytest.raises(ConfigError, match=r"stale, made with tokenizer abc, not abd\. Run"):
        open_latents(tmp_path / "latents", "abd")
    with pytest.raises(ConfigError, match="stale, made with store"):
        open_latents(tmp_path / "latents", "abc", "0" * 64)
    with pytest.raises(ConfigError, match="holds 'fields', not 'latents'"):
        open_latents(channel.path)
    with pytest.raises(ConfigError, match="no such folder"):
        open_latents(tmp_path / "nothing")


def test_a_current_cache_is_left_and_a_stale_one_replaced(channel, tmp_path):
    first = write_latents(tmp_path / "latents", channel, _encode, "abc")
    assert write_latents(tmp_path / "latents", channel, lambda *fields: pytest.fail("encoded again"), "abc") == first
    assert write_latents(tmp_path / "latents", channel, _encode, "abd") != first
    assert open_latents(tmp_path / "latents").header.tokenizer_hash == "abd"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["channel", "latents"]


def test_a_damaged_cache_is_refused_and_written_again(channel, tmp_path):
    digest = write_latents(tmp_path / "latents", channel, _encode, "abc")
    (tmp_path / "latents/latent/c/2/1/0/0/0/0").unlink()
    with pytest.raises(ConfigError, match="latent/c/2/1/0/0/0/0: missing"):
        open_latents(tmp_path / "latents", "abc")
    assert write_latents(tmp_path / "latents", channel, _encode, "abc") == digest
    open_latents(tmp_path / "latents", "abc")


def test_an_encoder_that_fails_leaves_the_old_cache(channel, tmp_path):
    write_latents(tmp_path / "latents", channel, _encode, "abc")

    def diverged(velocity, pressure, medium):
        latent, still = _encode(velocity, pressure, medium)
        return latent / 0, still

    with pytest.raises(RuntimeError, match="trajectory 0: not finite"):
        write_latents(tmp_path / "latents", channel, diverged, "abd")
    assert open_latents(tmp_path / "latents").header.tokenizer_hash == "abc"
