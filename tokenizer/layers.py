"""Convolution blocks that respect each axis's boundary condition."""

from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional

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
    return rearrange(values, "b c (x i) (y j) (z k) -> b (c i j k) x y z", i=2, j=2, k=2)


def depth_to_space(values: Tensor) -> Tensor:
    """Inverse of ``space_to_depth``."""
    return rearrange(values, "b (c i j k) x y z -> b c (x i) (y j) (z k)", i=2, j=2, k=2)


class BoundaryConv(nn.Module):
    """A 3x3x3 convolution padded by ``pad_one``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3)

    def forward(self, values: Tensor, boundary: Sequence[Boundary]) -> Tensor:
        return self.conv(pad_one(values, boundary))


class ResidualBlock(nn.Module):
    """Two normalised convolutions added to their input; begins as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width)
        self.conv1 = BoundaryConv(width, width)
        self.norm2 = nn.GroupNorm(8, width)
        self.conv2 = BoundaryConv(width, width)
        nn.init.zeros_(self.conv2.conv.weight)

    def forward(self, values: Tensor, boundary: Sequence[Boundary]) -> Tensor:
        hidden = self.conv1(functional.silu(self.norm1(values)), boundary)
        return values + self.conv2(functional.silu(self.norm2(hidden)), boundary)


class Downsample(nn.Module):
    """Half the resolution: a learned mix of each 2x2x2 cube plus its parameter-free channel average.

    The shortcut follows Chen et al., Deep Compression Autoencoder (2024), section 3.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        assert 8 * in_channels % out_channels == 0, f"8*{in_channels} channels do not average into {out_channels}"
        self.out_channels = out_channels
        self.mix = nn.Conv3d(8 * in_channels, out_channels, 1)

    def forward(self, values: Tensor) -> Tensor:
        cubes = space_to_depth(values)
        return self.mix(cubes) + reduce(cubes, "b (c g) x y z -> b c x y z", "mean", c=self.out_channels)


class Upsample(nn.Module):
    """Twice the resolution: a learned mix into each 2x2x2 cube plus parameter-free channel repetition."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        assert 8 * out_channels % in_channels == 0, f"{in_channels} channels do not repeat into 8*{out_channels}"
        self.repeats = 8 * out_channels // in_channels
        self.mix = nn.Conv3d(in_channels, 8 * out_channels, 1)

    def forward(self, values: Tensor) -> Tensor:
        return depth_to_space(self.mix(values) + values.repeat_interleave(self.repeats, dim=1))


class BlockStack(nn.Module):
    """Residual blocks at one resolution."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))

    def forward(self, values: Tensor, boundary: Sequence[Boundary]) -> Tensor:
        for block in self.blocks:
            values = block(values, boundary)
        return values
