"""The full evaluation on held-out trajectories: what stands in ``evaluation.json`` and the pictures beside it."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from shodh.evaluation.divergence import ConservationSums, merge_sums, sum_curl, sum_divergence, summarise_sums
from shodh.evaluation.latent_quality import (
    LatentTrajectory,
    measure_latent_quality,
    merge_moments,
    sum_moments,
    summarise_moments,
)
from shodh.evaluation.reconstruction import Encode, TrueFields, sample_trajectory, summarise_reconstruction
from shodh.evaluation.rollout import (
    TrueTrajectory,
    average_rollouts,
    measure_one_step,
    measure_rollout,
)
from shodh.evaluation.routing import RoutingCounts, count_routing, merge_counts, summarise
from shodh.fields import DecodedFields, DomainSpec, Grid, LatentBatch, Routing
from shodh.physics.spectra import vrmse

Model = Callable[[Tensor, Tensor, Tensor, Tensor], Any]  # -> Forecast


class HeldOutDomain(NamedTuple):
    """One domain's held-out trajectories, normalised, and what is needed to judge predictions of them."""

    domain: DomainSpec
    grid: Grid  # ``Grid.relative``, which the decoded flux is stored for
    trajectories: Sequence[TrueTrajectory]
    medium: Sequence[Tensor]  # (x, y, z) of each trajectory, for pictures
    decode: Callable[[Tensor, Tensor], DecodedFields]
    baselines: dict[str, Callable[[Tensor], Tensor]]  # name -> reconstruction of velocity, such as the block KLT
    decode_velocity: Callable[[Tensor, Tensor], Tensor] | None = None  # differentiable: not on the lattice
    encode: Encode | None = None  # of normalised fields and the medium as stored


@torch.no_grad()
def evaluate_domain(model: Model, held_out: HeldOutDomain, index: int, num_domains: int) -> tuple[dict, RoutingCounts]:
    """One domain's block of ``evaluation.json`` without routing, and the routing counts of its one-step forecasts."""
    rollouts, steps, sums, errors, counts, samples = [], [], [], [], [], []
    scores: dict[str, list[Tensor]] = {}
    for trajectory, medium in zip(held_out.trajectories, held_out.medium, strict=True):
        batch = successive_states(trajectory, index)
        forecast = model(batch.previous, batch.current, batch.medium, batch.parameters)
        counts.append(count_routing(forecast.routings, batch.domain, num_domains))
        steps.append(batch)
        for latents, truth in ((forecast.latent, slice(2, None)), (trajectory.latents, slice(None))):
            decoded = _decode_all(held_out, latents, trajectory.medium)
            sums.append(sum_conservation(decoded.flux, held_out))
            if truth == slice(2, None):
                errors.append((decoded.velocity - trajectory.velocity[truth]).square().mean())
            else:
                fields = TrueFields(trajectory.velocity, trajectory.pressure, medium)
                samples.append(sample_trajectory(decoded, fields, held_out.grid, held_out.baselines))
                scores.setdefault("velocity", []).append(vrmse(decoded.velocity, trajectory.velocity))
                scores.setdefault("pressure", []).append(vrmse(decoded.pressure, trajectory.pressure))
        for name, reconstruct in held_out.baselines.items():
            scores.setdefault(name, []).append(vrmse(reconstruct(trajectory.velocity), trajectory.velocity))
        rollouts.append(
            measure_rollout(
                lambda *inputs: model(*inputs).latent,
                lambda latent, medium: held_out.decode(latent, medium)[1:],
                trajectory,
            )
        )
    latents = [
        LatentTrajectory(t.latents, t.medium, m) for t, m in zip(held_out.trajectories, held_out.medium, strict=True)
    ]
    one_step = measure_one_step(lambda *inputs: model(*inputs).latent, steps)
    means = {name: float(torch.cat(values).mean()) for name, values in scores.items()}
    conserved = "curl" if held_out.domain.velocity_space == "irrotational" else "divergence"
    block = {
        conserved: summarise_sums(merge_sums(sums)) | {"units": "normalised velocity per mean cell size"},
        "tokenizer": {
            "vrmse": {"velocity": means.pop("velocity"), "pressure": means.pop("pressure")},
            **{f"{name}_vrmse": {"velocity": value} for name, value in means.items()},
            "latent_values": held_out.trajectories[0].latents.shape[1] + held_out.trajectories[0].medium.shape[0],
        },
        "latent_mse": one_step["latent_mse"],
        "persistence_latent_mse": one_step["persistence_mse"],
        "latent_mse_over_persistence": one_step["ratio"],
        "extrapolation_latent_mse": one_step["extrapolation_mse"],
        "decoded_mse": float(torch.stack(errors).mean()),
        "rollout": average_rollouts(rollouts),
        "reconstruction": summarise_reconstruction(samples, held_out.grid),
        "latents": measure_latent_quality(latents, held_out.decode, held_out.decode_velocity, held_out.encode),
    }
    return block, merge_counts(counts)


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
        f"{'tokenizer' if key == 'vrmse' else key.removesuffix('_vrmse')}_velocity_vrmse": float(
            np.mean([t[key]["velocity"] for t in tokenizers])
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
    """Middle slices of a held-out state: truth, decoded one-step forecast, error, medium and chosen experts."""
    trajectory = held_out.trajectories[0]
    batch = successive_states(trajectory, 0)
    half = len(batch.current) // 2
    forecast = model(batch.previous, batch.current, batch.medium, batch.parameters)
    decoded = held_out.decode(forecast.latent[half : half + 1], batch.medium[:1])
    truth = trajectory.velocity[half + 2]
    middle = truth.shape[-1] // 2
    shape = forecast.latent.shape[-3:]
    return {
        "truth": truth.norm(dim=0)[..., middle].cpu().numpy(),
        "decoded": decoded.velocity[0].norm(dim=0)[..., middle].cpu().numpy(),
        "error": (decoded.velocity[0] - truth).norm(dim=0)[..., middle].cpu().numpy(),
        "medium": held_out.medium[0][..., middle].numpy(),
        "expert": np.stack([_expert_map(routing, half, len(batch.current), shape) for routing in forecast.routings]),
        "field": np.array("speed |u| after one forecast step, normalised, slice z = middle"),
    }


def successive_states(trajectory: TrueTrajectory, index: int) -> LatentBatch:
    """Every three successive states of a trajectory as one batch."""
    latents, num = trajectory.latents, len(trajectory.latents) - 2
    return LatentBatch(
        previous=latents[:-2],
        current=latents[1:-1],
        following=latents[2:],
        medium=trajectory.medium.expand(num, *trajectory.medium.shape),
        parameters=trajectory.parameters.expand(num, -1),
        domain=torch.full((num,), index, device=latents.device),
    )


def sum_conservation(flux: Tensor, held_out: HeldOutDomain) -> ConservationSums:
    """Divergence of a stored flux, or curl of a stored circulation, whichever the domain conserves."""
    measure = sum_curl if held_out.domain.velocity_space == "irrotational" else sum_divergence
    return measure(flux, held_out.grid)


def _decode_all(held_out: HeldOutDomain, latents: Tensor, medium: Tensor) -> DecodedFields:
    parts = [held_out.decode(latent, medium.expand(len(latent), *medium.shape)) for latent in latents.split(8)]
    return DecodedFields(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _expert_map(routing: Routing, sample: int, num_samples: int, latent_shape: Sequence[int]) -> np.ndarray:
    """Best expert per token of one sample in the middle slice along z."""
    per_sample = rearrange(routing.expert[:, 0], "(b n) -> b n", b=num_samples)[sample]
    patch = round((np.prod(latent_shape) / len(per_sample)) ** (1 / 3))
    x, y, z = (size // patch for size in latent_shape)
    return rearrange(per_sample, "(x y z) -> x y z", x=x, y=y, z=z)[..., z // 2].cpu().numpy()
