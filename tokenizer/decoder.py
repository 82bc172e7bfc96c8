"""Latent -> features at 1/8, 1/4 and 1/2 of the field's resolution, from which the head reads potentials."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from shodh.fields import Boundary
from tokenizer.layers import BlockStack, Convolution, Upsample


class Decoder(nn.Module):
    """Mirror of the encoder up to half resolution."""

    def __init__(self, in_channels: int, widths: Sequence[int], depths: Sequence[int], recompute: bool = False) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.stem = Convolution(in_channels, coarse)
        self.coarse = BlockStack(coarse, depths[2], recompute)
        self.to_middle = Upsample(coarse, middle)
        self.middle = BlockStack(middle, depths[1], recompute)
        self.to_fine = Upsample(middle, fine)
        self.fine = BlockStack(fine, depths[0], recompute)

    def forward(
        self, latent: Float[Tensor, "b c i j k"], boundary: Sequence[Boundary]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features at the three resolutions, coarsest first."""
        coarse = self.begin(latent, boundary)
        middle = self.refine_to_middle(coarse, boundary)
        return coarse, middle, self.refine_to_fine(middle, boundary)

    def begin(self, latent: Float[Tensor, "b c i j k"], boundary: Sequence[Boundary]) -> Tensor:
        """Features at 1/8, from latents."""
        return self.coarse(self.stem(latent, boundary), boundary)

    def refine_to_middle(self, coarse: Tensor, boundary: Sequence[Boundary]) -> Tensor:
        """Features at 1/4 from those at 1/8."""
        return self.middle(self.to_middle(coarse, boundary), boundary)

    def refine_to_fine(self, middle: Tensor, boundary: Sequence[Boundary]) -> Tensor:
        """Features at 1/2 from those at 1/4."""
        return self.fine(self.to_fine(middle, boundary), boundary)
