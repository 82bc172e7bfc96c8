"""Two processes of generate_data fill one store; what they make is what one process makes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def generate(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "launch/generate_data.py", "configs/generate_data/debug.yaml", "domain=acoustics"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*call, f"folder={folder}", "acoustics.num_trajectories=3", *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_two_shards_make_the_store_of_one_process(tmp_path):
    second = generate(tmp_path / "shared", "shard=1/2").stdout
    assert "1 trajectories added, 2 trajectories are missing or damaged: run or await shard=0/2" in second
    digests = [
        re.findall(r"fwi: \d trajectories added, digest (\w{12})", generate(tmp_path / folder, *shard).stdout)
        for folder, shard in (("shared", ["shard=0/2"]), ("alone", []))
    ]
    assert len(digests[0]) == 1 and digests[0] == digests[1]


@pytest.mark.parametrize("shard", ["2/2", "one"])
def test_a_shard_that_makes_no_sense_is_refused_in_one_line(shard, tmp_path):
    done = generate(tmp_path, f"shard={shard}")
    assert done.returncode != 0 and not done.stdout
    assert f"shard={shard}: not i/n with 0 <= i < n" in done.stderr and done.stderr.count("\n") == 1
