"""A training told to stop by a signal leaves on all ranks together and loses nothing."""

import subprocess
from pathlib import Path

import pytest
from conftest import cpu_environment, deepspeed_command


@pytest.mark.distributed
def test_a_signal_to_one_rank_or_all_stops_all_with_a_checkpoint_from_which_the_run_continues_bitwise(tmp_path):
    script = Path(__file__).with_name("stop_two_ranks.py")
    command = [*deepspeed_command(2), script, tmp_path]
    done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, timeout=300)
    assert "stopped runs continue bit for bit" in done.stdout, done.stderr[-3000:]
    assert done.returncode == 75, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("stopped by")]
    assert said == [
        "stopped by SIGUSR1 at step 3; the same command continues",
        "stopped by SIGTERM at step 5; the same command continues",
        "stopped by SIGTERM at step 0; the same command continues",
        "stopped by SIGUSR1 at step 2; the same command continues",
    ]
