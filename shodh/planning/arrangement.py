"""What is trained, and how it is spread over ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from shodh.model.cost import FULL, Keeping
from shodh.model.transformer import TransformerConfig
from shodh.planning.cluster import ClusterConfig
from shodh.training.engine import EngineConfig
from shodh.training.objectives import ForecastConfig
from shodh.training.schedule import ScheduleConfig

LOW = 2  # bytes of a bfloat16 number


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training, as its config describes it, on latents of one grid."""

    model: TransformerConfig
    objective: ForecastConfig
    engine: EngineConfig
    schedule: ScheduleConfig
    checkpoint_interval: int
    grid: tuple[int, int, int]

    @property
    def num_samples(self) -> int:
        """Of an optimizer step."""
        return self.engine.batch_size * self.engine.accumulation


class Arrangement(NamedTuple):
    """How the samples of an optimizer step and the state of a model are spread."""

    zero_stage: int
    expert_parallel: int
    micro_batch: int  # samples of a rank at once
    accumulation: int
    recompute: bool


def arrange(workload: Workload, num_ranks: int) -> Arrangement:
    """As the config says; where ranks do not divide the batch, the largest share of it."""
    engine = workload.engine
    share = -(-engine.batch_size // num_ranks)
    return Arrangement(engine.zero_stage, engine.expert_parallel, share, engine.accumulation, workload.model.recompute)


def apply_arrangement(workload: Workload, arrangement: Arrangement, num_ranks: int) -> Workload:
    """The same training so arranged."""
    engine = replace(
        workload.engine,
        batch_size=arrangement.micro_batch * num_ranks,
        accumulation=arrangement.accumulation,
        zero_stage=arrangement.zero_stage,
        expert_parallel=arrangement.expert_parallel,
    )
    return replace(workload, engine=engine, model=replace(workload.model, recompute=arrangement.recompute))


def list_settings(arrangement: Arrangement, num_ranks: int) -> Sequence[str]:
    """What to append to the command that trains."""
    return (
        f"engine.zero_stage={arrangement.zero_stage}",
        f"engine.expert_parallel={arrangement.expert_parallel}",
        f"engine.batch_size={arrangement.micro_batch * num_ranks}",
        f"engine.accumulation={arrangement.accumulation}",
        f"model.recompute={str(arrangement.recompute).lower()}",
    )


def bytes_in_products(engine: EngineConfig, cluster: ClusterConfig) -> int:
    """Of a number: bfloat16 on CUDA unless the config says otherwise."""
    low = engine.precision == "bf16" or (engine.precision == "auto" and cluster.device == "cuda")
    return LOW if low else FULL


def keep_of(workload: Workload, cluster: ClusterConfig, num_predicted: int) -> Keeping:
    """How a rank of an arranged workload runs its forward pass."""
    share = -(-workload.engine.batch_size // cluster.num_ranks)
    low = bytes_in_products(workload.engine, cluster)
    grouped = low < FULL and cluster.device == "cuda"
    return Keeping(share, low, workload.engine.expert_parallel, num_predicted, grouped)


def most_predicted(workload: Workload) -> int:
    """Steps that are forecast in a row with gradients at the latest."""
    return max(workload.objective.num_predicted(step) for step in range_of_stages(workload))


def range_of_stages(workload: Workload) -> Sequence[int]:
    """The optimizer steps at which another number of forecasts in a row begins, 0 among them."""
    stages = (*workload.objective.unroll, *workload.objective.lead)
    return sorted({0, *(start for start, _ in stages if start < workload.schedule.num_steps)})
