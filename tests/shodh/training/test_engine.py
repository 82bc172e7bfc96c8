"""Under DeepSpeed: a resumed run is the uninterrupted one, bit for bit, at every ZeRO stage and with Muon."""

import subprocess
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


@pytest.mark.parametrize("stage", [1, 2])
def test_muon_is_refused_where_zero_flattens_the_matrices(stage):
    with pytest.raises(ValueError, match=f"zero_stage={stage}: .*optimizer=muon.* Set zero_stage=0") as caught:
        EngineConfig(batch_size=1, optimizer="muon", zero_stage=stage)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["batch_size", "accumulation"])
def test_empty_batches_are_refused(key):
    with pytest.raises(ValueError, match=f"{key}=0"):
        replace(EngineConfig(batch_size=1), **{key: 0})
