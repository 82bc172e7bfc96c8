"""Memory for batches, used again once nobody holds it: fresh memory costs a page fault per 4 KB."""

import sys
import threading
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

MOST_KEPT = 12  # arrays of one shape: a batch may have two, and five are about (queued 2, offered, in use, next)


class Buffers:
    """Hands out uninitialised float32 tensors whose memory it takes back when the last tensor on it is gone."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
        self._taking = threading.Lock()

    def take(self, *shape: int) -> Tensor:
        """A tensor on memory that no other tensor, view or array uses."""
        with self._taking:
            kept = self._kept[shape]
            for index in range(len(kept)):
                if sys.getrefcount(kept[index]) == _REFERENCES_WHEN_FREE:
                    return torch.from_numpy(kept[index])
            array = _allocate(shape)
            if len(kept) < MOST_KEPT:
                kept.append(array)
            return torch.from_numpy(array)


def _allocate(shape: tuple[int, ...]) -> np.ndarray:
    """Pinned where there is CUDA, because copies to it are then several times as fast."""
    return torch.empty(shape, pin_memory=torch.cuda.is_available()).numpy()


def _count_references_when_free() -> int:
    """What ``sys.getrefcount`` says of an array that only a list holds; Python's own references differ by version."""
    kept = [np.empty(1)]
    return sys.getrefcount(kept[0])


_REFERENCES_WHEN_FREE = _count_references_when_free()
