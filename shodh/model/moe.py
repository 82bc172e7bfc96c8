"""The mixture-of-experts feed-forward layer: one shared expert plus the best routed expert(s), no token dropped."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from shodh.fields import Routing
from shodh.model.experts import SharedExpert, StackedExperts
from shodh.model.router import SemanticRouter


class MixtureOfExperts(nn.Module):
    """Dropless dispatch: sort tokens by expert, one gather, grouped products, one weighted scatter-add."""

    def __init__(self, router: SemanticRouter, shared: SharedExpert, experts: StackedExperts) -> None:
        super().__init__()
        self.router = router
        self.shared = shared
        self.routed = experts

    def forward(self, tokens: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b n d"], Routing]:
        routing = self.router(tokens)
        flat = rearrange(tokens, "b n d -> (b n) d")
        order = routing.expert.flatten().argsort(stable=True)
        source = order // routing.expert.shape[1]
        count = torch.bincount(routing.expert.flatten(), minlength=routing.probability.shape[1])
        output = self.routed(flat[source], count)
        weighted = output * routing.gate.flatten()[order, None].to(output.dtype)
        mixed = self.shared(flat)
        mixed = mixed.index_add(0, source, weighted.to(mixed.dtype))
        return mixed.reshape(tokens.shape), routing
