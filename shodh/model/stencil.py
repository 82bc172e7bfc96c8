"""Linear experts: what of the next latent state is a linear function of the given ones around a cell."""

from collections.abc import Sequence

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from shodh.fields import Routing

# Of the kernels' own values: neighbours are much alike, so a forecast from 27 of them wants smaller steps than a layer.
GAIN = 0.1


class StencilExperts(nn.Module):
    """3x3x3 convolutions, begun at zero; those of a token's experts forecast its cells, by their shares of its gates.

    A transformer reads tokens through normalised features, which blurs how large they are; convection and waves are
    linear in just that. Neighbours beyond the box are those of the other side where the axis is periodic, else zero.
    Always FP32. Where there are fewer kernels than experts, as many successive experts share each.
    """

    gain: Tensor

    def __init__(self, num_kernels: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor(GAIN))  # training may make it smaller (training/linear_start.py)
        kernels = [torch.zeros(out_channels, in_channels * 27) for _ in range(num_kernels)]
        self.kernels = nn.ParameterList([nn.Parameter(kernel) for kernel in kernels])  # matrices, for Muon

    def forward(
        self,
        fields: Float[Tensor, "b m x y z"],
        periodic: Float[Tensor, "b 3"],
        routing: Routing,
        patch: int,
    ) -> Float[Tensor, "b c x y z"]:
        """The change of every latent cell; ``routing`` is of tokens of ``patch``^3 cells, ``periodic`` is 1 or 0."""
        kernels = self.gain * torch.stack(list(self.kernels))
        return convolve(kernels, fields, periodic, self.share_cells(routing, fields.shape[-3:], patch))

    def share_cells(self, routing: Routing, grid: Sequence[int], patch: int) -> Float[Tensor, "b e x y z"]:
        """How much of each kernel's forecast every cell of a latent grid takes."""
        gate = routing.gate.detach()  # the router is taught by the layers alone: kernels would rather be mixed
        gate = gate / gate.sum(-1, keepdim=True)  # a linear forecast is no better for being made smaller
        share = torch.zeros_like(routing.probability).scatter(-1, routing.expert, gate)
        share = reduce(share, "n (e several) -> n e", "sum", e=len(self.kernels))
        x, y, z = (size // patch for size in grid)
        return repeat(share, "(b x y z) e -> b e (x i) (y j) (z k)", x=x, y=y, z=z, i=patch, j=patch, k=patch)


def convolve(
    kernels: Float[Tensor, "e c u"],
    fields: Float[Tensor, "b m x y z"],
    periodic: Float[Tensor, "b 3"],
    share: Float[Tensor, "b e x y z"],
) -> Float[Tensor, "b c x y z"]:
    """What the kernels make of every cell, each counting by its share there; FP32."""
    with torch.autocast(fields.device.type, enabled=False):
        weight = rearrange(kernels, "e c (m i j k) -> (e c) m i j k", i=3, j=3, k=3)
        every = functional.conv3d(surround(fields.float(), periodic.float()), weight)
        every = rearrange(every, "b (e c) x y z -> b e c x y z", e=len(kernels))
        return torch.einsum("b e c x y z, b e x y z -> b c x y z", every, share)


def neighbourhoods(fields: Float[Tensor, "b m x y z"], periodic: Float[Tensor, "b 3"]) -> Float[Tensor, "n u"]:
    """What a kernel is multiplied with at every cell, as rows, x slowest."""
    around = surround(fields.float(), periodic.float()).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)
    return rearrange(around, "b m x y z i j k -> (b x y z) (m i j k)")


def surround(fields: Float[Tensor, "b m x y z"], periodic: Float[Tensor, "b 3"]) -> Float[Tensor, "b m x+2 y+2 z+2"]:
    """The fields within one layer of neighbours: of the other side along periodic axes, zeros along others."""
    for axis in range(3):
        size, wraps = fields.shape[axis - 3], periodic[:, axis, None, None, None, None]
        lower, upper = fields.narrow(axis - 3, size - 1, 1), fields.narrow(axis - 3, 0, 1)
        fields = torch.cat([wraps * lower, fields, wraps * upper], axis - 3)
    return fields
