"""The dry run of the reproduction: to the table without optional libraries, and in pieces to the same last bit."""

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
from conftest import cpu_environment
from pieces import run_piece
from reproduction import SECTIONS, Reproduction, Step, list_steps, require_domains, select_results

from shodh.config import ConfigError, load_config, parse_config
from shodh.evaluation.published_table import PUBLISHED
from shodh.training.checkpoint import MANIFEST, write_checkpoint
from tokenizer.export import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "reproduce" / "debug.yaml"
DOMAINS = ("open_channel", "porous_media")
OPTIONAL = ("wandb", "porespy", "deepwave", "matplotlib", "h5py", "tifffile", "xarray")
BLOCKER = f"""
import sys

class WithoutOptional:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {OPTIONAL} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(WithoutOptional, sys.meta_path)
"""  # found nowhere, as if they were not installed


def environment_of(folder: Path) -> dict[str, str]:
    """Of a machine without the optional libraries, kept in a folder."""
    (folder / "blocked").mkdir(exist_ok=True)
    (folder / "blocked" / "sitecustomize.py").write_text(BLOCKER)
    return cpu_environment() | {"PYTHONPATH": f"{folder}/blocked{os.pathsep}{ROOT}"}


def reproduce(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "launch/reproduce.py", *map(str, arguments), *folders(folder)]
    return subprocess.run(call, cwd=ROOT, env=environment_of(folder), capture_output=True, text=True, timeout=500)


def folders(folder: Path) -> list[str]:
    return [f"stores={folder}/stores", f"run={folder}/run"]


def interrupt(folder: Path, once_there: str) -> subprocess.CompletedProcess[str]:
    """One piece, told to stop as soon as the run holds a file."""
    call = [sys.executable, "launch/reproduce.py", str(CONFIG), *folders(folder)]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(call, cwd=ROOT, env=environment_of(folder), stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while not (folder / once_there).exists():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.005)
        process.send_signal(signal.SIGUSR1)
        code = process.wait(timeout=100)
    return subprocess.CompletedProcess(call, code, (folder / "log").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A dry run in one piece, where no optional library is installed; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    code = f"from importlib.util import find_spec as f; print([n for n in (*{OPTIONAL}, 'torch') if f(n)])"
    found = subprocess.run([sys.executable, "-c", code], env=environment_of(folder), capture_output=True, text=True)
    assert found.stdout.strip() == "['torch']"
    done = reproduce(folder, CONFIG, "fwi=where_installed")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.distributed
def test_dry_run_prints_the_table_without_any_optional_library(whole):
    folder, printed = whole
    rows = json.loads((folder / "run" / "table.json").read_text())["rows"]
    assert [(row["figure"], row["domain"]) for row in rows] == [
        (figure, name) for figure in ("latent_mse", "decoded_mse", "divergence", "routing") for name in DOMAINS
    ]
    for row in rows:
        assert row["published"] == PUBLISHED[row["domain"]][row["figure"]]
        assert row["ours"] == 0.0 if row["figure"] == "divergence" else row["ours"] > 0
        shown = "0.0" if row["ours"] == 0 else f"{row['ours']:.2e}"
        shown = f"{100 * row['ours']:.1f} % ({row['expert']})" if row["figure"] == "routing" else shown
        assert any(row["domain"] in line and shown in line for line in printed.splitlines())
    assert "all is done" in printed and "matplotlib is not installed" in printed


@pytest.mark.distributed
def test_pieces_on_two_machines_give_what_one_piece_gives_to_the_last_bit(whole, tmp_path):
    reference = whole[0] / "run"
    shutil.copytree(whole[0] / "stores", tmp_path / "stores")
    piece = interrupt(tmp_path, "run/checkpoints/tokenizer/step-2")
    assert piece.returncode == 75 and re.search(
        r"piece done: train_tokenizer at step [2-6] of 6; the same", piece.stdout
    )
    piece = interrupt(tmp_path, "run/checkpoints/pretrain/step-2")
    assert piece.returncode == 75 and re.search(r"piece done: pretrain at step [2-8] of 8; the same", piece.stdout)
    assert reproduce(tmp_path, "export", CONFIG, tmp_path / "export").returncode == 0
    shutil.rmtree(tmp_path / "run")  # the machine is gone
    assert reproduce(tmp_path, "import", CONFIG, tmp_path / "export").returncode == 0
    assert not (tmp_path / "run" / "latents").exists()
    piece = interrupt(tmp_path, "run/checkpoints/pretrain/step-8")  # what follows is a function of that and the data
    assert piece.returncode == 75 and "train_tokenizer: done" in piece.stdout and "resuming from" in piece.stdout
    one, other = (load_tokenizer(run / "tokenizer.safetensors") for run in (reference, tmp_path / "run"))
    assert one.digest == other.digest and one.certificate == other.certificate
    final = Path("checkpoints") / "pretrain" / "step-8" / "state.safetensors"
    assert (reference / final).read_bytes() == (tmp_path / "run" / final).read_bytes()


@pytest.mark.distributed
def test_second_call_trains_nothing_and_prints_the_table_again(whole):
    folder, printed = whole
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    done = reproduce(folder, CONFIG, f"export={folder}/export")
    assert done.returncode == 0 and (folder / "run" / "metrics.jsonl").read_bytes() == before
    assert printed[printed.index("figure ") : printed.index("all is done")] in done.stdout
    assert json.loads((folder / "export" / "table.json").read_text())["rows"]


def wait_step(tmp_path: Path, script: str, is_training: bool = False) -> Step:
    """A step that is a Python script, done when it has left a file and as far as it has written."""
    (tmp_path / "step.py").write_text(script)
    notes = tmp_path / "notes"
    return Step(
        "wait",
        [str(tmp_path / "step.py"), str(tmp_path)],
        lambda: (tmp_path / "done").exists(),
        lambda: notes.read_text() if notes.exists() else "its beginning",
        is_training,
    )


LISTENS = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    (folder / "notes").write_text("step 7 of 9")
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
time.sleep(60)
"""


def test_a_step_is_told_to_stop_in_time_and_what_it_keeps_is_named(tmp_path):
    begun = time.monotonic()
    assert run_piece([wait_step(tmp_path, LISTENS)], tmp_path, 12.0, 10.0) == "wait at step 7 of 9"
    assert time.monotonic() - begun < 10


def test_a_step_that_does_not_listen_is_ended_within_the_piece(tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGUSR1, signal.SIG_IGN); time.sleep(60)"
    begun, said = time.monotonic(), "^minutes=0.05: wait was still at its beginning after all of them. Raise minutes"
    with pytest.raises(RuntimeError, match=rf"{said}, or write its checkpoints more often\.$"):
        run_piece([wait_step(tmp_path, deaf, is_training=True)], tmp_path, 3.0, 1.0)
    assert time.monotonic() - begun < 6
    with pytest.raises(RuntimeError, match=rf"{said}\.$"):  # what writes no checkpoints is not to write more of them
        run_piece([wait_step(tmp_path, deaf)], tmp_path, 3.0, 1.0)


def test_a_step_that_fails_after_it_was_told_to_stop_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="^wait: ended with code 3, see above"):
        run_piece([wait_step(tmp_path, LISTENS.replace("75", "3"))], tmp_path, 12.0, 10.0)


def test_what_a_stopped_step_started_ends_with_it(tmp_path):
    script = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
(pathlib.Path(sys.argv[1]) / "notes").write_text(str(child.pid))
time.sleep(60)
"""
    said = run_piece([wait_step(tmp_path, script)], tmp_path, 12.0, 9.0)
    assert said is not None
    status = Path("/proc") / said.removeprefix("wait at ") / "status"
    deadline = time.monotonic() + 10
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.01)


def test_a_step_that_fails_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="^wait: ended with code 3, see above"):
        run_piece([wait_step(tmp_path, "raise SystemExit(3)")], tmp_path, 60.0, 1.0)
    with pytest.raises(RuntimeError, match="^wait: ended without what it was to write"):
        run_piece([wait_step(tmp_path, "")], tmp_path, 60.0, 1.0)


def test_two_pieces_of_one_run_do_not_run_at_once(tmp_path):
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "launch")!r}]
from pathlib import Path
from pieces import run_piece
folder = Path(sys.argv[1])
try:
    run_piece([], folder, 9.0, 1.0)
except ValueError as error:
    (folder / "done").write_text(str(error))
"""
    assert run_piece([wait_step(tmp_path, script)], tmp_path, 60.0, 1.0) is None
    assert "another piece of it is running" in (tmp_path / "done").read_text()


def test_domains_are_those_that_the_first_piece_settled(tmp_path, monkeypatch):
    config = load_config(Reproduction, CONFIG, [*folders(tmp_path), "fwi=where_installed"])
    monkeypatch.setattr("reproduction.find_spec", lambda name: None)
    assert require_domains(config) == DOMAINS
    monkeypatch.setattr("reproduction.find_spec", lambda name: object())
    assert require_domains(config) == DOMAINS
    fresh = load_config(Reproduction, CONFIG, [*folders(tmp_path / "fresh"), "fwi=where_installed"])
    assert require_domains(fresh) == (*DOMAINS, "fwi")
    other = load_config(Reproduction, CONFIG, [*folders(tmp_path), "domains=[open_channel]"])
    with pytest.raises(ConfigError, match="was begun with"):
        require_domains(other)


def test_the_newest_checkpoint_that_is_intact_is_exported(tmp_path, capsys):
    config = load_config(Reproduction, CONFIG, folders(tmp_path))
    checkpoints = config.run / "checkpoints" / "tokenizer"
    for step in (2, 4):
        write_checkpoint(checkpoints, step, {"weight": torch.ones(8)}, {"record": {"config": {}}})
    assert f"checkpoints/tokenizer/step-4/{MANIFEST}" in select_results(config)
    state = checkpoints / "step-4" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    chosen = {Path(name).parent.name for name in select_results(config)}
    assert chosen == {"step-2"} and "state.safetensors is truncated or altered" in capsys.readouterr().err
    shutil.rmtree(checkpoints / "step-2")
    with pytest.raises(ConfigError, match="none of 1 is intact"):
        select_results(config)


def test_a_damaged_last_checkpoint_is_trained_again_before_it_is_evaluated(tmp_path, capsys):
    config = load_config(Reproduction, CONFIG, folders(tmp_path))
    checkpoints = config.run / "checkpoints" / "pretrain"
    *_, pretrain, _ = list_steps(config, DOMAINS)
    for step in (2, 8):
        write_checkpoint(checkpoints, step, {"weight": torch.ones(8)}, {"record": {"config": {}}})
    assert pretrain.is_done()
    state = checkpoints / "step-8" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    assert not pretrain.is_done() and "state.safetensors is truncated or altered" in capsys.readouterr().err


@pytest.mark.parametrize("domains", [DOMAINS, (*DOMAINS, "fwi")], ids=["without deepwave", "with deepwave"])
@pytest.mark.parametrize("size", ["debug", "base"])
def test_every_config_on_the_way_is_there_and_loads(size, domains, tmp_path):
    from generate_data import GenerateConfig, _load_simulator
    from settings import CONFIGS

    config = load_config(Reproduction, ROOT / "configs" / "reproduce" / f"{size}.yaml", folders(tmp_path))
    data, *others = list_steps(config, domains)
    for step in others:
        load_config(CONFIGS[step.name], ROOT / step.command[1], step.command[2:])
    simulated = load_config(GenerateConfig, ROOT / data.command[1], data.command[2:])
    for section in (SECTIONS.get(name, name) for name in domains):
        simulator, config_class = _load_simulator(section)
        physics = parse_config(config_class, getattr(simulated, section), source=section)
        assert simulator.forecast(physics).on_cuda().cuda_bytes < 40e9 and simulated.device == "auto"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("acoustics", "^error: deepwave: is not installed, and this needs it"),
        ("porous_media", "error: porous_media: geometry=blobs: porespy is not installed. Install it, or set geometry"),
    ],
)
def test_a_library_that_is_needed_and_missing_is_named_in_one_line(section, said, tmp_path):
    call = [sys.executable, "launch/generate_data.py", "configs/generate_data/debug.yaml"]
    call += [f"domain={section}", f"folder={tmp_path}/stores"]
    done = subprocess.run(call, cwd=ROOT, env=environment_of(tmp_path), capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(said, done.stderr, re.MULTILINE), done.stderr
