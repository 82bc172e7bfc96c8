"""Under DeepSpeed: a resumed run is the uninterrupted one, bit for bit, at every ZeRO stage and with Muon."""

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import cpu_environment, deepspeed_command
from torch import nn

from shodh.training.engine import EngineConfig, build_engine, distributed, set_learning_rate


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


THREADS = """
import atexit, sys
from pathlib import Path
import torch

def tell_threads():
    names = []
    for file in Path("/proc/self/task").glob("*/comm"):
        try:
            names.append(file.read_text().strip())
        except OSError:  # it has ended
            pass
    print(names)

atexit.register(tell_threads)
from shodh.training.engine import EngineConfig, build_engine, distributed

def main(stage, fail):
    with distributed(threads_per_rank=1) as group:
        model = torch.nn.Linear(4, 4)
        engine = build_engine(model, EngineConfig(batch_size=4, zero_stage=stage), group.device)
        engine.backward(engine(torch.randn(4, 4)).sum())
        engine.step()
        tell_threads()
        assert not fail, "provoked"

main(int(sys.argv[1]), sys.argv[2] == "True")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize(("stage", "fails"), [(0, False), (1, False), (2, False), (1, True)])
def test_no_thread_of_the_process_group_outlives_it_into_the_end_of_the_interpreter(stage, fails):
    """One that does aborts the process now and then: "terminate called without an active exception"."""
    command = [sys.executable, "-c", THREADS, str(stage), str(fails)]
    done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == fails and ("AssertionError: provoked" in done.stderr) == fails, done.stderr[-3000:]
    inside, at_exit = done.stdout.splitlines()[-2:]
    assert "gloo" in inside and "gloo" not in at_exit and "tcpstore" not in at_exit, (inside, at_exit)


def test_processes_started_after_a_group_of_one_do_not_inherit_its_rank_and_port(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")  # somebody else's
    with pytest.raises(KeyError, match="provoked"), distributed(threads_per_rank=1):
        assert os.environ["RANK"] == "0" and os.environ["MASTER_PORT"] != "1"
        raise KeyError("provoked")
    assert "RANK" not in os.environ and os.environ["MASTER_PORT"] == "1"


FAULTS = """
import resource, torch
from shodh.training.engine import distributed

def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).sum()  # 64 MiB, 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = min(count_faults() for _ in range(5))
with distributed(threads_per_rank=1):
    print(outside, min(count_faults() for _ in range(50)))  # holes have to become large enough first
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_arrays_of_a_training_step_do_not_map_their_memory_anew():
    done = subprocess.run([sys.executable, "-c", FAULTS], env=cpu_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    outside, inside = map(int, done.stdout.split()[-2:])
    assert inside < outside / 10 or outside < 100, "huge pages may hide the difference, never reverse it"


@pytest.mark.parametrize("stage", [1, 2])
def test_muon_is_refused_where_zero_flattens_the_matrices(stage):
    with pytest.raises(ValueError, match=f"zero_stage={stage}: .*optimizer=muon.* Set zero_stage=0") as caught:
        EngineConfig(batch_size=1, optimizer="muon", zero_stage=stage)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # of torch itself, which ZeRO imports
@pytest.mark.parametrize(("stage", "clipping"), [(0, 1.0), (0, 0.0), (1, 1.0), (2, 0.0)])
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(stage, clipping):
    config = EngineConfig(batch_size=4, zero_stage=stage, gradient_clipping=clipping)
    with distributed(threads_per_rank=1) as group:
        model = nn.Linear(4, 4)
        engine = build_engine(model, config, group.device)
        set_learning_rate(engine, 0.1)

        def step(factor: float) -> torch.Tensor:
            engine.backward((engine(torch.ones(4, 4)) * factor).sum())
            engine.step()
            return model.weight.detach().clone()

        before = step(1.0)
        assert torch.equal(step(float("nan")), before) and engine.skipped_steps == 1
        assert not torch.equal(step(1.0), before) and engine.skipped_steps == 1


@pytest.mark.parametrize("key", ["batch_size", "accumulation"])
def test_empty_batches_are_refused(key):
    with pytest.raises(ValueError, match=f"{key}=0"):
        replace(EngineConfig(batch_size=1), **{key: 0})
