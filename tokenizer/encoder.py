"""Field -> latent: a pyramid of residual blocks, 8x coarser per axis, that never convolves at full resolution."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from shodh.fields import Boundary
from tokenizer.layers import BlockStack, BoundaryConv, Downsample, space_to_depth


class Encoder(nn.Module):
    """Maps ``in_channels`` cell or face fields to ``out_channels`` latents, 8x coarser along each axis."""

    def __init__(self, in_channels: int, out_channels: int, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.stem = BoundaryConv(8 * in_channels, fine)
        self.fine = BlockStack(fine, depths[0])
        self.to_middle = Downsample(fine, middle)
        self.middle = BlockStack(middle, depths[1])
        self.to_coarse = Downsample(middle, coarse)
        self.coarse = BlockStack(coarse, depths[2])
        self.out = nn.Conv3d(coarse, out_channels, 1)

    def forward(self, fields: Float[Tensor, "b f x y z"], boundary: Sequence[Boundary]) -> Float[Tensor, "b c i j k"]:
        values = self.fine(self.stem(space_to_depth(fields), boundary), boundary)
        values = self.middle(self.to_middle(values), boundary)
        values = self.coarse(self.to_coarse(values), boundary)
        return self.out(values)
