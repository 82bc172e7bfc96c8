"""The tokenizer file: the same tokenizer comes back, and damage is noticed."""

import pytest
import torch
from conftest import make_batch, make_domain

from shodh.config import ConfigError
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.export import load_tokenizer, save_tokenizer


@pytest.fixture
def saved(tmp_path):
    model = Autoencoder(AutoencoderConfig(latent_channels=8, medium_channels=4, widths=(8, 16, 32)))
    scales = {"anything": {"velocity_scale": 2.0}}
    path = tmp_path / "tokenizer.safetensors"
    return model, path, save_tokenizer(path, model, {"anything": make_domain()}, scales)


def test_reloaded_tokenizer_decodes_bit_identically(saved):
    model, path, digest = saved
    loaded = load_tokenizer(path)
    assert loaded.digest == digest and loaded.statistics == {"anything": {"velocity_scale": 2.0}}
    assert loaded.domains["anything"] == make_domain()
    batch = make_batch(make_domain())
    assert torch.equal(loaded.autoencoder(batch).velocity, model(batch).velocity)


def test_flipped_bit_is_refused(saved):
    _, path, _ = saved
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="altered"):
        load_tokenizer(path)


def test_truncated_file_is_refused(saved):
    _, path, _ = saved
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="truncated"):
        load_tokenizer(path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_tokenizer(tmp_path / "none.safetensors")
