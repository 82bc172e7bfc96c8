"""The Slurm scripts, run by bash with stand-ins for Slurm's commands: ranks, requeues, jobs that wait for jobs."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from shodh.training.stop_signal import EXIT_CODE

ROOT = Path(__file__).resolve().parents[2]
SLURM = "launch/slurm"
SRUN = """
shift # --kill-on-bad-exit
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$((i % (SLURM_NTASKS / SLURM_NNODES))) "$@" & pids[i]=$!
done
worst=0
for pid in "${pids[@]}"; do wait "$pid"; code=$?; ((code > worst)) && worst=$code; done
exit $worst
"""
SCONTROL = """
case "$1" in
    show) [ "$3" = 'node[7-8]' ] && printf 'node7\\nnode8\\n' ;;
    requeue) [ "${FORBIDDEN:-0}" = 0 ] && echo "$2" >> "$LOG/requeued" ;;
esac
"""
RANK = """
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" > "$LOG/rank-$RANK"
[ "${SLOW:-0}" = 0 ] || { touch "$LOG/started"; sleep "$SLOW"; }
exit $((RANK == WORLD_SIZE - 1 ? CODE : 0))
"""
SBATCH = """
printf '%s\\0' "$@" > "$LOG/$(($(ls "$LOG" | wc -l) + 101))"
ls "$LOG" | tail -n 1
"""


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of a job of two nodes with three tasks each, and of a submission."""
    commands, log = tmp_path / "commands", tmp_path / "log"
    commands.mkdir(), log.mkdir()
    for name, script in {"srun": SRUN, "scontrol": SCONTROL, "rank": RANK, "sbatch": SBATCH}.items():
        (commands / name).write_text(f"#!/usr/bin/env bash{script}")
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "6", "SLURM_NNODES": "2"}
    own = {"PATH": f"{commands}:{os.environ['PATH']}", "LOG": str(log), "PYTHON": "rank", "CODE": "0"}
    unset = ("MASTER_ADDR", "MASTER_PORT", "RANK", "MODEL")
    return (
        {key: value for key, value in os.environ.items() if key not in unset}
        | own
        | job
        | {"SLURM_SUBMIT_DIR": str(ROOT)}
    )


def bash(script: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    call = ["bash", f"{SLURM}/{script}", *arguments]
    return subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def train(environment: dict[str, str], **changed: str) -> tuple[subprocess.CompletedProcess[str], bool]:
    """A training's end, and whether its job went back into the queue."""
    done = bash("train.sbatch", environment | changed, "launch/pretrain.py", "configs/pretrain/debug.yaml", "run=a b")
    requeued = Path(environment["LOG"]) / "requeued"
    assert not requeued.exists() or requeued.read_text() == "12345\n"
    return done, requeued.exists()


def test_every_task_is_the_rank_that_the_engine_expects_and_arguments_arrive_whole(slurm):
    done, requeued = train(slurm)
    assert done.returncode == 0 and not requeued, done.stderr
    said = [(Path(slurm["LOG"]) / f"rank-{rank}").read_text().split(maxsplit=5) for rank in range(6)]
    assert [line[:4] for line in said] == [[str(rank), str(rank % 3), "6", "node7"] for rank in range(6)]
    assert {line[4] for line in said} == {str(20000 + 12345 % 12000)}
    assert {line[5] for line in said} == {"-u launch/pretrain.py configs/pretrain/debug.yaml run=a b\n"}


@pytest.mark.parametrize("code", [EXIT_CODE, 128 + signal.SIGUSR1])
def test_a_training_that_was_told_to_stop_goes_back_into_the_queue(slurm, code):
    done, requeued = train(slurm, CODE=str(code))
    assert requeued and "back into the queue (time 1 of at most 50)" in done.stderr


@pytest.mark.parametrize("code", [1, 2, 137, 143])
def test_a_training_that_failed_ends_the_job_with_its_exit_code(slurm, code):
    done, requeued = train(slurm, CODE=str(code))
    assert not requeued and done.returncode == code
    assert f"error: training ended with exit code {code}" in done.stderr


def test_a_job_that_never_gets_done_is_not_put_back_for_ever(slurm):
    done, requeued = train(slurm, CODE="75", MAX_REQUEUES="3", SLURM_RESTART_COUNT="2")
    assert requeued and done.returncode == 0
    (Path(slurm["LOG"]) / "requeued").unlink()
    done, requeued = train(slurm, CODE="75", MAX_REQUEUES="3", SLURM_RESTART_COUNT="3")
    assert not requeued and done.returncode == 1 and "MAX_REQUEUES=3" in done.stderr


def test_a_job_that_slurm_does_not_put_back_says_how_it_continues(slurm):
    done, requeued = train(slurm, CODE="75", FORBIDDEN="1")
    assert not requeued and done.returncode == 75 and "error: Slurm does not put job 12345 back" in done.stderr


def test_the_job_s_shell_outlives_a_signal_until_training_has_stopped(slurm):
    call = ["bash", f"{SLURM}/train.sbatch", "launch/pretrain.py", "configs/pretrain/debug.yaml"]
    process = subprocess.Popen(call, cwd=ROOT, env=slurm | {"CODE": "75", "SLOW": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (Path(slurm["LOG"]) / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0 and (Path(slurm["LOG"]) / "requeued").exists()


def test_a_job_without_config_ends_in_one_line(slurm):
    done = bash("train.sbatch", slurm, "launch/pretrain.py")
    assert done.returncode == 2 and done.stderr.startswith("error: no config given.") and done.stderr.count("\n") == 1


def submitted(environment: dict[str, str]) -> list[list[str]]:
    """The arguments of each submitted job, in order."""
    return [path.read_text().split("\0")[:-1] for path in sorted(Path(environment["LOG"]).iterdir())]


def test_the_pipeline_s_jobs_wait_for_one_another_and_its_shards_fill_the_store_once(slurm):
    done = bash("pipeline.sh", slurm | {"MODEL": "debug"}, "debug", "4", "--nodes=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "stores 101, tokenizer 102, latents 103, pretrain 104, evaluate 105\n"
    stores, *others = submitted(slurm)
    assert not [argument for argument in stores if "dependency" in argument] and "--array=0-3" in stores
    for before, job in zip((101, 102, 103, 104), others, strict=True):
        assert f"--dependency=afterok:{before}" in job
    (shard,) = (argument for argument in stores if "generate_data.py" in argument)
    shares = [shlex.split(shard.replace("$SLURM_ARRAY_TASK_ID", str(i)))[-1] for i in range(4)]
    assert shares == ["shard=0/4", "shard=1/4", "shard=2/4", "shard=3/4"]
    assert "--nodes=2" in others[2] and "--nodes=2" not in others[0]
    assert others[2][-3:] == [f"{SLURM}/train.sbatch", "launch/pretrain.py", "configs/pretrain/debug.yaml"]
    assert others[3][-1].endswith("launch/evaluate_model.py configs/evaluate_model/debug.yaml run=runs/debug")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["debug"], "no size and shards given"),
        (["debug", "0"], "NUM_SHARDS=0: must be at least 1"),
        (["huge", "2"], "configs/generate_data/huge.yaml: no such file"),
    ],
)
def test_a_pipeline_that_cannot_run_submits_nothing(slurm, arguments, said):
    done = bash("pipeline.sh", slurm, *arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1 and not submitted(slurm)


def test_models_of_another_config_are_evaluated_where_they_are_written():
    written = yaml.safe_load((ROOT / "configs/pretrain/cluster.yaml").read_text())["run"]
    assert written == "runs/cluster", "pipeline.sh evaluates runs/MODEL"
