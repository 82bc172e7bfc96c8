"""A dozen typed fields -> a DeepSpeed engine; the only file that knows DeepSpeed's configuration and quirks."""

import atexit
import gc
import logging
import math
import os
import socket
import sys
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn  # before any group exists: its functions' default arguments would hold the group for good
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from shodh.config import ConfigError
from shodh.device import find_device, keep_freed_memory
from shodh.training.optimizers import ADAMW_MOMENTS, OptimizerName, build_optimizer, create_moments

# What EngineConfig's own fields decide in DeepSpeed's JSON.
OWNED_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "torch_autocast",
}

# Numbers at most in the buffer in which ZeRO 1 and 2 collect gradients, for each precision: DeepSpeed's own choice,
# which it takes whole, however few parameters there are.
BUCKET = 500_000_000


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is trained across ranks. ``extra`` is merged into DeepSpeed's own JSON last."""

    batch_size: int  # samples per micro-step over all ranks
    accumulation: int = 1  # micro-steps per optimizer step
    zero_stage: Literal[0, 1, 2, 3] = 1
    expert_parallel: int = 1  # ranks that share out the experts of every layer
    optimizer: OptimizerName = "adamw"  # muon: for the matrices, AdamW for the rest; needs zero_stage 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU
    gradient_clipping: float = 1.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    threads_per_rank: int = 1  # on CPU
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "expert_parallel", "threads_per_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1. Raise it.")
        if self.gradient_clipping < 0 or self.weight_decay < 0:
            raise ValueError(
                f"gradient_clipping={self.gradient_clipping}, weight_decay={self.weight_decay}: "
                "must not be negative. Use 0 to switch one off."
            )
        if self.zero_stage == 3:
            raise ValueError(
                "zero_stage=3: partitions parameters, which checkpoints here take whole, and DeepSpeed 0.19 refuses it "
                "beside experts shared out over ranks. Set zero_stage=2; what experts take, expert_parallel shares out."
            )
        if self.optimizer == "muon" and self.zero_stage > 0:
            raise ValueError(
                f"zero_stage={self.zero_stage}: ZeRO 1 and 2 flatten the matrices that optimizer=muon needs whole. "
                "Set zero_stage=0, or optimizer=adamw."
            )
        owned = sorted(self.extra.keys() & OWNED_KEYS)
        if owned:
            raise ValueError(f"extra.{owned[0]}: has a field of its own in engine. Set that instead.")


_ENGINES: weakref.WeakSet[Any] = weakref.WeakSet()  # those to be destroyed with the process group


class Membership(NamedTuple):
    """Where this process stands among its peers."""

    device: torch.device
    rank: int
    size: int


@contextmanager
def distributed(threads_per_rank: int) -> Iterator[Membership]:
    """Membership of the process group that the launcher describes, or of one with a single process.

    On CPU DeepSpeed's shared-memory collective is switched off: it needs a C++ compiler, takes minutes to build and
    leaves 69 MB a rank in /dev/shm. At the end engines are destroyed, so that the group's threads end before the
    interpreter does: one that lets go of a tensor afterwards aborts the process.
    """
    with _described_rank():
        yield from _join(threads_per_rank)


@contextmanager
def _described_rank() -> Iterator[None]:
    """A launcher's variables as they are, else those of a group of one, which end with it.

    Left behind, they would make a process started later take itself for this rank, on a port that is gone.
    """
    if "RANK" in os.environ:
        yield
        return
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    alone["MASTER_PORT"] = str(_free_port())
    before = {name: os.environ[name] for name in alone if name in os.environ}
    os.environ.update(alone)
    try:
        yield
    finally:
        for name in alone:
            os.environ.pop(name, None)
        os.environ.update(before)


def _join(threads_per_rank: int) -> Iterator[Membership]:
    """The group that the environment describes, left at the end."""
    device = find_device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(threads_per_rank)
        keep_freed_memory()
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    try:
        yield Membership(device, dist.get_rank(), dist.get_world_size())
    finally:
        try:
            while _ENGINES:
                _ENGINES.pop().destroy()  # ZeRO's hooks keep an engine, which keeps the group
        finally:
            deepspeed.comm.destroy_process_group()  # not torch's: DeepSpeed lets go of the group too


@atexit.register
def _collect_engines() -> None:
    """An engine is a cycle; where an exception ended the process, its traceback holds the engine too."""
    for name in ("last_value", "last_traceback", "last_exc"):
        setattr(sys, name, None)
    gc.collect()


def create_expert_group(expert_parallel: int) -> dist.ProcessGroup | None:
    """The ranks with which this one shares out experts, successive ones; None where each holds all. Collective.

    Raises ConfigError where ``expert_parallel`` does not divide the number of ranks.
    """
    from deepspeed.utils import groups

    world = dist.get_world_size()
    if world % expert_parallel:
        raise ConfigError(f"engine.expert_parallel={expert_parallel}: does not divide {world} ranks. Choose a divisor.")
    if expert_parallel == 1:
        return None
    name = f"ep_size_{expert_parallel}"  # what DeepSpeed calls such a group
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel)
    return groups._get_expert_parallel_group(name)


def expert_group_of(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks each of which holds a slice of what this parameter is a slice of; None where it is whole."""
    return getattr(parameter, "expert_group", None)


def build_engine(model: nn.Module, config: EngineConfig, device: torch.device) -> Any:
    """A DeepSpeed engine around ``model`` with a torch optimizer; weights are broadcast from rank 0.

    Parameters with an ``expert_group`` (shodh/model/experts.py) are slices: those of rank 0 go to the ranks that hold
    the same. Raises ConfigError where the ranks do not divide the batch, or Muon finds no matrix.
    """
    import deepspeed

    world = dist.get_world_size()
    if config.batch_size % world:
        raise ConfigError(f"engine.batch_size={config.batch_size}: {world} ranks do not divide it. Choose a multiple.")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    low_precision = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    clipping = config.gradient_clipping
    if config.zero_stage == 0:
        clipping = clipping or math.inf  # so that DeepSpeed asks for it, and gradients are looked at
    deepspeed_config = {
        "train_micro_batch_size_per_gpu": config.batch_size // world,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": clipping,
        "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": min(BUCKET, num_parameters)},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": low_precision, "dtype": "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        **config.extra,
    }
    model = model.to(device)
    slices = _mark_slices(model)
    optimizer = build_optimizer(model, config.optimizer, config.weight_decay, config.betas)
    if config.zero_stage > 0:
        _part_groups(optimizer)
    with _declared_sparse(model) if slices else nullcontext():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
    _ENGINES.add(engine)
    if config.zero_stage == 0:
        engine.clip_fp32_gradients = partial(_clip_gradients, engine, clipping)
    _create_moments(engine)
    return engine


def _mark_slices(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of which this rank holds a slice, marked so that DeepSpeed reduces over ranks with the same."""
    slices = [(parameter, group) for parameter in model.parameters() if (group := expert_group_of(parameter))]
    for parameter, group in slices:
        parameter.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
        parameter.group_name = f"ep_size_{group.size()}"  # pyright: ignore[reportAttributeAccessIssue]
    return [parameter for parameter, _ in slices]


def _part_groups(optimizer: torch.optim.Optimizer) -> None:
    """Put slices into parameter groups of their own, as ZeRO wants them, each named after its ranks."""
    for group in list(optimizer.param_groups):
        slices = [parameter for parameter in group["params"] if expert_group_of(parameter) is not None]
        if not slices:
            continue
        whole = [parameter for parameter in group["params"] if expert_group_of(parameter) is None]
        marks = {"moe": True, "name": slices[0].group_name}
        if whole:
            group["params"] = whole
            optimizer.add_param_group({**group, "params": slices, **marks})
        else:
            group.update(marks)


@contextmanager
def _declared_sparse(model: nn.Module) -> Iterator[None]:
    """A model in which DeepSpeed finds a layer of its own kind: by that alone it knows that there are expert groups."""
    from deepspeed.moe.layer import MoE

    layer = MoE.__new__(MoE)
    nn.Module.__init__(layer)
    layer.num_experts = 1
    layer.set_deepspeed_parallelism = lambda *_, **__: None  # the groups are there
    model.add_module("deepspeed_layer", layer)
    try:
        yield
    finally:
        del model.deepspeed_layer


def _clip_gradients(engine: Any, most: float) -> None:
    """Scale gradients so that their norm over all parameters, all slices of experts included, is at most ``most``.

    Where it is not finite, the step is skipped and counted, as under ZeRO: the optimizer finds no gradients. By itself
    DeepSpeed 0.19.8 steps with them without ZeRO, and takes the mean over ranks of the norms of what each holds.
    """
    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    by_group: dict[dist.ProcessGroup | None, list[Tensor]] = {}
    for parameter in parameters:
        by_group.setdefault(expert_group_of(parameter), []).append(parameter.grad)
    squares = []
    for group, gradients in by_group.items():
        squares.append(get_total_norm(gradients).square())
        if group is not None:
            dist.all_reduce(squares[-1], group=group)
    norm = torch.stack(squares).sum().sqrt()
    if norm.isfinite():
        clip_grads_with_norm_(parameters, most, norm)
        return
    engine.skipped_steps += 1
    for parameter in parameters:
        parameter.grad = None


def plain_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer, under ZeRO's wrapper where there is one."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Use ``learning_rate`` in the coming optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def set_parameter(engine: Any, parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter another value on all ranks, and let the optimizer forget what it remembers of it."""
    set_state(engine, parameter, value, {name: torch.zeros_like(value) for name in moment_names(engine, parameter)})


def set_state(engine: Any, parameter: nn.Parameter, value: Tensor, moments: Mapping[str, Tensor]) -> None:
    """A parameter's FP32 value, wherever ZeRO keeps it, and the optimizer's moments of it."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    with torch.no_grad():
        parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value)
        for name, moment in moments.items():
            if hasattr(parameter, "_hp_mapping"):
                safe_set_full_optimizer_state(parameter, moment, name)
            else:
                plain_optimizer(engine).state[parameter][name].copy_(moment)


def moment_names(engine: Any, parameter: nn.Parameter) -> tuple[str, ...]:
    """What the optimizer remembers of a parameter beside its step count; empty for a frozen one."""
    if hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2, which serve AdamW only
        return ADAMW_MOMENTS
    return tuple(name for name in plain_optimizer(engine).state.get(parameter, {}) if name != "step")


def _create_moments(engine: Any) -> None:
    """Create the optimizer's state before the first step.

    Left to itself, ZeRO 1 and 2 (DeepSpeed 0.19.8) link parameters to their moments after the first group has stepped
    and miss those of all other groups.
    """
    create_moments(plain_optimizer(engine))
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
