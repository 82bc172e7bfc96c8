"""What a latent transformer costs: its parameters, the products of a forward and a backward pass, what those keep.

Letters of the formulas, for one sample: N cells of the latent grid, n = N / patch^3 tokens, v values that a token is
made of and w that it stands for; d width, h and g hidden widths of the shared and of a routed expert, k = top_k of e
experts, s semantic width; u values around a cell that a linear expert sees, r values that all of them say of it. A
product of (a, b) and (b, c) counts 2 a b c operations; what is not a product of matrices counts none.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from shodh.fields import CONDITIONS, NUM_GIVEN
from shodh.model.transformer import LatentTransformer, TransformerConfig

FULL = 4  # bytes of an FP32 number
INDEX = 8  # bytes of an index
NUM_CONDITIONS = len(CONDITIONS) + NUM_GIVEN - 1  # q: those given, and sizes of the changes


class ParameterCount(NamedTuple):
    """Numbers of parameters by who holds them under expert parallelism."""

    dense: int  # every rank
    routed: int  # experts, shared out over ranks
    linear: int  # linear experts: every rank


class Operations(NamedTuple):
    """Floating-point operations of one sample's forward pass, by what becomes of them."""

    entry: int  # the first products, whose inputs need no gradient
    ends: int  # the rest of what lies outside the blocks
    attention: int  # with its projections and the modulation of both norms
    shared: int  # shared experts, during which tokens may travel to their routed ones
    routed: int
    router: int  # always FP32
    linear: int  # linear experts, always FP32; their inputs need no gradient

    @property
    def forward(self) -> int:
        """All of them."""
        return sum(self)

    @property
    def blocks(self) -> int:
        """Those of the blocks, which are done again in the backward pass where they are recomputed."""
        return self.attention + self.shared + self.routed + self.router

    def train(self, num_predicted: float = 1.0, num_led: float = 0.0) -> float:
        """Of ``num_predicted`` forecasts in a row with their backward passes, after ``num_led`` without gradient.

        Backward, a product costs one more for its weights' gradient, and one for its input's where that is needed: not
        in the first forecast's ``entry`` and ``linear``. What recomputation repeats is not counted.
        """
        return (3 * num_predicted + num_led) * self.forward - self.entry - self.linear


class Sizes(NamedTuple):
    """The letters of the formulas above."""

    cells: int
    tokens: int
    seen: int  # v
    said: int  # w
    kernels: int  # E


@functools.lru_cache(maxsize=8)
def name_parameters(config: TransformerConfig) -> tuple[tuple[str, nn.Parameter], ...]:
    """Every parameter's name and shape: those of the model itself, built without memory for its numbers."""
    with torch.device("meta"):
        return tuple(LatentTransformer(config).named_parameters())


def is_routed(name: str) -> bool:
    """Whether a parameter is a stack of routed experts, which expert parallelism shares out."""
    return ".routed." in name


def count_by_kind(named: Sequence[tuple[str, nn.Parameter]]) -> ParameterCount:
    """How many parameters of each kind there are."""
    total = sum(parameter.numel() for _, parameter in named)
    routed = sum(parameter.numel() for name, parameter in named if is_routed(name))
    linear = sum(parameter.numel() for name, parameter in named if name.startswith("stencil."))
    return ParameterCount(total - routed - linear, routed, linear)


def measure_sizes(config: TransformerConfig, grid: Sequence[int]) -> Sizes:
    """The sizes of one sample on a latent grid; raises ValueError where ``patch`` does not divide it."""
    if any(size < 1 or size % config.patch for size in grid):
        raise ValueError(f"patch={config.patch}: does not divide the latent grid {tuple(grid)}. Choose one that does.")
    cells, volume = math.prod(grid), config.patch**3
    seen = NUM_GIVEN * config.latent_channels + config.medium_channels
    kernels = config.num_kernels or config.num_experts
    return Sizes(cells, cells // volume, seen * volume, config.latent_channels * volume, kernels)


def count_operations(config: TransformerConfig, grid: Sequence[int]) -> Operations:
    """Of one sample's forward pass.

    entry      2 n v d + 2 q d, of q conditions                shared  depth * 6 n d h
    ends       2 d^2 + 2 n d w                                 routed  depth * 6 k n d g
    attention  depth * (8 d^2 + 8 n d^2 + 4 n^2 d)             router  depth * (2 n d s + 4 d s + 2 n s e)
                                                               linear  2 N r u + 2 N r
    """
    sizes, d = measure_sizes(config, grid), config.width
    n, s, values = sizes.tokens, config.semantic_width, sizes.kernels * config.latent_channels
    around = 27 * (NUM_GIVEN * config.latent_channels + config.medium_channels)
    return Operations(
        entry=2 * n * sizes.seen * d + 2 * NUM_CONDITIONS * d,
        ends=2 * d**2 + 2 * n * d * sizes.said,
        attention=config.depth * (8 * d**2 + 8 * n * d**2 + 4 * n**2 * d),
        shared=config.depth * 6 * n * d * config.hidden,
        routed=config.depth * 6 * config.top_k * n * d * _routed_width(config),
        router=config.depth * (2 * n * d * s + 4 * d * s + 2 * n * s * config.num_experts),
        linear=2 * sizes.cells * values * around + 2 * sizes.cells * values,
    )


class Keeping(NamedTuple):
    """How a forward pass is run, as far as it decides what is kept."""

    num_samples: int
    low: int = FULL  # bytes of a number in the products: 4, or 2 under bfloat16 autocast
    expert_parallel: int = 1
    num_predicted: int = 1  # forecasts in a row
    grouped: bool = False  # experts run by one kernel, as in bfloat16 on CUDA; else chunk by chunk


def saved_bytes(config: TransformerConfig, grid: Sequence[int], keeping: Keeping) -> int:
    """What the training loss keeps and hands on beside parameters and the batch, bytes.

    Counted on CPU; CUDA's fused norms keep less of their inputs. Blocks that are recomputed keep their input and what
    the losses read of their routing.
    """
    sizes, low = measure_sizes(config, grid), keeping.low
    tokens, cells = keeping.num_samples * sizes.tokens, keeping.num_samples * sizes.cells
    block = block_bytes(config, grid, keeping)
    ends, spared = _ends_bytes(config, grid, keeping), 0
    if config.recompute:
        spared = config.depth * (_routing_bytes(config, tokens) - tokens * (config.num_experts + 1) * FULL)
        block = tokens * config.width * low + _routing_bytes(config, tokens)
    # the given states, their differences of each order and the change have gradients then; telemetry sees the first
    fields = (NUM_GIVEN * (NUM_GIVEN + 1) // 2 + 1) * cells * config.latent_channels * FULL
    again = fields + (low < FULL) * low * config.width * (sizes.seen + NUM_CONDITIONS) - spared
    return keeping.num_predicted * (config.depth * block + ends) + (keeping.num_predicted - 1) * again


def block_bytes(config: TransformerConfig, grid: Sequence[int], keeping: Keeping) -> int:
    """What one block of the transformer keeps, or makes again, bytes.

    Per token: both norms, their input and its normalised values in FP32, what the weights and the modulation make of it
    in low precision; queries and keys before and after rotation; values, attention's output, before and after heads
    are joined; two hidden widths of the shared expert, four where autograd keeps them.
    """
    n, d, low = measure_sizes(config, grid).tokens, config.width, keeping.low
    tokens = keeping.num_samples * n
    cast = 1 if low < FULL else 0  # what is needed in both precisions
    norms = 2 * (tokens * d * (2 * FULL + 2 * low) + tokens * FULL + keeping.num_samples * d * low)
    queries_and_keys = 2 * tokens * (d * (1 + cast) + config.num_heads) * FULL
    attention = queries_and_keys + tokens * (7 * d * low + config.num_heads * FULL)
    rotary = 4 * n * (d // config.num_heads // 2) * FULL
    router = tokens * (cast * d + 2 * config.semantic_width + 2) * FULL + 3 * keeping.num_samples * d * FULL
    shared = tokens * (4 * config.hidden * low if keeping.grouped else 2 * config.hidden * low + INDEX)
    routed = _routed_bytes(config, tokens, keeping) + _routing_bytes(config, tokens)
    hidden = 3 * d * (config.hidden + config.num_experts // keeping.expert_parallel * _routed_width(config))
    matrices = cast * low * (8 * d**2 + hidden)
    return norms + attention + rotary + router + shared + routed + matrices


def _routed_bytes(config: TransformerConfig, tokens: int, keeping: Keeping) -> int:
    """Of k copies of every token: gate, order, and rows of the width and of hidden widths, as the experts are run.

    Chunk by chunk two hidden widths are kept and the sorted input; by one kernel four, and input, output and weighted
    output. Rows that travelled are kept as they came back, too, and weighted.
    """
    travels = keeping.expert_parallel > 1
    rows, hidden = (3 + travels, 4) if keeping.grouped else (1 + 2 * travels, 2)
    numbers = rows * config.width + hidden * _routed_width(config)
    return tokens * config.top_k * (numbers * keeping.low + FULL + 2 * INDEX)


def _routing_bytes(config: TransformerConfig, tokens: int) -> int:
    """Which experts were chosen and their gates; scores, probabilities and normalisation, for losses and telemetry."""
    return tokens * (config.top_k * (INDEX + FULL) + (2 * config.num_experts + 1) * FULL)


def _ends_bytes(config: TransformerConfig, grid: Sequence[int], keeping: Keeping) -> int:
    """Before the first block and after the last: conditions, what is embedded, the last norm, linear experts, error."""
    sizes, d, low = measure_sizes(config, grid), config.width, keeping.low
    tokens, cells = keeping.num_samples * sizes.tokens, keeping.num_samples * sizes.cells
    told = keeping.num_samples * (NUM_CONDITIONS + 4 * d) * low
    norm = tokens * (d * (2 * FULL + low) + FULL)
    fields = NUM_GIVEN * config.latent_channels + config.medium_channels
    around = keeping.num_samples * fields * math.prod(size + 2 for size in grid) * FULL
    kernels = 27 * fields * config.latent_channels * sizes.kernels * FULL  # in units of their gain
    linear = around + kernels + cells * sizes.kernels * FULL
    error = cells * config.latent_channels * FULL
    matrices = (low < FULL) * low * d * (sizes.said + d)
    return told + tokens * sizes.seen * low + norm + linear + error + matrices


def _routed_width(config: TransformerConfig) -> int:
    return config.expert_hidden or config.hidden
