"""Ends that lose nothing: told by a signal, all ranks leave after the same step with its checkpoint written.

Schedulers send SIGTERM or SIGUSR1 some time before they take a job's machines away. Whichever rank hears it, all leave
together: launchers end the other ranks once one has left, so none may go before rank 0 has written everything. Likewise
where a loss is not finite; and where rank 0 cannot write, all must learn of it, or they would wait for it.
"""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

import torch

from shodh.training.checkpoint import CheckpointError, SaveCheckpoint
from shodh.training.loop import StepRecord

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = os.EX_TEMPFAIL  # 75: not done, and nothing wrong; the same command continues
FAULT = 255  # in the place of a signal's number: a checkpoint could not be written


class Stopped(SystemExit):
    """Training has left early. Ends the process with EXIT_CODE; no launch script need know of it."""


class StopOnSignal:
    """Hook that raises Stopped on all ranks after the step in which any of them was told to stop; comes after ``save``.

    Signals are heard while it is entered as a context. On leaving that with Stopped, which is when everything that
    writes must have been closed, ranks wait for one another; from then on the signals are ignored, as launchers send
    them to all other ranks once one has left. Costs a step one reduction of a byte.
    """

    def __init__(self, engine: Any, save: SaveCheckpoint) -> None:
        self.engine, self.save = engine, save
        self.heard = 0  # number of the last signal to this rank
        self.told, self.step = 0, 0  # of the stop that all ranks agreed on
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        self.before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None or isinstance(error, (Stopped, FloatingPointError)):  # which all ranks meet alike
            torch.distributed.barrier()
        if not isinstance(error, Stopped):
            for number, handler in self.before.items():
                signal.signal(number, handler)
            return
        for number in SIGNALS:  # not by a handler of ours, which an interpreter that ends sets back to what kills it
            signal.signal(number, signal.SIG_IGN)
        if torch.distributed.get_rank() == 0:
            name = signal.Signals(self.told).name
            print(f"stopped by {name} at step {self.step}; the same command continues", file=sys.stderr, flush=True)

    def before_first(self, step: int) -> None:
        """Raise Stopped if any rank was told to stop before training began after ``step``; collective over ranks."""
        if self._agree(step):
            raise Stopped(EXIT_CODE)

    def after_step(self, record: StepRecord) -> None:
        if not self._agree(record.step):
            return
        if not self.save.is_due(record.step):
            self.save.save(record.step)
        raise Stopped(EXIT_CODE)

    def _agree(self, step: int) -> bool:
        """Whether any rank was told; raises CheckpointError on all of them where a checkpoint could not be written."""
        own = self.heard if self.save.fault is None else FAULT
        told = torch.tensor([own], dtype=torch.uint8, device=self.engine.device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        self.told, self.step = int(told), step
        if self.told == FAULT:
            self.save.wait()  # raises on the rank that writes
            raise CheckpointError("checkpoint: rank 0 could not write it. See what it says.")
        return self.told > 0

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = number
