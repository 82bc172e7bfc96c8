"""A training is planned without data, launcher or GPU; what cannot be is refused in one line."""

import json
import subprocess
import sys
from pathlib import Path

import plan_run
import pytest
from conftest import cpu_environment

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = sorted((ROOT / "configs" / "plan_run").glob("*.yaml"))
DEBUG = (str(ROOT / "configs/pretrain/debug.yaml"), str(ROOT / "configs/plan_run/laptop.yaml"))


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=100)


def test_the_table_holds_the_configuration_and_the_recommendation_and_starts_no_engine():
    done = start("-X", "importtime", "launch/plan_run.py", *DEBUG)
    assert done.returncode == 0, done.stderr[-2000:]
    header, *_, recommended = done.stdout.splitlines()
    assert header.split() == ["as", "configured", "recommended"]
    parts = ("memory of each rank", "seconds of a step", "all-to-all, waited for", "GPU-hours")
    for part in (*parts, "checkpoint: training waits", "checkpoint: until written"):
        assert part in done.stdout
    assert recommended.startswith("recommended: engine.zero_stage=")
    assert "shodh.planning" in done.stderr and "deepspeed" not in done.stderr


@pytest.mark.parametrize("cluster", CLUSTERS, ids=[path.stem for path in CLUSTERS])
def test_what_every_cluster_at_hand_recommends_is_then_recommended_as_it_is(cluster, capsys):
    config = str(ROOT / "configs/pretrain/quickstart.yaml")
    sizes = ["engine.batch_size=128", "model.depth=2", "latent_shape=[8,8,8]"]
    plan_run.main([config, str(cluster), *sizes, "--json"])
    plans = json.loads(capsys.readouterr().out)
    for name in ("as_configured", "recommended"):
        assert plans[name]["step"]["compute"] > 0 and plans[name]["memory"]["activations"] > 0
    assert plans["recommended"]["step_total"] <= plans["as_configured"]["step_total"]
    plan_run.main([config, str(cluster), *sizes, *plans["settings"], "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again["as_configured"] == again["recommended"] == plans["recommended"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("cluster.gpus_per_node=0", "gpus_per_node=0: must be at least 1"),
        ("cluster.memory=8", "Did you mean cluster.memory_gigabytes?"),
        ("latent_shape=[5,4,4]", "patch=2: does not divide the latent grid (5, 4, 4)"),
        ("engine.expert_parallel=4", "engine.expert_parallel=4: does not divide both 2 ranks"),
    ],
)
def test_what_cannot_be_planned_is_refused(argument, message):
    with pytest.raises(ValueError) as caught:
        plan_run.main([*DEBUG, "model.patch=2", argument])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_cluster_without_enough_memory_and_no_cluster_at_all_get_one_line():
    done = start("launch/plan_run.py", *DEBUG, "cluster.memory_gigabytes=0.0001")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: cluster.memory_gigabytes=0.0001: no arrangement fits; the smallest")
    done = start("launch/plan_run.py", DEBUG[0])
    assert done.returncode == 1 and "Usage: launch/plan_run.py CONFIG.yaml CLUSTER.yaml" in done.stderr
