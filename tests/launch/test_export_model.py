"""`export_model.py`: joins a run's newest model with the tokenizer whose latents it forecasts, and with no other."""

import random
import re
import shutil
from pathlib import Path

import export_model
import pytest
import torch
from conftest import make_batch, make_domain
from parts import load_model, read_newest_model

from shodh.config import ConfigError, to_plain
from shodh.fields import CONDITIONS, NUM_GIVEN
from shodh.model.pretrained import from_pretrained
from shodh.model.transformer import LatentTransformer, TransformerConfig, find_stacks
from shodh.training.checkpoint import write_checkpoint
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.export import digest_weights, load_tokenizer, save_tokenizer

SIZES = TransformerConfig(
    latent_channels=8, medium_channels=4, width=24, depth=2, num_heads=2, num_experts=4, hidden=16
)
DOMAIN = make_domain()
CPU = torch.device("cpu")


def save(path: Path) -> str:
    model = Autoencoder(AutoencoderConfig(latent_channels=8, medium_channels=4, widths=(8, 16, 32)))
    certificate = {"verdict": "exact", "failures": [], "weights": digest_weights(model), "num_fields": 1, "domains": {}}
    return save_tokenizer(path, model, {DOMAIN.name: DOMAIN}, {DOMAIN.name: {"velocity_scale": 2.0}}, certificate)


def collect_from_slices(model: LatentTransformer, num_ranks: int) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a model whose experts as many ranks share out: their slices, joined in order."""
    stacks = {id(parameter) for parameter in find_stacks(model)}
    state = {f"buffer/{name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        slices = parameter.detach().chunk(num_ranks) if id(parameter) in stacks else (parameter.detach(),)
        state[f"parameter/{name}"] = torch.cat([part.clone() for part in slices])
    return state | {f"exp_avg/{name}": parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with a tokenizer beside it and two checkpoints of different models."""
    digest = save(tmp_path / "tokenizer.safetensors")
    for step in (3, 7):
        model = LatentTransformer(SIZES)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)  # untrained, parts of it are zero
        description = {
            "identity": {"model": to_plain(SIZES), "tokenizer": digest, "data": {DOMAIN.name: "a" * 64}},
            "record": {"config": {"tokenizer": str(tmp_path / "tokenizer.safetensors"), "run": str(tmp_path / "run")}},
            "git_sha": "5f" * 20,
        }
        write_checkpoint(
            tmp_path / "run" / "checkpoints" / "pretrain", step, collect_from_slices(model, 2), description
        )
    torch.save(model.state_dict(), tmp_path / "newest.pt")
    return tmp_path / "run"


@torch.no_grad()
def test_exported_file_gives_tokenizer_and_newest_model_back_bit_for_bit(run, tmp_path, capsys):
    out = tmp_path / "to" / "shodh.safetensors"
    export_model.main([str(run), str(out)])
    said = capsys.readouterr().out
    assert re.fullmatch(
        rf"{out}: [\d.]+ MB, model of [\d,]+ parameters \([\d,]+ active\) after step 7, digest [0-9a-f]{{12}}\n", said
    )
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    expected = LatentTransformer(SIZES)
    expected.load_state_dict(torch.load(tmp_path / "newest.pt", weights_only=True))
    inputs = torch.randn(2, NUM_GIVEN, 8, 4, 4, 4), torch.randn(2, 4, 4, 4, 4), torch.rand(2, len(CONDITIONS))
    model, description = from_pretrained(out)
    assert torch.equal(model(*inputs).latent, expected(*inputs).latent)
    assert description == read_newest_model(run).description and description.step == 7

    alone, joined = load_tokenizer(tmp_path / "tokenizer.safetensors"), load_tokenizer(out)
    assert joined[1:] == alone[1:] and joined.certificate is not None and joined.digest == alone.digest
    batch = make_batch(DOMAIN)
    assert torch.equal(joined.autoencoder(batch).velocity, alone.autoencoder(batch).velocity)
    assert load_model(out, joined, CPU).description == load_model(run, alone, CPU).description


def test_exported_file_serves_as_the_tokenizer_of_a_further_export(run, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    export_model.main([str(run), str(first)])
    export_model.main([str(run), str(second), f"tokenizer={first}"])
    assert load_tokenizer(second).digest == load_tokenizer(first).digest
    assert first.stat().st_size == second.stat().st_size


def test_flipped_bit_anywhere_is_refused_in_one_line_that_names_the_part(run, tmp_path):
    out = tmp_path / "shodh.safetensors"
    export_model.main([str(run), str(out)])
    whole = out.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw, refused = random.Random(0), set()
    places = [draw.randrange(header) for _ in range(80)] + [draw.randrange(header, len(whole)) for _ in range(80)]
    for place in [*places, header - 1, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        out.write_bytes(damaged)
        said = []
        for part, read in (("model", from_pretrained), ("tokenizer", load_tokenizer)):
            try:
                read(out)
            except ConfigError as error:
                assert str(error).startswith(f"{part}={out}: ") and "\n" not in str(error)
                said.append(part)
        assert said, f"byte {place} of {len(whole)} (header {header})"
        refused.add(tuple(said))
    assert refused == {("model",), ("tokenizer",), ("model", "tokenizer")}


def test_tokenizer_of_other_latents_is_refused_and_nothing_is_written(run, tmp_path):
    save(tmp_path / "other.safetensors")
    out = tmp_path / "shodh.safetensors"
    with pytest.raises(ConfigError, match="was trained on another tokenizer's latents"):
        export_model.main([str(run), str(out), f"tokenizer={tmp_path}/other.safetensors"])
    assert not out.exists()
    export_model.main([str(run), str(out)])
    with pytest.raises(ConfigError, match=rf"model={out}: was trained on another tokenizer's latents"):
        load_model(out, load_tokenizer(tmp_path / "other.safetensors"), CPU)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["RUN"], "no run and no file to write given. Usage: launch/export_model.py"),
        (["RUN", "tokenizer=x"], "no run and no file to write given"),
        (["RUN", "out.pt"], "out=out.pt: .* Call it NAME.safetensors"),
        (["RUN", "out.safetensors", "tokenzier=x"], "tokenzier='x': no such key .*Did you mean tokenizer"),
        (["RUN", "out.safetensors", "tokenizer=/nowhere/t"], "tokenizer=/nowhere/t: no such file"),
        (["RUN/checkpoints", "out.safetensors"], "no checkpoint yet"),
        (["/nowhere/run", "out.safetensors"], "config=/nowhere/run: no such file"),
    ],
)
def test_bad_input_is_said(run, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        export_model.main([argument.replace("RUN", str(run)) for argument in arguments])
    assert not list(tmp_path.glob("out*"))


def test_damaged_newest_checkpoint_is_passed_over_aloud(run, tmp_path, capsys):
    newest = run / "checkpoints" / "pretrain" / "step-7" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    export_model.main([str(run), str(tmp_path / "shodh.safetensors")])
    done = capsys.readouterr()
    assert "step-7: state.safetensors is truncated or altered" in done.err and "after step 3" in done.out
    shutil.rmtree(run / "checkpoints" / "pretrain" / "step-3")
    with pytest.raises(ConfigError, match="none of 1 is intact"):
        export_model.main([str(run), str(tmp_path / "shodh.safetensors")])
