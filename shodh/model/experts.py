"""The networks of a mixture: the shared expert, and all routed ones stacked, or those of them that this rank holds."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from shodh.model.swiglu import Dispatch, apply_networks


class SharedExpert(nn.Module):
    """The feed-forward network that every token passes."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, tokens: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        if tokens.is_cuda and torch.is_autocast_enabled("cuda"):
            gate, up = self.gate_up(tokens).chunk(2, -1)
            return self.down(functional.silu(gate) * up)
        dispatch = Dispatch(None, None, torch.tensor([len(tokens)]))
        return apply_networks(tokens, dispatch, self.gate_up.weight.T[None], self.down.weight.T[None])


class StackedExperts(nn.Module):
    """Routed experts as stacked matrices; slice i of each parameter is expert i's.

    With a ``group`` of ranks each of them holds an equal, successive share of the experts. All are drawn on every rank,
    so that they begin alike however many ranks there are.
    """

    def __init__(self, num_experts: int, width: int, hidden: int, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.num_experts, self.group = num_experts, group
        gate_up = torch.randn(num_experts, width, 2 * hidden) / math.sqrt(width)
        down = torch.randn(num_experts, hidden, width) / math.sqrt(hidden) * 0.1
        self.gate_up, self.down = self._share(gate_up), self._share(down)

    def forward(self, rows: Float[Tensor, "n d"], dispatch: Dispatch) -> Float[Tensor, "n d"]:
        """The weighted sum of what each row's experts make of it; only experts that this rank holds."""
        return apply_networks(rows, dispatch, self.gate_up, self.down)

    def _share(self, stack: Tensor) -> nn.Parameter:
        if self.group is None:
            return nn.Parameter(stack)
        own = own_experts(self.num_experts, self.group.size(), self.group.rank())
        parameter = nn.Parameter(stack[own].clone())
        parameter.expert_group = self.group  # pyright: ignore[reportAttributeAccessIssue] - read by training
        return parameter


def own_experts(num_experts: int, num_ranks: int, rank: int) -> slice:
    """Those that one of several ranks holds; raises ValueError where they cannot be shared out evenly."""
    if num_experts % num_ranks:
        raise ValueError(
            f"num_experts={num_experts}: {num_ranks} ranks cannot share them out evenly. "
            "Choose a multiple, or another engine.expert_parallel."
        )
    share = num_experts // num_ranks
    return slice(rank * share, (rank + 1) * share)
