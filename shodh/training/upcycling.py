"""Sparse upcycling within one training: routed experts are one network at first, and part at a step.

An expert learns from its own tokens alone, and what several physics share it learns more slowly than a dense network of
its size does. Komatsuzaki et al., Sparse Upcycling (2022), begin experts as copies of a trained dense network; here one
training holds both, and routers learn meanwhile whom to send where.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class TrainAsOne:
    """Hook that keeps experts alike for ``num_steps`` steps: begun alike, each gets the mean of all gradients.

    To be made before the engine, which takes the initial values from here; the mean is of what autograd gives a
    parameter, so ranks, accumulation and ZeRO come after it. Does nothing with 0 steps.
    """

    def __init__(self, stacks: Sequence[Float[nn.Parameter, "e _ _"]], num_steps: int) -> None:
        self.num_steps, self.as_one = num_steps, num_steps > 0
        if self.as_one:
            for stack in stacks:
                with torch.no_grad():
                    stack.copy_(stack[:1].clone().expand_as(stack))
                stack.register_hook(self._share)

    def begin_step(self, step: int) -> None:
        self.as_one = step < self.num_steps

    def _share(self, gradient: Tensor) -> Tensor:
        return gradient.mean(0, keepdim=True).expand_as(gradient).contiguous() if self.as_one else gradient
