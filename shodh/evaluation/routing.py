"""Which expert serves which physics: loads, purity, margins and the information between domain and expert.

Everything is a function of ``RoutingCounts``, sums that add up over batches and ranks (all-reduce each field with sum).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
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


class RoutingStatistics(NamedTuple):
    """What ``RoutingCounts`` say of every layer and domain; a domain without a token has NaN. Entropies in nats."""

    load: Float[Tensor, "layer g e"]  # share of a domain's tokens on each expert
    entropy: Float[Tensor, "layer g"]  # of that load
    concentration: Float[Tensor, "layer g"]  # the largest share that one expert has of a domain
    margin: Float[Tensor, "layer g"]  # best minus second-best probability, mean over tokens
    overall: Float[Tensor, "layer e"]  # share of all tokens on each expert
    purity: Float[Tensor, "layer"]  # mean over tokens of the largest domain share of the token's expert
    information: Float[Tensor, "layer"]  # I(domain; expert), bias-corrected
    domain_entropy: Float[Tensor, "layer"]  # H(domain), the most that the information can be


def count_routing(routings: Sequence[Routing], domain: Int[Tensor, "b"], num_domains: int) -> RoutingCounts:
    """The sums of one batch; one Routing per layer, ``domain`` once per sample. No transfer from the device.

    Tokens are sample after sample, so that n is a multiple of b. With ``domain`` given per token, each token counts as
    a sample of its own. Raises ValueError if n is no multiple of b.
    """
    num_samples, num_routed = len(domain), len(routings[0].expert)
    if num_samples == 0 or num_routed % num_samples:
        raise ValueError(f"domain: {num_samples} entries for {num_routed} tokens. Pass one per sample or per token.")
    per_sample = _count_per_sample(routings, num_samples)
    margin = reduce(_margin(routings), "l (b n) -> l b", "sum", b=num_samples).double()
    num_per_domain = _add_by_domain(torch.ones_like(domain, dtype=torch.float64)[None], domain, num_domains)[0]
    return RoutingCounts(
        choices=_add_by_domain(per_sample, domain, num_domains),
        squares=_add_by_domain(per_sample.square(), domain, num_domains),
        margin=_add_by_domain(margin, domain, num_domains),
        num_tokens=num_per_domain * (num_routed // num_samples),
        num_samples=num_per_domain,
    )


def merge_counts(batches: Sequence[RoutingCounts]) -> RoutingCounts:
    """The sums over several batches. Raises ValueError for none."""
    if not batches:
        raise ValueError("batches=[]: there is nothing to merge. Count at least one batch.")
    return RoutingCounts(*(torch.stack(column).sum(0) for column in zip(*batches, strict=True)))


def describe(counts: RoutingCounts) -> RoutingStatistics:
    """All layers' statistics at once. The overall load weighs domains by their tokens."""
    choices = counts.choices.double()
    by_domain, total = choices.sum(-1), choices.sum((-1, -2))
    load = choices / by_domain.unsqueeze(-1)
    return RoutingStatistics(
        load=load,
        entropy=_entropy(load),
        concentration=load.amax(-1),
        margin=counts.margin / counts.num_tokens,
        overall=choices.sum(1) / total.unsqueeze(-1),
        purity=choices.amax(1).sum(-1) / total,
        information=mutual_information(counts),
        domain_entropy=_entropy(by_domain / total.unsqueeze(-1)),
    )


def summarise(counts: RoutingCounts, domain_names: Sequence[str]) -> dict[str, Any]:
    """Per layer, and per domain and layer, what JSON and the dashboard show; domains without a token are left out.

    Entropies and information in nats. Loads over all domains weigh them by their tokens.
    """
    counts = RoutingCounts(*(field.double().cpu() for field in counts))
    seen = [g for g in range(len(domain_names)) if counts.num_tokens[g] > 0]
    counts = select_domains(counts, seen)
    statistics = describe(counts)
    information = statistics.information.tolist()
    return {
        "layers": [_summarise_layer(statistics, layer) for layer in range(len(counts.choices))],
        "domains": {
            domain_names[g]: _summarise_domain(counts, statistics, column) | {"mutual_information": information}
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
    between = (counts.squares - counts.choices.square() / num_samples).clamp_min(0)
    variance = between * num_samples / (num_samples - 1).clamp_min(1) / counts.choices.sum(-1, keepdim=True).square()
    overall = torch.einsum("lg,lge->le", weight, share)
    overall_variance = torch.einsum("lg,lge->le", weight.square(), variance)
    within = _entropy(share) + _shortfall(variance, share)
    return _entropy(overall) + _shortfall(overall_variance, overall) - (weight * within).sum(-1)


def select_domains(counts: RoutingCounts, domains: Sequence[int]) -> RoutingCounts:
    """The counts of some domains alone."""
    keep = list(domains)
    return RoutingCounts(
        choices=counts.choices[:, keep],
        squares=counts.squares[:, keep],
        margin=counts.margin[:, keep],
        num_tokens=counts.num_tokens[keep],
        num_samples=counts.num_samples[keep],
    )


def normalise_information(statistics: RoutingStatistics) -> Float[Tensor, "layer"]:
    """I(domain; expert) / H(domain); 0 where there is but one domain."""
    entropy = statistics.domain_entropy
    return torch.where(entropy > 0, statistics.information / entropy, torch.zeros_like(entropy))


def _count_per_sample(routings: Sequence[Routing], num_samples: int) -> Float[Tensor, "layer b e"]:
    """Tokens of each sample on each expert: one scatter for all layers."""
    expert = rearrange([r.expert for r in routings], "l (b n) k -> (l b) (n k)", b=num_samples)
    counts = torch.zeros(len(expert), routings[0].probability.shape[-1], dtype=torch.float64, device=expert.device)
    counts.scatter_add_(1, expert.long(), torch.ones((), dtype=counts.dtype, device=expert.device).expand_as(expert))
    return rearrange(counts, "(l b) e -> l b e", b=num_samples)


def _add_by_domain(
    values: Float[Tensor, "layer b *e"], domain: Int[Tensor, "b"], num_domains: int
) -> Float[Tensor, "layer g *e"]:
    sums = torch.zeros(values.shape[0], num_domains, *values.shape[2:], dtype=values.dtype, device=values.device)
    return sums.index_add_(1, domain.long(), values)


def _margin(routings: Sequence[Routing]) -> Float[Tensor, "layer n"]:
    """Best minus second-best probability, kept up expert by expert: on a CPU a quarter of the time of ``topk``."""
    probability = rearrange([r.probability for r in routings], "l n e -> e l n").contiguous()
    best, second = probability[0], torch.zeros_like(probability[0])
    for other in probability[1:]:
        second = torch.maximum(second, torch.minimum(best, other))
        best = torch.maximum(best, other)
    return best - second


def _summarise_layer(statistics: RoutingStatistics, layer: int) -> dict[str, Any]:
    load = statistics.overall[layer]
    return {
        "load": load.tolist(),
        "load_over_ideal": (load * len(load)).tolist(),
        "purity": statistics.purity[layer].item(),
        "mutual_information": statistics.information[layer].item(),
        "normalised_mutual_information": normalise_information(statistics)[layer].item(),
        "domain_entropy": statistics.domain_entropy[layer].item(),
        "dead_experts": torch.nonzero(load == 0).flatten().tolist(),
        "effective_experts": _entropy(load).exp().item(),
    }


def _summarise_domain(counts: RoutingCounts, statistics: RoutingStatistics, domain: int) -> dict[str, Any]:
    load, entropy = statistics.load[:, domain], statistics.entropy[:, domain]
    num_experts = load.shape[-1]
    return {
        "load": load.tolist(),
        "load_over_ideal": (load * num_experts).tolist(),
        "concentration": statistics.concentration[:, domain].tolist(),
        "entropy": entropy.tolist(),
        "normalised_entropy": (entropy / math.log(num_experts) if num_experts > 1 else entropy).tolist(),
        "margin": statistics.margin[:, domain].tolist(),
        "choices_per_token": round((counts.choices[0, domain].sum() / counts.num_tokens[domain]).item()),
        "num_tokens": int(counts.num_tokens[domain]),
        "num_samples": int(counts.num_samples[domain]),
    }


def _entropy(probability: Float[Tensor, "*s e"]) -> Float[Tensor, "*s"]:
    return torch.special.entr(probability).sum(-1)


def _shortfall(variance: Float[Tensor, "*s e"], probability: Float[Tensor, "*s e"]) -> Float[Tensor, "*s"]:
    """By how much the entropy of estimated probabilities falls short of the true one, to first order."""
    return (variance / probability.clamp_min(1e-300)).sum(-1) / 2
