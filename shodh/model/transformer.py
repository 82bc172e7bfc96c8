"""The Top-1 MoE latent transformer: the last latent states and the medium in, the next state out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from shodh.fields import CONDITIONS, NUM_GIVEN, PARAMETERS, Routing
from shodh.model.attention import Attention
from shodh.model.embedding import from_tokens, rotary_angles, to_tokens
from shodh.model.experts import SharedExpert, StackedExperts
from shodh.model.moe import MixtureOfExperts
from shodh.model.router import SemanticRouter
from shodh.model.stencil import StencilExperts, convolve, neighbourhoods


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of the latent transformer; latent and medium channels come from the tokenizer."""

    latent_channels: int = 16
    medium_channels: int = 8
    patch: int = 1
    width: int = 192
    depth: int = 4
    num_heads: int = 6
    num_experts: int = 8
    top_k: int = 1
    hidden: int = 384  # of the shared expert and, unless they have a size of their own, of each routed one
    num_kernels: int | None = None  # linear experts, each of as many successive experts; default: one of each
    told: bool = True  # whether parameters and boundary conditions modulate the tokens; kernels know the latter always
    expert_hidden: int | None = None  # of each routed expert; None: as the shared one
    semantic_width: int = 32
    temperature: float = 0.1
    recompute: bool = False  # activation checkpointing: keep what enters each block, and run it again backward

    def __post_init__(self) -> None:
        for name in (
            "latent_channels",
            "patch",
            "width",
            "depth",
            "num_heads",
            "num_experts",
            "hidden",
            "semantic_width",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1. Raise it.")
        if self.expert_hidden is not None and self.expert_hidden < 1:
            raise ValueError(f"expert_hidden={self.expert_hidden}: must be at least 1. Raise it, or leave it out.")
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(
                f"width={self.width}: each of {self.num_heads} heads needs an even share. Change one of them."
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k}: must lie between 1 and num_experts={self.num_experts}.")
        if self.num_kernels is not None and (self.num_kernels < 1 or self.num_experts % self.num_kernels):
            raise ValueError(f"num_kernels={self.num_kernels}: does not divide num_experts={self.num_experts}.")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: must be positive.")


class Forecast(NamedTuple):
    """The next latent state and what every layer's router decided on the way."""

    latent: Float[Tensor, "b c x y z"]
    routings: tuple[Routing, ...]


class Block(nn.Module):
    """Attention, then the mixture of experts, both behind RMSNorm modulated by the physical parameters."""

    def __init__(self, config: TransformerConfig, expert_group: ProcessGroup | None = None) -> None:
        super().__init__()
        width = config.width
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, config.num_heads)
        self.mixture_norm = nn.RMSNorm(width, eps=1e-6)
        self.mixture = MixtureOfExperts(
            SemanticRouter(width, config.num_experts, config.top_k, config.semantic_width, config.temperature),
            SharedExpert(width, config.hidden),
            StackedExperts(config.num_experts, width, config.expert_hidden or config.hidden, expert_group),
        )
        self.modulation = nn.Linear(width, 4 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, tokens: Float[Tensor, "b n d"], condition: Float[Tensor, "b d"], angles: Float[Tensor, "n a"]
    ) -> tuple[Float[Tensor, "b n d"], Routing]:
        scale1, shift1, scale2, shift2 = rearrange(self.modulation(condition), "b (k d) -> k b 1 d", k=4)
        tokens = tokens + self.attention(self.attention_norm(tokens) * (1 + scale1) + shift1, angles)
        mixed, routing = self.mixture(self.mixture_norm(tokens) * (1 + scale2) + shift2)
        return tokens + mixed, routing


class LatentTransformer(nn.Module):
    """Forecasts the next latent state. Its inputs are physics only: no domain name or index ever enters.

    Changes of slow and of nearly still samples are small beside their states: tokens are made of changes in units of
    their own size, and the logarithms of the sizes join the conditions. The ranks of an ``expert_group`` share out the
    routed experts of every layer: each must then call the model as often as the others.
    """

    correction: Tensor  # what the layers' word counts

    def __init__(self, config: TransformerConfig, expert_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("correction", torch.tensor(1.0))  # training may make it smaller (linear_start.py)
        cells = config.patch**3
        channels = config.latent_channels
        num_inputs = NUM_GIVEN * channels + config.medium_channels
        self.embed = nn.Linear(num_inputs * cells, config.width)
        self.condition = nn.Sequential(
            nn.Linear(len(CONDITIONS) + NUM_GIVEN - 1, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.blocks = nn.ModuleList(Block(config, expert_group) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.out = nn.Linear(config.width, channels * cells)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.stencil = StencilExperts(config.num_kernels or config.num_experts, num_inputs, channels)

    def forward(
        self,
        states: Float[Tensor, "b t c x y z"],
        medium: Float[Tensor, "b m x y z"],
        parameters: Float[Tensor, "b q"],
    ) -> Forecast:
        """The state one snapshot interval after the last of the NUM_GIVEN successive ``states``."""
        x, y, z = states.shape[-3:]
        patch, grid = self.config.patch, (x, y, z)
        current, *changes = backward_differences(states)
        sizes = [root_mean_square(change) for change in changes]
        seen = [current, *(change / size for change, size in zip(changes, sizes, strict=True)), medium]
        tokens = self.embed(to_tokens(torch.cat(seen, 1), patch))
        told = parameters if self.config.told else torch.zeros_like(parameters)
        condition = functional.silu(self.condition(torch.cat([told, *(size.flatten(1).log() for size in sizes)], 1)))
        places = (x // patch, y // patch, z // patch)
        angles = rotary_angles(places, self.config.width // self.config.num_heads, current.device)
        routings = []
        for block in self.blocks:
            tokens, routing = self._pass(block, tokens, condition, angles)
            routings.append(routing)
        change = from_tokens(self.out(self.norm(tokens)), grid, patch).float() * change_scale(current, sizes[0])
        linear = self.stencil(*linear_inputs(states, medium, parameters), routings[-1], patch)
        change = self.correction * change + linear
        return Forecast(current + change.to(current.dtype), tuple(routings))

    def _pass(
        self, block: nn.Module, tokens: Float[Tensor, "b n d"], condition: Float[Tensor, "b d"], angles: Tensor
    ) -> tuple[Float[Tensor, "b n d"], Routing]:
        if not (self.config.recompute and torch.is_grad_enabled()):
            return block(tokens, condition, angles)
        # not stopped early: rows that have set out for another rank are waited for
        return checkpoint(block, tokens, condition, angles, use_reentrant=False, early_stop=False)

    def forecast_linearly(
        self,
        kernels: Float[Tensor, "e c u"],
        states: Float[Tensor, "b t c x y z"],
        medium: Float[Tensor, "b m x y z"],
        parameters: Float[Tensor, "b q"],
        routing: Routing,
    ) -> Float[Tensor, "b c x y z"]:
        """The next latent state by linear experts alone, with other kernels and a routing that is given; FP32."""
        fields, periodic = linear_inputs(states, medium, parameters)
        share = self.stencil.share_cells(routing, states.shape[-3:], self.config.patch)
        return states[:, -1].float() + convolve(kernels, fields, periodic, share)

    def linear_rows(
        self,
        states: Float[Tensor, "b t c x y z"],
        medium: Float[Tensor, "b m x y z"],
        parameters: Float[Tensor, "b q"],
    ) -> Float[Tensor, "n u"]:
        """What the linear expert of every cell is multiplied with, x slowest."""
        return neighbourhoods(*linear_inputs(states, medium, parameters))

    def linear_shares(self, routing: Routing, grid: Sequence[int]) -> Float[Tensor, "n e"]:
        """How much of every linear expert's forecast each of those cells takes."""
        return rearrange(self.stencil.share_cells(routing, grid, self.config.patch), "b e x y z -> (b x y z) e")


def linear_inputs(
    states: Float[Tensor, "b t c x y z"], medium: Float[Tensor, "b m x y z"], parameters: Float[Tensor, "b q"]
) -> tuple[Float[Tensor, "b n x y z"], Float[Tensor, "b 3"]]:
    """What linear experts see: fields, and 1 for each axis that is periodic, as the conditions tell, else 0."""
    return torch.cat([*backward_differences(states), medium], 1), parameters[:, len(PARAMETERS) :]


def backward_differences(states: Float[Tensor, "b t c x y z"]) -> list[Float[Tensor, "b c x y z"]]:
    """The last state and its differences of order 1 to t - 1: as much as the states themselves say, but less alike."""
    differences = [states[:, -1]]
    while states.shape[1] > 1:
        states = states.diff(dim=1)
        differences.append(states[:, -1])
    return differences


def change_scale(current: Float[Tensor, "b c x y z"], last: Float[Tensor, "b 1 1 1 1"]) -> Float[Tensor, "b 1 1 1 1"]:
    """How much a sample may be expected to change: by as much as it just did, ``last``, and by a tenth of what it is.

    Between a flow's turning points and its full swing changes differ tenfold, which normalised features do not show.
    """
    return (last**2 + 0.01 * root_mean_square(current) ** 2).sqrt()


def root_mean_square(values: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b 1 1 1 1"]:
    """Of each sample, FP32; at least a thousandth, whitened latents being of order 1."""
    return (reduce(values.float() ** 2, "b c x y z -> b 1 1 1 1", "mean") + 1e-6).sqrt()


def find_stacks(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all routed experts, one slice of each for each expert that this rank holds."""
    stacks = [module for module in model.modules() if isinstance(module, StackedExperts)]
    return [parameter for stack in stacks for parameter in stack.parameters()]


def count_parameters(model: LatentTransformer) -> tuple[int, int]:
    """Parameters in all, and those that one token passes; all kernels are applied to all cells before one is chosen."""
    dense = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in find_stacks(model))
    routed = sum(p[0].numel() for p in find_stacks(model))
    return dense + routed * model.config.num_experts, dense + routed * model.config.top_k
