"""How much memory the tokenizer will take, found by a dry run that computes nothing.

The same code runs on fake tensors, which have shapes and no values, while every allocation and release is counted. So
the forecast follows the network, tiled or not, without a formula to keep in step.
"""

import functools
import math
import weakref
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shodh.fields import DomainSpec, FieldBatch, Grid
from tokenizer.autoencoder import DOWNSAMPLING, Autoencoder, AutoencoderConfig
from tokenizer.helmholtz_head import face_measure
from tokenizer.objective import ReconstructionConfig, reconstruction_loss
from tokenizer.tiling import Tiles, decode_fields_tiled, encode_tiled

Task = Literal["encode", "decode", "train"]
HEAP_BYTES = 128_000_000  # that the allocator of a CPU process keeps of released blocks, each below 32 MiB
OPERATORS = 1.05  # for what other operators allocate inside and release at once
CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it that are alive, and their highest sum so far, ``peak``.

    What asks for a value is answered with True, because the questions that encoding and decoding ask are whether
    all is finite.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        taken = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before = {tensor.untyped_storage()._cdata for tensor in taken}
        for tensor in made:
            if tensor.untyped_storage()._cdata not in before:  # else a view, or changed in place
                self._count(tensor.untyped_storage())
        work = _convolution_bytes(taken, made) if func.overloadpacket in CONVOLUTIONS else 0
        self.peak = max(self.peak, self.live + work)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def release(_: weakref.ref) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, release)
        self.live += size


def _convolution_bytes(taken: list[Tensor], made: list[Tensor]) -> int:
    """What a convolution on a CPU works with inside: its tensors once more, reordered into blocks.

    Those of one sample with few cells are instead unfolded into a column per kernel, as PyTorch's choice between its
    two implementations goes (ConvParams::use_mkldnn in aten/src/ATen/native/Convolution.cpp).
    """
    *gradient, fields, kernel = (tensor for tensor in taken if tensor.ndim == 5)
    if len(fields) == 1 and fields.shape[:4].numel() <= 20480:
        output = gradient[0] if gradient else made[0]
        return output.element_size() * output.shape[2:].numel() * kernel.shape[1:].numel()
    return sum(tensor.numel() * tensor.element_size() for tensor in (*taken, *made))


@functools.lru_cache(maxsize=256)
def forecast_memory(
    config: AutoencoderConfig, domain: DomainSpec, grid: Grid, num_samples: int, task: Task, tiles: Tiles | None = None
) -> int:
    """Bytes that a CPU process grows by at most, in FP32, on top of the weights: inputs, work and results together.

    Training counts forward, backward, the weights' gradients and two moments of each weight. The forecast is at most
    1.3 times what is allocated; a process that takes less than 1 GB may stay further below it. On CUDA it is used as it
    is, which overstates: convolutions there do not reorder their tensors.
    """
    face_measure(domain, grid, torch.device("cpu"))  # which is kept for later callers, who need its values
    with FakeTensorMode(allow_non_fake_inputs=True):
        autoencoder = Autoencoder(config)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in autoencoder.parameters())
        autoencoder.train(task == "train").requires_grad_(task == "train")
        with PeakMemory() as memory:
            _run(autoencoder, domain, grid, num_samples, task, tiles)
    moments = 2 * weights if task == "train" else 0
    return int(OPERATORS * memory.peak) + moments + _length_bytes(grid) + HEAP_BYTES


def _run(
    autoencoder: Autoencoder, domain: DomainSpec, grid: Grid, num_samples: int, task: Task, tiles: Tiles | None
) -> object:
    """The task on inputs of no particular value."""
    if task == "decode":
        sizes, coarse = autoencoder.config, [n // DOWNSAMPLING for n in grid.shape]
        latent, medium = (torch.zeros(num_samples, c, *coarse) for c in (sizes.latent_channels, sizes.medium_channels))
        if tiles is None:
            with torch.no_grad():
                return autoencoder.decode_fields(latent, medium, domain, grid)
        return decode_fields_tiled(autoencoder, latent, medium, domain, grid, tiles)
    velocity, pressure, medium = (torch.zeros(num_samples, f, *grid.shape) for f in (3, 1, 1))
    batch = FieldBatch(velocity, pressure, medium, domain, grid)
    if task == "train":
        return reconstruction_loss(autoencoder(batch), batch, ReconstructionConfig())["total"].backward()
    if tiles is None:
        with torch.no_grad():
            return autoencoder.encode(batch)
    return encode_tiled(autoencoder, batch, tiles)


def _length_bytes(grid: Grid) -> int:
    """Of a grid's lengths and areas, 9 values a cell in FP32 and while they are made in FP64; small for most grids."""
    return 9 * (4 + 8) * math.prod(n for axis, n in enumerate(grid.shape) if not grid.is_uniform(axis))
