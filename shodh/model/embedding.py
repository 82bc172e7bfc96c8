"""Latents to tokens and back, and where tokens stand: patches and 3-D rotary angles."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def to_tokens(latent: Float[Tensor, "b c x y z"], patch: int) -> Float[Tensor, "b n v"]:
    """Cubes of patch^3 latent cells as rows, x slowest.

    Raises ValueError where ``patch`` does not divide the latent grid.
    """
    if any(size % patch for size in latent.shape[-3:]):
        raise ValueError(
            f"patch={patch}: does not divide the latent grid {tuple(latent.shape[-3:])}. Choose one that does."
        )
    return rearrange(latent, "b c (x i) (y j) (z k) -> b (x y z) (c i j k)", i=patch, j=patch, k=patch)


def from_tokens(tokens: Float[Tensor, "b n v"], grid: tuple[int, int, int], patch: int) -> Float[Tensor, "b c x y z"]:
    """Inverse of ``to_tokens`` for a latent grid of shape ``grid``."""
    x, y, z = (size // patch for size in grid)
    return rearrange(tokens, "b (x y z) (c i j k) -> b c (x i) (y j) (z k)", x=x, y=y, z=z, i=patch, j=patch, k=patch)


def rotary_angles(grid: tuple[int, int, int], head_width: int, device: torch.device) -> Float[Tensor, "n a"]:
    """Rotation angles per token: a third of the channel pairs turns with each of x, y, z.

    Frequencies fall geometrically from 1 to 1/100 radians a token: Su et al., RoFormer (2021), applied per axis.
    """
    pairs = head_width // 2
    per_axis = [pairs // 3 + (1 if axis < pairs % 3 else 0) for axis in range(3)]
    positions = torch.cartesian_prod(*(torch.arange(n, device=device, dtype=torch.float32) for n in grid))
    angles = [
        positions[:, axis : axis + 1] * 100.0 ** -(torch.arange(count, device=device) / max(count, 1))
        for axis, count in enumerate(per_axis)
    ]
    return torch.cat(angles, 1)


def rotate(values: Float[Tensor, "b h n d"], angles: Float[Tensor, "n a"]) -> Float[Tensor, "b h n d"]:
    """Channel pairs of each head turned by the token's angles."""
    first, second = values.chunk(2, -1)
    cos, sin = angles.cos().to(values.dtype), angles.sin().to(values.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
