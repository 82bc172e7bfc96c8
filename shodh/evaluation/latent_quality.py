"""How fit latents are for a forecaster: bounded, white, and such that a small step moves the decoded field a little."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from shodh.fields import DecodedFields

# velocity and pressure, normalised, and the medium as stored -> latents of state and medium; and back
Encode = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Decode = Callable[[Tensor, Tensor], DecodedFields]
DecodeVelocity = Callable[[Tensor, Tensor], Tensor]  # state latent, medium latent -> velocity

BOUND = 5.0  # standard deviations: 6 in 10 million values of a Gaussian lie outside
RELATIVE_SIZES = (1e-3, 1e-2, 1e-1)  # of perturbations, over the rms of the latent
POWER_ITERATIONS = 10
NUM_PERTURBED = 6  # states whose latents are perturbed


class LatentTrajectory(NamedTuple):
    """One trajectory's whitened latents, and its medium, encoded and as stored."""

    latents: Float[Tensor, "t c i j k"]
    medium_latent: Float[Tensor, "m i j k"]
    medium: Float[Tensor, "x y z"]


class LatentSample(NamedTuple):
    """One state as latents, and the medium it is in, encoded and as stored."""

    latent: Float[Tensor, "1 c i j k"]
    medium_latent: Float[Tensor, "1 m i j k"]
    medium: Float[Tensor, "x y z"]


class LatentMoments(NamedTuple):
    """Sums over latent cells, in FP64; add those of several trajectories or domains with ``merge_moments``."""

    num_cells: int
    total: Float[Tensor, "c"]
    products: Float[Tensor, "c c"]
    largest: float
    num_outside: int


def sum_moments(latent: Float[Tensor, "b c x y z"]) -> LatentMoments:
    """Moments of whitened latents over samples and cells."""
    rows = rearrange(latent, "b c x y z -> (b x y z) c").double().cpu()
    size = rows.abs()
    return LatentMoments(len(rows), rows.sum(0), rows.T @ rows, size.max().item(), int((size > BOUND).sum()))


def merge_moments(parts: Sequence[LatentMoments]) -> LatentMoments:
    """Moments of all parts together."""
    return LatentMoments(
        num_cells=sum(p.num_cells for p in parts),
        total=torch.stack([p.total for p in parts]).sum(0),
        products=torch.stack([p.products for p in parts]).sum(0),
        largest=max(p.largest for p in parts),
        num_outside=sum(p.num_outside for p in parts),
    )


def summarise_moments(moments: LatentMoments) -> dict[str, Any]:
    """``mean`` and ``std`` over all values; the covariance of channels within a cell: its condition number (1: white;
    None if singular) and the effective number of channels (sum of eigenvalues)^2 / sum of their squares; the largest
    |value|; the share of values outside of ``bound``."""
    channel_mean = moments.total / moments.num_cells
    covariance = moments.products / moments.num_cells - torch.outer(channel_mean, channel_mean)
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp_min(0)
    smallest, largest = eigenvalues[0].item(), eigenvalues[-1].item()
    mean = channel_mean.mean().item()
    square = (moments.products.diagonal() / moments.num_cells).mean().item()
    num_channels = len(moments.total)
    singular = smallest <= 1e-12 * largest  # of FP64 sums of FP32 values
    return {
        "num_channels": num_channels,
        "mean": mean,
        "std": math.sqrt(max(square - mean**2, 0.0)),
        "largest": moments.largest,
        "condition_number": None if singular else largest / smallest,
        "effective_channels": (eigenvalues.sum() ** 2 / eigenvalues.square().sum().clamp_min(1e-300)).item(),
        "bound": BOUND,
        "share_outside": moments.num_outside / (moments.num_cells * num_channels),
    }


@torch.no_grad()
def measure_gain(decode: DecodeVelocity, samples: Sequence[LatentSample], seed: int = 0) -> dict[str, Any]:
    """How far random Gaussian perturbations of a latent move the decoded velocity, one sample at a time.

    Gain: (|change of velocity| / |velocity less its box means|) / (|perturbation| / |latent|), so a forecast whose
    latents err by 1 % decodes to an error of VRMSE gain x 1 %, if its errors are as white as these. ``nonlinearity``:
    mean gain at the largest size over that at the smallest; 1 for a linear decoder.
    """
    generator = torch.Generator().manual_seed(seed)
    gains = torch.zeros(len(RELATIVE_SIZES), len(samples), dtype=torch.float64)
    for n, (state, still, _) in enumerate(samples):
        velocity = decode(state, still)
        noise = torch.randn(state.shape, generator=generator).to(state)
        for i, size in enumerate(RELATIVE_SIZES):
            step = noise * (size * state.norm() / noise.norm())
            gains[i, n] = (decode(state + step, still) - velocity).double().norm() / (size * deviation(velocity))
    return {
        "relative_sizes": list(RELATIVE_SIZES),
        "mean": gains.mean(1).tolist(),
        "p90": gains.quantile(0.9, dim=1).tolist(),
        "max": gains.max(1).values.tolist(),
        "nonlinearity": (gains[-1].mean() / gains[0].mean()).item(),
        "num_samples": len(samples),
    }


@torch.enable_grad()
def measure_largest_gain(
    decode: DecodeVelocity, sample: LatentSample, seed: int = 0, num_iterations: int = POWER_ITERATIONS
) -> float:
    """The gain of the worst small perturbation of one latent, by power iterations on J^T J; a lower bound.

    J v comes from differentiating the pull-back J^T w, which is linear in w, once more: several times faster here than
    forward-mode differentiation. ``decode`` must be differentiable.
    """
    latent = sample.latent.detach().clone().requires_grad_()
    velocity = decode(latent, sample.medium_latent)
    cotangent = torch.zeros_like(velocity, requires_grad=True)
    (pulled_back,) = torch.autograd.grad(velocity, latent, cotangent, create_graph=True)
    direction = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed)).to(latent)
    stretch = 0.0
    for _ in range(num_iterations):
        direction = direction / direction.norm()
        (change,) = torch.autograd.grad(pulled_back, cotangent, direction, retain_graph=True)
        stretch = max(stretch, change.double().norm().item())
        (direction,) = torch.autograd.grad(velocity, latent, change, retain_graph=True)
        if not bool(direction.any()):
            break  # a decoder that ignores its latent has no worst direction
    return stretch * latent.detach().double().norm().item() / deviation(velocity).item()


def deviation(velocity: Float[Tensor, "b 3 x y z"]) -> Float[Tensor, ""]:
    """Length of a field less the box means of its components, in FP64."""
    values = velocity.detach().double()
    return (values - values.mean((-3, -2, -1), keepdim=True)).norm().clamp_min(1e-300)


@torch.no_grad()
def measure_round_trip(
    decode: Decode,
    encode: Encode,
    samples: Sequence[LatentSample],
) -> float:
    """|encode(decode(z)) - z| / |z|, mean over samples: 0 for a tokenizer that knows its own fields again."""
    errors = []
    for latent, medium_latent, medium in samples:
        decoded = decode(latent, medium_latent)
        again, _ = encode(decoded.velocity, decoded.pressure, medium[None, None])
        errors.append(((again - latent).double().norm() / latent.double().norm()).item())
    return sum(errors) / len(errors)


def measure_latent_quality(
    trajectories: Sequence[LatentTrajectory],
    decode: Decode,
    decode_velocity: DecodeVelocity | None = None,
    encode: Encode | None = None,
) -> dict[str, Any]:
    """How bounded and white a domain's latents are, ``smoothness`` and, with an encoder, ``round_trip``.

    ``smoothness`` has the gains of the ``velocity`` and of its ``pattern``, the velocity less its box means: where the
    mean flow passes through the latent, it is what a perturbation moves most. Each has a ``largest_gain`` if there is a
    differentiable decoder; where that raises MemoryError, None, and ``largest_gain_skipped`` says why.
    """
    result = summarise_moments(merge_moments([sum_moments(t.latents) for t in trajectories]))
    samples = spread_samples(trajectories, NUM_PERTURBED)
    parts = {"velocity": _velocity_of(decode), "pattern": without_mean(_velocity_of(decode))}
    result["smoothness"] = {name: measure_gain(decoder, samples) for name, decoder in parts.items()}
    if decode_velocity is not None:
        largest, reason = _measure_largest_gains(decode_velocity, samples[len(samples) // 2])
        for name, gain in largest.items():
            result["smoothness"][name]["largest_gain"] = gain
        if reason:
            result["largest_gain_skipped"] = reason
    if encode is not None:
        result["round_trip"] = measure_round_trip(decode, encode, samples)
    return result


def _measure_largest_gains(
    decode_velocity: DecodeVelocity, sample: LatentSample
) -> tuple[dict[str, float | None], str | None]:
    """Those of velocity and pattern, or None with the reason."""
    decoders = {"velocity": decode_velocity, "pattern": without_mean(decode_velocity)}
    try:
        return {name: measure_largest_gain(decoder, sample) for name, decoder in decoders.items()}, None
    except MemoryError as refusal:
        return dict.fromkeys(decoders), str(refusal)


def _velocity_of(decode: Decode) -> DecodeVelocity:
    return lambda latent, medium_latent: decode(latent, medium_latent).velocity


def without_mean(decode: DecodeVelocity) -> DecodeVelocity:
    """The decoder of the velocity less the box means of its components."""

    def decode_pattern(latent: Tensor, medium_latent: Tensor) -> Tensor:
        velocity = decode(latent, medium_latent)
        return velocity - velocity.mean((-3, -2, -1), keepdim=True)

    return decode_pattern


def spread_samples(trajectories: Sequence[LatentTrajectory], most: int) -> list[LatentSample]:
    """At most ``most`` samples, evenly from all states."""
    states = [(trajectory, t) for trajectory in trajectories for t in range(len(trajectory.latents))]
    most = min(most, len(states))
    chosen = [states[(2 * k + 1) * len(states) // (2 * most)] for k in range(most)]
    return [LatentSample(one.latents[t : t + 1], one.medium_latent[None], one.medium) for one, t in chosen]
