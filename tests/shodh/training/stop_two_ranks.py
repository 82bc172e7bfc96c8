"""Run by test_stop_signal.py under the DeepSpeed launcher: trainings told to stop, each beside one left alone.

stop_two_ranks.py FOLDER prints a line for what held, then leaves by a signal for good.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from shodh.training.checkpoint import SaveCheckpoint, find_fault, list_checkpoints, read_checkpoint
from shodh.training.engine import EngineConfig, build_engine, distributed
from shodh.training.loop import LoopConfig
from shodh.training.run import train_resumably
from shodh.training.schedule import ScheduleConfig
from shodh.training.stop_signal import EXIT_CODE, StopOnSignal, Stopped
from shodh.training.tracking import StepSize, TrackingConfig

NUM_STEPS, INTERVAL = 8, 5
Told = dict[tuple[int, int], signal.Signals]  # (rank, step from 1) -> what arrives between its two micro-steps


class SquareOutput:
    """Sends its own process the signals of a scenario in the midst of a step."""

    def __init__(self, rank: int, told: Told) -> None:
        self.rank, self.told = rank, dict(told)

    def begin_step(self, step):
        self.step = step + 1

    def __call__(self, engine, batch):
        number = self.told.pop((self.rank, self.step), None)
        if number is not None:
            os.kill(os.getpid(), number)
        return {"total": engine(batch).square().mean()}, None


class Keep:
    """Hook that keeps every step's loss."""

    def __init__(self):
        self.losses = {}

    def after_step(self, record):
        self.losses[record.step] = record.scalars["loss"]


def batches_from(step, group, folder):
    try:
        for micro_step in range(2 * step, 1000):
            yield torch.randn(2, 8, generator=torch.Generator().manual_seed(2 * micro_step + group.rank))
    finally:  # rank 0 takes longer to leave, as one that writes does
        if group.rank == 0:
            time.sleep(0.3)
            (folder / "closed").touch()


def make_engine(group):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4))
    return build_engine(model, EngineConfig(batch_size=4, accumulation=2, zero_stage=1), group.device)


def run(group, folder, told: Told, interval=INTERVAL):
    """The losses of one call of a training, and the code it would leave with."""
    keep, code = Keep(), 0
    if group.rank == 0:
        folder.mkdir(exist_ok=True)
        (folder / "closed").unlink(missing_ok=True)
    torch.distributed.barrier()
    schedule = ScheduleConfig(num_steps=NUM_STEPS, learning_rate=0.01, num_warmup_steps=2)
    try:
        train_resumably(
            make_engine(group),
            SquareOutput(group.rank, told),
            lambda step: batches_from(step, group, folder),
            LoopConfig(schedule=schedule),
            [keep],
            folder=folder,
            phase="pretrain",
            identity={},
            record={"config": {"seed": 0}},
            checkpoint_interval=interval,
            tracking=TrackingConfig(wandb="disabled"),
            step_size=StepSize(1),
        )
    except Stopped as stopped:
        code = stopped.code
        assert (folder / "closed").exists(), "a rank left before rank 0 had closed everything"
    torch.distributed.barrier()
    return keep.losses, code


def check_scenario(group, folder, told: Told, last_step: int, whole):
    """Stopped after ``last_step`` on all ranks with an intact checkpoint; resumed, equal to the run left alone."""
    first, code = run(group, folder, told)
    assert code == EXIT_CODE == 75 and set(first) == set(range(1, last_step + 1)), (code, first)
    checkpoints = folder / "checkpoints" / "pretrain"
    newest = checkpoints / f"step-{last_step}"
    assert newest in list_checkpoints(checkpoints) and find_fault(newest) is None
    torch.distributed.barrier()
    second, code = run(group, folder, {})
    assert code == 0 and first | second == whole and set(second) == set(range(last_step + 1, NUM_STEPS + 1))


def same_end(one: Path, other: Path):
    (a, _), (b, _) = (
        read_checkpoint(folder / "checkpoints" / "pretrain" / f"step-{NUM_STEPS}") for folder in (one, other)
    )
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def told_before_the_first_step(group, folder):
    engine = make_engine(group)
    try:
        with StopOnSignal(engine, SaveCheckpoint(engine, folder / "none", 1, NUM_STEPS, {})) as stop:
            if group.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            stop.before_first(0)
    except Stopped:
        assert not (folder / "none").exists()
    else:
        raise AssertionError("a rank trained although it was told to stop")


class TellAtTheVeryEnd:
    """Sends its process SIGTERM when the interpreter is taken apart, as a launcher may once another rank has left."""

    def __init__(self):
        self.kill, self.arguments = os.kill, (os.getpid(), signal.SIGTERM)
        sys.modules["told once more"] = self  # let go of after Python has set its own handlers back

    def __del__(self):
        self.kill(*self.arguments)


def main(folder):
    with distributed(threads_per_rank=1) as group:
        before = signal.getsignal(signal.SIGTERM)
        whole, _ = run(group, folder / "whole", {})
        assert signal.getsignal(signal.SIGTERM) is before, "a finished training still listens"
        one = {(1, 3): signal.SIGUSR1}
        both = {(0, 5): signal.SIGTERM, (1, 5): signal.SIGTERM}  # at a step that is saved anyway
        check_scenario(group, folder / "one", one, 3, whole)
        check_scenario(group, folder / "both", both, 5, whole)
        for stopped in ("one", "both"):
            same_end(folder / "whole", folder / stopped)
        told_before_the_first_step(group, folder)
        if group.rank == 0:
            print("stopped runs continue bit for bit", flush=True)
        _, code = run(group, folder / "left", {(1, 2): signal.SIGUSR1})
    TellAtTheVeryEnd()
    sys.exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
