"""Jobs done by processes that start once and take one job after another, as starting torch and DeepSpeed takes seconds.

A worker reads names of jobs from its standard input and answers each in a line. It ends with its parent, however that
ends, and what a job prints goes to the job's log.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

Answer = str | None  # why a job failed, in one line


def keep_answers() -> TextIO:
    """Standard output for answers alone: whatever else is printed from now on goes where errors go."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(answers: TextIO, work: Callable[[str], object], find_log: Callable[[str], Path]) -> None:
    """Do the jobs whose names arrive; what one raises is written to its log and answered, and the next is done."""
    names: queue.Queue[str | None] = queue.Queue()
    busy = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            busy.set()
            names.put(line.strip())
        if busy.is_set():
            os._exit(1)  # the parent is gone; checkpoints are whole at any time
        names.put(None)

    threading.Thread(target=listen, daemon=True).start()
    for name in iter(names.get, None):
        _print_to(find_log(name))
        failure = None
        try:
            work(name)
        except Exception as error:  # of any kind: the other jobs go on
            traceback.print_exc()
            failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
        busy.clear()
        print(json.dumps({"failure": failure}), file=answers, flush=True)


def run_jobs(
    command: Sequence[str],
    logs: Mapping[str, Path],
    num_workers: int,
    folder: Path,
    on_end: Callable[[str, Answer], object],
) -> None:
    """Do the jobs in order, ``num_workers`` at a time, each by a process of ``command``; ``logs`` is each one's log.

    ``on_end`` hears of each, and why it failed where it did. Workers are killed with whatever ends this early.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in logs:
        waiting.put(name)
    workers = [_Worker(command, folder / f"worker-{number}.log") for number in range(min(num_workers, len(logs)))]
    speaking = threading.Lock()

    def keep_busy(worker: _Worker) -> None:
        while (name := _next(waiting)) is not None:
            failure = worker.do(name, logs[name])
            with speaking:
                on_end(name, failure)

    with ThreadPoolExecutor(len(workers) or 1) as pool:
        try:
            for done in [pool.submit(keep_busy, worker) for worker in workers]:
                done.result()
        finally:
            while _next(waiting) is not None:
                pass
            for worker in workers:
                worker.end()


class _Worker:
    """One process, started at its first job and again after a death."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = list(command), log
        self.process: subprocess.Popen[str] | None = None

    def do(self, name: str, log: Path) -> Answer:
        """Have a job done; why it failed, if it did."""
        if self.process is not None and self.process.poll() is not None:  # died between two jobs
            self.end()
        process = self.process = self.process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(name + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        if answer:
            return json.loads(answer)["failure"]
        code = self.end()
        last = [line for path in (log, self.log) for line in _read_tail(path)] or ["nothing in its log"]
        return f"its process ended with code {code}: {last[0]}"

    def end(self) -> int | None:
        """Have it ended, at once if at work; the code that it ended with."""
        process, self.process = self.process, None
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # nobody reads any more what it was still to be told
                if pipe is not None:
                    pipe.close()
        return process.wait()

    def _start(self) -> subprocess.Popen[str]:
        outer = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        with self.log.open("w") as log:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # a Ctrl-C is the parent's to act on
                env=outer | {"OMP_NUM_THREADS": "1"},
            )


def _next(waiting: "queue.SimpleQueue[str]") -> str | None:
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return None


def _print_to(log: Path) -> None:
    """Send standard output and error, those of libraries too, to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _read_tail(log: Path) -> list[str]:
    """The last line of a log, if it has any."""
    return log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()[-1:] if log.is_file() else []
