"""Latent -> fine features at half the field's resolution, from which the heads read potentials and pressure."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from shodh.fields import Boundary
from tokenizer.layers import BlockStack, BoundaryConv, Upsample


class Decoder(nn.Module):
    """Mirror of the encoder up to half resolution; the coarse features are returned too, for the mean flow."""

    def __init__(self, in_channels: int, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.stem = BoundaryConv(in_channels, coarse)
        self.coarse = BlockStack(coarse, depths[2])
        self.to_middle = Upsample(coarse, middle)
        self.middle = BlockStack(middle, depths[1])
        self.to_fine = Upsample(middle, fine)
        self.fine = BlockStack(fine, depths[0])

    def forward(
        self, latent: Float[Tensor, "b c i j k"], boundary: Sequence[Boundary]
    ) -> tuple[Float[Tensor, "b d i j k"], Float[Tensor, "b w x y z"]]:
        coarse = self.coarse(self.stem(latent, boundary), boundary)
        values = self.middle(self.to_middle(coarse), boundary)
        return coarse, self.fine(self.to_fine(values), boundary)
