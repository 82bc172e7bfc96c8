"""The network that the stem is compared with: the same but for where its first and last convolutions run."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # last: its tokenizer.py is no package

from tokenizer_stem import DOMAINS, convolve_at_full_resolution, draw_turbulence

from shodh.physics.exterior import curl_of_faces, divergence_of_faces
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig

SMALL = AutoencoderConfig(widths=(8, 8, 8), encoder_depths=(0, 0, 0), decoder_depths=(1, 0, 0))
ROUND_OFF = 64 * torch.finfo(torch.float32).eps  # of the sums of a few differences, velocity of about 1


@pytest.mark.parametrize("with_blocks", [False, True])
def test_the_variant_has_the_same_latents_and_a_first_and_last_convolution_at_full_resolution(with_blocks):
    model = convolve_at_full_resolution(Autoencoder(SMALL), with_blocks)
    batch = draw_turbulence(DOMAINS[1], 1, seed=0)
    seen = []
    for layer in (model.encoder.stem.mix, model.head.inner.norms[-1]):  # the norm is what the last convolution takes
        layer.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[2:])))
    latent, medium = model.encode(batch)
    decoded = model.decode(latent, medium, batch.domain, batch.grid)
    assert seen == [batch.grid.shape] * 2
    assert latent.shape[1:] == (16, 4, 4, 4) and decoded.velocity.shape == batch.velocity.shape


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: domain.name)
def test_random_turbulence_conserves_what_its_domain_conserves_and_has_unit_rms(domain):
    batch = draw_turbulence(domain, 2, seed=1)
    measure = curl_of_faces if domain.velocity_space == "irrotational" else divergence_of_faces
    assert measure(batch.velocity, domain.boundary).abs().max() < ROUND_OFF * batch.velocity.abs().max()
    torch.testing.assert_close(batch.velocity.square().mean((1, 2, 3, 4)), torch.ones(2), rtol=1e-5, atol=0)
