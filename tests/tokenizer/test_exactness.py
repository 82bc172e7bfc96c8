"""Exact conservation of what is decoded: all mixtures of boundaries, all ways that weights come and go."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import cpu_environment, make_batch, make_domain

from shodh.physics.exterior import curl_of_faces, divergence_of_faces
from shodh.physics.helmholtz import compose_velocity, snap_potentials
from shodh.physics.masked_projection import open_faces, project_fields
from shodh.training.checkpoint import load_parameters, read_newest, write_checkpoint
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.export import load_tokenizer, save_tokenizer
from tokenizer.helmholtz_head import to_grid

ROOT = Path(__file__).resolve().parents[2]
SMALL = AutoencoderConfig(latent_channels=8, medium_channels=4, widths=(8, 16, 32))
CLOSED = list(itertools.product(["periodic", "wall"], repeat=3))
ANY = list(itertools.product(["periodic", "wall", "open"], repeat=3))
STRETCHED = tuple(0.1 * 1.1**k for k in range(16))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Autoencoder(SMALL)
    with torch.no_grad():  # stronger than at the start of training, so that every term of the flux matters
        for parameter in model.head.parameters():
            parameter.normal_()
    return model.eval().requires_grad_(False)


def spacing(boundary):
    return tuple(0.5 * (i + 1) if b == "periodic" else STRETCHED for i, b in enumerate(boundary))


def require_no_flux_through_walls(flux, boundary):
    for axis in range(3):
        if boundary[axis] == "wall":
            assert not flux[:, axis].select(axis + 1, 0).any()


def require_exact_channel(model):
    """Of encoded fields and of random latents, in a stretched channel."""
    batch = make_batch(make_domain(), spacing=(1.0, STRETCHED, 0.3))
    for latents in (model.encode(batch), [torch.randn_like(z) for z in model.encode(batch)]):
        flux = model.decode_fields(*latents, batch.domain, batch.grid).flux
        assert flux.dtype == torch.float32 and flux.any()
        assert divergence_of_faces(flux.double(), batch.grid.boundary).abs().max() == 0
        require_no_flux_through_walls(flux, batch.grid.boundary)


@pytest.mark.parametrize("boundary", ANY)
def test_solenoidal_flux_has_exactly_no_divergence_on_stretched_boxes_with_and_without_mean_flow(model, boundary):
    batch = make_batch(make_domain("solenoidal", boundary), batch=1, spacing=spacing(boundary))
    for mean_flow in (0.0, 1e3):
        moved = batch._replace(velocity=batch.velocity + mean_flow)
        flux = model.decode_fields(*model.encode(moved), batch.domain, batch.grid).flux
        assert flux.any() and divergence_of_faces(flux.double(), boundary).abs().max() == 0
        require_no_flux_through_walls(flux, boundary)


@pytest.mark.parametrize("boundary", ANY)
def test_irrotational_circulation_has_exactly_no_curl_on_stretched_boxes(model, boundary):
    batch = make_batch(make_domain("irrotational", boundary), batch=1, spacing=spacing(boundary))
    circulation = model.decode_fields(*model.encode(batch), batch.domain, batch.grid).flux
    assert circulation.any() and curl_of_faces(circulation.double(), boundary).abs().max() == 0
    require_no_flux_through_walls(circulation, boundary)


@pytest.mark.parametrize("boundary", CLOSED)
def test_full_flux_is_the_exact_sum_of_a_part_without_divergence_and_one_without_curl(model, boundary):
    batch = make_batch(make_domain("full", boundary), batch=1, spacing=spacing(boundary))
    latents = model.encode(batch)
    flux = model.decode_fields(*latents, batch.domain, batch.grid).flux
    snapped = snap_potentials(to_grid(model.decode(*latents, batch.domain, batch.grid).potentials, batch.grid))
    solenoidal, irrotational = (compose_velocity(snapped, boundary, part) for part in ("solenoidal", "irrotational"))
    assert torch.equal(solenoidal.double() + irrotational.double(), flux.double())
    assert divergence_of_faces(solenoidal.double(), boundary).abs().max() == 0
    assert curl_of_faces(irrotational.double(), boundary).abs().max() == 0
    require_no_flux_through_walls(flux, boundary)


@pytest.mark.parametrize("boundary", CLOSED)
def test_projected_fields_have_exactly_no_flux_in_the_solid_and_no_divergence(model, boundary):
    batch = make_batch(make_domain("solenoidal", boundary), spacing=spacing(boundary))
    fields = model.decode_fields(*model.encode(batch), batch.domain, batch.grid)
    pore = torch.rand(2, 16, 16, 16) < 0.6
    flux = project_fields(fields, pore, batch.grid).flux
    assert flux.any() and not flux[~open_faces(pore, boundary)].any()
    assert divergence_of_faces(flux.double(), boundary).abs().max() == 0


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_latents_far_from_any_encoders_decode_exactly(model, scale):
    batch = make_batch(make_domain())
    latents = [scale * torch.randn_like(z) for z in model.encode(batch)]
    flux = model.decode_fields(*latents, batch.domain, batch.grid).flux
    assert divergence_of_faces(flux.double(), batch.grid.boundary).abs().max() == 0


def test_weights_trained_in_bf16_decode_exactly_in_fp32_and_under_autocast():
    model = Autoencoder(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = make_batch(make_domain())
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decoded = model.decode(*model.encode(batch), batch.domain, batch.grid)
        optimizer.zero_grad()
        (decoded.velocity - batch.velocity).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        require_exact_channel(model.eval())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            require_exact_channel(model)


def test_weights_decode_exactly_after_reload_from_a_checkpoint(model, tmp_path):
    state = {f"parameter/{name}": value for name, value in model.named_parameters()}
    state |= {f"buffer/{name}": value for name, value in model.named_buffers()}
    write_checkpoint(tmp_path, 1, state, {"record": {"config": {}}})
    reloaded = Autoencoder(SMALL).requires_grad_(False)
    load_parameters(reloaded, read_newest(tmp_path)[0])
    require_exact_channel(reloaded)


def test_weights_decode_exactly_after_export(model, tmp_path):
    save_tokenizer(tmp_path / "tokenizer.safetensors", model, {"anything": make_domain()}, {})
    require_exact_channel(load_tokenizer(tmp_path / "tokenizer.safetensors").autoencoder)


@pytest.mark.slow
def test_thousands_of_decodes_are_exact():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "exactness.py"], env=cpu_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
