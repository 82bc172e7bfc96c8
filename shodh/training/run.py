"""A training run that can be killed or told to stop at any time: resume, train, checkpoint, track."""

import json
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shodh.config import ConfigError
from shodh.training.alarm_log import Alarm, AlarmLog
from shodh.training.checkpoint import (
    CheckpointError,
    SaveCheckpoint,
    find_newest,
    open_checkpoint,
    restore_state,
)
from shodh.training.loop import EarlyHook, Hook, LoopConfig, Objective, train
from shodh.training.stop_signal import StopOnSignal
from shodh.training.tracking import StepSize, Track, TrackingConfig


def train_resumably(
    engine: Any,
    objective: Objective,
    batches_from: Callable[[int], Generator[Any, None, None]],
    loop: LoopConfig,
    hooks: Sequence[Hook | EarlyHook],
    *,
    folder: Path,
    phase: str,
    identity: dict[str, Any],
    record: dict[str, Any],
    checkpoint_interval: int,
    tracking: TrackingConfig,
    step_size: StepSize,
) -> None:
    """Train to ``loop.schedule.num_steps`` from the newest intact checkpoint in ``folder``, or from the start.

    ``identity`` is what decides the result (sizes, objective, schedule, seed, digests of data); ``record`` is all that
    is worth knowing (the whole config). Both are stored with every checkpoint. Raises ConfigError when the folder was
    begun with another identity: the old checkpoints stay, and the message names what differs. Ranks, ZeRO stage,
    shares of the experts, threads, paths and intervals may change. SIGTERM or SIGUSR1 to any rank ends the process
    after the step (stop_signal.py).
    """
    leader = dist.get_rank() == 0
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run={folder}: is a file. Give a folder.")
    checkpoints = folder / "checkpoints" / phase
    size = dist.get_world_size()
    run = {"identity": identity, "record": record, "git_sha": read_git_sha(), "world_size": size}
    num_steps = loop.schedule.num_steps
    save = SaveCheckpoint(engine, checkpoints, checkpoint_interval, num_steps, run)
    with StopOnSignal(engine, save) as stop:
        first_step = _resume(engine, checkpoints, identity, leader)
        if first_step >= num_steps:
            _say(leader, f"{phase}: all {num_steps} steps are done ({checkpoints}/step-{first_step})")
            return
        _say(leader, f"{phase}: steps {first_step + 1} to {num_steps} -> {checkpoints}")
        stop.before_first(first_step)
        track = Track(folder, phase, tracking, first_step, num_steps, step_size)
        try:
            train(engine, objective, batches_from, loop, [*hooks, track, save, stop], first_step)
        except FloatingPointError as error:
            if leader:
                AlarmLog(folder, phase).write("raised", track.step + 1, Alarm("not finite", str(error)))
            raise
        finally:
            track.close()
            save.close()


def read_git_sha() -> str:
    """The commit of the source tree, "+" appended where it has been edited; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        sha = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "-C", root, "diff", "--quiet", "HEAD"], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return sha.stdout.strip() + ("+" if dirty.returncode else "")


def _resume(engine: Any, checkpoints: Path, identity: dict[str, Any], leader: bool) -> int:
    newest = _agree_on_newest(checkpoints, leader)
    if newest is None:
        return 0
    state, run = open_checkpoint(newest)
    differences = list(_differences(run["identity"], json.loads(json.dumps(identity))))
    if differences:
        raise ConfigError(
            f"{checkpoints}: was begun with another configuration ({'; '.join(differences[:3])}). "
            "Give another run folder, or the same configuration."
        )
    restore_state(engine, state)
    _say(leader, f"resuming from {newest}")
    return int(run["step"])


def _agree_on_newest(checkpoints: Path, leader: bool) -> Path | None:
    """What rank 0 finds, which alone reads all of it to verify its digests; CheckpointError on all ranks alike."""
    found: list[Any] = [None, None]
    if leader:
        try:
            found[0] = find_newest(checkpoints, lambda message: _say(True, f"warning: {message}"))
        except CheckpointError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, 0)
    newest, fault = found
    if fault is not None:
        raise CheckpointError(fault)
    return newest


def _differences(old: Any, new: Any, path: str = "") -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {old} -> {new}"


def _say(leader: bool, message: str) -> None:
    if leader:
        print(message, file=sys.stderr, flush=True)
