"""The full evaluation on held-out trajectories: what stands in ``evaluation.json`` and the pictures beside it."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from shodh.evaluation.divergence import ConservationSums, merge_sums, sum_curl, sum_divergence, summarise_sums
from shodh.evaluation.latent_quality import (
    Decode,
    DecodeVelocity,
    Encode,
    LatentTrajectory,
    measure_latent_quality,
    merge_moments,
    sum_moments,
    summarise_moments,
)
from shodh.evaluation.reconstruction import TrajectoryRows, TrueFields, sample_trajectory, summarise_reconstruction
from shodh.evaluation.rollout import (
    Predict,
    TrueTrajectory,
    average_present,
    join_successive,
    measure_one_step,
    plan_steps,
)
from shodh.evaluation.rollout_quality import measure_rollouts, summarise_rollouts
from shodh.evaluation.routing import RoutingCounts, count_routing, merge_counts, summarise
from shodh.fields import NUM_GIVEN, DecodedFields, DomainSpec, Grid, LatentBatch, Routing
from shodh.physics.masked_projection import find_pores, project_fields

Model = Callable[[Tensor, Tensor, Tensor], Any]  # as Predict, but -> Forecast


class HeldOutDomain(NamedTuple):
    """One domain's held-out trajectories, normalised, and what is needed to judge predictions of them."""

    domain: DomainSpec
    grid: Grid  # ``Grid.relative``, which the decoded flux is stored for
    trajectories: Sequence[TrueTrajectory]
    medium: Sequence[Tensor]  # (x, y, z) of each trajectory, as stored
    decode: Decode
    baselines: dict[str, Callable[[Tensor], Tensor]]  # name -> reconstruction of velocity, such as the block KLT
    decode_velocity: DecodeVelocity | None = None  # differentiable: not on the lattice; MemoryError if that is too much
    encode: Encode | None = None  # of normalised fields and the medium as stored
    forecasters: Mapping[str, Predict] = {}  # name -> what else predicts this domain, such as the linear latent model
    project: bool = False  # lead decoded fields through the pores, which the medium is then, before they are judged


class TrajectoryResult(NamedTuple):
    """What one held-out trajectory adds to its domain's block of ``evaluation.json``."""

    routing: RoutingCounts
    conservation: list[ConservationSums]  # of decoded forecasts and of decoded true latents
    # Mean squares of velocity one step ahead, in normalised units: of decoded forecasts, of the state before, and of
    # decoded true latents (``decoded_truth_mse``), below which no forecast can be expected to get.
    errors: dict[str, Tensor]
    reconstruction: TrajectoryRows
    rollouts: dict[str, Any]


@torch.no_grad()
def evaluate_domain(model: Model, held_out: HeldOutDomain, index: int, num_domains: int) -> tuple[dict, RoutingCounts]:
    """One domain's block of ``evaluation.json`` without routing, and the routing counts of its one-step forecasts."""
    num = len(held_out.trajectories)
    results = [_evaluate_trajectory(model, held_out, number, index, num_domains) for number in range(num)]
    latents = [
        LatentTrajectory(t.latents, t.medium, m) for t, m in zip(held_out.trajectories, held_out.medium, strict=True)
    ]
    sums = merge_sums([part for r in results for part in r.conservation])
    conserved = "curl" if held_out.domain.velocity_space == "irrotational" else "divergence"
    reconstruction = summarise_reconstruction([r.reconstruction for r in results], held_out.grid)
    block = {
        conserved: summarise_sums(sums) | {"units": "normalised velocity per mean cell size"},
        "tokenizer": _headlines(reconstruction, held_out.trajectories[0]),
        **measure_next_latents(held_out, lambda *inputs: model(*inputs).latent),
        **{name: float(torch.stack([r.errors[name] for r in results]).mean()) for name in results[0].errors},
        "rollout": summarise_rollouts([r.rollouts for r in results]),
        "rollout_starts": list(plan_steps(len(latents[0].latents)).starts),
        "reconstruction": reconstruction,
        "latents": measure_latent_quality(latents, held_out.decode, held_out.decode_velocity, held_out.encode),
        "projected": held_out.project,
    }
    return block, merge_counts([r.routing for r in results])


def _evaluate_trajectory(
    model: Model, held_out: HeldOutDomain, number: int, index: int, num_domains: int
) -> TrajectoryResult:
    trajectory, medium = held_out.trajectories[number], held_out.medium[number]
    decode = _decoder_for(held_out, medium)
    batch = successive_states(trajectory, index)
    forecast = model(batch.given, batch.medium, batch.parameters)
    decoded = _decode_all(decode, forecast.latent, trajectory.medium)
    sums, truth = [sum_conservation(decoded.flux, held_out)], trajectory.velocity
    guesses = {"decoded_mse": decoded.velocity, "persistence_decoded_mse": truth[NUM_GIVEN - 1 : -1]}
    errors = _measure_guesses(guesses, truth)
    del guesses  # one decoded trajectory at a time: at full size two take gigabytes
    decoded = _decode_all(decode, trajectory.latents, trajectory.medium)
    sums.append(sum_conservation(decoded.flux, held_out))
    errors |= _measure_guesses({"decoded_truth_mse": decoded.velocity[NUM_GIVEN:]}, truth)
    fields = TrueFields(trajectory.velocity, trajectory.pressure, medium)
    return TrajectoryResult(
        routing=count_routing(forecast.routings, batch.domain, num_domains),
        conservation=sums,
        errors=errors,
        reconstruction=sample_trajectory(decoded, fields, held_out.grid, held_out.baselines),
        rollouts=_roll_out_trajectory(held_out, {"model": lambda *inputs: model(*inputs).latent}, number, decoded),
    )


def _measure_guesses(guesses: Mapping[str, Tensor], truth: Tensor) -> dict[str, Tensor]:
    """Mean square over every value of what is guessed of the states after the given ones."""
    return {name: (guess - truth[NUM_GIVEN:]).square().mean() for name, guess in guesses.items()}


def measure_next_latents(held_out: HeldOutDomain, predict: Predict) -> dict[str, float]:
    """``latent_mse`` one step ahead over all held-out trajectories, beside those of the guesses and forecasters."""
    batches = [successive_states(trajectory, 0) for trajectory in held_out.trajectories]
    one_step = measure_one_step(predict, batches)
    others = {name: measure_one_step(other, batches)["latent_mse"] for name, other in held_out.forecasters.items()}
    return {
        "latent_mse": one_step["latent_mse"],
        "persistence_latent_mse": one_step["persistence_mse"],
        "latent_mse_over_persistence": one_step["ratio"],
        "extrapolation_latent_mse": one_step["extrapolation_mse"],
        **{f"{name}_latent_mse": error for name, error in others.items()},
    }


def measure_forecasts(held_out: HeldOutDomain, predictors: Mapping[str, Predict]) -> dict[str, Any]:
    """``rollout`` of a domain's block for several models at once, and nothing else of it."""
    results = []
    for number, trajectory in enumerate(held_out.trajectories):
        decode = _decoder_for(held_out, held_out.medium[number])
        decoded = _decode_all(decode, trajectory.latents, trajectory.medium)
        results.append(_roll_out_trajectory(held_out, predictors, number, decoded))
    return summarise_rollouts(results)


def _roll_out_trajectory(
    held_out: HeldOutDomain, predictors: Mapping[str, Predict], number: int, decoded_truth: DecodedFields
) -> dict[str, Any]:
    medium = held_out.medium[number]
    decode = _decoder_for(held_out, medium)
    return measure_rollouts(
        {**predictors, **held_out.forecasters},
        lambda latent, still: decode(latent, still)[1:],
        held_out.trajectories[number],
        decoded_truth[1:],
        held_out.grid,
        medium,
    )


def _headlines(reconstruction: Mapping[str, Any], trajectory: TrueTrajectory) -> dict[str, Any]:
    """The tokenizer's VRMSE, means over snapshots that are not silent, beside the baselines' and the latent's size."""
    baselines = reconstruction["baseline_vrmse"].items()
    return {
        "vrmse": {field: reconstruction["vrmse"][field] for field in ("velocity", "pressure")},
        **{f"{name}_vrmse": {"velocity": value} for name, value in baselines},
        "latent_values": trajectory.latents.shape[1] + trajectory.medium.shape[0],
    }


def evaluate(model: Model, held_out: Sequence[HeldOutDomain]) -> dict[str, Any]:
    """``domains``, ``mean`` and ``latents`` (of all domains together) of ``evaluation.json``."""
    names = [h.domain.name for h in held_out]
    blocks, counts = {}, []
    for index, domain in enumerate(held_out):
        blocks[names[index]], count = evaluate_domain(model, domain, index, len(names))
        counts.append(count)
    summary = summarise(merge_counts(counts), names)
    for name in names:
        blocks[name]["routing"] = summary["domains"][name]
    tokenizers = [block["tokenizer"] for block in blocks.values()]
    mean = {
        f"{'tokenizer' if key == 'vrmse' else key.removesuffix('_vrmse')}_velocity_vrmse": average_present(
            [t[key]["velocity"] for t in tokenizers]
        )
        for key in tokenizers[0]
        if key.endswith("vrmse")
    }
    moments = merge_moments([sum_moments(t.latents) for domain in held_out for t in domain.trajectories])
    whole = {"latents": summarise_moments(moments)}
    return {"domains": blocks, "mean": mean, "routing_layers": summary["layers"], **whole}


def write_evaluation(folder: Path, evaluation: dict[str, Any], model: Model, held_out: Sequence[HeldOutDomain]) -> None:
    """``evaluation.json`` and ``slices.npz``, each written beside and renamed."""
    slices = {
        f"{domain.domain.name}/{name}": values
        for domain in held_out
        for name, values in picture_domain(model, domain).items()
    }
    np.savez_compressed(folder / "slices.tmp.npz", **slices)  # type: ignore[arg-type]
    os.replace(folder / "slices.tmp.npz", folder / "slices.npz")
    (folder / "evaluation.tmp").write_text(json.dumps(evaluation, indent=1))
    os.replace(folder / "evaluation.tmp", folder / "evaluation.json")


@torch.no_grad()
def picture_domain(model: Model, held_out: HeldOutDomain) -> dict[str, np.ndarray]:
    """A held-out state: middle slices of truth, decoded one-step forecast, error and medium; experts in 3-D."""
    trajectory = held_out.trajectories[0]
    batch = successive_states(trajectory, 0)
    half = len(batch.current) // 2
    forecast = model(batch.given, batch.medium, batch.parameters)
    decoded = _decoder_for(held_out, held_out.medium[0])(forecast.latent[half : half + 1], batch.medium[:1])
    truth = trajectory.velocity[half + NUM_GIVEN]
    middle = truth.shape[-1] // 2
    shape = forecast.latent.shape[-3:]
    return {
        "truth": truth.norm(dim=0)[..., middle].cpu().numpy(),
        "decoded": decoded.velocity[0].norm(dim=0)[..., middle].cpu().numpy(),
        "error": (decoded.velocity[0] - truth).norm(dim=0)[..., middle].cpu().numpy(),
        "medium": held_out.medium[0][..., middle].numpy(),
        "experts": np.stack([_expert_map(routing, half, len(batch.current), shape) for routing in forecast.routings]),
        "truth_slices": _slices_through_tokens(truth.norm(dim=0), forecast.routings[0], len(batch.current), shape),
        "field": np.array("speed |u| after one forecast step, normalised, slice z = middle"),
    }


def successive_states(trajectory: TrueTrajectory, index: int) -> LatentBatch:
    """All given states of a trajectory, each with the one that follows, as one batch."""
    return join_successive(trajectory.latents, trajectory.medium, trajectory.parameters, index)


def sum_conservation(flux: Tensor, held_out: HeldOutDomain) -> ConservationSums:
    """Divergence of a stored flux, or curl of a stored circulation, whichever the domain conserves."""
    measure = sum_curl if held_out.domain.velocity_space == "irrotational" else sum_divergence
    return measure(flux, held_out.grid)


def _decoder_for(held_out: HeldOutDomain, medium: Tensor) -> Decode:
    """The domain's decoder for trajectories in one medium (x, y, z), as stored."""
    if not held_out.project:
        return held_out.decode
    pore = find_pores(medium[None, None])

    def decode(latent: Tensor, still: Tensor) -> DecodedFields:
        return project_fields(held_out.decode(latent, still), pore.expand(len(latent), *medium.shape), held_out.grid)

    return decode


def _decode_all(decode: Decode, latents: Tensor, medium: Tensor) -> DecodedFields:
    parts = [decode(latent, medium.expand(len(latent), *medium.shape)) for latent in latents.split(8)]
    return DecodedFields(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _expert_map(routing: Routing, sample: int, num_samples: int, latent_shape: Sequence[int]) -> np.ndarray:
    """Best expert per token (x, y, z) of one sample."""
    per_sample = rearrange(routing.expert[:, 0], "(b n) -> b n", b=num_samples)[sample]
    x, y, z = _token_grid(per_sample.numel(), latent_shape)
    return rearrange(per_sample, "(x y z) -> x y z", x=x, y=y, z=z).cpu().numpy().astype(np.int16)


def _token_grid(num_tokens: int, latent_shape: Sequence[int]) -> tuple[int, int, int]:
    patch = round((math.prod(latent_shape) / num_tokens) ** (1 / 3))
    x, y, z = (size // patch for size in latent_shape)
    return x, y, z


def _slices_through_tokens(
    field: Tensor, routing: Routing, num_samples: int, latent_shape: Sequence[int]
) -> np.ndarray:
    """Slices (x, y, slice) of a field through the middle of every layer of tokens along z."""
    num = _token_grid(len(routing.expert) // num_samples, latent_shape)[2]
    middles = [(2 * i + 1) * field.shape[-1] // (2 * num) for i in range(num)]
    return field[..., middles].cpu().numpy()
