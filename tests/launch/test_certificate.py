"""`evaluate_model.py certificate`: what a tokenizer file conserves, without any store, and what it does not."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import cpu_environment, make_domain

from shodh.fields import FieldSpec
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.export import digest_weights, save_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SCALES = {"velocity_scale": 3.7, "pressure_scale": 1.0, "medium_mean": 0.6, "medium_scale": 0.49}


@pytest.fixture
def saved(tmp_path) -> tuple[Autoencoder, Path]:
    model = Autoencoder(AutoencoderConfig(latent_channels=8, medium_channels=4, widths=(8, 16, 32)))
    pores = FieldSpec(name="pore_space", units="1", location="cell", long_name="1 in pores, 0 in the solid")
    domains = {
        "channel": make_domain(),
        "sound": make_domain("irrotational", ("open", "open", "wall")),
        "mixed": make_domain("full"),
        "rock": replace(make_domain("solenoidal", ("periodic", "periodic", "periodic")), medium=pores),
    }
    domains = {name: replace(domain, name=name) for name, domain in domains.items()}
    path = tmp_path / "tokenizer.safetensors"
    save_tokenizer(path, model, domains, dict.fromkeys(domains, SCALES))
    return model, path


def certify(path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "launch/evaluate_model.py", "certificate", str(path), *overrides]
    return subprocess.run(call, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True)


def test_tokenizer_file_is_certified_without_stores_in_every_velocity_space(saved):
    model, path = saved
    done = certify(path, "num_random=1")
    assert done.returncode == 0, done.stderr[-2000:]
    certificate = json.loads((path.parent / "certificate.json").read_text())
    assert certificate["verdict"] == "exact" and certificate["weights"] == digest_weights(model)
    assert [len(blocks) for blocks in certificate["domains"].values()] == [2, 1, 2, 2]
    for name, kinds in (("channel", ["divergence"]), ("sound", ["curl"]), ("mixed", ["divergence", "curl"])):
        for block in certificate["domains"][name]:
            assert [kind for kind in ("divergence", "curl") if kind in block] == kinds
            assert all(block[kind]["max_abs"] == 0.0 for kind in kinds) and block["wall_flux"] == 0.0
    rock = certificate["domains"]["rock"][0]["solid_flux"]
    assert rock["max_before"] > 0 and rock["max_after"] == 0.0 == rock["divergence_after"]["max_abs"]
    assert "Verdict: exact" in (path.parent / "report.html").read_text()
    assert "exact: 7 decodes" in done.stdout


def test_weights_that_decode_to_nan_fail_in_one_line_with_exit_code_1(saved):
    model, path = saved
    with torch.no_grad():
        next(model.head.parameters()).fill_(torch.nan)
    save_tokenizer(path, model, {"channel": replace(make_domain(), name="channel")}, {"channel": SCALES})
    done = certify(path, "num_random=1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error:") and "channel, random latents on 16x24x32: potentials: not finite" in line
    assert json.loads((path.parent / "certificate.json").read_text())["verdict"] == "FAILED"
    assert "Certificate FAILED" in (path.parent / "report.html").read_text()


def test_unknown_sizes_are_refused_in_one_line(saved):
    done = certify(saved[1], "num_randm=1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "num_randm" in done.stderr and "Did you mean num_random?" in done.stderr
