"""Bytes that travel between ranks in an optimizer step, counted as what each rank sends."""

from typing import NamedTuple

from shodh.model.cost import FULL, count_by_kind, measure_sizes, name_parameters
from shodh.planning.arrangement import Workload, bytes_in_products, keep_of, range_of_stages
from shodh.planning.cluster import ClusterConfig


class Traffic(NamedTuple):
    """Bytes that a rank sends in an optimizer step."""

    reduction: float  # of gradients that all ranks share, and of what ZeRO gathers after its step
    expert_reduction: float  # the same of routed experts, between ranks that hold the same
    all_to_all: float  # of tokens to their experts and back


def count_passes(workload: Workload) -> tuple[float, float]:
    """Forecasts with and without gradient in each micro-step, averaged over the training."""
    objective, num_steps = workload.objective, workload.schedule.num_steps
    starts = [*range_of_stages(workload), num_steps]
    with_gradient = without = 0.0
    for start, end in zip(starts, starts[1:], strict=False):
        with_gradient += (end - start) * objective.num_predicted(start)
        without += (end - start) * objective.mean_lead(start)
    return with_gradient / num_steps, without / num_steps


def count_traffic(workload: Workload, cluster: ClusterConfig) -> Traffic:
    """What each rank sends; a ring all-reduce of b bytes over R ranks sends 2 (1 - 1/R) b.

    Under ZeRO DeepSpeed reduces gradients to all ranks as well, then gathers the parameters that each has stepped,
    (1 - 1/R) of their bytes; ZeRO 2 reduces in every micro-step.
    """
    engine, count = workload.engine, count_by_kind(name_parameters(workload.model))
    low = bytes_in_products(engine, cluster) if engine.zero_stage else FULL  # ZeRO sends what autocast multiplies low
    rounds = engine.accumulation if engine.zero_stage == 2 else 1
    replicas = cluster.num_ranks // engine.expert_parallel
    gathered = FULL if engine.zero_stage else 0

    def reduce(numbers: int | float, size: int, ranks: int) -> float:
        return (1 - 1 / ranks) * numbers * (2 * size * rounds + gathered)

    return Traffic(
        reduce(count.dense, low, cluster.num_ranks) + reduce(count.linear, FULL, cluster.num_ranks),
        reduce(count.routed / engine.expert_parallel, FULL, replicas),
        engine.accumulation * count_exchanges(workload) * exchange_bytes(workload, cluster),
    )


def count_exchanges(workload: Workload) -> float:
    """Of every micro-step: two a layer and forward pass, two backward, two more where blocks are recomputed."""
    predicted, led = count_passes(workload)
    return workload.model.depth * (2 * (predicted + led) + (4 if workload.model.recompute else 2) * predicted)


def count_agreements(workload: Workload) -> float:
    """Of every micro-step: one a layer and forward pass on how many tokens travel, one more where it is recomputed."""
    predicted, led = count_passes(workload)
    return workload.model.depth * (predicted + led + (predicted if workload.model.recompute else 0))


def exchange_bytes(workload: Workload, cluster: ClusterConfig) -> float:
    """What a rank sends when the tokens of one layer go to their experts, or back: (1 - 1/EP) of k copies of them."""
    keeping = keep_of(workload, cluster, 1)
    tokens = keeping.num_samples * measure_sizes(workload.model, workload.grid).tokens
    share = 1 - 1 / workload.engine.expert_parallel
    return share * tokens * workload.model.top_k * workload.model.width * keeping.low
