"""Forecast skill on all held-out trajectories, cheap enough to be measured of dozens of models: few steps are decoded.

Latents are judged at every snapshot, fields at some; rollouts start from up to three times of a trajectory.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shodh.evaluation.held_out import HeldOutDomain, Model, successive_states
from shodh.evaluation.rollout import (
    SPANS,
    STRUCTURE_STEPS,
    TrueTrajectory,
    average_present,
    forecast_steps,
    measure_one_step,
    plan_steps,
)
from shodh.evaluation.rollout_quality import decode_unless_lost, find_loud
from shodh.evaluation.routing import count_routing, merge_counts, summarise
from shodh.fields import NUM_GIVEN, Routing
from shodh.physics.spectra import vrmse

ROLLOUT_SPANS = ("2-20", "20", "21-60")  # of ``SPANS``; of each the ``STRUCTURE_STEPS`` are decoded
NUM_ONE_STEP = 8  # one-step forecasts decoded of a trajectory, evenly spread
AT_ONCE = 16  # states decoded at a time


@torch.no_grad()
def measure_skill(model: Model, held_out: Sequence[HeldOutDomain]) -> dict[str, Any]:
    """``domains``: errors of each beside persistence's; ``routing``: see ``summarise``; ``gates``: see ``_sum_gates``.

    Errors are means over trajectories, starts and steps; they are None where a rollout did not stay finite.
    """
    blocks, counts, gates = {}, [], []
    for index, domain in enumerate(held_out):
        batches = [successive_states(trajectory, index) for trajectory in domain.trajectories]
        forecasts = [model(b.given, b.medium, b.parameters) for b in batches]
        pairs = zip(forecasts, batches, strict=True)
        counts += [count_routing(forecast.routings, batch.domain, len(held_out)) for forecast, batch in pairs]
        gates += [_sum_gates(f.routings) for f in forecasts]
        latents = iter([forecast.latent for forecast in forecasts])
        one_step = measure_one_step(lambda *inputs, latents=latents: next(latents), batches)
        fields = [
            _measure_fields(model, domain, trajectory, forecast.latent)
            for trajectory, forecast in zip(domain.trajectories, forecasts, strict=True)
        ]
        blocks[domain.domain.name] = {
            "latent_mse": one_step["latent_mse"],
            "persistence_latent_mse": one_step["persistence_mse"],
            "latent_mse_over_persistence": one_step["ratio"],
            **{span: average_guesses([f[span] for f in fields]) for span in ("1", *ROLLOUT_SPANS)},
            "num_trajectories": len(batches),
        }
    routing = summarise(merge_counts(counts), [domain.domain.name for domain in held_out])
    return {"domains": blocks, "routing": routing, "gates": average_present(gates)}


def average_guesses(rows: Sequence[dict[str, list[float]]]) -> dict[str, float | None]:
    """Mean VRMSE of the model and of persistence; None without any, or where one is not finite."""
    means: dict[str, float | None] = {}
    for name in ("vrmse", "persistence_vrmse"):
        values = [value for row in rows for value in row[name]]
        means[name] = math.fsum(values) / len(values) if values and all(map(math.isfinite, values)) else None
    return means


def _measure_fields(
    model: Model, held_out: HeldOutDomain, trajectory: TrueTrajectory, forecast: Tensor
) -> dict[str, dict[str, list[float]]]:
    """VRMSE of decoded velocities by span, "1" of one-step forecasts, each from true states."""
    loud, num = find_loud(trajectory.velocity), len(forecast)
    time = NUM_GIVEN + torch.arange(min(num, NUM_ONE_STEP)) * (num - 1) // max(1, min(num, NUM_ONE_STEP) - 1)
    velocity = _decode(held_out, forecast[time - NUM_GIVEN], trajectory.medium)
    measured = {"1": _compare(velocity, trajectory.velocity, loud, time, time - 1)}
    steps = plan_steps(len(trajectory.latents))
    predicted = forecast_steps(lambda *inputs: model(*inputs).latent, trajectory, steps)
    decoded = torch.tensor([step in STRUCTURE_STEPS for step in steps.step.tolist()])
    step, time, given = (pairs[decoded] for pairs in (steps.step, steps.time, steps.given))
    velocity = _decode(held_out, predicted[decoded], trajectory.medium)
    for span in ROLLOUT_SPANS:
        here = torch.tensor([number in SPANS[span] for number in step.tolist()])
        measured[span] = _compare(velocity[here], trajectory.velocity, loud, time[here], given[here])
    return measured


def _decode(held_out: HeldOutDomain, latents: Tensor, medium: Tensor) -> Tensor:
    """Velocities of latents, NaN where these are lost."""
    parts = latents.split(AT_ONCE)
    return torch.cat([decode_unless_lost(lambda *i: held_out.decode(*i)[1:], part, medium)[0] for part in parts])


def _compare(velocity: Tensor, truth: Tensor, loud: Tensor, time: Tensor, given: Tensor) -> dict[str, list[float]]:
    """VRMSE, against the true states at ``time``, of what was predicted and of the true states ``given``.

    Those that are not loud are left out.
    """
    guesses = {"vrmse": velocity, "persistence_vrmse": truth[given]}
    return {name: vrmse(guess, truth[time])[loud[time]].tolist() for name, guess in guesses.items()}


def _sum_gates(routings: Sequence[Routing]) -> list[dict[str, float]]:
    """Per layer, means over tokens: the sum of the gates of the chosen experts, and the best one's share of it."""
    return [
        {
            "sum": routing.gate.sum(-1).mean().item(),
            "best_share": (routing.gate[:, 0] / routing.gate.sum(-1)).mean().item(),
        }
        for routing in routings
    ]
