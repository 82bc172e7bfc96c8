"""Operations of products as PyTorch sees them, all of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]


@contextmanager
def counting_operations() -> Iterator[FlopCounterMode]:
    """Count what runs within; attention is taken apart, because the CPU's fused one is not seen."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _count_added_product})
    with counter, sdpa_kernel(SDPBackend.MATH):
        yield counter


def _count_added_product(total: Shape, left: Shape, right: Shape, out_shape: Any = None, **choices: Any) -> int:
    """Of shapes; PyTorch's counter leaves out products that are added in place."""
    return 2 * left[0] * left[1] * right[1]
