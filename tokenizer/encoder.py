"""Field -> latent: a pyramid of residual blocks, 8x coarser per axis, that never convolves at full resolution."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from shodh.fields import Boundary
from tokenizer.layers import BlockStack, Convolution, Downsample, space_to_depth


class Encoder(nn.Module):
    """Maps ``in_channels`` cell or face fields to ``out_channels`` latents, 8x coarser along each axis."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], depths: Sequence[int], recompute: bool = False
    ) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.stem = Convolution(8 * in_channels, fine)
        self.fine = BlockStack(fine, depths[0], recompute)
        self.to_middle = Downsample(fine, middle)
        self.middle = BlockStack(middle, depths[1], recompute)
        self.to_coarse = Downsample(middle, coarse)
        self.coarse = BlockStack(coarse, depths[2], recompute)
        self.out = Convolution(coarse, out_channels)

    def forward(self, fields: Float[Tensor, "b f x y z"], boundary: Sequence[Boundary]) -> Float[Tensor, "b c i j k"]:
        return self.finish(self.reduce_to_coarse(self.reduce_to_middle(fields, boundary), boundary), boundary)

    def reduce_to_middle(self, fields: Float[Tensor, "b f x y z"], boundary: Sequence[Boundary]) -> Tensor:
        """What the blocks at 1/4 take, from the fields."""
        return self.to_middle(self.fine(self.stem(space_to_depth(fields), boundary), boundary), boundary)

    def reduce_to_coarse(self, values: Tensor, boundary: Sequence[Boundary]) -> Tensor:
        """What the blocks at 1/8 take, from what those at 1/4 take."""
        return self.to_coarse(self.middle(values, boundary), boundary)

    def finish(self, values: Tensor, boundary: Sequence[Boundary]) -> Float[Tensor, "b c i j k"]:
        """Latents, from what the blocks at 1/8 take."""
        return self.out(self.coarse(values, boundary), boundary)
