"""The Kubernetes job and the image that it runs: what one part says another must mean."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from shodh.training.stop_signal import EXIT_CODE, SIGNALS

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "launch/docker/Dockerfile").read_text()
CLAIM, SERVICE, JOB = yaml.safe_load_all((ROOT / "launch/kubernetes/pretrain.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
(RANKS,) = POD["containers"]
ENVIRONMENT = {variable["name"]: variable["value"] for variable in RANKS["env"]}


def instructions(name: str) -> list[str]:
    """The arguments of each Dockerfile instruction of a name."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_pods_find_the_first_one_by_the_service_s_name_and_port():
    job, service = JOB["metadata"]["name"], SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": job}
    assert SERVICE["spec"]["clusterIP"] == "None" and SERVICE["spec"]["publishNotReadyAddresses"]
    assert POD["subdomain"] == service and ENVIRONMENT["MASTER_ADDR"] == f"{job}-0.{service}"
    (offered,), (opened,) = SERVICE["spec"]["ports"], RANKS["ports"]
    assert offered["port"] == opened["containerPort"] == int(ENVIRONMENT["MASTER_PORT"])


def test_as_many_nodes_and_gpus_are_asked_for_as_ranks_are_started():
    spec = JOB["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(ENVIRONMENT["NUM_NODES"])
    assert RANKS["resources"]["limits"]["nvidia.com/gpu"] == int(ENVIRONMENT["NUM_GPUS"])


def test_each_pod_starts_the_ranks_of_its_node_of_all_nodes(tmp_path):
    launcher = tmp_path / "deepspeed"
    launcher.write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n")
    launcher.chmod(0o755)
    script = RANKS["args"][0].replace("/tmp/hostfile", str(tmp_path / "hostfile"))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "3", **ENVIRONMENT}
    done = subprocess.run([*RANKS["command"], script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arguments = done.stdout.split("\0")
    assert arguments[arguments.index("--node_rank") + 1] == "3" and "--no_ssh" in arguments
    assert arguments[arguments.index("--master_addr") + 1] == "shodh-pretrain-0.shodh-pretrain"
    assert (tmp_path / "hostfile").read_text() == "".join(
        f"shodh-pretrain-{node}.shodh-pretrain slots=8\n" for node in range(4)
    )
    for path in (argument for argument in arguments if argument.endswith((".py", ".yaml"))):
        assert (ROOT / path).is_file()


def test_a_pod_that_is_taken_away_tells_its_ranks_and_nobody_else_and_is_no_failure():
    command = RANKS["lifecycle"]["preStop"]["exec"]["command"]
    told, waited = re.findall(r"-f '([^']+)'", command[-1])
    assert told == waited and "-USR1" in command[-1] and "SIGUSR1" in {number.name for number in SIGNALS}
    script = next(word for word in shlex.split(RANKS["args"][0]) if word.startswith("launch/"))
    assert re.search(told, f"/usr/local/bin/python -u {script} --local_rank=7 configs/pretrain/cluster.yaml")
    launcher = f"python -u -m deepspeed.launcher.launch --world_info=abc --node_rank=0 {script} configs/x.yaml"
    assert not re.search(told, launcher), "the launcher would die of it"
    assert not re.search(told, " ".join(command)), "the command would kill itself"
    ignored = [rule for rule in JOB["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "Ignore"]
    codes = next(rule["onExitCodes"] for rule in ignored if "onExitCodes" in rule)
    assert codes["containerName"] == RANKS["name"] and codes["operator"] == "In"
    # the launcher ends with a rank's return code, which is less than 0 after a signal
    assert set(codes["values"]) == {EXIT_CODE, *(256 - number for number in SIGNALS)}
    assert POD["restartPolicy"] == "Never", "only then may a job have a podFailurePolicy"


def test_every_mount_is_of_a_volume_and_stands_where_the_config_writes():
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in RANKS["volumeMounts"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/shodh/stores"]]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    config = yaml.safe_load((ROOT / "configs/pretrain/cluster.yaml").read_text())
    for key in ("stores", "latents", "tokenizer", "run"):
        place = Path(RANKS["workingDir"]) / config[key]
        assert any(place.is_relative_to(mount) for mount in mounts), f"{key} would be lost with the pod"
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_image_holds_the_project_and_runs_as_the_user_that_the_job_names():
    assert instructions("WORKDIR") == [RANKS["workingDir"]]
    assert instructions("USER") == [str(POD["securityContext"]["runAsUser"])]
    assert f"PYTHONPATH={RANKS['workingDir']}" in instructions("ENV")[0].split()
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore and {line[1:] for line in ignore if line.startswith("!")} == copied
    assert {"shodh", "tokenizer", "data", "launch", "configs"} <= copied
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.parametrize("tool", ["pkill", "pgrep", "seq"])
def test_the_image_has_what_the_pod_calls(tool):
    scripts: list[Any] = [RANKS["args"][0], RANKS["lifecycle"]["preStop"]["exec"]["command"][-1]]
    assert any(tool in script for script in scripts)
    assert tool == "seq" or "procps" in instructions("RUN")[0]


def test_the_hostfile_is_one_that_deepspeed_reads():
    from deepspeed.launcher.runner import fetch_hostfile

    assert set(fetch_hostfile(str(ROOT / "launch/hostfile")).values()) == {8}
