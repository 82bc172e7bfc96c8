"""On CUDA: exact decodes after bfloat16, slabs as the whole, latents as a CPU makes them."""

import pytest
import torch
from conftest import make_batch, make_domain

from shodh.device import find_device
from shodh.physics.exterior import curl_of_faces, divergence_of_faces
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.objective import ReconstructionConfig, reconstruction_loss
from tokenizer.tiling import Tiles, decode_fields_tiled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = AutoencoderConfig(latent_channels=8, medium_channels=4, widths=(8, 16, 32))
# FP32 sums of up to 27 * 32 products in another order, some 20 in a row; TF32 would be off by 1e-3.
ROUND_OFF = 1e-4


@pytest.mark.parametrize(
    ("space", "boundary"),
    [("solenoidal", ("periodic", "wall", "periodic")), ("irrotational", ("open",) * 3)],
)
def test_a_decode_is_exact_after_a_step_in_bfloat16_whole_and_in_slabs(space, boundary):
    device = find_device()
    model, batch = Autoencoder(SMALL).to(device), make_batch(make_domain(space, boundary)).to(device)
    with torch.autocast("cuda", torch.bfloat16):
        reconstruction_loss(model(batch), batch, ReconstructionConfig())["total"].backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    latents = [values.detach() for values in model.eval().encode(batch)]
    measure = curl_of_faces if space == "irrotational" else divergence_of_faces
    whole = model.decode_fields(*latents, batch.domain, batch.grid)
    tiled = decode_fields_tiled(model, *latents, batch.domain, batch.grid, Tiles(1, 1, 1))
    for fields in (whole, tiled):
        assert fields.flux.abs().max() > 0
        assert measure(fields.flux.double(), boundary).abs().max() == 0
    torch.testing.assert_close(
        tiled.velocity, whole.velocity, rtol=0, atol=ROUND_OFF * float(whole.velocity.abs().max())
    )


@torch.no_grad()
def test_latents_and_fields_are_those_of_the_cpu():
    model, batch = Autoencoder(SMALL).eval(), make_batch(make_domain("solenoidal", ("periodic", "wall", "periodic")))
    here = model.encode(batch)
    decoded = model.decode_fields(*here, batch.domain, batch.grid).velocity
    device = find_device()
    there = model.to(device).encode(batch.to(device))
    fields = model.decode_fields(*there, batch.domain, batch.grid).velocity
    for cpu, cuda in zip((*here, decoded), (*there, fields), strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=0, atol=ROUND_OFF * float(cpu.abs().max()))
