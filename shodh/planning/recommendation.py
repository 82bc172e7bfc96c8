"""The fastest arrangement of a training that fits a cluster's memory."""

import math
from collections.abc import Iterator
from itertools import product

from shodh.config import ConfigError
from shodh.planning.arrangement import Arrangement, Workload, apply_arrangement
from shodh.planning.cluster import ClusterConfig
from shodh.planning.plan import Plan, fits, forecast, usable_bytes
from shodh.units import format_bytes

REMEDIES = {
    "parameters": "Lower model.width, model.depth or model.num_experts",
    "gradients": "Lower model.width, model.depth or model.num_experts",
    "optimizer": "Lower model.width, model.depth or model.num_experts",
    "activations": "Raise model.patch, or lower model.width, model.depth or objective.unroll",
    "buffers": "Use a smaller model, or engine.zero_stage=0, which collects no gradients",
}


def recommend(workload: Workload, cluster: ClusterConfig) -> tuple[Workload, Plan]:
    """The fastest arrangement that fits, of equal ones that with the larger micro-batch, then the least memory.

    The samples of an optimizer step stay what they are, or become the next multiple that ranks share evenly. Raises
    ConfigError, saying what is missing, where none fits.
    """
    candidates = []
    for arrangement in list_arrangements(workload, cluster):
        arranged = apply_arrangement(workload, arrangement, cluster.num_ranks)
        candidates.append((arranged, forecast(arranged, cluster)))
    fitting = [candidate for candidate in candidates if fits(candidate[1], cluster)]
    if not fitting:
        raise ConfigError(_describe_lack(min((plan for _, plan in candidates), key=lambda p: p.memory.total), cluster))
    return min(fitting, key=lambda candidate: _preference(candidate[1]))


def list_arrangements(workload: Workload, cluster: ClusterConfig) -> Iterator[Arrangement]:
    """All ways to spread a training that the engine and the loss allow.

    Windows of a trajectory stand side by side on one rank, experts are shared out evenly, and Muon needs ZeRO 0.
    """
    windows = workload.objective.windows
    turns = math.ceil(workload.num_samples / cluster.num_ranks / windows)  # of that many samples a rank
    stages = (0,) if workload.engine.optimizer == "muon" else (0, 1, 2)
    groups = list_divisors(math.gcd(cluster.num_ranks, workload.model.num_experts))
    for stage, group, at_once, recompute in product(stages, groups, list_divisors(turns), (False, True)):
        yield Arrangement(stage, group, at_once * windows, turns // at_once, recompute)


def list_divisors(number: int) -> list[int]:
    """From 1 to the number itself."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _preference(plan: Plan) -> tuple[float, int, float]:
    return plan.step.total, -plan.arrangement.micro_batch, plan.memory.total


def _describe_lack(smallest: Plan, cluster: ClusterConfig) -> str:
    stage, group, micro_batch, _, recompute = smallest.arrangement
    part = max(smallest.memory._fields, key=lambda name: getattr(smallest.memory, name))
    needed, usable = smallest.memory.total, usable_bytes(cluster)
    return (
        f"cluster.memory_gigabytes={cluster.memory_gigabytes:g}: no arrangement fits; the smallest (ZeRO {stage}, "
        f"experts over {group} ranks, {micro_batch} samples at once{', recomputed' if recompute else ''}) takes "
        f"{format_bytes(int(needed))} a rank, {format_bytes(int(needed - usable))} more than can be used, "
        f"{format_bytes(int(getattr(smallest.memory, part)))} of it for {part}. {REMEDIES[part]}, or take larger GPUs."
    )
