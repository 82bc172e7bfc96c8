"""What every step of a run tells about its experts, gathered over ranks by one reduction and one transfer."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from shodh.evaluation.routing import (
    RoutingCounts,
    count_routing,
    describe,
    merge_counts,
    normalise_information,
    select_domains,
)
from shodh.fields import LatentBatch
from shodh.training.loop import StepRecord

FLIP_INTERVAL = 25  # steps: a forward of one sample per domain costs a few hundredths of a small run's step


class StepRouting(NamedTuple):
    """One step's counts over all ranks, and rank by rank what alarms compare; on the CPU."""

    counts: RoutingCounts
    choices: Float[Tensor, "rank layer g e"]
    num_samples: Float[Tensor, "rank g"]
    seconds: Float[Tensor, "rank"]  # of the step


class MeasureRouting:
    """Hook: loads, purity, entropies, margins and information of the global batch, logged every ``interval``-th step.

    ``measured`` is what the last step gave, of every step: alarms do not wait for what is logged.
    """

    def __init__(self, domain_names: Sequence[str], interval: int) -> None:
        self.domain_names, self.interval = domain_names, interval
        self.measured: StepRouting | None = None

    def after_step(self, record: StepRecord) -> None:
        self.measured = gather_routing(record.outputs, len(self.domain_names), record.seconds)
        if record.step % self.interval == 0:
            record.scalars.update(routing_scalars(self.measured.counts, self.domain_names))


class MeasureFlips:
    """Hook: share of a fixed probe batch's tokens whose best expert changed in the last ``interval`` steps.

    Per layer and domain. ``probe`` is a sample or more per domain; None on ranks that do not measure.
    """

    def __init__(self, model: nn.Module, probe: LatentBatch | None, domain_names: Sequence[str], interval: int) -> None:
        self.model, self.probe, self.domain_names, self.interval = model, probe, domain_names, interval
        self.expert: Tensor | None = None  # (layer, sample, token) of the measurement before

    @torch.no_grad()
    def after_step(self, record: StepRecord) -> None:
        if self.probe is None or record.step % self.interval:
            return
        probe = self.probe
        routings = self.model(probe.given, probe.medium, probe.parameters).routings
        expert = rearrange([r.expert[:, 0] for r in routings], "l (b n) -> l b n", b=len(probe.domain))
        if self.expert is not None:
            changed = (expert != self.expert).double().mean(-1).cpu()
            for index, domain in enumerate(self.domain_names):
                shares = changed[:, probe.domain.cpu() == index].mean(-1).tolist()
                record.scalars.update(
                    {f"routing/layer{layer}/flip_rate/{domain}": share for layer, share in enumerate(shares)}
                )
        self.expert = expert


def gather_routing(outputs: Sequence[Any], num_domains: int, seconds: float) -> StepRouting:
    """The counts of a step's micro-batches (each with ``routings`` and ``domain``) on all ranks; collective.

    One reduction: each rank adds its sums, and its own row of a table that is zero elsewhere.
    """
    counts = merge_counts([count_routing(output.routings, output.domain, num_domains) for output in outputs])
    sums = torch.cat([counts.squares.flatten(), counts.margin.flatten(), counts.num_tokens])
    own = torch.cat([counts.choices.flatten(), counts.num_samples, counts.num_samples.new_full((1,), seconds)])
    rows = own.new_zeros(torch.distributed.get_world_size(), len(own))
    rows[torch.distributed.get_rank()] = own
    packed = torch.cat([sums, rows.flatten()])
    torch.distributed.all_reduce(packed)
    packed = packed.cpu()
    squares, margin, num_tokens, flat = packed.split([*map(math.prod, _shapes(counts)), rows.numel()])
    table = flat.reshape(rows.shape)
    choices = table[:, : counts.choices.numel()].reshape(len(table), *counts.choices.shape)
    num_samples = table[:, -1 - num_domains : -1]
    whole = RoutingCounts(
        choices=choices.sum(0),
        squares=squares.reshape(counts.squares.shape),
        margin=margin.reshape(counts.margin.shape),
        num_tokens=num_tokens,
        num_samples=num_samples.sum(0),
    )
    return StepRouting(whole, choices, num_samples, table[:, -1])


def routing_scalars(counts: RoutingCounts, domain_names: Sequence[str]) -> dict[str, float]:
    """The statistics of ``counts`` as flat names; loads are in even shares, so that 1 is ideal.

    load/layer0/expert3, load/layer0/DOMAIN/expert3, routing/layer0/purity, routing/layer0/entropy/DOMAIN, ...
    Domains without a token are left out.
    """
    seen = [g for g, number in enumerate(counts.num_tokens.tolist()) if number > 0]
    if len(seen) < len(domain_names):
        counts = select_domains(counts, seen)
    statistics, names = describe(counts), [domain_names[g] for g in seen]
    num_experts = statistics.load.shape[-1]
    by_layer = {
        "purity": statistics.purity,
        "mutual_information": statistics.information,
        "normalised_mutual_information": normalise_information(statistics),
        "dead_experts": (statistics.overall == 0).sum(-1),
        "effective_experts": torch.special.entr(statistics.overall).sum(-1).exp(),
    }
    by_domain = {
        "entropy": statistics.entropy,
        "concentration": statistics.concentration,
        "margin": statistics.margin,
    }
    scalars = {}
    for layer, loads in enumerate((statistics.overall * num_experts).tolist()):
        scalars |= {f"load/layer{layer}/expert{e}": load for e, load in enumerate(loads)}
    for layer, domains in enumerate((statistics.load * num_experts).tolist()):
        for name, loads in zip(names, domains, strict=True):
            scalars |= {f"load/layer{layer}/{name}/expert{e}": load for e, load in enumerate(loads)}
    for key, values in by_layer.items():
        scalars |= {f"routing/layer{layer}/{key}": float(value) for layer, value in enumerate(values.tolist())}
    for key, table in by_domain.items():
        for layer, values in enumerate(table.tolist()):
            scalars |= {f"routing/layer{layer}/{key}/{n}": v for n, v in zip(names, values, strict=True)}
    return scalars


def _shapes(counts: RoutingCounts) -> tuple[torch.Size, torch.Size, torch.Size]:
    return counts.squares.shape, counts.margin.shape, counts.num_tokens.shape
