"""The tokenizer: exact conservation for random weights, right units, refusals."""

import itertools
import math

import pytest
import torch
from conftest import make_batch, make_domain

from shodh.physics.exterior import curl_of_faces, divergence_of_faces
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig, measure_latents
from tokenizer.helmholtz_head import face_measure, to_grid
from tokenizer.objective import (
    NEGLIGIBLE,
    ReconstructionConfig,
    ReconstructionObjective,
    octave_error,
    reconstruction_loss,
)

SMALL = AutoencoderConfig(latent_channels=8, medium_channels=4, widths=(8, 16, 32))


@pytest.fixture
def model():
    model = Autoencoder(SMALL)
    with torch.no_grad():  # stronger than at the start of training, so that every term of the flux matters
        for parameter in model.head.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("boundary", list(itertools.product(["periodic", "wall"], repeat=3)))
def test_decoded_flux_has_exactly_zero_divergence_for_random_weights(model, boundary):
    batch = make_batch(make_domain("solenoidal", boundary))
    batch = batch._replace(velocity=batch.velocity + 1e3)  # a mean flow that random potentials do not drown
    fields = model.decode_fields(*model.encode(batch), batch.domain, batch.grid)
    assert fields.flux.dtype == torch.float32
    assert divergence_of_faces(fields.flux.double(), boundary).abs().max() == 0
    means = fields.flux.double().mean((-3, -2, -1)).abs()
    for axis in range(3):
        if boundary[axis] == "periodic":
            assert means[:, axis].min() > 0, "the mean flow is missing"
        else:
            assert fields.flux[:, axis].select(axis + 1, 0).abs().max() == 0, "flux through the wall"


@torch.no_grad()
def test_stretched_grid_keeps_zero_divergence_and_the_flow_through_the_box(model):
    widths = tuple(0.01 * 1.2**k for k in range(16))
    batch = make_batch(make_domain("solenoidal", ("periodic", "wall", "periodic")), spacing=(0.2, widths, 0.1))
    batch = batch._replace(velocity=batch.velocity + 10.0)
    fields = model.decode_fields(*model.encode(batch), batch.domain, batch.grid)
    assert divergence_of_faces(fields.flux.double(), batch.grid.boundary).abs().max() == 0
    area = torch.from_numpy(batch.grid.face_area)
    for axis in (0, 2):
        through = [(u * area)[:, axis].mean((1, 2, 3)) for u in (fields.velocity, batch.velocity)]
        torch.testing.assert_close(*through, rtol=1e-4, atol=0)  # FP32 potentials of order 100 around the mean


@pytest.mark.parametrize("boundary", [("open",) * 3, ("periodic", "wall", "open")])
def test_decoded_circulation_has_exactly_zero_curl_for_random_weights(model, boundary):
    batch = make_batch(make_domain("irrotational", boundary))
    fields = model.decode_fields(*model.encode(batch), batch.domain, batch.grid)
    assert fields.flux.abs().max() > 0
    assert curl_of_faces(fields.flux.double(), boundary).abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("space", ["solenoidal", "irrotational"])
def test_exact_velocity_equals_the_trained_one_to_lattice_precision(model, space):
    batch = make_batch(make_domain(space))
    latent, medium = model.encode(batch)
    decoded = model.decode(latent, medium, batch.domain, batch.grid)
    exact = model.decode_fields(latent, medium, batch.domain, batch.grid).velocity
    circulation, scalar, mean_flow = (p.abs().max() for p in to_grid(decoded.potentials, batch.grid))
    step = 2.0**-22 * (4 * (circulation + scalar) + mean_flow)  # of the lattice, at most
    narrowest = face_measure(batch.domain, batch.grid, exact.device).min()
    assert (
        exact - decoded.velocity
    ).abs().max() <= 5 * step / narrowest  # 5 terms, each half a step off, and round-off


def test_latents_are_8_times_coarser_and_white_after_measuring(model):
    batches = [make_batch(make_domain()) for _ in range(4)]
    measure_latents(model, batches, torch.device("cpu"))
    latents = torch.cat([model.encode(batch)[0] for batch in batches])
    assert latents.shape[-3:] == (2, 2, 2)
    rows = latents.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(rows.mean(0), torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cov(rows.T, correction=0), torch.eye(8), rtol=0, atol=1e-3)  # FP32, 1 / 1e-3


def test_whitening_does_not_change_what_is_decoded(model):
    batch = make_batch(make_domain())
    before = model(batch).velocity.detach()
    measure_latents(model, [make_batch(make_domain()) for _ in range(3)], torch.device("cpu"))
    torch.testing.assert_close(model(batch).velocity, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


def test_one_batch_is_overfitted():
    model = Autoencoder(SMALL)
    batch = make_batch(make_domain(), spacing=(0.1, 0.1, 0.1))
    batch = batch._replace(velocity=smooth_flow(batch.velocity))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = reconstruction_loss(model(batch), batch, ReconstructionConfig())["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0], losses[::10]


def smooth_flow(like: torch.Tensor) -> torch.Tensor:
    """A shear flow along x that varies with z: solenoidal, and simple enough to be learnt in seconds."""
    z = torch.arange(like.shape[-1]) / like.shape[-1]
    flow = torch.zeros_like(like)
    flow[:, 0] = torch.sin(2 * torch.pi * z)
    return flow


def test_grid_that_8_does_not_divide_is_refused_in_one_line(model):
    with pytest.raises(ValueError, match="not divisible by 8"):
        model.encode(make_batch(make_domain(), n=12))


def test_field_with_nan_is_refused_in_one_line(model):
    batch = make_batch(make_domain())
    batch.velocity[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.eval().encode(batch)


def test_widths_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="widths"):
        AutoencoderConfig(widths=(4, 12, 32))


def test_objective_reports_its_terms(model):
    terms, _ = ReconstructionObjective(ReconstructionConfig())(model, make_batch(make_domain()))
    assert set(terms) == {"total", "velocity", "pressure", "gradient", "spectrum"} and terms["total"].requires_grad


@pytest.mark.parametrize("boundary", [("periodic",) * 3, ("open",) * 3])
def test_what_is_decoded_of_a_field_at_rest_is_not_judged_by_its_share_of_nothing(boundary):
    still, floor = torch.zeros(2, 3, 16, 16, 16), 0.1
    negligible = torch.randn(2, 3, 16, 16, 16) * (NEGLIGIBLE * floor) ** 0.5
    assert float(octave_error(negligible, still, boundary, floor)) < math.log(2) ** 2
    assert float(octave_error(still, still, boundary, floor)) == 0.0
    assert float(octave_error(100 * negligible, still, boundary, floor)) > math.log(100) ** 2  # but it may not be loud
