"""A model in a file: the same model comes back, and what cannot be it is refused in one line."""

import json
import re

import pytest
import torch
from safetensors import safe_open

from shodh.config import ConfigError
from shodh.fields import CONDITIONS, NUM_GIVEN
from shodh.model.pretrained import ModelDescription, Pretrained, describe_model, from_pretrained
from shodh.model.transformer import LatentTransformer, TransformerConfig
from shodh.tensor_file import TensorPart, digest_tensors, join_parts, write_tensors

SIZES = TransformerConfig(
    latent_channels=4, medium_channels=2, width=24, depth=2, num_heads=2, num_experts=4, hidden=16
)
TOKENIZER = TensorPart({"weight": torch.ones(64)}, {"tokenizer": "{}", "digest": "1"})


@pytest.fixture
def pretrained() -> Pretrained:
    model = LatentTransformer(SIZES)
    for tensor in [*model.parameters(), *model.buffers()]:
        torch.nn.init.normal_(tensor.data, std=0.1)  # untrained, parts of it are zero
    description = ModelDescription(
        sizes=SIZES,
        step=40,
        git_sha="5f" * 20,
        data_digests={"fwi": "a" * 64},
        tokenizer_digest="b" * 64,
        config={"run": "runs/any", "loop": {"seed": 3}, "weights": []},
    )
    return Pretrained(model.eval(), description)


@pytest.fixture
def path(pretrained, tmp_path):
    path = tmp_path / "shodh.safetensors"
    write_tensors(path, join_parts({"tokenizer": TOKENIZER, "model": describe_model(pretrained)}))
    return path


def write_described(path, change, tensors=None):
    """The file as code that says or holds something else would have written it, with a digest that fits."""
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["model"])
    change(said)
    text, state = json.dumps(said), tensors or LatentTransformer(SIZES).state_dict()
    part = TensorPart(state, {"model": text, "model_digest": digest_tensors(state, text)})
    write_tensors(path, join_parts({"tokenizer": TOKENIZER, "model": part}))


def require_one_line(path, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_pretrained(path)
    message = str(caught.value)
    assert message.startswith(f"model={path}: ") and re.search(said, message) and "\n" not in message, message


@torch.no_grad()
def test_reloaded_model_forecasts_bit_identically_and_knows_where_it_comes_from(pretrained, path):
    inputs = torch.randn(3, NUM_GIVEN, 4, 4, 4, 4), torch.randn(3, 2, 4, 4, 4), torch.rand(3, len(CONDITIONS))
    loaded = from_pretrained(str(path))
    assert torch.equal(loaded.model(*inputs).latent, pretrained.model(*inputs).latent)
    assert loaded.description == pretrained.description


def test_reloaded_model_is_for_prediction(path):
    model = from_pretrained(path).model
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_flipped_bit_of_any_tensor_or_of_the_description_is_refused(path):
    whole = path.read_bytes()
    tensors = describe_model(from_pretrained(path)).tensors.values()
    places = [whole.index(tensor.numpy().tobytes()) for tensor in tensors]
    places += [whole.index(text) for text in (b'model":', b"top_k", b"model_digest", b"latent_channels", b"model/norm")]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        require_one_line(path, "altered since it was written")


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_truncated_file_is_refused(path, left):
    path.write_bytes(path.read_bytes()[:left])
    require_one_line(path, "truncated or not safetensors")


def test_missing_file_and_one_without_a_model_are_refused(tmp_path):
    require_one_line(tmp_path / "none.safetensors", "no such file. Write one with launch/export_model.py")
    write_tensors(tmp_path / "tokenizer.safetensors", TOKENIZER)
    require_one_line(tmp_path / "tokenizer.safetensors", "holds no model")


@pytest.mark.parametrize("section", ["sizes", None])
def test_model_of_a_newer_version_is_refused_with_the_key_and_the_commit(path, section):
    def add(said):
        (said[section] if section else said)["num_wormholes"] = 2

    write_described(path, add)
    require_one_line(path, f"another version .*num_wormholes=2: no such key.* commit {'5f' * 20}")


def test_tensors_of_another_architecture_are_refused(path):
    tensors = describe_model(from_pretrained(path)).tensors
    renamed = {name.replace("embed.", "embedding."): value for name, value in tensors.items()}
    write_described(path, lambda said: None, renamed)
    require_one_line(path, "another version .*embed.weight")
    write_described(path, lambda said: None, tensors | {"out.bias": torch.zeros(5)})
    require_one_line(path, "another version .*out.bias")


def test_description_that_lacks_something_is_refused(path):
    write_described(path, lambda said: said.pop("tokenizer_digest"))
    require_one_line(path, "another version .*tokenizer_digest: missing")
