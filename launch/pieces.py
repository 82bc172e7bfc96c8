"""Steps run one after another for a limited time: what is done is skipped, and what is cut short continues next time.

Each step is a process that keeps its state in files. At the limit it is sent SIGUSR1, upon which it may write a
checkpoint; one that does not listen is ended by that, and loses what it did since it last wrote.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from reproduction import Step

from shodh.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
STOPPED = os.EX_TEMPFAIL  # 75, with which a training ends that was told to, once its checkpoint is written
BY_US = (-signal.SIGUSR1, -signal.SIGKILL)  # how a step ends that we told to stop and that does not listen
POLL_SECONDS = 0.1


def run_piece(steps: Sequence[Step], folder: Path, seconds: float, stop_seconds: float) -> str | None:
    """Run what is left for ``seconds``, of which ``stop_seconds`` are for stopping; where it stopped, None at the end.

    A SIGTERM or SIGUSR1 to this process ends the piece early. Raises RuntimeError for a step that fails, or that keeps
    nothing of a whole piece; ConfigError while another piece of the same folder runs.
    """
    limit, is_first = time.monotonic() + seconds - stop_seconds, True
    with _lock(folder) as lock, _listen() as told:
        for step in steps:
            if step.is_done():
                print(f"{step.name}: done", flush=True)
                continue
            before = step.describe()
            if told or time.monotonic() >= limit:
                return f"{step.name} at {before}"
            print(f"{step.name}: from {before}", flush=True)
            if _run_step(step, limit, stop_seconds, told, lock):
                if is_first and not told and step.describe() == before and not step.is_done():
                    remedy = "Raise minutes" + (", or write its checkpoints more often." if step.is_training else ".")
                    raise RuntimeError(
                        f"minutes={seconds / 60:g}: {step.name} was still at {before} after all of them. {remedy}"
                    )
                return f"{step.name} at {step.describe()}"
            if not step.is_done():
                call = " ".join(step.command)
                raise RuntimeError(f"{step.name}: ended without what it was to write. Run it by itself: {call}")
            is_first = False
    return None


def _run_step(step: Step, limit: float, stop_seconds: float, told: list[int], lock: int) -> bool:
    """Whether it was stopped before its end. Raises RuntimeError where it fails."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, *step.command]
    environment = os.environ | {"PYTHONPATH": paths}
    process = subprocess.Popen(command, env=environment, pass_fds=(lock,), start_new_session=True)
    stopping = None
    try:
        while process.poll() is None:
            now = time.monotonic()
            if stopping is None and (told or now >= limit):
                stopping = now
                process.send_signal(signal.SIGUSR1)
            elif stopping is not None and now >= stopping + stop_seconds:
                process.kill()
            time.sleep(POLL_SECONDS)
    except BaseException:  # an interrupt
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(stop_seconds)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own processes too, which may hold locks that come next
        process.wait()
    if process.returncode not in (0, STOPPED, *(() if stopping is None else BY_US)):
        raise RuntimeError(f"{step.name}: ended with code {process.returncode}, see above. The same command continues.")
    return stopping is not None or process.returncode == STOPPED


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[int]:
    """A lock that the running step holds too, so that no other piece begins while a step outlives this process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".piece.lock", "a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"run={folder}: another piece of it is running. Wait for it, or stop it.") from None
        yield stream.fileno()


@contextlib.contextmanager
def _listen() -> Iterator[list[int]]:
    """Signals that ask this process to stop, as they come."""
    told: list[int] = []
    before = {number: signal.signal(number, lambda n, _: told.append(n)) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
