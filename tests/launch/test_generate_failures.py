"""A domain that fails is named at once, and the others are finished."""

import os
import subprocess
import sys
from pathlib import Path

from data.layout import check

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
folder: {folder}
num_test: 1
num_processes: 1
open_channel: {{resolution: 16, num_trajectories: 2, num_snapshots: 2, friction_reynolds: [1.0e+30, 1.0e+30]}}
acoustics: {{resolution: 16, num_trajectories: 2, num_snapshots: 2}}
"""


def test_a_domain_that_fails_is_told_before_the_others_finish(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path / "stores"))
    done = subprocess.run(
        [sys.executable, "launch/generate_data.py", str(tmp_path / "config.yaml")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    failed = done.stdout.index("error: open_channel: open_channel trajectory 0: blew up by t = -9")
    finished = done.stdout.index("fwi: 2 trajectories added")
    assert failed < finished and done.stdout.count("error:") == 1
    assert check(tmp_path / "stores/fwi") == []
