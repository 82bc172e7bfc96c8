"""What pretraining minimises: the relative forecast error, global-batch balance and the z-loss."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from shodh.fields import LatentBatch, Routing


@dataclass(frozen=True, kw_only=True)
class ForecastConfig:
    """Weights beside the forecast error, whose weight is 1."""

    mean_weight: float = 16.0
    balance_weight: float = 0.01
    z_weight: float = 1e-4
    change_floor: float = 0.02  # of the whitened latent's variance; a nearly still sample counts no more than this


class RoutedBatch(NamedTuple):
    """What telemetry needs of a micro-batch."""

    routings: tuple[Routing, ...]
    domain: Int[Tensor, "b"]


class ForecastObjective:
    """Objective of pretraining; counts tokens per expert over ranks and the accumulation steps so far."""

    def __init__(self, config: ForecastConfig) -> None:
        self.config = config
        self.token_count: Tensor | None = None  # (layer, expert), of the present step

    def begin_step(self) -> None:
        self.token_count = None

    def __call__(self, engine: Any, batch: LatentBatch) -> tuple[dict[str, Tensor], RoutedBatch]:
        forecast = engine(batch.previous, batch.current, batch.medium, batch.parameters)
        counts = torch.stack([count_tokens(routing) for routing in forecast.routings])
        torch.distributed.all_reduce(counts)
        self.token_count = counts if self.token_count is None else self.token_count + counts
        data = relative_change_error(forecast.latent, batch, self.config.change_floor)
        mean = relative_mean_error(forecast.latent, batch, self.config.change_floor)
        balance = torch.stack(
            [balance_loss(r, count) for r, count in zip(forecast.routings, self.token_count, strict=True)]
        ).mean()
        z = torch.stack([z_loss(routing) for routing in forecast.routings]).mean()
        total = data + self.config.mean_weight * mean
        total = total + self.config.balance_weight * balance + self.config.z_weight * z
        detached = tuple(Routing(*(value.detach() for value in routing)) for routing in forecast.routings)
        terms = {"total": total, "data": data, "mean": mean, "balance": balance, "z": z}
        return terms, RoutedBatch(detached, batch.domain)


def relative_change_error(
    prediction: Float[Tensor, "b c x y z"], batch: LatentBatch, floor: float
) -> Float[Tensor, ""]:
    """Squared error over the squared change of each sample, averaged: persistence scores 1 (less for still samples).

    The scale comes from the sample alone, so no label is needed to weigh slow and fast physics alike.
    """
    error, change = prediction.float() - batch.following, batch.following - batch.current
    return (_mean_square(error) / (_mean_square(change) + floor)).mean()


def relative_mean_error(prediction: Float[Tensor, "b c x y z"], batch: LatentBatch, floor: float) -> Float[Tensor, ""]:
    """The same for box means, which carry the mean flow: an error that all tokens share does not average out."""
    mean_error = reduce(prediction.float() - batch.following, "b c x y z -> b c 1 1 1", "mean")
    return (_mean_square(mean_error) / (_mean_square(batch.following - batch.current) + floor)).mean()


def _mean_square(values: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b"]:
    return reduce(values**2, "b c x y z -> b", "mean")


def count_tokens(routing: Routing) -> Float[Tensor, "e"]:
    """Tokens sent to each expert."""
    return torch.bincount(routing.expert.flatten(), minlength=routing.probability.shape[1]).float()


def balance_loss(routing: Routing, global_count: Float[Tensor, "e"]) -> Float[Tensor, ""]:
    """e * sum_e (share of the *global* batch on e) * (mean probability of e here); 1 when balanced.

    The share is taken over ranks and the accumulation steps so far: a micro-batch holds few domains, and balancing
    inside it would spread every domain over all experts. Fedus et al., Switch Transformers (2021), eq. 4.
    """
    share = global_count / global_count.sum()
    return len(share) * (share * reduce(routing.probability, "n e -> e", "mean")).sum()


def z_loss(routing: Routing) -> Float[Tensor, ""]:
    """Mean squared log-partition of the scores; keeps them small. Zoph et al., ST-MoE (2022), eq. 5."""
    return routing.score.logsumexp(-1).square().mean()
