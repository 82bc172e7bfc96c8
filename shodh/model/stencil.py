"""Linear experts: what of the next latent state is a linear function of the given ones around a cell."""

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from shodh.fields import Routing

# Of the kernels' own values: neighbours are much alike, so a forecast from 27 of them wants smaller steps than a layer.
GAIN = 0.1


class StencilExperts(nn.Module):
    """3x3x3 convolutions, begun at zero; those of a token's experts, weighted by their gates, forecast its cells.

    A transformer reads tokens through normalised features, which blurs how large they are; convection and waves are
    linear in just that. Neighbours beyond the box are those of the other side where the axis is periodic, else zero.
    Always FP32. Where there are fewer kernels than experts, as many successive experts share each.
    """

    def __init__(self, num_kernels: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
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
        with torch.autocast(fields.device.type, enabled=False):
            kernel = GAIN * rearrange(torch.stack(list(self.kernels)), "e c (m i j k) -> (e c) m i j k", i=3, j=3, k=3)
            every = functional.conv3d(surround(fields.float(), periodic.float()), kernel)
            gate = routing.gate.detach()  # the router is taught by the layers alone: kernels would rather be mixed
            share = torch.zeros_like(routing.probability).scatter(-1, routing.expert, gate)
            share = reduce(share, "n (e several) -> n e", "sum", e=len(self.kernels))
            x, y, z = (size // patch for size in fields.shape[-3:])
            share = repeat(share, "(b x y z) e -> b e (x i) (y j) (z k)", x=x, y=y, z=z, i=patch, j=patch, k=patch)
            every = rearrange(every, "b (e c) x y z -> b e c x y z", e=len(self.kernels))
            return torch.einsum("b e c x y z, b e x y z -> b c x y z", every, share)


def surround(fields: Float[Tensor, "b m x y z"], periodic: Float[Tensor, "b 3"]) -> Float[Tensor, "b m x+2 y+2 z+2"]:
    """The fields within one layer of neighbours: of the other side along periodic axes, zeros along others."""
    for axis in range(3):
        size, wraps = fields.shape[axis - 3], periodic[:, axis, None, None, None, None]
        lower, upper = fields.narrow(axis - 3, size - 1, 1), fields.narrow(axis - 3, 0, 1)
        fields = torch.cat([wraps * lower, fields, wraps * upper], axis - 3)
    return fields
