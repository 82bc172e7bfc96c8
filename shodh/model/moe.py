"""The mixture-of-experts feed-forward layer: one shared expert plus the best routed expert(s), no token dropped."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from shodh.fields import Routing
from shodh.model.exchange import plan_exchange
from shodh.model.experts import SharedExpert, StackedExperts
from shodh.model.router import SemanticRouter
from shodh.model.swiglu import Dispatch


class MixtureOfExperts(nn.Module):
    """Dropless dispatch: sort tokens by expert, one gather, grouped products, one weighted scatter-add.

    Where ranks share out the experts, rows travel while the shared expert works: half of it on their way there, half on
    their way back.
    """

    def __init__(self, router: SemanticRouter, shared: SharedExpert, experts: StackedExperts) -> None:
        super().__init__()
        self.router = router
        self.shared = shared
        self.routed = experts

    def forward(self, tokens: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b n d"], Routing]:
        routing = self.router(tokens)
        flat = rearrange(tokens, "b n d -> (b n) d")
        dispatch = sort_by_expert(routing)
        if self.routed.group is None:
            mixed = self.shared(flat) + self.routed(flat, dispatch)
        else:
            mixed = self._mix_across_ranks(flat, dispatch)
        return mixed.reshape(tokens.shape), routing

    def _mix_across_ranks(self, flat: Float[Tensor, "n d"], dispatch: Dispatch) -> Float[Tensor, "n d"]:
        source, gate, end = dispatch
        assert self.routed.group is not None and source is not None and gate is not None
        there, back, arrived = plan_exchange(end, self.routed.group)
        low = flat
        if torch.is_autocast_enabled(flat.device.type):
            low = flat.to(torch.get_autocast_dtype(flat.device.type))
        first, last = flat.tensor_split(2)
        travelling = there.start(low.index_select(0, source))
        shared = [self.shared(first)]
        travelling = back.start(self.routed(there.end(travelling), arrived))
        shared.append(self.shared(last))
        output = back.end(travelling)
        weighted = output * gate[:, None].to(output.dtype)
        mixed = torch.cat(shared)
        return mixed.index_add(0, source, weighted.to(mixed.dtype))


def sort_by_expert(routing: Routing) -> Dispatch:
    """Tokens in the order of their experts, each weighed by its gate."""
    expert, order = routing.expert.flatten().sort(stable=True)
    every = torch.arange(routing.probability.shape[1], device=expert.device)
    end = torch.searchsorted(expert, every, right=True)
    return Dispatch(order // routing.expert.shape[1], routing.gate.flatten()[order], end)
