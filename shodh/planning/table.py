"""Plans side by side, as people read them."""

from collections.abc import Iterator, Mapping
from typing import Any

from shodh.planning.cluster import ClusterConfig
from shodh.planning.plan import Plan, usable_bytes
from shodh.units import format_bytes

LABEL_WIDTH, COLUMN_WIDTH = 30, 22


def describe_plans(plans: Mapping[str, Plan], cluster: ClusterConfig) -> str:
    """A table with a column for each plan."""
    columns = {title: dict(_describe(plan, cluster)) for title, plan in plans.items()}
    lines = [f"{'':{LABEL_WIDTH}}" + "".join(f"{title:>{COLUMN_WIDTH}}" for title in columns)]
    lines.append("-" * len(lines[0]))
    for label in next(iter(columns.values())):
        values = "".join(f"{column[label]:>{COLUMN_WIDTH}}" for column in columns.values())
        lines.append(f"{label:{LABEL_WIDTH}}{values}")
    return "\n".join(lines)


def name_values(plan: Plan) -> dict[str, Any]:
    """All of a plan by name, for JSON."""
    parts = plan._asdict()
    for name in ("arrangement", "memory", "traffic", "step"):
        parts[name] = parts[name]._asdict()
    totals = {"memory_total": plan.memory.total, "step_total": plan.step.total}
    return parts | totals | {"all_to_all_share": plan.step.all_to_all_share}


def _describe(plan: Plan, cluster: ClusterConfig) -> Iterator[tuple[str, str]]:
    arrangement, step = plan.arrangement, plan.step
    yield "ZeRO stage", str(arrangement.zero_stage)
    yield "experts shared out over", f"{arrangement.expert_parallel} of {cluster.num_ranks} ranks"
    yield "samples at once, each rank", str(arrangement.micro_batch)
    yield "accumulation", str(arrangement.accumulation)
    yield "samples of a step", str(arrangement.micro_batch * arrangement.accumulation * cluster.num_ranks)
    yield "blocks recomputed", "yes" if arrangement.recompute else "no"
    for name, size in plan.memory._asdict().items():
        yield f"memory: {name}", format_bytes(int(size))
    yield "memory of each rank", f"{plan.memory.total / usable_bytes(cluster):.0%} of {_usable(cluster)}"
    for name in ("compute", "optimizer", "reduction", "all_to_all", "hidden"):
        yield f"seconds: {name.replace('_', '-')}", format_seconds(getattr(step, name))
    yield "seconds of a step", format_seconds(step.total)
    yield "all-to-all, waited for", f"{step.all_to_all_share:.1%}"
    yield "tokens a second", f"{plan.tokens_per_second:.3g}"
    yield "TFLOP/s of each rank", f"{plan.teraflops_per_second:.3g} ({plan.utilisation:.0%} MFU)"
    yield "checkpoint", format_bytes(plan.checkpoint_bytes)
    yield "checkpoint: training waits", format_seconds(plan.checkpoint_waiting)
    yield "checkpoint: until written", format_seconds(plan.checkpoint_seconds)
    yield "hours", f"{plan.hours:.3g}"
    yield "GPU-hours", f"{plan.gpu_hours:.3g}"
    if cluster.price_per_gpu_hour:
        yield "cost", f"{plan.cost:.0f}"


def format_seconds(seconds: float) -> str:
    """In seconds, milliseconds or microseconds, three digits."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _usable(cluster: ClusterConfig) -> str:
    return format_bytes(int(usable_bytes(cluster)))
