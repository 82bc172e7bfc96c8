"""Under DeepSpeed on two ranks: a resumed run is the uninterrupted one, bit for bit, at every ZeRO stage."""

import subprocess
from pathlib import Path

import pytest
from conftest import cpu_environment, deepspeed_command

from shodh.training.engine import EngineConfig


@pytest.mark.distributed
def test_resume_is_bitwise_at_zero_0_1_2_and_state_moves_between_stages():
    script = Path(__file__).with_name("resume_under_zero.py")
    command = [*deepspeed_command(2), script]
    done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all stages resume bit for bit" in done.stdout


@pytest.mark.parametrize("key", ["batch_size", "accumulation"])
def test_empty_batches_are_refused(key):
    with pytest.raises(ValueError, match=f"{key}=0"):
        EngineConfig(**({"batch_size": 1} | {key: 0}))
