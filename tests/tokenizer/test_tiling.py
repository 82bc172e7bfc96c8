"""Slabs give what the whole box gives, exactly conservative across their borders."""

import pytest
import torch
from conftest import make_domain

from shodh.fields import FieldBatch, Grid
from shodh.physics.exterior import curl_of_faces, divergence_of_faces
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.tiling import Tiles, decode_fields_tiled, decode_potentials_tiled, encode_tiled

BOUNDARIES = [
    ("periodic", "periodic", "periodic"),
    ("wall", "wall", "wall"),
    ("open", "open", "open"),
    ("periodic", "wall", "open"),
    ("open", "periodic", "wall"),
    ("wall", "open", "periodic"),
]
SHAPES = [(48, 16, 24), (16, 40, 24), (24, 16, 48)]  # cut across x, y and z; 40 is no multiple of a slab
TILES = [Tiles(2, 1, 1), Tiles(1, 2, 3), Tiles(2, 4, 7)]
# A sum of up to 27 * 32 products is off by sqrt(864) * 2^-24 = 2e-6 when it is done in another order, and a value is
# a chain of some 20 of them: 1e-5 of the largest. Next to a cut whose margin is one too narrow it is off by over 1e-2.
ROUND_OFF = 1e-5


def random_model(**sizes) -> Autoencoder:
    """Every weight random: at the start of training the branches that look at neighbours are zero."""
    config = AutoencoderConfig(latent_channels=5, medium_channels=3, widths=(8, 12, 16), **sizes)
    model = Autoencoder(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        fan_in = parameter.shape[1] if parameter.ndim == 2 else 1
        parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
    return model


def random_batch(boundary, shape, space="solenoidal", num_samples=2) -> FieldBatch:
    widths = [
        tuple(0.1 * 1.02**k for k in range(n)) if b == "wall" else 0.1 for n, b in zip(shape, boundary, strict=True)
    ]
    grid = Grid(shape=shape, spacing=(widths[0], widths[1], widths[2]), boundary=boundary)
    velocity, pressure, medium = (torch.randn(num_samples, f, *shape) for f in (3, 1, 1))
    return FieldBatch(velocity + 1, pressure, medium, make_domain(space, boundary), grid)


def assert_close(tiled, whole):
    torch.testing.assert_close(tiled, whole, rtol=0, atol=ROUND_OFF * float(whole.abs().max()))


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(("shape", "tiles"), list(zip(SHAPES, TILES, strict=True)))
def test_latents_of_slabs_are_those_of_the_whole_box(boundary, shape, tiles):
    model, batch = random_model(encoder_depths=(1, 2, 1)), random_batch(boundary, shape)
    for tiled, whole in zip(encode_tiled(model, batch, tiles), model.encode(batch), strict=True):
        assert_close(tiled, whole)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(("shape", "tiles"), list(zip(SHAPES, TILES, strict=True)))
def test_potentials_of_slabs_are_those_of_the_whole_box(boundary, shape, tiles):
    model, domain = random_model(decoder_depths=(1, 2, 1)), make_domain("solenoidal", boundary)
    latent, medium = (torch.randn(2, c, *(n // 8 for n in shape)) for c in (5, 3))
    potentials, pressure = decode_potentials_tiled(model, latent, medium, domain, tiles)
    whole_potentials, whole_pressure = model.decode_potentials(latent, medium, domain)
    for tiled, whole in zip((*potentials, pressure), (*whole_potentials, whole_pressure), strict=True):
        assert_close(tiled, whole)


@pytest.mark.parametrize("depths", [(0, 0, 0), (2, 1, 0), (3, 3, 1)])
def test_margins_follow_the_depths_of_the_network(depths):
    model = random_model(encoder_depths=depths, decoder_depths=depths)
    batch = random_batch(("periodic", "wall", "open"), (40, 16, 16), num_samples=1)
    latents = model.encode(batch)
    for tiled, whole in zip(encode_tiled(model, batch, Tiles(1, 1, 1)), latents, strict=True):
        assert_close(tiled, whole)
    potentials, pressure = decode_potentials_tiled(model, *latents, batch.domain, Tiles(1, 1, 1))
    whole_potentials, whole_pressure = model.decode_potentials(*latents, batch.domain)
    for tiled, whole in zip((*potentials, pressure), (*whole_potentials, whole_pressure), strict=True):
        assert_close(tiled, whole)


@pytest.mark.parametrize(
    ("space", "boundary"),
    [
        (space, boundary)
        for space in ("solenoidal", "irrotational", "full")
        for boundary in (("periodic",) * 3, ("wall",) * 3, ("periodic", "wall", "periodic"), ("open",) * 3)
        if not (space == "full" and "open" in boundary)  # there is no such domain
    ],
)
def test_flux_of_slabs_is_exact_across_their_borders(space, boundary):
    model, batch = random_model(), random_batch(boundary, (40, 16, 24), space)
    latent, medium = (torch.randn_like(latent) for latent in model.encode(batch))
    fields = decode_fields_tiled(model, latent, medium, batch.domain, batch.grid, Tiles(1, 1, 1))
    whole = model.decode_fields(latent, medium, batch.domain, batch.grid)
    assert fields.flux.dtype == torch.float32 and fields.flux.abs().max() > 0
    if space == "solenoidal":
        assert divergence_of_faces(fields.flux.double(), boundary).abs().max() == 0
    if space == "irrotational":
        assert curl_of_faces(fields.flux.double(), boundary).abs().max() == 0
    for tiled, other in zip(fields, whole, strict=True):
        assert_close(tiled, other)


def test_nan_in_any_slab_is_refused_in_one_line():
    model, batch = random_model(), random_batch(("periodic",) * 3, (16, 16, 40))
    batch.pressure[1, 0, 3, 3, 39] = torch.inf
    with pytest.raises(ValueError, match="anything: field holds NaN or infinity"):
        encode_tiled(model, batch, Tiles(1, 1, 1))
