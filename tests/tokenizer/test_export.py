"""The tokenizer file: the same tokenizer comes back, and damage is noticed."""

import pytest
import torch
from conftest import make_batch, make_domain
from safetensors.torch import save_file

from shodh.config import ConfigError
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.export import digest_weights, load_tokenizer, save_tokenizer


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


def test_file_of_another_program_is_told_to_be_no_tokenizer_instead_of_an_altered_one(tmp_path):
    for name, metadata in (("bare", None), ("described", {"format": "pt"})):
        save_file({"weight": torch.ones(2)}, tmp_path / f"{name}.safetensors", metadata=metadata)
        with pytest.raises(ConfigError, match=f"{name}.safetensors: is no Shodh tokenizer"):
            load_tokenizer(tmp_path / f"{name}.safetensors")


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_tokenizer(tmp_path / "none.safetensors")


def certify_zeros(model: Autoencoder) -> dict:
    return {"verdict": "exact", "failures": [], "weights": digest_weights(model), "num_fields": 1, "domains": {}}


def test_certificate_comes_back_with_the_file_and_leaves_its_latents_valid(saved, tmp_path):
    model, path, digest = saved
    assert load_tokenizer(path).certificate is None
    certified = tmp_path / "certified.safetensors"
    scales = load_tokenizer(path).statistics
    save_tokenizer(certified, model, {"anything": make_domain()}, scales, certify_zeros(model))
    loaded = load_tokenizer(certified)
    assert loaded.certificate == certify_zeros(model) and loaded.digest == digest
    assert digest_weights(loaded.autoencoder) == certify_zeros(model)["weights"]


@pytest.mark.parametrize(
    "change",
    [
        (b'\\"exact\\"', b'\\"wrong\\"'),
        (b'num_fields\\": 1', b'num_fields\\": 9'),
        (b'"certificate":', b'"certificats":'),
    ],
)
def test_altered_certificate_is_refused(saved, tmp_path, change):
    model, *_ = saved
    path = tmp_path / "certified.safetensors"
    save_tokenizer(path, model, {"anything": make_domain()}, {}, certify_zeros(model))
    data = path.read_bytes()
    old, new = change
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    with pytest.raises(ConfigError, match="altered"):
        load_tokenizer(path)


def test_certificate_of_other_weights_is_refused(saved, tmp_path):
    model, *_ = saved
    certificate = certify_zeros(model)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="other weights"):
        save_tokenizer(tmp_path / "t.safetensors", model, {"anything": make_domain()}, {}, certificate)
