"""Workers do every job once, survive those that fail or die, and end with their parent."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from workers import run_jobs

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
WORKER = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, {launch!r})
from workers import keep_answers, serve
answers = keep_answers()
print("libraries say things")
folder = Path({folder!r})

def work(name):
    print("at work on", name, flush=True)
    if name == "fails":
        raise ValueError("width=3: odd. Change it.")
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "leaves":
        threading.Timer(0.1, os._exit, [3]).start()
    if name == "sleeps":
        (folder / "asleep").write_text(str(os.getpid()))
        time.sleep(600)
    (folder / f"{{name}}.done").write_text(str(os.getpid()))

serve(answers, work, lambda name: folder / f"{{name}}.log")
"""


@pytest.fixture
def command(tmp_path) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(launch=str(LAUNCH), folder=str(tmp_path)))
    return [sys.executable, str(script)]


def do(command: list[str], folder: Path, names: list[str], num_workers: int = 2) -> dict[str, str | None]:
    ends: dict[str, str | None] = {}
    logs = {name: folder / f"{name}.log" for name in names}
    run_jobs(command, logs, num_workers, folder, lambda name, failure: ends.update({name: failure}))
    return ends


def test_all_jobs_are_done_by_few_processes_and_each_has_its_log(command, tmp_path):
    names = [f"job{i}" for i in range(6)]
    assert do(command, tmp_path, names) == dict.fromkeys(names)
    assert len({(tmp_path / f"{name}.done").read_text() for name in names}) <= 2
    assert all((tmp_path / f"{name}.log").read_text() == f"at work on {name}\n" for name in names)


def test_a_job_that_fails_or_dies_is_named_with_its_reason_and_the_others_go_on(command, tmp_path):
    ends = do(command, tmp_path, ["first", "fails", "dies", "last"], num_workers=1)
    assert list(ends) == ["first", "fails", "dies", "last"]
    assert ends["first"] is None and ends["last"] is None and (tmp_path / "last.done").is_file()
    assert ends["fails"] == "ValueError: width=3: odd. Change it."
    assert "Traceback" in (tmp_path / "fails.log").read_text()
    assert ends["dies"] == "its process ended with code -9: at work on dies"


def test_a_worker_that_died_between_two_jobs_is_started_again(command, tmp_path):
    ends = {}

    def wait_for_death(name: str, failure: str | None) -> None:
        ends[name] = failure
        time.sleep(1.0)

    names = ["leaves", "next"]
    run_jobs(command, {name: tmp_path / f"{name}.log" for name in names}, 1, tmp_path, wait_for_death)
    assert ends == dict.fromkeys(names)
    first, second = ((tmp_path / f"{name}.done").read_text() for name in names)
    assert first != second


def test_a_worker_that_cannot_start_fails_its_jobs_with_what_it_said(tmp_path):
    broken = [sys.executable, "-c", "import sys; sys.exit('error: no data')"]
    assert do(broken, tmp_path, ["one", "two"]) == dict.fromkeys(
        ["one", "two"], "its process ended with code 1: error: no data"
    )


def test_no_jobs_start_no_process(tmp_path):
    assert do(["/nowhere/no-such-program"], tmp_path, []) == {}


def test_workers_die_with_a_parent_that_is_killed(command, tmp_path):
    parent = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(LAUNCH)!r})
        from pathlib import Path
        from workers import run_jobs
        run_jobs({command!r}, {{"sleeps": Path({str(tmp_path)!r}) / "log"}}, 1, Path({str(tmp_path)!r}), print)
    """)
    process = subprocess.Popen([sys.executable, "-c", parent])
    worker = int(_wait_for(tmp_path / "asleep"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while _is_running(worker):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def _wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.05)
    return path.read_text()


def _is_running(process: int) -> bool:
    """A zombie that nobody has waited for does not run."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
