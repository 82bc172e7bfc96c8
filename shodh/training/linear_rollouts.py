"""Linear experts refined for rollouts: the best map of one step, applied again and again, is not the best of many.

What the least squares leave of one step is not noise but what latents hide, so errors of a rollout add up. Gradient
steps through rollouts of the linear experts alone, which cost a fraction of the model's, damp what cannot be foretold.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from shodh.fields import NUM_GIVEN, LatentBatch, Routing
from shodh.training.objectives import expected_square, follow, mean_square

RATE = 3e-3  # of a direction's unit length; with 1e-2 the rollouts of sound burst
BETAS = (0.9, 0.95)
FIRST_STEP_WEIGHT = 0.5  # of its error over its change, beside the mean of all over the states themselves
STATE_FLOOR = 0.05  # of the whitened latent's variance
BURST = 1e3  # of its deviation: a rollout grows no further, nor teaches


class LinearForecaster(Protocol):
    """A model that forecasts by given linear experts alone."""

    def forecast_linearly(
        self, kernels: Tensor, states: Tensor, medium: Tensor, parameters: Tensor, routing: Routing
    ) -> Tensor: ...


def refine_kernels(
    engine: Any,
    kernels: Float[Tensor, "e u c"],
    directions: Float[Tensor, "e u u"],
    batches: Iterable[LatentBatch],
    num_batches: int,
    change_floor: float,
) -> tuple[Float[Tensor, "e u c"], list[float]]:
    """Kernels that err less over all steps that ``batches`` hold, in a row, and the loss of each batch on the way.

    They move along ``directions`` (``whitening_directions``), of which one is as easy to learn as another. Each sample
    keeps the experts that the router chooses for its first state. Collective over ranks, which end with the same.
    """
    amounts = torch.zeros_like(kernels, requires_grad=True)
    optimizer = torch.optim.Adam([amounts], betas=BETAS)
    losses = []
    for number, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = RATE * (1 - number / num_batches)
        moved = (kernels + directions @ amounts).transpose(1, 2)
        loss = rollout_loss(engine, moved, batch, change_floor)
        (amounts.grad,) = torch.autograd.grad(loss, amounts)
        mean = torch.cat([amounts.grad.flatten(), loss.detach().reshape(1)]) / torch.distributed.get_world_size()
        torch.distributed.all_reduce(mean)
        amounts.grad = mean[:-1].reshape(amounts.shape)
        losses.append(float(mean[-1]))
        optimizer.step()
    return kernels + directions @ amounts.detach(), losses


def rollout_loss(
    engine: Any, kernels: Float[Tensor, "e c u"], batch: LatentBatch, change_floor: float
) -> Float[Tensor, ""]:
    """Of linear experts alone: squared error over the state's mean square, as log(1 + it), lest few samples rule all.

    The mean over steps and samples, and half of the first step's error over its change.
    """
    model: LinearForecaster = engine.module
    states = batch.states[:, :NUM_GIVEN].float()
    with torch.no_grad():
        routing = engine(states, batch.medium, batch.parameters).routings[-1]
    errors = []
    for k in range(NUM_GIVEN, batch.states.shape[1]):
        latent = model.forecast_linearly(kernels, states, batch.medium, batch.parameters, routing)
        latent = latent.clamp(-BURST, BURST)
        truth = batch.states[:, k].float()
        error = mean_square(latent - truth)
        if not errors:
            first = error / expected_square(truth - states[:, -1], change_floor)
        errors.append(torch.log1p(error / expected_square(truth, STATE_FLOOR)))
        states = follow(states, latent)
    return torch.stack(errors).mean() + FIRST_STEP_WEIGHT * first.mean()


def whitening_directions(gram: Float[Tensor, "u u"], ridge: float) -> Float[Tensor, "u u"]:
    """Columns, of mean square length 1, along which features of these sums of products are alike and independent."""
    size = gram.diagonal().sqrt()
    inverse = torch.where(size > 0, 1 / size, 0.0)  # along a feature that is always 0 nothing moves
    scaled = gram * torch.outer(inverse, inverse)
    scaled.diagonal().add_(ridge)
    columns = torch.linalg.inv(torch.linalg.cholesky(scaled)).T * inverse[:, None]
    return columns / reduce(columns**2, "u v -> v", "sum").mean().sqrt()
