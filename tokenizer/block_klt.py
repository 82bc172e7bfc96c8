"""The linear baseline that a tokenizer has to beat: principal components of 8x8x8 blocks of velocity."""

from collections.abc import Iterable, Mapping

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

BLOCK = 8


class BlockKLT:
    """Karhunen-Loeve transform of blocks, one basis for all domains: the best linear code of a block by itself."""

    def __init__(self, mean: Float[Tensor, "v"], basis: Float[Tensor, "v c"]) -> None:
        self.mean, self.basis = mean, basis

    @staticmethod
    def fit(velocities: Iterable[Float[Tensor, "b 3 x y z"]], num_values: Mapping[str, int]) -> dict[str, "BlockKLT"]:
        """One code per entry of ``num_values``, fitted to normalised training fields (equally many of each domain)."""
        size = 3 * BLOCK**3
        moment, total, count = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), 0
        for velocity in velocities:
            blocks = to_blocks(velocity).cpu()
            moment += blocks.T @ blocks  # one snapshot in its own precision, their sum in FP64
            total += blocks.sum(0, dtype=torch.float64)
            count += len(blocks)
        mean = total / count
        _, vectors = torch.linalg.eigh(moment / count - torch.outer(mean, mean))
        return {name: BlockKLT(mean, vectors[:, -num:]) for name, num in num_values.items()}  # eigenvalues ascend

    def reconstruct(self, velocity: Float[Tensor, "b 3 x y z"]) -> Float[Tensor, "b 3 x y z"]:
        """The field after keeping ``num_values`` coefficients of each block."""
        blocks = to_blocks(velocity).double().cpu() - self.mean
        coded = (blocks @ self.basis) @ self.basis.T + self.mean
        x, y, z = (n // BLOCK for n in velocity.shape[-3:])
        return rearrange(
            coded, "(b x y z) (f i j k) -> b f (x i) (y j) (z k)", x=x, y=y, z=z, f=3, i=BLOCK, j=BLOCK, k=BLOCK
        ).to(velocity)


def to_blocks(velocity: Float[Tensor, "b 3 x y z"]) -> Float[Tensor, "s v"]:
    """Non-overlapping blocks as rows of 1536 values."""
    return rearrange(velocity, "b f (x i) (y j) (z k) -> (b x y z) (f i j k)", i=BLOCK, j=BLOCK, k=BLOCK)
