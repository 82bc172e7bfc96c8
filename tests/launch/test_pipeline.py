"""The whole path at debug size: every launch script runs, survives SIGKILL, and refuses bad input in one line."""

import doctest
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import cpu_environment, deepspeed_command

from data.latents import open_latents
from shodh.model.pretrained import from_pretrained
from tokenizer.export import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("fwi", "open_channel", "porous_media")
LONG = ["loop.schedule.num_steps=40", "checkpoint_interval=5", "measure_interval=20"]  # long enough to be killed
SHARED = [*LONG, "engine.expert_parallel=2"]  # by two ranks


def command(script: str, folder: Path, *overrides: str, ranks: int = 0) -> list[str]:
    verb = script.removesuffix(".py")
    starter = deepspeed_command(ranks) if ranks else [sys.executable]
    paths = {
        "generate_data": [f"folder={folder}/stores"],
        "train_tokenizer": [f"stores={folder}/stores", f"run={folder}/run"],
        "cache_latents": [f"stores={folder}/stores", f"tokenizer={folder}/run/tokenizer.safetensors"],
        "pretrain": [f"stores={folder}/stores", f"tokenizer={folder}/run/tokenizer.safetensors", f"run={folder}/run"],
    }
    paths["evaluate_model"] = paths["pretrain"]
    latents = [] if verb in ("generate_data", "train_tokenizer") else [f"latents={folder}/run/latents"]
    return [*starter, f"launch/{script}", f"configs/{verb}/debug.yaml", *paths[verb], *latents, *overrides]


def launch(script: str, folder: Path, *overrides: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    call = command(script, folder, *overrides, ranks=ranks)
    return subprocess.run(call, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=400)


def losses(run: Path, phase: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if is_whole(line)]
    return [(line["step"], line["loss"]) for line in lines if line["phase"] == phase]


def is_whole(line: str) -> bool:
    """A kill can tear the line that was being written."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Stores, tokenizer and latents at debug size, made by the launch scripts themselves."""
    folder = tmp_path_factory.mktemp("pipeline")
    for script, ranks in (("generate_data.py", 0), ("train_tokenizer.py", 2), ("cache_latents.py", 0)):
        done = launch(script, folder, ranks=ranks)
        assert done.returncode == 0, f"{script}: {done.stderr[-3000:]}"
    return folder


@pytest.fixture(scope="module")
def pretrained(prepared) -> Path:
    done = launch("pretrain.py", prepared, *SHARED, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return prepared


@pytest.fixture(scope="module")
def exported(pretrained) -> Path:
    """The one file of the run; what reads it needs no other tokenizer and no checkpoint."""
    file = pretrained / "exported" / "shodh.safetensors"
    python, _, *config = command("evaluate_model.py", pretrained)
    call = [python, "launch/export_model.py", config[0], str(file), *config[1:]]
    done = subprocess.run(call, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "after step 40" in done.stdout, done.stderr[-3000:]
    return file


@pytest.mark.distributed
def test_killed_pretraining_resumes_and_its_losses_are_bitwise_those_of_an_uninterrupted_run(pretrained, tmp_path):
    whole = losses(pretrained / "run", "pretrain")
    assert [step for step, _ in whole] == list(range(1, 41))
    call = command("pretrain.py", pretrained, *SHARED, f"run={tmp_path}/killed", ranks=2)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            call, cwd=ROOT, env=cpu_environment(), stdout=log, stderr=log, start_new_session=True
        )
        metrics = tmp_path / "killed" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 12:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    killed = losses(tmp_path / "killed", "pretrain")
    assert 12 <= len(killed) < 40, "the run was not killed midway"
    done = launch("pretrain.py", pretrained, *SHARED, f"run={tmp_path}/killed", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stderr
    both = losses(tmp_path / "killed", "pretrain")
    resumed = both[len(killed) :]
    assert resumed[0][0] > 1, "it started again from step 0"
    assert killed == whole[: len(killed)]
    assert resumed == whole[resumed[0][0] - 1 :]


def test_second_call_says_that_all_is_done_and_trains_nothing(pretrained):
    before = (pretrained / "run" / "metrics.jsonl").read_bytes()
    done = launch("pretrain.py", pretrained, *LONG)
    assert done.returncode == 0 and "all 40 steps are done" in done.stderr
    assert (pretrained / "run" / "metrics.jsonl").read_bytes() == before


def test_evaluation_of_an_exported_file_writes_every_promised_figure_and_exact_zeros(exported, pretrained):
    done = launch("evaluate_model.py", pretrained, f"exported={exported}", "tokenizer=/nowhere/t.safetensors")
    assert done.returncode == 0, done.stderr[-3000:]
    evaluation = json.loads((pretrained / "run" / "evaluation.json").read_text())
    assert evaluation["run"]["step"] == 40 and set(evaluation["run"]["data_digests"]) == set(DOMAINS)
    assert set(evaluation["domains"]) == set(DOMAINS)
    for name, block in evaluation["domains"].items():
        conserved = block["curl" if name == "fwi" else "divergence"]
        keys = {"max_abs", "rms", "rms_over_rms_gradient", "operator", "dtype", "mismatched_operator_rms"}
        assert keys <= set(conserved)
        assert conserved["max_abs"] == 0.0 and conserved["mismatched_operator_rms"] > 0
        if name != "fwi":
            assert conserved["mean_flow"] > 0
        assert {"velocity", "pressure"} <= set(block["tokenizer"]["vrmse"])
        assert block["latent_mse"] > 0 and block["decoded_mse"] > 0
        assert set(block["rollout"]) == {"model", "linear", "persistence", "decoded_truth"}
        for forecast in block["rollout"].values():
            assert {"1", "2-20", "20", "21-60"} == set(forecast["vrmse"])
            assert forecast["vrmse"]["2-20"] > 0 and forecast["vrmse"]["20"] is None  # 3 steps
            assert len(forecast["vrmse_per_step"]) == 3 and len(forecast["octave_energy_ratio"]["1"]) > 1
            assert (forecast["permeability"] is None) == (name != "porous_media")
        assert block["linear_latent_mse"] > 0
        assert block["reconstruction"]["vrmse"]["velocity"] == pytest.approx(block["tokenizer"]["vrmse"]["velocity"])
        assert block["reconstruction"]["highest_octave_energy_ratio"] > 0
        assert (block["reconstruction"]["permeability"] is None) == (name != "porous_media")
        assert block["latents"]["smoothness"]["velocity"]["largest_gain"] > 0 and block["latents"]["round_trip"] > 0
        assert len(block["routing"]["load"]) == 2 and {"concentration", "mutual_information"} <= set(block["routing"])
        assert all(abs(sum(load) - 1) < 1e-6 for load in block["routing"]["load"])
        assert name in done.stdout
    report = (pretrained / "run" / "report.html").read_text()
    assert report.count("data:image/png;base64,") >= 9 and "http://" not in report


def test_example_of_from_pretrained_runs_on_the_file_that_export_model_wrote(
    exported, pretrained, tmp_path, monkeypatch
):
    for name, place in (("runs/quickstart", exported.parent), ("stores/quickstart", pretrained / "stores")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(place)
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder().find(from_pretrained, "from_pretrained")
    assert len(example.examples) > 10 and example.examples[-1].want == "0.0\n"
    said: list[str] = []
    assert doctest.DocTestRunner().run(example, out=said.append, clear_globs=False).failed == 0, "".join(said)
    cached, encoded = open_latents(pretrained / "run" / "latents" / "open_channel"), example.globs["latents"]
    for t, latent in enumerate(encoded):
        torch.testing.assert_close(latent, torch.from_numpy(cached.latent(example.globs["i"], t)))
    assert not torch.equal(example.globs["forecast"].latent[0], encoded[-1])


def test_exported_tokenizer_ships_its_certificate_and_is_certified_again_on_held_out_fields(prepared):
    shipped = load_tokenizer(prepared / "run" / "tokenizer.safetensors").certificate
    assert shipped is not None and shipped["verdict"] == "exact" and set(shipped["domains"]) == set(DOMAINS)
    call = command("evaluate_model.py", prepared)
    done = subprocess.run(
        [*call[:2], "certificate", *call[2:]], cwd=ROOT, env=cpu_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    certificate = json.loads((prepared / "run" / "certificate.json").read_text())
    assert certificate["verdict"] == "exact" and certificate["weights"] == shipped["weights"]
    for blocks in certificate["domains"].values():
        assert [b["decoded"] for b in blocks].count("held-out fields") == 1
    (held_out,) = (b for b in certificate["domains"]["porous_media"] if b["decoded"] == "held-out fields")
    assert held_out["solid_flux"]["max_before"] > 0 and held_out["solid_flux"]["max_after"] == 0.0


def one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    """The user's one line; the process must have failed without a traceback."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("script", "override", "said"),
    [
        ("pretrain.py", "model.widht=64", "model.widht=64: no such key.*Did you mean model.width"),
        ("pretrain.py", "domains=[fwi, openchannel]", "domains=openchannel: no such store.*open_channel"),
        ("pretrain.py", "stores=/nowhere", "no such store in /nowhere"),
        ("pretrain.py", "model.latent_channels=7", "model.latent_channels=7: the tokenizer gives 16"),
        ("pretrain.py", "engine.zero_stage=5", "engine.zero_stage=5"),
        ("pretrain.py", "engine.zero_stage=3", "zero_stage=3: .*Set zero_stage=2"),
        ("pretrain.py", "engine.expert_parallel=3", "engine.expert_parallel=3: does not divide model.num_experts=4"),
        ("pretrain.py", "engine.expert_parallel=2", "engine.expert_parallel=2: does not divide 1 ranks"),
        ("train_tokenizer.py", "engine.expert_parallel=2", "engine.expert_parallel=2: a tokenizer has no experts"),
        ("cache_latents.py", "tokenizer=/nowhere/t.safetensors", "tokenizer=/nowhere/t.safetensors: no such file"),
        ("generate_data.py", "acoustics.resolution=4", "resolution=4"),
        ("pretrain.py", "domains=[]", "name at least one"),
        ("pretrain.py", "measure_interval=0", "measure_interval=0: must be at least 1"),
        ("pretrain.py", "model.depth=0", "depth=0: must be at least 1"),
        ("pretrain.py", "engine.extra={gradient_clipping: 3}", "extra.gradient_clipping: has a field of its own"),
        ("generate_data.py", "acoustics.resolution=32", "config.resolution is 16 .*32 now"),
    ],
)
def test_bad_input_ends_in_one_line_and_loses_nothing(prepared, script, override, said):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()}
    line = one_line_error(launch(script, prepared, override))
    assert re.search(said, line), line
    assert before == {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()}


def test_two_ranks_say_it_once(prepared):
    one_line_error(launch("pretrain.py", prepared, "model.widht=64", ranks=2))


@pytest.mark.distributed
def test_a_checkpoint_that_cannot_be_written_ends_all_ranks_in_one_line(prepared, tmp_path):
    (tmp_path / "checkpoints").touch()
    line = one_line_error(launch("pretrain.py", prepared, f"run={tmp_path}", ranks=2))
    assert re.search(r"checkpoints/pretrain/step-2: cannot be written .*older checkpoints are untouched", line), line


def test_truncated_checkpoint_is_skipped_for_an_older_one_and_nothing_is_lost(pretrained, tmp_path):
    shutil.copytree(pretrained / "run" / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "pretrain" / "step-40" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    done = launch("evaluate_model.py", pretrained, f"run={tmp_path}")
    assert done.returncode == 0 and "step-40: state.safetensors is truncated or altered" in done.stderr
    older = tmp_path / "checkpoints" / "pretrain" / "step-35" / "state.safetensors"
    older.write_bytes(older.read_bytes()[:-100])
    assert "none of 2 is intact" in one_line_error(launch("evaluate_model.py", pretrained, f"run={tmp_path}"))


def test_changed_configuration_does_not_overwrite_a_run(pretrained):
    line = one_line_error(launch("pretrain.py", pretrained, *LONG, "loop.schedule.learning_rate=0.5"))
    assert "was begun with another configuration" in line and "learning_rate: 0.001 -> 0.5" in line


def test_swapped_stores_are_refused(prepared, tmp_path):
    shutil.copytree(prepared / "stores" / "fwi", tmp_path / "stores" / "open_channel")
    overrides = [f"stores={tmp_path}/stores", f"run={tmp_path}/run", "domains=[open_channel]"]
    assert "open_channel: holds fwi" in one_line_error(launch("train_tokenizer.py", prepared, *overrides))


def test_lost_chunk_of_a_store_is_named_not_read_as_zeros(prepared, tmp_path):
    shutil.copytree(prepared / "stores", tmp_path / "stores")
    chunk = next(
        p for p in (tmp_path / "stores" / "fwi" / "pressure").rglob("*") if p.is_file() and p.name != "zarr.json"
    )
    chunk.unlink()
    line = one_line_error(launch("train_tokenizer.py", prepared, f"stores={tmp_path}/stores", f"run={tmp_path}/run"))
    assert "pressure" in line and "missing" in line


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*_*.py")) + ["pretrain.py"])
def test_help_names_the_command_and_imports_neither_torch_nor_deepspeed(script):
    code = (
        f"import runpy, sys; sys.argv = ['launch/{script}', '--help']\n"
        f"try: runpy.run_path('launch/{script}', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr
    assert f"launch/{script}" in done.stdout


@pytest.mark.distributed
def test_zero_stage_ranks_shares_of_experts_and_intervals_may_change_on_resume(pretrained, tmp_path):
    shutil.copytree(pretrained / "run" / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "pretrain" / "step-40")
    changed = ["engine.zero_stage=2", "measure_interval=7", f"run={tmp_path}"]
    done = launch("pretrain.py", pretrained, *LONG, *changed)  # one rank instead of two, with all experts
    assert done.returncode == 0 and "resuming from" in done.stderr, done.stderr[-2000:]
    whole, moved = dict(losses(pretrained / "run", "pretrain")), dict(losses(tmp_path, "pretrain"))
    assert set(moved) == set(range(36, 41))
    assert all(abs(moved[step] - whole[step]) < 1e-3 * whole[step] for step in moved), (moved, whole)
