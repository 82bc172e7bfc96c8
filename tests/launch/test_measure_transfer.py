"""The whole comparison at debug size: killed at any time it continues, to the very figures of an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import cpu_environment

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["variants=[shodh,solo,oracle]", "seeds=[0,1]", "loop.schedule.num_steps=12", "checkpoint_interval=2"]

pytestmark = pytest.mark.slow


def command(folder: Path, verb: str, *overrides: str) -> list[str]:
    """A launch script at debug size with all its paths below ``folder``."""
    stores, tokenizer = f"stores={folder}/stores", f"tokenizer={folder}/run/tokenizer.safetensors"
    paths = {
        "generate_data": [f"folder={folder}/stores"],
        "train_tokenizer": [stores, f"run={folder}/run"],
        "cache_latents": [stores, tokenizer, f"latents={folder}/latents"],
        "measure_transfer": [stores, tokenizer, f"latents={folder}/latents"],
    }
    return [sys.executable, f"launch/{verb}.py", f"configs/{verb}/debug.yaml", *paths[verb], *overrides]


def launch(call: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(call, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("transfer")
    for verb in ("generate_data", "train_tokenizer", "cache_latents"):
        done = launch(command(folder, verb))
        assert done.returncode == 0, f"{verb}: {done.stderr[-3000:]}"
    return folder


@pytest.fixture(scope="module")
def measured(prepared) -> Path:
    """A comparison that nobody interrupted."""
    done = launch(command(prepared, "measure_transfer", f"run={prepared}/whole", *SMALL))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Is Shodh worse than any of them?" in done.stdout
    return prepared / "whole"


def read_figures(run: Path) -> dict[str, dict]:
    """What was measured of each model, without what time it took."""
    results = {path.parent.name: json.loads(path.read_text()) for path in run.glob("*/result.json")}
    return {name: {key: found[key] for key in ("domains", "routing", "gates")} for name, found in results.items()}


def test_every_model_is_measured_on_its_domains_and_all_files_are_there(measured):
    figures = read_figures(measured)
    solo = {f"solo_{domain}-{seed}" for domain in ("fwi", "open_channel", "porous_media") for seed in (0, 1)}
    assert set(figures) == solo | {f"{variant}-{seed}" for variant in ("shodh", "oracle") for seed in (0, 1)}
    assert list(figures["solo_fwi-1"]["domains"]) == ["fwi"] and len(figures["shodh-0"]["domains"]) == 3
    for block in figures["oracle-0"]["domains"].values():
        assert block["latent_mse_over_persistence"] > 0 and block["2-20"]["vrmse"] > 0 and block["20"]["vrmse"] is None
    for layer in figures["oracle-1"]["routing"]["layers"]:
        assert layer["purity"] == 1.0 and layer["dead_experts"] == []
    summary = json.loads((measured / "transfer.json").read_text())
    assert set(summary["shodh_over"]) == {"solo", "oracle"} and summary["seeds"] == [0, 1]
    assert (measured / "transfer.png").stat().st_size > 10_000 and (measured / "transfer.md").is_file()


def test_killed_it_leaves_no_process_continues_and_ends_with_the_same_figures(prepared, measured, tmp_path):
    call = command(prepared, "measure_transfer", f"run={tmp_path}/killed", *SMALL)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(call, cwd=ROOT, env=cpu_environment(), stdout=log, stderr=log)
        deadline = time.monotonic() + 400
        while not any((tmp_path / "killed").glob("*/result.json")):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*/result.json")}
    assert 1 <= len(kept) < 10, "it was not killed midway"
    _wait_until_nothing_is_written(tmp_path / "killed")
    done = launch(call)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items()), "it measured a model again"
    assert read_figures(tmp_path / "killed") == read_figures(measured)


def test_second_call_measures_nothing_and_prints_the_same_table(prepared, measured):
    before, table = sorted(measured.rglob("*/*")), (measured / "transfer.md").read_text()
    done = launch(command(prepared, "measure_transfer", f"run={measured}", *SMALL))
    assert done.returncode == 0 and "10 of 10 models are measured; to do: -" in done.stdout
    assert sorted(measured.rglob("*/*")) == before and (measured / "transfer.md").read_text() == table


def test_models_that_fail_are_named_with_their_reason_and_the_others_go_on(prepared, measured, tmp_path):
    begun = tmp_path / "run" / "oracle-0"
    begun.parent.mkdir()
    begun.symlink_to(measured / "oracle-0")  # of another learning rate
    changed = [*SMALL, "loop.schedule.learning_rate=5e-4", "variants=[shodh,oracle]", "seeds=[0]"]
    done = launch(command(prepared, "measure_transfer", f"run={tmp_path}/run", *changed))
    assert done.returncode == 1 and (tmp_path / "run" / "shodh-0" / "result.json").is_file()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "1 of 2 models failed (oracle-0: ConfigError" in line and "learning_rate: 0.001 -> 0.0005" in line


@pytest.mark.parametrize(
    ("override", "said"),
    [("engine.batch_size=7", "3 domains do not divide it"), ("latents=/nowhere", "/nowhere"), ("sedes=[0]", "seeds?")],
)
def test_bad_input_ends_in_one_line_before_anything_is_trained(prepared, tmp_path, override, said):
    done = launch(command(prepared, "measure_transfer", f"run={tmp_path}/run", override))
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and len(lines) == 1 and said in lines[0] and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def _wait_until_nothing_is_written(folder: Path) -> None:
    """Workers that outlived their parent would write on."""
    deadline, before = time.monotonic() + 120, None
    while before != (now := {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.exists()}):
        assert time.monotonic() < deadline, "workers outlived their parent"
        before = now
        time.sleep(10)
