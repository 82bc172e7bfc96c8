"""Under DeepSpeed: a resumed run is the uninterrupted one, bit for bit, at every ZeRO stage and with Muon."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import cpu_environment, deepspeed_command

from shodh.training.engine import EngineConfig


def run_ranks(num_ranks: int, folder: Path) -> str:
    script = Path(__file__).with_name("resume_under_zero.py")
    command = [*deepspeed_command(num_ranks), script, folder]
    done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.distributed
def test_resume_is_bitwise_at_zero_0_1_2_and_with_muon_and_state_moves_between_stages_and_world_sizes(tmp_path):
    assert "all stages resume bit for bit" in run_ranks(2, tmp_path)
    assert "one rank goes on where two ranks stopped" in run_ranks(1, tmp_path)


THREADS_AT_EXIT = """
import atexit, sys
from pathlib import Path
atexit.register(lambda: print([name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]))
import torch
from shodh.training.engine import EngineConfig, build_engine, distributed

def main():
    with distributed(threads_per_rank=1) as group:
        model = torch.nn.Linear(4, 4)
        engine = build_engine(model, EngineConfig(batch_size=4, zero_stage=int(sys.argv[1])), group.device)
        engine.backward(engine(torch.randn(4, 4)).sum())
        engine.step()

main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_no_thread_of_the_process_group_outlives_it_into_the_end_of_the_interpreter(stage):
    """One that does aborts the process now and then: "terminate called without an active exception"."""
    command = [sys.executable, "-c", THREADS_AT_EXIT, str(stage)]
    done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    threads = done.stdout.splitlines()[-1]
    assert "gloo" not in threads and "tcpstore" not in threads, threads


@pytest.mark.parametrize("stage", [1, 2])
def test_muon_is_refused_where_zero_flattens_the_matrices(stage):
    with pytest.raises(ValueError, match=f"zero_stage={stage}: .*optimizer=muon.* Set zero_stage=0") as caught:
        EngineConfig(batch_size=1, optimizer="muon", zero_stage=stage)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["batch_size", "accumulation"])
def test_empty_batches_are_refused(key):
    with pytest.raises(ValueError, match=f"{key}=0"):
        replace(EngineConfig(batch_size=1), **{key: 0})
