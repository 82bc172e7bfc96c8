"""Which expert serves which physics: loads, purity, margins and the information between domain and expert.

Everything is a function of ``RoutingCounts``, sums that add up over batches and ranks (all-reduce each field with sum).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from shodh.fields import Routing


class RoutingCounts(NamedTuple):
    """Sums over samples, exact in FP64; g is the domain. Of a domain's samples all have equally many tokens."""

    choices: Float[Tensor, "layer g e"]  # tokens sent to each expert (a Top-k token counts k times)
    squares: Float[Tensor, "layer g e"]  # the same per sample, squared, then summed: how much samples differ
    margin: Float[Tensor, "layer g"]  # best minus second-best probability, summed over tokens
    num_tokens: Float[Tensor, "g"]
    num_samples: Float[Tensor, "g"]


def count_routing(routings: Sequence[Routing], domain: Int[Tensor, "b"], num_domains: int) -> RoutingCounts:
    """The sums of one batch; one Routing per layer, ``domain`` once per sample.

    Tokens are sample after sample, so that n is a multiple of b. With ``domain`` given per token, each token counts as
    a sample of its own. Raises ValueError if n is no multiple of b.
    """
    num_samples, num_routed = len(domain), len(routings[0].expert)
    if num_samples == 0 or num_routed % num_samples:
        raise ValueError(f"domain: {num_samples} entries for {num_routed} tokens. Pass one per sample or per token.")
    member = torch.nn.functional.one_hot(domain.long(), num_domains).double()
    per_sample = torch.stack([_count_per_sample(routing, num_samples) for routing in routings])
    margin = torch.stack([reduce(_margin(r), "(b n) -> b", "sum", b=num_samples) for r in routings])
    return RoutingCounts(
        choices=torch.einsum("lbe,bg->lge", per_sample, member),
        squares=torch.einsum("lbe,bg->lge", per_sample**2, member),
        margin=torch.einsum("lb,bg->lg", margin, member),
        num_tokens=member.sum(0) * (num_routed // num_samples),
        num_samples=member.sum(0),
    )


def merge_counts(batches: Sequence[RoutingCounts]) -> RoutingCounts:
    """The sums over several batches. Raises ValueError for none."""
    if not batches:
        raise ValueError("batches=[]: there is nothing to merge. Count at least one batch.")
    return RoutingCounts(*(torch.stack(column).sum(0) for column in zip(*batches, strict=True)))


def summarise(counts: RoutingCounts, domain_names: Sequence[str]) -> dict[str, Any]:
    """Per layer, and per domain and layer, what JSON and the dashboard show; domains without a token are left out.

    Entropies and information in nats. Loads over all domains weigh them by their tokens.
    """
    counts = RoutingCounts(*(field.double().cpu() for field in counts))
    seen = [g for g in range(len(domain_names)) if counts.num_tokens[g] > 0]
    counts = _select_domains(counts, seen)
    layers = [_summarise_layer(counts, layer) for layer in range(len(counts.choices))]
    information = [layer["mutual_information"] for layer in layers]
    return {
        "layers": layers,
        "domains": {
            domain_names[g]: _summarise_domain(counts, column) | {"mutual_information": information}
            for column, g in enumerate(seen)
        },
    }


def mutual_information(counts: RoutingCounts) -> Float[Tensor, "layer"]:
    """I(domain; expert) per layer in nats, corrected for its upward bias; about 0, either side, if there is none.

    Counts of finite samples look dependent by chance: entropies fall short by half of sum_e Var(p_e) / p_e. Tokens
    of one sample are not independent, so the variance is taken between samples, not between tokens; if they were,
    this is the correction of Miller (1955), (g - 1)(e - 1) / 2n. A domain seen through one sample has no variance to
    correct by, and few samples leave some bias.
    """
    weight = counts.choices.sum(-1) / counts.choices.sum((-1, -2)).unsqueeze(-1)
    share = counts.choices / counts.choices.sum(-1, keepdim=True)
    num_samples = counts.num_samples.unsqueeze(-1)
    between = (counts.squares - counts.choices**2 / num_samples).clamp_min(0)
    variance = between * num_samples / (num_samples - 1).clamp_min(1) / counts.choices.sum(-1, keepdim=True) ** 2
    overall = torch.einsum("lg,lge->le", weight, share)
    overall_variance = torch.einsum("lg,lge->le", weight**2, variance)
    within = _entropy(share) + _shortfall(variance, share)
    return _entropy(overall) + _shortfall(overall_variance, overall) - (weight * within).sum(-1)


def flip_rate(previous: Sequence[Routing], current: Sequence[Routing]) -> list[float]:
    """Per layer, the share of tokens of a fixed probe batch whose best expert changed between two measurements."""
    pairs = zip(previous, current, strict=True)
    return [(p.expert[:, 0] != c.expert[:, 0]).double().mean().item() for p, c in pairs]


def _select_domains(counts: RoutingCounts, domains: list[int]) -> RoutingCounts:
    return RoutingCounts(
        choices=counts.choices[:, domains],
        squares=counts.squares[:, domains],
        margin=counts.margin[:, domains],
        num_tokens=counts.num_tokens[domains],
        num_samples=counts.num_samples[domains],
    )


def _count_per_sample(routing: Routing, num_samples: int) -> Float[Tensor, "b e"]:
    chosen = torch.nn.functional.one_hot(routing.expert.long(), routing.probability.shape[-1])
    return reduce(chosen, "(b n) k e -> b e", "sum", b=num_samples).double()


def _margin(routing: Routing) -> Float[Tensor, "n"]:
    best = routing.probability.double().topk(min(2, routing.probability.shape[-1]), dim=-1).values
    return best[:, 0] - best[:, 1] if best.shape[-1] > 1 else best[:, 0]


def _summarise_layer(counts: RoutingCounts, layer: int) -> dict[str, Any]:
    choices = counts.choices[layer]
    load = choices.sum(0) / choices.sum()
    information = mutual_information(counts)[layer].item()
    domain_entropy = _entropy(choices.sum(-1) / choices.sum()).item()
    return {
        "load": load.tolist(),
        "load_over_ideal": (load * len(load)).tolist(),
        "mutual_information": information,
        "normalised_mutual_information": information / domain_entropy if domain_entropy > 0 else 0.0,
        "domain_entropy": domain_entropy,
        "dead_experts": torch.nonzero(load == 0).flatten().tolist(),
        "effective_experts": _entropy(load).exp().item(),
    }


def _summarise_domain(counts: RoutingCounts, domain: int) -> dict[str, Any]:
    load = counts.choices[:, domain] / counts.choices[:, domain].sum(-1, keepdim=True)
    num_experts, entropy = load.shape[-1], _entropy(load)
    return {
        "load": load.tolist(),
        "load_over_ideal": (load * num_experts).tolist(),
        "purity": load.amax(-1).tolist(),
        "entropy": entropy.tolist(),
        "normalised_entropy": (entropy / math.log(num_experts) if num_experts > 1 else entropy).tolist(),
        "margin": (counts.margin[:, domain] / counts.num_tokens[domain]).tolist(),
        "num_tokens": int(counts.num_tokens[domain]),
        "num_samples": int(counts.num_samples[domain]),
    }


def _entropy(probability: Float[Tensor, "*s e"]) -> Float[Tensor, "*s"]:
    return torch.special.entr(probability).sum(-1)


def _shortfall(variance: Float[Tensor, "*s e"], probability: Float[Tensor, "*s e"]) -> Float[Tensor, "*s"]:
    """By how much the entropy of estimated probabilities falls short of the true one, to first order."""
    return (variance / probability.clamp_min(1e-300)).sum(-1) / 2
