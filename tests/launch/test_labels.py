"""A domain's name and index reach no network: renaming and permuting them changes no bit of loss or prediction."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import make_batch, make_domain

from shodh.fields import CONDITIONS, NUM_GIVEN, LatentBatch
from shodh.model.transformer import LatentTransformer, TransformerConfig
from shodh.training.objectives import ForecastConfig, ForecastObjective
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig

SMALL = TransformerConfig(
    latent_channels=4, medium_channels=2, width=24, depth=2, num_heads=2, num_experts=4, hidden=16
)


@pytest.fixture
def model(monkeypatch) -> LatentTransformer:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)  # one rank: the sum is itself
    model = LatentTransformer(SMALL)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_permuting_labels_leaves_losses_gradients_and_predictions_bit_identical(model):
    states = torch.randn(6, NUM_GIVEN + 1, 4, 4, 4, 4)
    batch = LatentBatch(
        states, torch.randn(6, 2, 4, 4, 4), torch.rand(6, len(CONDITIONS)), torch.tensor([0, 0, 1, 1, 2, 2])
    )

    def train_once(labels: tuple[int, ...]) -> tuple[list[torch.Tensor], SimpleNamespace]:
        seen = SimpleNamespace()

        def engine(*inputs: torch.Tensor):
            seen.forecast = model(*inputs)
            return seen.forecast

        objective = ForecastObjective(ForecastConfig())
        objective.begin_step(0)
        model.zero_grad()
        terms, _ = objective(engine, batch._replace(domain=torch.tensor(labels)[batch.domain]))
        terms["total"].backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [*terms.values(), *gradients], seen

    expected, first = train_once((0, 1, 2))
    for labels in itertools.permutations(range(3)):
        found, again = train_once(labels)
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
        assert torch.equal(again.forecast.latent, first.forecast.latent)
        pairs = zip(again.forecast.routings, first.forecast.routings, strict=True)
        assert all(torch.equal(f.expert, e.expert) for f, e in pairs)


def test_renaming_a_domain_leaves_the_tokenizer_bit_identical():
    model = Autoencoder(AutoencoderConfig(latent_channels=8, medium_channels=4, widths=(8, 16, 32)))
    batch = make_batch(make_domain())
    renamed = batch._replace(domain=dataclasses.replace(batch.domain, name="fwi", parameters=("viscosity",)))
    latents = model.encode(batch)
    assert all(torch.equal(a, b) for a, b in zip(latents, model.encode(renamed), strict=True))
    fields = [model.decode_fields(*latents, b.domain, b.grid) for b in (batch, renamed)]
    assert all(torch.equal(a, b) for a, b in zip(*fields, strict=True))
