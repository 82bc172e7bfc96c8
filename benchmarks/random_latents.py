"""Latents that a model takes and that hold nothing: what they hold costs no time."""

import torch

from shodh.fields import CONDITIONS, NUM_GIVEN, LatentBatch
from shodh.model.transformer import TransformerConfig


def make_latents(
    config: TransformerConfig, num_samples: int, num_predicted: int, cells: tuple[int, int, int]
) -> LatentBatch:
    """Random latents of three domains in turn, with so many states to predict."""
    return LatentBatch(
        states=torch.randn(num_samples, NUM_GIVEN + num_predicted, config.latent_channels, *cells),
        medium=torch.randn(num_samples, config.medium_channels, *cells),
        parameters=torch.randn(num_samples, len(CONDITIONS)),
        domain=torch.arange(num_samples) % 3,
    )
