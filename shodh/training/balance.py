"""What keeps routed experts in use and lets them specialise, always judged over the global batch, never one part of it.

A field is one kind of physics, so a micro-batch holds few; balancing inside it would spread each over all experts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from shodh.fields import Routing
from shodh.training.loop import StepRecord

# Of the largest entropy that shares of experts can have. Three kinds of physics cannot fill four experts evenly unless
# one expert mixes them: two of four that share one kind have 0.96 if they halve it and 0.928 if one takes a quarter.
# With a tenth (0.87) as enough, half of the batches held none of it, and some experts died. Kinds that are drawn
# unevenly, or more of them than experts, may never be as even: then experts are pressed to mix them.
EVEN_ENOUGH = 0.93


class GlobalLoad(NamedTuple):
    """What all samples of a step so far, over ranks and accumulation, did in every layer; sums, so they add up."""

    choices: Float[Tensor, "layer e"]  # tokens sent to each expert
    probability: Float[Tensor, "layer e"]  # of each expert, mean over a sample's tokens, summed over samples

    def __add__(self, other: tuple) -> "GlobalLoad":
        return GlobalLoad(self.choices + other[0], self.probability + other[1])


def measure_load(routings: Sequence[Routing], probability: Float[Tensor, "layer b e"]) -> GlobalLoad:
    """The load of one micro-batch on all ranks, without gradient; collective over ranks."""
    choices = torch.stack([count_tokens(routing) for routing in routings])
    both = torch.stack([choices, probability.detach().sum(1)])
    torch.distributed.all_reduce(both)
    return GlobalLoad(*both)


def count_tokens(routing: Routing) -> Float[Tensor, "e"]:
    """Tokens sent to each expert; exact, and no device is waited for, as ``bincount`` does."""
    expert = routing.expert.flatten()
    zeros = routing.probability.new_zeros(routing.probability.shape[1])
    return zeros.scatter_add(0, expert, zeros.new_ones(1).expand(len(expert)))


def sample_probability(routings: Sequence[Routing], num_samples: int) -> Float[Tensor, "layer b e"]:
    """Probability of each expert, mean over a sample's tokens."""
    return torch.stack([reduce(r.probability, "(b n) e -> b e", "mean", b=num_samples) for r in routings])


def balance_loss(routing: Routing, choices: Float[Tensor, "e"]) -> Float[Tensor, ""]:
    """e * sum_e (share of the *global* batch on e) * (mean probability of e here); 1 when balanced.

    Fedus et al., Switch Transformers (2021), eq. 4.
    """
    share = choices / choices.sum()
    return len(share) * (share * reduce(routing.probability, "n e -> e", "mean")).sum()


def information_loss(
    here: Float[Tensor, "b e"], global_probability: Float[Tensor, "e"], choices: Float[Tensor, "e"]
) -> Float[Tensor, ""]:
    """Minus the mutual information of sample and expert, in nats: H(expert | sample) - H(expert).

    ``here`` holds each sample's probability of each expert; of the global batch, ``global_probability`` is their sum
    and ``choices`` the tokens that each expert got. It asks for samples that know their expert and experts that share
    the samples, whatever the samples are: no label enters. H(expert) is that of the global batch; its gradient flows
    through the samples here, and only until both tokens and probability are shared evenly enough. It acts on
    probability alone, so it vanishes where that is exactly even, whatever the tokens.

    Krause et al., Discriminative Clustering by Regularized Information Maximization (2010).
    """
    whole = global_probability / global_probability.sum()
    surprise = (here.mean(0) * whole.clamp_min(1e-12).log()).sum()  # minus the entropy, where here and whole agree
    entropies = torch.special.entr(torch.stack([choices / choices.sum(), whole])).sum(-1)
    even = (entropies >= EVEN_ENOUGH * math.log(len(whole))).all()
    surprise = torch.where(even, surprise.detach(), surprise)
    return torch.special.entr(here).sum(-1).mean() + surprise


def z_loss(routing: Routing) -> Float[Tensor, ""]:
    """Mean squared log-partition of the scores; keeps them small. Zoph et al., ST-MoE (2022), eq. 5."""
    return routing.score.logsumexp(-1).square().mean()


@runtime_checkable
class BiasedRouter(Protocol):
    """A router whose choice, but not whose gate, a bias per expert shifts."""

    bias: Tensor


class AdjustBias:
    """Hook that balances without a loss: after every step each expert's bias moves by ``rate`` towards an even share.

    The direction is the sign of (even share - share of the global batch). Wang et al., Auxiliary-Loss-Free Load
    Balancing (2024). ``rate`` is in units of the router's scores, which lie within +-1 / temperature.
    """

    def __init__(self, routers: Sequence[BiasedRouter], rate: float) -> None:
        self.routers, self.rate = routers, rate

    @torch.no_grad()
    def after_step(self, record: StepRecord) -> None:
        if self.rate == 0:
            return
        counts = [torch.stack([count_tokens(r) for r in batch.routings]) for batch in record.outputs]
        choices = torch.stack(counts).sum(0)
        torch.distributed.all_reduce(choices)
        for router, count in zip(self.routers, choices, strict=True):
            router.bias += self.rate * (count.mean() - count).sign()
