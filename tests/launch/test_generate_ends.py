"""However generate_data ends, its workers end with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60  # s to import PyTorch and a simulator on a busy core


def children_of(parent: int) -> set[int]:
    """Processes whose parent is this one, by /proc; those that were not waited for do not count."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, its_parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
            if int(its_parent) == parent and state != "Z":
                found.add(int(folder.name))
    return found


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_when_the_parent_is_ended(end, tmp_path):
    call = [sys.executable, "launch/generate_data.py", "configs/generate_data/new_physics.yaml", "domain=taylor_green"]
    endless = ["taylor_green.resolution=32", "taylor_green.num_trajectories=400", f"folder={tmp_path}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w") as said:
        parent = subprocess.Popen([*call, *endless], cwd=ROOT, env=environment, stdout=said, stderr=said)
    children: set[int] = set()
    try:
        deadline = time.monotonic() + PATIENCE
        while not any(tmp_path.rglob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.1)
        children = children_of(parent.pid)
        assert children, (tmp_path / "said").read_text()
        parent.send_signal(end)
        assert parent.wait(10) == -end
        while any(map(is_running, children)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(is_running, children))
    finally:
        for child in children | children_of(parent.pid):  # those found before and since
            if is_running(child):
                os.kill(child, signal.SIGKILL)
        parent.kill()
        parent.wait()
