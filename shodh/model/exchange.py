"""Expert parallelism: rows travel to the ranks that hold their experts and back, each way once, while the host goes on.

Autograd's engine runs backward what ran last forward. So between a journey's start and its end there lies, in both
passes, whatever was computed meanwhile.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, all_to_all_single

from shodh.model.swiglu import Dispatch


class Journey:
    """One all-to-all under way; ``sent`` and ``received`` are how many rows go to and come from each of the ranks."""

    def __init__(self, sent: list[int], received: list[int], group: ProcessGroup) -> None:
        self.sent, self.received, self.group = sent, received, group
        self._under_way: tuple[Any, Tensor, Tensor] | None = None  # all must live until the rows have arrived

    def start(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Send rows sorted by rank; what this returns is for ``end`` alone."""
        return _Start.apply(rows, self)

    def end(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
        """The rows that the other ranks sent, sorted by rank."""
        return _End.apply(rows, self)

    def depart(self, rows: Tensor, sent: list[int], received: list[int]) -> None:
        assert self._under_way is None, "one journey at a time"
        rows, arriving = rows.contiguous(), rows.new_empty(sum(received), rows.shape[1])
        work = all_to_all_single(arriving, rows, received, sent, group=self.group, async_op=True)
        self._under_way = work, rows, arriving

    def arrive(self) -> Tensor:
        assert self._under_way is not None, "what arrives has departed"
        work, _, arriving = self._under_way
        work.wait()
        self._under_way = None
        return arriving


class _Start(torch.autograd.Function):
    """Departs forward, arrives backward. Between it and ``_End`` zeros stand in for the rows that travel."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        journey.depart(rows, journey.sent, journey.received)
        return rows.new_zeros(1).expand(rows.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.arrive(), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: Journey) -> Tensor:
        ctx.journey, ctx.rows = journey, rows.shape
        return journey.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None]:
        ctx.journey.depart(slopes, ctx.journey.received, ctx.journey.sent)
        return slopes.new_zeros(1).expand(ctx.rows), None


class Exchange(NamedTuple):
    """Both ways of the rows of one layer, and how this rank's experts find those that came."""

    there: Journey
    back: Journey
    dispatch: Dispatch


def plan_exchange(end: Int[Tensor, "e"], group: ProcessGroup) -> Exchange:
    """Agree with the group's ranks on how many rows travel; the host waits for that.

    ``end`` says where each expert's rows end among this rank's, sorted by expert.
    """
    count = end.diff(prepend=end.new_zeros(1))
    sent = rearrange(count, "(rank e) -> rank e", rank=group.size())
    received = torch.empty_like(sent)
    all_to_all_single(received, sent.contiguous(), group=group)
    expert = torch.arange(sent.shape[1], device=end.device).repeat(group.size())
    order = expert.repeat_interleave(received.flatten()).argsort(stable=True)
    dispatch = Dispatch(order, None, received.sum(0).cumsum(0))
    outward, inward = sent.sum(1).tolist(), received.sum(1).tolist()
    return Exchange(Journey(outward, inward, group), Journey(inward, outward, group), dispatch)
