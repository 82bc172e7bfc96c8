"""Measurements taken while a model trains; what they find joins the step's scalars (metrics.jsonl, dashboard)."""

from collections.abc import Sequence

import torch
from torch import nn

from shodh.evaluation.divergence import summarise_sums
from shodh.evaluation.held_out import HeldOutDomain, successive_states, sum_conservation
from shodh.evaluation.rollout import measure_one_step, measure_rollout
from shodh.evaluation.routing import RoutingCounts, count_routing, flip_rate, merge_counts, summarise
from shodh.fields import Routing
from shodh.training.loop import StepRecord


class MeasureRouting:
    """Load, purity and mutual information per layer over the global batch of every ``interval``-th step."""

    def __init__(self, domain_names: Sequence[str], interval: int) -> None:
        self.domain_names, self.interval = domain_names, interval

    def after_step(self, record: StepRecord) -> None:
        if record.step % self.interval:
            return
        counts = merge_counts([count_routing(o.routings, o.domain, len(self.domain_names)) for o in record.outputs])
        for field in counts:
            torch.distributed.all_reduce(field)
        record.scalars.update(routing_scalars(counts, self.domain_names))


def routing_scalars(counts: RoutingCounts, domain_names: Sequence[str]) -> dict[str, float]:
    """The summary of ``counts`` as flat names: load/layer0/expert3, routing/layer0/purity/NAME, ..."""
    summary = summarise(counts, domain_names)
    scalars = {}
    for number, layer in enumerate(summary["layers"]):
        scalars[f"routing/layer{number}/mutual_information"] = layer["mutual_information"]
        scalars[f"routing/layer{number}/effective_experts"] = layer["effective_experts"]
        scalars |= {f"load/layer{number}/expert{e}": load for e, load in enumerate(layer["load_over_ideal"])}
        for name, domain in summary["domains"].items():
            scalars[f"routing/layer{number}/purity/{name}"] = domain["purity"][number]
            scalars[f"routing/layer{number}/margin/{name}"] = domain["margin"][number]
    return scalars


class MeasureForecast:
    """On a held-out trajectory per domain: one-step error over persistence, and how many tokens changed expert."""

    def __init__(self, model: nn.Module, probes: Sequence[HeldOutDomain], interval: int) -> None:
        self.model, self.probes, self.interval = model, probes, interval
        self.routings: dict[str, Sequence[Routing]] = {}

    @torch.no_grad()
    def after_step(self, record: StepRecord) -> None:
        for probe in due(self.probes, self.interval, record):
            name, batch = probe.domain.name, successive_states(probe.trajectories[0], 0)
            forecast = self.model(batch.previous, batch.current, batch.medium, batch.parameters)
            error = measure_one_step(lambda *_, latent=forecast.latent: latent, batch)
            record.scalars[f"forecast/mse_over_persistence/{name}"] = error["ratio"]
            if name in self.routings:
                for layer, share in enumerate(flip_rate(self.routings[name], forecast.routings)):
                    record.scalars[f"routing/layer{layer}/flip_rate/{name}"] = share
            self.routings[name] = forecast.routings


class MeasureDivergence:
    """FP64 divergence (or curl) of decoded forecasts of a held-out trajectory; any value but 0.0 is a defect."""

    def __init__(self, model: nn.Module, probes: Sequence[HeldOutDomain], interval: int) -> None:
        self.model, self.probes, self.interval = model, probes, interval

    @torch.no_grad()
    def after_step(self, record: StepRecord) -> None:
        for probe in due(self.probes, self.interval, record):
            batch = successive_states(probe.trajectories[0], 0)
            forecast = self.model(batch.previous, batch.current, batch.medium, batch.parameters)
            flux = probe.decode(forecast.latent[-1:], batch.medium[-1:]).flux
            measured = summarise_sums(sum_conservation(flux, probe))
            record.scalars[f"divergence/max_abs/{probe.domain.name}"] = measured["max_abs"]


class MeasureRollout:
    """VRMSE of the decoded velocity after 1, 2-5 and all steps of a held-out trajectory per domain."""

    def __init__(self, model: nn.Module, probes: Sequence[HeldOutDomain], interval: int) -> None:
        self.model, self.probes, self.interval = model, probes, interval

    @torch.no_grad()
    def after_step(self, record: StepRecord) -> None:
        for probe in due(self.probes, self.interval, record):
            measured = measure_rollout(
                lambda *inputs: self.model(*inputs).latent,
                lambda latent, medium, probe=probe: probe.decode(latent, medium)[1:],
                probe.trajectories[0],
            )
            errors = {steps: error for steps, error in measured["vrmse"].items() if error is not None}
            record.scalars.update(
                {f"rollout/vrmse_{steps}/{probe.domain.name}": error for steps, error in errors.items()}
            )


def due(probes: Sequence[HeldOutDomain], interval: int, record: StepRecord) -> Sequence[HeldOutDomain]:
    """The probes on steps when they are measured, else none (ranks other than 0 are given none)."""
    return () if record.step % interval else probes
