"""Convolution blocks that respect each axis's boundary condition and look no further than their kernels reach.

Nothing is normalised over space, so what stands at a position depends on its neighbourhood alone: a field decoded in
tiles equals the field decoded whole.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from shodh.fields import Boundary


def pad_one(values: Tensor, boundary: Sequence[Boundary]) -> Tensor:
    """One cell of padding per side: wrapped at periodic axes, zero at walls, repeated at open ends."""
    for axis in range(3):
        dim = axis - 3
        first, last = values.narrow(dim, 0, 1), values.narrow(dim, -1, 1)
        if boundary[axis] == "periodic":
            ends = last, first
        elif boundary[axis] == "wall":
            ends = torch.zeros_like(first), torch.zeros_like(last)
        else:
            ends = first, last
        values = torch.cat([ends[0], values, ends[1]], dim)
    return values


def space_to_depth(values: Tensor) -> Tensor:
    """Each 2x2x2 cube becomes 8 channels at half the resolution: b c 2x 2y 2z -> b (c 8) x y z."""
    if _has_channels_last(values):
        return rearrange(values, "b c (x i) (y j) (z k) -> b x y z (c i j k)", i=2, j=2, k=2).movedim(-1, 1)
    return rearrange(values, "b c (x i) (y j) (z k) -> b (c i j k) x y z", i=2, j=2, k=2)


def depth_to_space(values: Tensor) -> Tensor:
    """Inverse of ``space_to_depth``."""
    if _has_channels_last(values):
        return rearrange(values, "b (c i j k) x y z -> b (x i) (y j) (z k) c", i=2, j=2, k=2).movedim(-1, 1)
    return rearrange(values, "b (c i j k) x y z -> b c (x i) (y j) (z k)", i=2, j=2, k=2)


def _has_channels_last(values: Tensor) -> bool:
    """Whether the channels of a cell lie side by side in memory, which CUDA's bf16 convolutions are fastest with."""
    return values.is_contiguous(memory_format=torch.channels_last_3d) and not values.is_contiguous()


class ChannelNorm(nn.Module):
    """Each position's features over their root mean square, times a gain per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, values: Float[Tensor, "b w x y z"]) -> Float[Tensor, "b w x y z"]:
        scale = torch.rsqrt(values.float().square().mean(1, keepdim=True) + 1e-4)
        return values * scale.to(values) * self.gain.to(values).reshape(-1, 1, 1, 1)


class Convolution(nn.Module):
    """A convolution whose kernel is kept as a matrix (out, in * size^3), which is what Muon orthogonalises.

    A kernel of 3 is padded by ``pad_one``; one of 1 mixes channels.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int = 3) -> None:
        super().__init__()
        self.shape = (out_channels, in_channels, size, size, size)
        bound = (in_channels * size**3) ** -0.5
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels * size**3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, values: Tensor, boundary: Sequence[Boundary]) -> Tensor:
        padded = pad_one(values, boundary) if self.shape[-1] == 3 else values
        return functional.conv3d(padded, self.weight.reshape(self.shape), self.bias)

    def begin_at_zero(self) -> "Convolution":
        """The same layer with weights of zero: a residual branch that begins as the identity."""
        nn.init.zeros_(self.weight)
        return self


class ResidualBlock(nn.Module):
    """A 3x3x3 convolution mixes neighbours, then a gated layer (SwiGLU) mixes channels; begins as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(width), ChannelNorm(width)
        self.mix = Convolution(width, width).begin_at_zero()
        self.expand = Convolution(width, 4 * width, 1)
        self.contract = Convolution(2 * width, width, 1).begin_at_zero()

    def forward(self, values: Tensor, boundary: Sequence[Boundary]) -> Tensor:
        values = values + self.mix(functional.silu(self.norm1(values)), boundary)
        gate, hidden = self.expand(self.norm2(values), boundary).chunk(2, 1)
        return values + self.contract(functional.silu(gate) * hidden, boundary)


class BlockStack(nn.Module):
    """Residual blocks at one resolution; with ``recompute`` their activations are made again in the backward pass."""

    def __init__(self, width: int, depth: int, recompute: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.recompute = recompute

    def forward(self, values: Tensor, boundary: Sequence[Boundary]) -> Tensor:
        for block in self.blocks:
            if self.recompute and self.training:
                values = checkpoint(block, values, boundary, use_reentrant=False)  # type: ignore[assignment]
            else:
                values = block(values, boundary)
        return values


class Downsample(nn.Module):
    """Half the resolution: a learned mix of each 2x2x2 cube."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.mix = Convolution(8 * in_channels, out_channels, 1)

    def forward(self, values: Tensor, boundary: Sequence[Boundary]) -> Tensor:
        return self.mix(space_to_depth(values), boundary)


class Upsample(nn.Module):
    """Twice the resolution: a learned mix into each 2x2x2 cube."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.mix = Convolution(in_channels, 8 * out_channels, 1)

    def forward(self, values: Tensor, boundary: Sequence[Boundary]) -> Tensor:
        return depth_to_space(self.mix(values, boundary))
