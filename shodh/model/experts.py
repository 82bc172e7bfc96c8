"""SwiGLU feed-forward networks: one dense (the shared expert) and many stacked, run on tokens sorted by expert."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional


class SharedExpert(nn.Module):
    """The feed-forward network that every token passes."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, tokens: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        gate, up = self.gate_up(tokens).chunk(2, -1)
        return self.down(functional.silu(gate) * up)


class StackedExperts(nn.Module):
    """All routed experts as stacked matrices; expert i owns slice i of each parameter."""

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(num_experts, width, 2 * hidden) / math.sqrt(width))
        self.down = nn.Parameter(torch.randn(num_experts, hidden, width) / math.sqrt(hidden) * 0.1)

    def forward(self, tokens: Float[Tensor, "n d"], count: Int[Tensor, "e"]) -> Float[Tensor, "n d"]:
        """Outputs for tokens sorted by expert, ``count`` of them for each."""
        gate, up = grouped_product(tokens, self.gate_up, count).chunk(2, -1)
        return grouped_product(functional.silu(gate) * up, self.down, count)


def grouped_product(
    rows: Float[Tensor, "n d"], matrices: Float[Tensor, "e d f"], count: Int[Tensor, "e"]
) -> Float[Tensor, "n f"]:
    """Each run of ``count[i]`` rows times matrix i.

    On CUDA under bf16 autocast one grouped kernel without a host sync; elsewhere a loop, the fastest measured on CPU.
    """
    if rows.is_cuda and torch.is_autocast_enabled("cuda"):
        offsets = count.cumsum(0).to(torch.int32)
        low = torch.get_autocast_dtype("cuda")
        return functional.grouped_mm(rows.to(low), matrices.to(low), offs=offsets)
    runs = rows.split(count.tolist())
    return torch.cat([run @ matrix for run, matrix in zip(runs, matrices, strict=True)])
