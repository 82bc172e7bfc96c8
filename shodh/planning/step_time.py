"""Seconds of an optimizer step.

Products take their operations over the peak times its utilisation. What lies between them moves memory: each number
that is kept for the backward pass is written and read, then read again and its gradient written and read; each weight
is read twice and its gradient written, under autocast after a cast. A step of AdamW reads four numbers a parameter and
writes three; Muon's five rounds on an a x b matrix, a <= b, are 5 (4 a^2 b + 2 a^3) operations. Tokens of each layer
wait for their ranks to agree on how many travel, then travel; either takes a latency, however few they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from shodh.model.cost import (
    FULL,
    ParameterCount,
    count_by_kind,
    count_operations,
    name_parameters,
    saved_bytes,
)
from shodh.model.transformer import TransformerConfig
from shodh.planning.arrangement import Workload, bytes_in_products, keep_of
from shodh.planning.cluster import ClusterConfig
from shodh.planning.traffic import count_agreements, count_exchanges, count_passes, count_traffic, exchange_bytes
from shodh.training.objectives import ForecastConfig
from shodh.training.optimizers import is_hidden_matrix

GIGA, TERA = 1e9, 1e12
ROUNDS = 5  # of Muon's iteration
# That a forward and a backward pass start, views apart: in each block and outside of all; counted with one expert.
OPERATIONS_PER_BLOCK, OPERATIONS = 304, 184


class StepTime(NamedTuple):
    """Seconds of an optimizer step."""

    compute: float
    optimizer: float
    reduction: float
    all_to_all: float  # all of it
    hidden: float  # the part of it during which shared experts compute: tokens travel, nothing is agreed on

    @property
    def total(self) -> float:
        """Seconds from one step to the next."""
        return self.compute + self.optimizer + self.reduction + self.all_to_all - self.hidden

    @property
    def all_to_all_share(self) -> float:
        """Of the step, what is spent waiting for tokens."""
        return (self.all_to_all - self.hidden) / self.total


def forecast_step(workload: Workload, cluster: ClusterConfig) -> StepTime:
    """Of an arranged workload, on the mean over its steps."""
    named = name_parameters(workload.model)
    compute = _seconds_of_compute(workload, cluster, count_by_kind(named))
    travelling, agreeing = _seconds_of_exchange(workload, cluster)
    return StepTime(
        compute,
        _seconds_of_optimizer(workload, cluster, named),
        _seconds_of_reduction(workload, cluster),
        travelling + agreeing,
        min(travelling, compute * _share_of_shared(workload)),
    )


def step_operations(workload: Workload, cluster: ClusterConfig) -> float:
    """Operations of a step's products on each rank, without what recomputation repeats."""
    samples = keep_of(workload, cluster, 1).num_samples * workload.engine.accumulation
    return samples * count_operations(workload.model, workload.grid).train(*count_passes(workload))


def count_drawn(
    model: TransformerConfig, objective: ForecastConfig, grid: Sequence[int], num_samples: int
) -> Callable[[int], float]:
    """Operations of every step's products over all ranks, from what the step draws; what is repeated is not counted."""
    operations = count_operations(model, grid)

    def of_step(step: int) -> float:
        passes = objective.draw_passes(step)
        return num_samples * operations.train(float(passes.num_predicted), float(passes.lead))

    return of_step


def _seconds_of_compute(workload: Workload, cluster: ClusterConfig, count: ParameterCount) -> float:
    seconds = _seconds_of_products(workload, cluster) + _seconds_of_memory(workload, cluster, count)
    predicted, led = count_passes(workload)
    passes = predicted + (led + (predicted if workload.model.recompute else 0)) / 3
    operations = passes * (OPERATIONS + OPERATIONS_PER_BLOCK * workload.model.depth)
    started = workload.engine.accumulation * operations * cluster.launch_microseconds * 1e-6
    return max(seconds, started) if cluster.device == "cuda" else seconds + started  # a GPU works meanwhile


def _seconds_of_products(workload: Workload, cluster: ClusterConfig) -> float:
    """Routers and linear experts compute in FP32 whatever the precision of the rest."""
    operations = count_operations(workload.model, workload.grid)
    predicted, led = count_passes(workload)
    passes = 3 * predicted + led
    in_full = passes * operations.router + (passes - 1) * operations.linear
    others = operations.train(predicted, led) - in_full
    if workload.model.recompute:
        others += predicted * (operations.blocks - operations.router)
        in_full += predicted * operations.router
    low = bytes_in_products(workload.engine, cluster) < FULL
    peak = cluster.peak_teraflops if low else cluster.full_teraflops
    samples = keep_of(workload, cluster, 1).num_samples * workload.engine.accumulation
    return samples * (others / peak + in_full / cluster.full_teraflops) / cluster.utilisation / TERA


def _seconds_of_memory(workload: Workload, cluster: ClusterConfig, count: ParameterCount) -> float:
    """Weights and activations read and written between products."""
    engine, (predicted, led) = workload.engine, count_passes(workload)
    low = bytes_in_products(engine, cluster)
    cast = FULL + low if low < FULL else 0
    local = count.dense + count.linear + count.routed / engine.expert_parallel
    weights = local * ((predicted + led) * (cast + low) + predicted * (low + FULL))
    kept = saved_bytes(replace(workload.model, recompute=False), workload.grid, keep_of(workload, cluster, 1))
    again = 2 if workload.model.recompute else 0
    activations = kept * ((5 + again) * predicted + 2 * led)
    return engine.accumulation * (weights + activations) / cluster.memory_bandwidth / GIGA


def _seconds_of_optimizer(
    workload: Workload, cluster: ClusterConfig, named: Sequence[tuple[str, nn.Parameter]]
) -> float:
    """Of the numbers that a rank steps; Muon's rounds are in bfloat16, as torch does them."""
    engine, count = workload.engine, count_by_kind(named)
    local = count.dense + count.linear + count.routed / engine.expert_parallel
    stepped = sum(count) / cluster.num_ranks if engine.zero_stage else local
    operations = 0.0
    if engine.optimizer == "muon":
        for name, parameter in named:
            if is_hidden_matrix(name, parameter):
                short, long = sorted(parameter.shape[-2:])
                slices = parameter.shape[0] / engine.expert_parallel if parameter.ndim == 3 else 1
                operations += slices * ROUNDS * (4 * short**2 * long + 2 * short**3)
    return 7 * FULL * stepped / cluster.memory_bandwidth / GIGA + operations / (
        cluster.peak_teraflops * cluster.utilisation * TERA
    )


def _seconds_of_exchange(workload: Workload, cluster: ClusterConfig) -> tuple[float, float]:
    """Of tokens that travel, and of agreeing on their number, for which the host waits.

    What goes to other nodes and what stays within one travel side by side; a group is of successive ranks.
    """
    peers = workload.engine.expert_parallel - 1
    if peers == 0:
        return 0.0, 0.0
    near = min(workload.engine.expert_parallel, cluster.gpus_per_node) - 1
    within, beyond = near / peers / cluster.node_bandwidth, (1 - near / peers) / cluster.network_bandwidth
    latency = cluster.latency_microseconds * 1e-6
    journey = latency + exchange_bytes(workload, cluster) * max(within, beyond) / GIGA
    rounds = workload.engine.accumulation
    return rounds * count_exchanges(workload) * journey, rounds * count_agreements(workload) * latency


def _share_of_shared(workload: Workload) -> float:
    """Of computing, what shared experts take, during which tokens may travel: their share of the products."""
    operations, (predicted, led) = count_operations(workload.model, workload.grid), count_passes(workload)
    again = predicted if workload.model.recompute else 0
    shared = (3 * predicted + led + again) * operations.shared
    return shared / (operations.train(predicted, led) + again * operations.blocks)


def _seconds_of_reduction(workload: Workload, cluster: ClusterConfig) -> float:
    """Of what all ranks hold, then of experts, between ranks as far apart as their groups are large."""
    traffic = count_traffic(workload, cluster)
    members = max(1, cluster.gpus_per_node // workload.engine.expert_parallel)  # on a node, with the same experts
    everywhere, between = (_ring_bandwidth(cluster, n) * GIGA for n in (cluster.gpus_per_node, members))
    return traffic.reduction / everywhere + traffic.expert_reduction / between


def _ring_bandwidth(cluster: ClusterConfig, members: int) -> float:
    """Rings over several nodes use the links of all their members on a node, one ring each."""
    if cluster.num_nodes == 1:
        return cluster.node_bandwidth
    return min(cluster.node_bandwidth, cluster.network_bandwidth * members)
