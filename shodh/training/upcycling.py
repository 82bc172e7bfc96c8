"""Sparse upcycling within one training: routed experts are one network at first, and part at a step.

An expert learns from its own tokens alone, and what several physics share it learns more slowly than a dense network of
its size does. Komatsuzaki et al., Sparse Upcycling (2022), begin experts as copies of a trained dense network; here one
training holds both, and routers learn meanwhile whom to send where.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from shodh.training.engine import expert_group_of


class TrainAsOne:
    """Hook that keeps experts alike for ``num_steps`` steps: begun alike, each gets the mean of all gradients.

    To be made before the engine, which takes the initial values from here, but of parameters where they are trained;
    the mean is of what autograd gives a parameter, so ranks, accumulation and ZeRO come after it. Where ranks share out
    the experts it is of all of theirs. Does nothing with 0 steps.
    """

    def __init__(self, stacks: Sequence[Float[nn.Parameter, "e _ _"]], num_steps: int) -> None:
        self.num_steps, self.as_one = num_steps, num_steps > 0
        if self.as_one:
            for stack in stacks:
                group = expert_group_of(stack)
                with torch.no_grad():
                    first = stack[:1].clone()
                    if group is not None:
                        dist.broadcast(first, group=group, group_src=0)
                    stack.copy_(first.expand_as(stack))
                stack.register_hook(partial(self._share, group))

    def begin_step(self, step: int) -> None:
        self.as_one = step < self.num_steps

    def _share(self, group: dist.ProcessGroup | None, gradient: Tensor) -> Tensor:
        if not self.as_one:
            return gradient
        mean = gradient.mean(0, keepdim=True)
        if group is not None:
            dist.all_reduce(mean, group=group)
            mean /= group.size()
        return mean.expand_as(gradient).contiguous()
