"""Memory of a rank in bytes: parameters, gradients, what the optimizer keeps, activations and buffers.

With P parameters, D of them on every rank and the routed R on a rank's 1 / EP share, on N ranks: the parts that ZeRO
cuts up are D / N + (R / EP) / (N / EP) = P / N numbers. Parameters, gradients and moments are FP32. Read in DeepSpeed
0.19.8 (``runtime/zero/stage_1_and_2.py``), measured by ``benchmarks/plan.py``.

Left out: the held-out trajectory of each domain that the ranks of the first expert group keep to measure forecasts on,
4 FP32 numbers for each cell and snapshot (about 3.4 GB at 128^3 and 100 snapshots), and rank 0's copy of a checkpoint,
which is in the host's memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from shodh.model.cost import FULL, block_bytes, count_by_kind, is_routed, measure_sizes, name_parameters, saved_bytes
from shodh.planning.arrangement import LOW, Workload, bytes_in_products, keep_of, most_predicted
from shodh.planning.cluster import ClusterConfig
from shodh.training.engine import BUCKET
from shodh.training.optimizers import ADAMW_MOMENTS, MUON_MOMENTS, OptimizerName, is_hidden_matrix


class Memory(NamedTuple):
    """Bytes on each rank."""

    parameters: float
    gradients: float
    optimizer: float  # moments, and ZeRO's own copy of the parameters it steps
    activations: float
    buffers: float  # for gradients under way, and for tokens

    @property
    def total(self) -> float:
        """All together."""
        return sum(self)


def forecast_memory(workload: Workload, cluster: ClusterConfig) -> Memory:
    """Of an arranged workload."""
    engine, num_ranks = workload.engine, cluster.num_ranks
    named = name_parameters(workload.model)
    count = count_by_kind(named)
    local, whole = count.dense + count.linear + count.routed / engine.expert_parallel, sum(count)
    moments = count_moments(named, engine.optimizer, engine.expert_parallel)
    if engine.zero_stage:
        moments = moments - (len(ADAMW_MOMENTS) * (local - whole / num_ranks))
    kept = FULL * (moments + (whole / num_ranks if engine.zero_stage else 0))
    gradients = FULL * (whole / num_ranks if engine.zero_stage == 2 else local)
    keeping = keep_of(workload, cluster, most_predicted(workload))
    activations = float(saved_bytes(workload.model, workload.grid, keeping))
    if workload.model.recompute:
        activations += block_bytes(workload.model, workload.grid, keeping)
    buffers = _gradient_buffers(workload, cluster, local) + _token_buffers(workload, cluster)
    return Memory(FULL * local, gradients, kept, activations, buffers)


def count_moments(named: Sequence[tuple[str, nn.Parameter]], optimizer: OptimizerName, expert_parallel: int) -> float:
    """Numbers that the optimizer remembers on a rank without ZeRO: two per parameter, one of Muon's matrices."""
    total = 0.0
    for name, parameter in named:
        by_muon = optimizer == "muon" and is_hidden_matrix(name, parameter)
        size = parameter.numel() / (expert_parallel if is_routed(name) else 1)
        total += size * len(MUON_MOMENTS if by_muon else ADAMW_MOMENTS)
    return total


def _gradient_buffers(workload: Workload, cluster: ClusterConfig, local: float) -> float:
    """ZeRO takes a bucket for each precision that gradients travel in; else they are joined to be reduced.

    On a CPU only what is written of a bucket counts, and that is one.
    """
    if workload.engine.zero_stage == 0 and cluster.num_ranks == 1:
        return 0.0
    both = workload.engine.zero_stage > 0 and bytes_in_products(workload.engine, cluster) == LOW
    return float(FULL * min(local, BUCKET) * (2 if both and cluster.device == "cuda" else 1))


def _token_buffers(workload: Workload, cluster: ClusterConfig) -> float:
    """Of one layer under expert parallelism: copies of tokens as sent and as received."""
    if workload.engine.expert_parallel == 1:
        return 0.0
    keeping = keep_of(workload, cluster, 1)
    tokens = keeping.num_samples * measure_sizes(workload.model, workload.grid).tokens
    return 2.0 * tokens * workload.model.top_k * workload.model.width * keeping.low
