"""What a training is seen to need: part of plan.py."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from operation_counter import counting_operations
from random_latents import make_latents
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from shodh.fields import NUM_GIVEN, LatentBatch
from shodh.model.transformer import LatentTransformer
from shodh.planning.arrangement import Workload
from shodh.training.checkpoint import collect_state
from shodh.training.engine import build_engine, create_expert_group, plain_optimizer, set_learning_rate
from shodh.training.objectives import ForecastObjective

Measurement = dict[str, float]


def measure(workload: Workload, device: torch.device, num_ranks: int) -> Measurement:
    """One step is counted, another profiled, five more timed."""
    torch.manual_seed(0)
    model = LatentTransformer(workload.model, create_expert_group(workload.engine.expert_parallel))
    engine = build_engine(model, workload.engine, device)
    set_learning_rate(engine, 1e-4)
    objective, num_samples = ForecastObjective(workload.objective), workload.engine.batch_size // num_ranks
    batch = make_latents(workload.model, num_samples, workload.objective.num_states - NUM_GIVEN, workload.grid)
    parameters = Storages(model.parameters())
    optimizer = plain_optimizer(engine)
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    kept = Storages([*stepped, *moments], apart_from=parameters)
    activations = Storages([], apart_from=Storages([*model.parameters(), *model.buffers(), *batch]))
    with counting_operations() as counter:
        objective.begin_step(0)
        terms, _ = objective(engine, batch)
        engine.backward(terms["total"])
    engine.step()
    del terms
    with saved_tensors_hooks(activations.add, lambda tensor: tensor):
        objective.begin_step(0)
        _, routed = objective(engine, batch)
    for routing in routed.routings:
        for tensor in routing:
            activations.add(tensor)
    size = activations.size
    activations.clear()
    del routed
    peak = parameters.size + kept.size + profile_peak(lambda: take_step(engine, objective, batch))
    seconds = []
    for _ in range(5):
        started = time.process_time()
        take_step(engine, objective, batch)
        seconds.append(time.process_time() - started)
    state = collect_state(engine)
    return {
        "parameters": parameters.size,
        "optimizer": kept.size,
        "activations": size,
        "operations": counter.get_total_flops(),
        "checkpoint": sum(value.nbytes for value in state.values()),
        "peak": peak,
        "seconds": float(np.median(seconds)),
    }


class Storages:
    """Memory that tensors stand on, each counted once."""

    def __init__(self, tensors: Iterable[Tensor], apart_from: "Storages | None" = None) -> None:
        self.excluded = set() if apart_from is None else set(apart_from.sizes)
        self.sizes: dict[int, int] = {}
        self.held: list[Tensor] = []  # else an address could be given out again
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> Tensor:
        """Count what the tensor stands on, and give it back."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.excluded:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.held.append(tensor)
        return tensor

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(self.sizes.values())

    def clear(self) -> None:
        """Let go of the tensors."""
        self.held.clear()
        self.sizes.clear()


def take_step(engine: Any, objective: ForecastObjective, batch: LatentBatch) -> None:
    """As the training loop does."""
    objective.begin_step(0)
    terms, _ = objective(engine, batch)
    engine.backward(terms["total"])
    engine.step()


def profile_peak(work: Callable[[], None]) -> int:
    """The most bytes that work has allocated and not yet freed at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events: list[Any] = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return int(np.cumsum([size for _, size in sorted(changes, key=lambda change: change[0])]).max())
