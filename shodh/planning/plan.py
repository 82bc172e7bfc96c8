"""What a training will need: memory, time, checkpoints and money, and what about it deserves a warning."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from shodh.config import ConfigError
from shodh.model.cost import FULL, measure_sizes, name_parameters
from shodh.planning.arrangement import Arrangement, Workload, arrange, keep_of
from shodh.planning.cluster import ClusterConfig
from shodh.planning.memory import Memory, count_moments, forecast_memory
from shodh.planning.step_time import GIGA, TERA, StepTime, forecast_step, step_operations
from shodh.planning.traffic import Traffic, count_traffic
from shodh.units import format_bytes

USABLE = 0.9  # of a GPU's memory; the driver, libraries and gaps between tensors take the rest
FEWEST_ROWS = 512  # of an expert at once; below half of that a grouped product waits for its weights
MOST_WAITING = 0.05  # of a step, for tokens under way or for a checkpoint, before it is worth a warning


class Plan(NamedTuple):
    """The forecast for one arrangement of a training on a cluster."""

    arrangement: Arrangement
    memory: Memory  # of each rank
    traffic: Traffic  # of each rank in a step
    step: StepTime
    tokens_per_second: float
    teraflops_per_second: float  # of each rank
    utilisation: float  # of the peak: that, over the cluster's
    checkpoint_bytes: int
    checkpoint_waiting: float  # seconds that training waits for each
    checkpoint_seconds: float  # until one is written
    hours: float
    gpu_hours: float
    cost: float


def forecast(workload: Workload, cluster: ClusterConfig) -> Plan:
    """The plan of a training as its config arranges it; raises ConfigError where it cannot be so arranged."""
    _require_groups(workload, cluster)
    step = forecast_step(workload, cluster)
    size, num_steps = count_checkpoint_bytes(workload), workload.schedule.num_steps
    copying, writing = _seconds_of_checkpoint(size, workload, cluster)
    between = workload.checkpoint_interval * step.total
    waiting = copying + max(0.0, writing - between)  # a thread writes it until the next is due
    waited = math.ceil(num_steps / workload.checkpoint_interval) * waiting + min(writing, between)  # all of the last
    hours = (num_steps * step.total + waited) / 3600
    teraflops = step_operations(workload, cluster) / step.total / TERA
    tokens = workload.num_samples * measure_sizes(workload.model, workload.grid).tokens
    return Plan(
        arrange(workload, cluster.num_ranks),
        forecast_memory(workload, cluster),
        count_traffic(workload, cluster),
        step,
        tokens / step.total,
        teraflops,
        teraflops / cluster.peak_teraflops,
        size,
        waiting,
        copying + writing,
        hours,
        hours * cluster.num_ranks,
        hours * cluster.num_ranks * cluster.price_per_gpu_hour,
    )


def count_checkpoint_bytes(workload: Workload) -> int:
    """Parameters and moments in full, FP32, whatever the arrangement."""
    named = name_parameters(workload.model)
    numbers = sum(parameter.numel() for _, parameter in named)
    return FULL * int(numbers + count_moments(named, workload.engine.optimizer, expert_parallel=1))


def fits(plan: Plan, cluster: ClusterConfig) -> bool:
    """Whether a rank's memory is enough, with a margin."""
    return plan.memory.total <= usable_bytes(cluster)


def usable_bytes(cluster: ClusterConfig) -> float:
    """Of a rank's memory."""
    return USABLE * cluster.memory_gigabytes * GIGA


def list_warnings(workload: Workload, cluster: ClusterConfig, plan: Plan) -> Iterator[str]:
    """One line for each thing that will not work or will cost more than it need."""
    engine, num_ranks, windows = workload.engine, cluster.num_ranks, workload.objective.windows
    if engine.batch_size % (num_ranks * windows):
        yield (
            f"engine.batch_size={engine.batch_size}: {num_ranks} ranks with windows={windows} do not divide it, and "
            f"training refuses it. Choose a multiple of {num_ranks * windows}."
        )
    if not fits(plan, cluster):
        needed, usable = format_bytes(int(plan.memory.total)), format_bytes(int(usable_bytes(cluster)))
        yield f"memory={needed}: of {usable} that can be used. Arrange it as recommended."
    rows = rows_per_expert(workload, cluster)
    if cluster.device == "cuda" and rows < FEWEST_ROWS:
        yield (
            f"rows={rows:.0f}: each expert gets fewer than {FEWEST_ROWS} at once, so its products wait for memory. "
            "Raise engine.batch_size or engine.expert_parallel, or lower model.num_experts."
        )
    if plan.step.all_to_all_share > MOST_WAITING:
        yield (
            f"all_to_all={plan.step.all_to_all_share:.0%}: of a step is spent waiting for tokens, which shared experts "
            "do not hide. A larger model.hidden would, or faster links."
        )
    if cluster.num_nodes > 1 and engine.expert_parallel > cluster.gpus_per_node:
        yield (
            f"engine.expert_parallel={engine.expert_parallel}: tokens travel between nodes, {plan.step.hidden:.2g} s "
            "of a step hidden behind shared experts, which nobody has measured. Try the most within a node too."
        )
    waiting = plan.checkpoint_waiting / (plan.checkpoint_waiting + workload.checkpoint_interval * plan.step.total)
    if waiting > MOST_WAITING:
        interval = workload.checkpoint_interval
        yield f"checkpoint_interval={interval}: training waits {waiting:.0%} of the time for checkpoints. Raise it."


def rows_per_expert(workload: Workload, cluster: ClusterConfig) -> float:
    """Tokens that an expert gets at once, on the mean: from all ranks of its group."""
    tokens = keep_of(workload, cluster, 1).num_samples * measure_sizes(workload.model, workload.grid).tokens
    return tokens * workload.model.top_k * workload.engine.expert_parallel / workload.model.num_experts


def _seconds_of_checkpoint(size: int, workload: Workload, cluster: ClusterConfig) -> tuple[float, float]:
    """To copy one to the memory of rank 0's node, and then to write it.

    Where ranks hold parts of it, all of it comes over rank 0's slowest link first.
    """
    copying = size / cluster.host_bandwidth
    if cluster.num_ranks > 1 and (workload.engine.zero_stage or workload.engine.expert_parallel > 1):
        copying += size / (cluster.network_bandwidth if cluster.num_nodes > 1 else cluster.node_bandwidth)
    return copying / GIGA, size / cluster.disk_bandwidth / GIGA


def _require_groups(workload: Workload, cluster: ClusterConfig) -> None:
    size, num_experts = workload.engine.expert_parallel, workload.model.num_experts
    if cluster.num_ranks % size or num_experts % size:
        raise ConfigError(
            f"engine.expert_parallel={size}: does not divide both {cluster.num_ranks} ranks and "
            f"model.num_experts={num_experts}. Choose one that does."
        )
