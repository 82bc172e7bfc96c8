"""SwiGLU networks applied to runs of rows: by one grouped kernel on CUDA, chunk by chunk in the cache on CPU.

A network is w_down (silu(w_gate x) * w_up x), ``gate_up`` holding w_gate beside w_up: Shazeer, GLU Variants Improve
Transformer (2020), eq. 6.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Rows that a CPU takes through a network at once: what lies between its products then stays in the cache.
CHUNK = 512


class Dispatch(NamedTuple):
    """Which rows each network takes, sorted by network: ``source[end[i - 1]:end[i]]`` go through network i."""

    # A row may go through several networks, whose outputs are added. None: each row through one, in their order.
    source: Int[Tensor, "m"] | None
    weight: Float[Tensor, "m"] | None  # what each output counts; None: 1
    end: Int[Tensor, "e"]


def apply_networks(
    rows: Float[Tensor, "n d"],
    dispatch: Dispatch,
    gate_up: Float[Tensor, "e d g"],
    down: Float[Tensor, "e h d"],
) -> Float[Tensor, "n d"]:
    """The weighted sum, for every row, of its networks' outputs; 0 for a row that goes through none.

    Under autocast all products are of its precision. In bfloat16 on CUDA the host waits for nothing.
    """
    if torch.is_autocast_enabled(rows.device.type):
        low = torch.get_autocast_dtype(rows.device.type)
        rows, gate_up, down = rows.to(low), gate_up.to(low), down.to(low)
    num_rows = len(rows) if dispatch.source is None else len(dispatch.source)
    if has_grouped_kernel(rows) and num_rows > 0:
        return _apply_grouped(rows, dispatch, gate_up, down)
    chunks = list(_cut(dispatch.end.tolist(), num_rows if rows.is_cuda else CHUNK))
    return _NetworksByChunk.apply(
        rows, dispatch.weight, gate_up, down, dispatch.source, chunks, torch.is_grad_enabled()
    )


def has_grouped_kernel(rows: Tensor) -> bool:
    """Whether one kernel serves all networks here and is fast: torch has it for bfloat16, and elsewhere as a loop."""
    return rows.is_cuda and rows.dtype == torch.bfloat16


def _apply_grouped(rows: Tensor, dispatch: Dispatch, gate_up: Tensor, down: Tensor) -> Tensor:
    end = dispatch.end.to(torch.int32)
    gate, up = functional.grouped_mm(_sort(rows, dispatch.source), gate_up, offs=end).chunk(2, -1)
    output = functional.grouped_mm(functional.silu(gate) * up, down, offs=end)
    if dispatch.weight is not None:
        output = output * dispatch.weight[:, None].to(output.dtype)
    return _unsort(output, dispatch.source, len(rows))


class _Chunk(NamedTuple):
    """Some successive rows of the sorted ones, all for one network."""

    network: int
    rows: slice
    is_first: bool  # of the network's


class _NetworksByChunk(torch.autograd.Function):
    """``apply_networks`` with its gradient, a chunk of rows at a time.

    Of hidden features this keeps the products with ``gate_up``, two numbers for each where autograd keeps four, and
    does the rest again while it is in the cache; the gradients of ``gate_up`` and ``down`` are added up in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | None,
        gate_up: Tensor,
        down: Tensor,
        source: Tensor | None,
        chunks: Sequence[_Chunk],
        keep: bool,
    ) -> Tensor:
        num_rows, rows = len(rows), _sort(rows, source)
        output, hidden = torch.empty_like(rows), rows.new_empty(_longest(chunks), down.shape[1])
        products = []  # not one array for all: memory of that size is mapped anew each time, page by page
        for network, chunk, _ in chunks:
            product = rows[chunk] @ gate_up[network]
            gate, up = product.chunk(2, -1)
            gated = torch.ops.aten.silu.out(gate, out=hidden[: len(product)]).mul_(up)
            torch.mm(gated, down[network], out=output[chunk])
            if weight is not None:
                output[chunk].mul_(weight[chunk, None])
            if keep:
                products.append(product)
        ctx.save_for_backward(rows if keep else None, weight, gate_up, down, source, *products)
        ctx.chunks, ctx.num_rows = chunks, num_rows
        return _unsort(output, source, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, gate_up, down, source, *products = ctx.saved_tensors
        slopes, of_rows = _sort(slopes, source), torch.empty_like(rows)
        of_weight = None if weight is None else torch.zeros_like(weight)
        of_gate_up, of_down = (
            _gradient_like(matrices, ctx.chunks) if needed else None
            for matrices, needed in zip((gate_up, down), ctx.needs_input_grad[2:4], strict=True)
        )
        longest = _longest(ctx.chunks)
        buffers, of_products = rows.new_empty(3, longest, down.shape[1]), rows.new_empty(longest, gate_up.shape[2])
        for (network, chunk, is_first), product in zip(ctx.chunks, products, strict=True):
            gate, up = product.chunk(2, -1)
            gated, hidden, of_hidden = buffers[:, : len(product)]
            torch.mul(torch.ops.aten.silu.out(gate, out=gated), up, out=hidden)
            slope = slopes[chunk]
            torch.mm(slope, down[network].T, out=of_hidden)
            if weight is not None and of_weight is not None:
                of_weight[chunk] = torch.linalg.vecdot(hidden, of_hidden)
                of_hidden.mul_(weight[chunk, None])
                slope = slope * weight[chunk, None].to(slope.dtype)
            if of_down is not None:
                of_down[network].addmm_(hidden.T, slope, beta=not is_first)
            of_product = of_products[: len(product)]
            of_gate, of_up = of_product.chunk(2, -1)
            torch.mul(of_hidden, gated, out=of_up)
            torch.ops.aten.silu_backward.grad_input(of_hidden.mul_(up), gate, grad_input=of_gate)
            if of_gate_up is not None:
                of_gate_up[network].addmm_(rows[chunk].T, of_product, beta=not is_first)
            torch.mm(of_product, gate_up[network].T, out=of_rows[chunk])
        return _unsort(of_rows, source, ctx.num_rows), of_weight, of_gate_up, of_down, None, None, None


def _cut(end: Sequence[int], most: int) -> Iterator[_Chunk]:
    """The runs of all networks, in chunks of at most so many rows."""
    for network, (first, last) in enumerate(zip([0, *end[:-1]], end, strict=True)):
        for start in range(first, last, most):
            yield _Chunk(network, slice(start, min(start + most, last)), start == first)


def _longest(chunks: Sequence[_Chunk]) -> int:
    return max((chunk.rows.stop - chunk.rows.start for chunk in chunks), default=0)


def _sort(rows: Tensor, source: Tensor | None) -> Tensor:
    return rows if source is None else rows.index_select(0, source)


def _unsort(rows: Tensor, source: Tensor | None, num_rows: int) -> Tensor:
    return rows if source is None else rows.new_zeros(num_rows, rows.shape[1]).index_add_(0, source, rows)


def _gradient_like(matrices: Tensor, chunks: Sequence[_Chunk]) -> Tensor:
    """Memory for a gradient: 0 for networks without rows, for others what their first chunk is to overwrite."""
    gradient = torch.empty_like(matrices, memory_format=torch.contiguous_format)
    visited = {chunk.network for chunk in chunks}
    for network in range(len(matrices)):
        if network not in visited:
            gradient[network].zero_()
    return gradient
