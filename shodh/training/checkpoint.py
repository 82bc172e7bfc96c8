"""Checkpoints that are either complete or absent, in logical parameter space.

A checkpoint is a folder ``step-N`` with ``state.safetensors`` (full FP32 parameters, buffers and optimizer moments by
name: two for AdamW, one for Muon), ``run.json``, the resolved ``config.yaml`` that restarts the run, and a manifest of
SHA-256 digests. It is written as ``step-N.tmp``, synced, then renamed. Nothing is pickled. Because names are logical,
the number of ranks, the ZeRO stage and how ranks share out experts may change on resume.
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shodh.config import ConfigError, dump_config
from shodh.disk import sync
from shodh.training.engine import expert_group_of, moment_names, plain_optimizer, set_state
from shodh.training.loop import StepRecord

MANIFEST = "manifest.json"


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used; the message says which, why and what to do."""


def collect_state(engine: Any, memory: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, Tensor]:
    """Full FP32 parameters, moments, buffers and AdamW's step count by logical name; collective over ranks.

    On the CPU of rank 0; empty on others. Slices of experts are joined in the order of the experts. Values go into
    ``memory``, a state collected before, where there is one: to map memory anew takes longer than to copy.
    """
    leads = dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        for key, value in _full_tensors(engine, parameter).items():
            whole = _join_slices(value.detach().float(), expert_group_of(parameter))
            if leads:
                state[f"{key}/{name}"] = _copy_to_host(whole, memory.get(f"{key}/{name}"))
    if not leads:
        return state
    for name, buffer in engine.module.named_buffers():
        state[f"buffer/{name}"] = _copy_to_host(buffer, memory.get(f"buffer/{name}"))
    counts = [int(moments["step"]) for moments in plain_optimizer(engine).state.values() if "step" in moments]
    state["optimizer/step"] = torch.tensor(max(counts, default=0))  # Muon counts no steps
    return state


def restore_state(engine: Any, state: dict[str, Tensor]) -> None:
    """Inverse of ``collect_state`` on any number of ranks, ZeRO stage and share of the experts.

    Raises CheckpointError on a missing or misshapen tensor.
    """
    optimizer = plain_optimizer(engine)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            names = moment_names(engine, parameter)
            moments = {moment: _find_slice(state, f"{moment}/{name}", parameter) for moment in names}
            set_state(engine, parameter, _find_slice(state, f"parameter/{name}", parameter), moments)
        for name, buffer in engine.module.named_buffers():
            buffer.copy_(_find_slice(state, f"buffer/{name}", buffer))
        for moments in optimizer.state.values():
            if "step" in moments:
                moments["step"].fill_(float(state["optimizer/step"]))


def write_checkpoint(folder: Path, step: int, state: dict[str, Tensor], run: dict[str, Any], keep: int = 2) -> Path:
    """Commit ``step-N`` atomically and delete all but the newest ``keep``; returns its path. Call on rank 0 only.

    What writes that were killed have left is deleted first: it may be of a step that never comes again.

    Raises CheckpointError when the disk is full; older checkpoints stay as they are.
    """
    final, temporary = folder / f"step-{step}", folder / f"step-{step}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for abandoned in folder.glob("step-*.tmp"):
            shutil.rmtree(abandoned, ignore_errors=True)
        temporary.mkdir()
        save_file(state, temporary / "state.safetensors")
        (temporary / "run.json").write_text(json.dumps({"step": step, **run}, indent=1))
        (temporary / "config.yaml").write_text(dump_config(run["record"]["config"]))
        digests = {path.name: digest_file(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(digests, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint={final}: cannot be written ({error}). Free disk space; older checkpoints are untouched."
        ) from None
    for old in sorted(list_checkpoints(folder), key=checkpoint_step)[:-keep]:
        shutil.rmtree(old)
    return final


def find_newest(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every file matches its manifest; ``report`` hears of each one skipped.

    Raises CheckpointError when checkpoints exist but none is intact: training never silently starts again from 0.
    """
    candidates = sorted(list_checkpoints(folder), key=checkpoint_step, reverse=True)
    for path in candidates:
        fault = find_fault(path)
        if fault is None:
            return path
        report(f"checkpoint={path}: {fault}. Skipped; an older one is used.")
    if candidates:
        raise CheckpointError(
            f"checkpoint={folder}: none of {len(candidates)} is intact ({find_fault(candidates[0])}). "
            "Restore one from a backup, or delete the folder to start again from step 0."
        )
    return None


def read_newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State and run description of the newest intact checkpoint; raises CheckpointError when there is none."""
    newest = find_newest(folder, lambda message: print(f"warning: {message}", file=sys.stderr))
    if newest is None:
        raise CheckpointError(f"checkpoint={folder}: no checkpoint yet. Train first (see launch/).")
    return read_checkpoint(newest)


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file matches its digest."""
    try:
        digests = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, digest in digests.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if digest_file(file) != digest:
            return f"{name} is truncated or altered (its SHA-256 differs from the manifest)"
    return None


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State and run description of an intact checkpoint; raises CheckpointError otherwise."""
    if not path.is_dir():
        raise CheckpointError(f"checkpoint={path}: no such folder. Give a step-N folder.")
    fault = find_fault(path)
    if fault is not None:
        raise CheckpointError(f"checkpoint={path}: {fault}. Use another step-N folder beside it.")
    return open_checkpoint(path)


def open_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same of a checkpoint that is known to be intact; tensors are mapped, and read where they are used."""
    return load_file(path / "state.safetensors"), json.loads((path / "run.json").read_text())


def load_parameters(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put parameters and buffers of a checkpoint into a bare model (for evaluation)."""
    own = {key.split("/", 1)[1]: value for key, value in state.items() if key.startswith(("parameter/", "buffer/"))}
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(
            f"checkpoint: does not fit the model: {' '.join(str(error).split())[:200]}. Use the config that wrote it."
        ) from None


class SaveCheckpoint:
    """Hook that takes a checkpoint every ``interval`` steps and after the last one; collective over ranks.

    Training waits until the state is copied to rank 0's memory, which is kept for the next; a thread then writes it,
    one checkpoint at a time. Until it has, the newest one on disk is the one before. If it cannot, ``fault`` says why.
    """

    def __init__(self, engine: Any, folder: Path, interval: int, num_steps: int, run: dict[str, Any]) -> None:
        self.engine, self.folder, self.interval, self.num_steps, self.run = engine, folder, interval, num_steps, run
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        self._is_said = False  # that it could not be written
        self.memory: dict[str, Tensor] = {}  # of the state last taken

    def after_step(self, record: StepRecord) -> None:
        if self.is_due(record.step):
            self.save(record.step)

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is one after which a checkpoint is taken."""
        return step % self.interval == 0 or step == self.num_steps

    def save(self, step: int) -> None:
        """Take a checkpoint now, unless the one before could not be written."""
        if self._writing is not None:
            wait([self._writing])
        self.memory = collect_state(self.engine, self.memory)
        if dist.get_rank() == 0 and self.fault is None:
            self._writing = self._writer.submit(write_checkpoint, self.folder, step, self.memory, self.run)

    @property
    def is_writing(self) -> bool:
        """Whether the last one taken is not on disk yet."""
        return self._writing is not None and not self._writing.done()

    @property
    def fault(self) -> BaseException | None:
        """What kept a checkpoint from being written, on the rank that writes; None while all is well."""
        writing = self._writing
        return writing.exception() if writing is not None and writing.done() else None

    def wait(self) -> None:
        """Until the last one taken is written; raises CheckpointError, once, where it could not be."""
        if self._writing is not None and not self._is_said:
            self._is_said = self._writing.exception() is not None
            self._writing.result()

    def close(self) -> None:
        """End the thread when all is written; raises CheckpointError where it could not be and nobody has said so."""
        self._writer.shutdown()
        self.wait()


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints in a folder, in no order."""
    return [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]


def checkpoint_step(path: Path) -> int:
    """The N of a folder ``step-N``."""
    return int(path.name.removeprefix("step-"))


def digest_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_slice(state: dict[str, Tensor], key: str, like: Tensor) -> Tensor:
    """What a rank holds of a tensor, on its device: all of it, or its experts' slice."""
    group = expert_group_of(like)
    shape = like.shape if group is None else (len(like) * group.size(), *like.shape[1:])
    if key not in state or state[key].shape != shape:
        found = tuple(state[key].shape) if key in state else "nothing"
        raise CheckpointError(
            f"checkpoint: {key} should have shape {tuple(shape)}, found {found}. Use the config that wrote it."
        )
    return (state[key] if group is None else state[key].chunk(group.size())[group.rank()]).to(like.device)


def _join_slices(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The whole of which ranks hold slices, in rank 0's group; other groups hold the same and need not join it."""
    if group is None or dist.get_global_rank(group, 0) != 0:
        return values
    whole = values.new_empty(len(values) * group.size(), *values.shape[1:])
    dist.all_gather_into_tensor(whole, values.contiguous(), group=group)
    return whole


def _copy_to_host(values: Tensor, memory: Tensor | None) -> Tensor:
    """Values as they are now, whatever training does to them next."""
    if memory is None:
        return values.detach().to("cpu", copy=True).contiguous()
    return memory.copy_(values.detach())


def _full_tensors(engine: Any, parameter: nn.Parameter) -> Mapping[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not hasattr(parameter, "_hp_mapping"):
        moments = plain_optimizer(engine).state.get(parameter, {})
        return {"parameter": parameter} | {moment: moments[moment] for moment in moment_names(engine, parameter)}
    tensors: dict[str, Any] = {"parameter": safe_get_full_fp32_param(parameter)}
    for moment in moment_names(engine, parameter):
        tensors[moment] = safe_get_full_optimizer_state(parameter, moment)
    return tensors
