"""Measurements taken while a model trains; what they find joins the step's scalars (metrics.jsonl, dashboard)."""

from collections.abc import Sequence

import torch
from torch import nn

from shodh.evaluation.divergence import summarise_sums
from shodh.evaluation.held_out import HeldOutDomain, successive_states, sum_conservation
from shodh.evaluation.rollout import measure_one_step
from shodh.evaluation.rollout_quality import measure_short_rollout
from shodh.fields import LatentBatch
from shodh.training.loop import StepRecord


class MeasureForecast:
    """On a held-out trajectory per domain: one-step error over persistence, and FP64 divergence (or curl) decoded.

    Any divergence but 0.0 is a defect.
    """

    def __init__(self, model: nn.Module, probes: Sequence[HeldOutDomain], interval: int) -> None:
        self.model, self.probes, self.interval = model, probes, interval

    @torch.no_grad()
    def after_step(self, record: StepRecord) -> None:
        for probe in due(self.probes, self.interval, record):
            name, batch = probe.domain.name, successive_states(probe.trajectories[0], 0)
            forecast = self.model(batch.given, batch.medium, batch.parameters)
            error = measure_one_step(lambda *_, latent=forecast.latent: latent, batch)
            record.scalars[f"forecast/mse_over_persistence/{name}"] = error["ratio"]
            flux = probe.decode(forecast.latent[-1:], batch.medium[-1:]).flux
            measured = summarise_sums(sum_conservation(flux, probe))
            record.scalars[f"divergence/max_abs/{name}"] = measured["max_abs"]


class MeasureRollout:
    """VRMSE of the decoded velocity at steps 1, 2-20 (mean) and 20 of a held-out trajectory per domain."""

    def __init__(self, model: nn.Module, probes: Sequence[HeldOutDomain], interval: int) -> None:
        self.model, self.probes, self.interval = model, probes, interval

    @torch.no_grad()
    def after_step(self, record: StepRecord) -> None:
        for probe in due(self.probes, self.interval, record):
            errors = measure_short_rollout(
                lambda *inputs: self.model(*inputs).latent,
                lambda latent, medium, probe=probe: probe.decode(latent, medium)[1:],
                probe.trajectories[0],
            )
            record.scalars.update({f"rollout/vrmse_{span}/{probe.domain.name}": e for span, e in errors.items()})


def take_probe(probes: Sequence[HeldOutDomain]) -> LatentBatch | None:
    """One held-out state per domain, from the middle of its first trajectory; None without probes."""
    if not probes:
        return None
    batches = [successive_states(probe.trajectories[0], index) for index, probe in enumerate(probes)]
    middle = [LatentBatch(*(values[len(b.domain) // 2, None] for values in b)) for b in batches]
    return LatentBatch(*(torch.cat(values) for values in zip(*middle, strict=True)))


def due(probes: Sequence[HeldOutDomain], interval: int, record: StepRecord) -> Sequence[HeldOutDomain]:
    """The probes on steps when they are measured, else none (ranks other than 0 are given none)."""
    return () if record.step % interval else probes
