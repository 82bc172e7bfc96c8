import base64
import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from shodh.evaluation.report import format_table, write_report
from shodh.evaluation.report_run import format_count, format_number, read_metrics
from shodh.training.alarm_log import Alarm, AlarmLog

REPOSITORY = Path(__file__).parents[3]
DOMAINS = ("open_channel", "porous_media", "fwi")
NUM_LAYERS, NUM_EXPERTS = 2, 8


def random_field(random: np.random.Generator, num_cells: int, slope: float = -1.8) -> np.ndarray:
    """A smooth periodic random slice of unit deviation, amplitudes falling with wavenumber to the power ``slope``."""
    k = np.fft.fftfreq(num_cells, 1 / num_cells)
    wavenumber = np.maximum(np.hypot(k[:, None], k[None, :]), 1)
    field = np.fft.ifft2(np.fft.fft2(random.normal(size=(num_cells, num_cells))) * wavenumber**slope).real
    return ((field - field.mean()) / field.std()).astype(np.float32)


def evaluate_domain(random: np.random.Generator, index: int) -> dict:
    steps = np.arange(1, 11)
    concentration = (4.0, 0.2)  # later layers specialise
    load = [random.dirichlet(np.full(NUM_EXPERTS, a)).tolist() for a in concentration]
    rollout = {}
    kinds = (("model", 0.33, 0.8), ("persistence", 0.35, 1.3), ("linear", 0.34, 9.9), ("decoded_truth", 0.3, 0.32))
    for name, first, last in kinds:
        row = (first + (last - first) * (1 - np.exp(-steps / 6)) + 0.01 * random.normal(size=10)).tolist()
        rollout[name] = {
            "vrmse": {"1": row[0], "2-20": float(np.mean(row[1:])), "20": row[9], "21-60": None},
            "vrmse_per_step": row,
            "energy_drift": {"20": -0.12},
            "octave_energy_ratio": {"20": [0.98, 0.86, None]},
            "permeability": {"20": {"flow_error": 0.123}} if index == 1 else None,
            "wall_shear": {"20": None},
        }
    conserved = {"max_abs": 0.0, "rms": 0.0, "mean_abs": 0.0, "rms_over_rms_gradient": 0.0, "num_fields": 24}
    conserved |= {"operator": "staggered incidence d: faces -> cells, coefficients +1 and -1, on the stored flux"}
    conserved |= {"dtype": "stored float32, evaluated float64", "mismatched_operator_rms": 0.031, "mean_flow": 0.42}
    conserved |= {"mismatched_rms_over_rms_gradient": 0.052}
    return {
        "curl" if index == 2 else "divergence": conserved,
        "tokenizer": {
            "vrmse": {"velocity": 0.31 + 0.12 * index, "pressure": 0.22},
            "block_klt_vrmse": {"velocity": 0.385 + 0.2 * index},
            "latent_values": 1024,
        },
        "latent_mse": 0.021,
        "persistence_latent_mse": 0.055,
        "latent_mse_over_persistence": 0.38 + 0.1 * index,
        "decoded_mse": 0.0123,
        "rollout": rollout,
        "routing": {
            "load": load,
            "concentration": [max(row) for row in load],
            "mutual_information": [0.02, 0.82],
        },
    }


def write_metrics(folder: Path, random: np.random.Generator) -> None:
    lines = []
    for phase, num_steps in (("tokenizer", 400), ("pretrain", 600)):
        for step in range(0, num_steps, 5):
            loss = 0.12 + 0.9 * np.exp(-step / 90) * np.exp(0.08 * random.normal())
            record = {"step": step, "time": 1.7e9 + step, "phase": phase, "loss": loss, "learning_rate": 1e-3}
            record |= {"loss/data": 0.9 * loss, "tokens_per_second": 21000 + 500 * random.normal()}
            if phase == "pretrain":
                for layer in range(NUM_LAYERS):
                    record[f"routing/layer{layer}/concentration/fwi"] = 0.2 + 0.2 * layer * (1 - np.exp(-step / 200))
                    load = random.dirichlet(np.linspace(20, 60, NUM_EXPERTS))
                    record |= {f"load/layer{layer}/expert{e}": share for e, share in enumerate(load)}
                if step % 50 == 0:
                    record |= {f"forecast/ratio/{name}": 0.4 + np.exp(-step / 100) for name in DOMAINS}
            lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 605, "phase": "pretrain", "lo')


def write_example_run(folder: Path) -> Path:
    """A run folder with all that a report reads, from seeded random numbers; its log ends in the middle of a line."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    evaluation = {
        "run": {
            "config": {"model": {"num_experts": NUM_EXPERTS, "num_layers": NUM_LAYERS}, "seed": 0},
            "git_sha": "0123456789abcdef0123456789abcdef01234567",
            "parameters_total": 9_812_345,
            "parameters_active": 3_204_000,
            "data_digests": dict.fromkeys(DOMAINS, "sha256:" + "5f" * 32),
            "tokenizer_hash": "a1b2c3d4e5f60718",
        },
        "domains": {name: evaluate_domain(random, index) for index, name in enumerate(DOMAINS)},
        "routing_layers": [
            {"purity": 0.35, "mutual_information": 0.02, "normalised_mutual_information": 0.018},
            {"purity": 0.91, "mutual_information": 0.82, "normalised_mutual_information": 0.746},
        ],
        "mean": {"tokenizer_velocity_vrmse": 0.43, "block_klt_velocity_vrmse": 0.585},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    write_metrics(folder, random)
    collapse = Alarm("collapse", "Layer 0: collapse, expert 3 takes 97% of the tokens, whatever their domain.", 0, (3,))
    AlarmLog(folder, "pretrain").write("raised", 120, collapse)
    slices = {}
    for index, name in enumerate(DOMAINS):
        truth, noise = random_field(random, 32), random_field(random, 32, -0.5)
        truth = truth if index == 2 else np.abs(truth)
        coarse = np.stack([[random_field(random, 4) for _ in range(4)] for _ in range(NUM_LAYERS)]).swapaxes(1, 3)
        decoded = truth + 0.2 * noise if index == 2 else np.abs(truth + 0.2 * noise)
        slices[f"{name}/truth"], slices[f"{name}/decoded"] = truth, decoded
        slices[f"{name}/error"] = decoded - truth
        slices[f"{name}/medium"] = (random_field(random, 32) > 0.3).astype(np.float32)
        slices[f"{name}/experts"] = np.clip(coarse * 1.3 + 2 * index + 2, 0, NUM_EXPERTS - 1).astype(np.int16)
        slices[f"{name}/truth_slices"] = np.stack([np.roll(truth, 4 * i, 0) for i in range(4)], -1)
        slices[f"{name}/field"] = np.array("particle velocity along x" if index == 2 else "|u| in the middle plane")
    np.savez(folder / "slices.npz", **slices)
    return folder


class Reader(HTMLParser):
    """Collects addresses, text and tags that were not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in ("meta", "link", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read_page(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = write_example_run(tmp_path_factory.mktemp("runs") / "quickstart")
    write_report(folder)
    return folder


def test_page_is_well_formed_and_loads_nothing_from_elsewhere(run_folder):
    page = read_page(run_folder / "report.html")
    assert page.open == []
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "url(" not in (run_folder / "report.html").read_text()


def test_every_picture_is_a_png_in_a_light_and_a_dark_form(run_folder):
    pictures = [a for a in read_page(run_folder / "report.html").addresses if a.startswith("data:image/png")]
    # light and dark; per domain 4 slices, 1 of expert maps, 1 rollout; loads; 3 curves a phase, routing and forecast
    assert len(pictures) == 2 * (3 * (4 + 1 + 1) + NUM_LAYERS + 2 * 3 + 2)
    assert all(base64.b64decode(p.split(",")[1]).startswith(b"\x89PNG") for p in pictures)


def test_page_shows_the_figures_of_the_evaluation(run_folder):
    text = " ".join(read_page(run_folder / "report.html").text)
    for words in (
        "open_channel",
        "0.480",
        "9.8 M",
        "Layer 1: purity 0.910, I / H 0.746, I 0.820 nats",
        "Layer 0: collapse, expert 3",
        "sha256:5f5f",
        "0.980, 0.860, -",
        "0.123",
    ):
        assert words in text, words
    assert "metrics.jsonl: 1 broken line skipped." in text


def test_empty_folder_gives_sentences_and_a_missing_one_an_error(tmp_path):
    text = " ".join(read_page(write_report(tmp_path)).text)
    assert "There is no evaluation yet." in text
    assert "There are no field slices yet." in text
    with pytest.raises(ValueError, match="no such folder"):
        write_report(tmp_path / "absent")


def test_broken_files_are_named_and_the_rest_is_shown(tmp_path):
    archive = tmp_path / "slices.npz"
    np.savez(archive, truth=np.zeros((64, 64)))
    archive.write_bytes(archive.read_bytes()[:2000])
    (tmp_path / "evaluation.json").write_text('{"domains": {"fwi": {"latent_m')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "phase": "pretrain", "loss": 1.0}\n{"step": 2, "ph')
    text = " ".join(read_page(write_report(tmp_path)).text)
    assert "slices.npz is broken" in text
    assert "evaluation.json is broken" in text
    assert "metrics.jsonl: 1 broken line skipped." in text
    assert "its running median" in text


def test_partial_evaluation_leaves_gaps_not_errors(tmp_path):
    rollout = {"model": {"vrmse": {"1": 0.5, "2-20": None, "20": 0.7}}}
    evaluation = {"domains": {"fwi": {"latent_mse": 0.1, "rollout": rollout}}}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "phase": "pretrain", "loss": NaN}\n')
    text = " ".join(read_page(write_report(tmp_path)).text)
    assert "The loss was not finite at 1 logged step" in text


def test_words_from_a_run_cannot_become_markup(tmp_path):
    evaluation = {"run": {"config": "</pre><script>alert(1)</script>"}, "domains": {"<img src=x>": {"latent_mse": 1.0}}}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    page = write_report(tmp_path).read_text()
    assert "<script" not in page
    assert "<img src=x>" not in page


def test_steps_logged_again_after_a_resume_replace_the_lost_ones(tmp_path):
    log, problems = tmp_path / "metrics.jsonl", []
    steps = [("pretrain", step, 10.0 - step) for step in (1, 2, 3)] + [("tokenizer", 2, 1.0), ("pretrain", 2, 6.0)]
    log.write_text("".join(json.dumps({"phase": p, "step": s, "loss": loss}) + "\n" for p, s, loss in steps) + "[1]\n")
    kept = [(r["phase"], r["step"], r["loss"]) for r in read_metrics(log, problems)]
    assert kept == [("pretrain", 1, 9.0), ("pretrain", 2, 6.0), ("tokenizer", 2, 1.0)]
    assert problems == ["metrics.jsonl: 1 broken line skipped."]


def test_text_table_is_aligned_and_fits_110_columns(run_folder):
    evaluation = json.loads((run_folder / "evaluation.json").read_text())
    evaluation["domains"]["a_domain_with_a_very_long_name_indeed"] = {}
    lines = format_table(evaluation).splitlines()
    assert max(map(len, lines)) <= 110
    assert len(lines) == 3 + 4 + 1
    ends = [re.search(r"0\.(380|480|580)(?= )", line) for line in lines[3:6]]
    assert len({match.end() for match in ends if match}) == 1
    assert "\n".join(lines).isascii()


def test_only_zero_reads_as_zero():
    assert [format_number(x) for x in (0.0, 1e-9, -2e-4, 0.5, 12.34, 12345.0, None)] == [
        *("0.0", "1e-9", "-0.0002", "0.500", "12.3", "1.2e+4", "-"),
    ]
    assert [format_count(x) for x in (None, 512, 9999, 12_345, 4_300_000, 1.2e9)] == [
        *("-", "512", "9999", "12.3 k", "4.3 M", "1.2 G"),
    ]


def test_command_prints_the_path_and_imports_no_torch(tmp_path):
    script = REPOSITORY / "launch" / "show_report.py"
    probe = f"import runpy, sys; sys.argv = ['x', {str(tmp_path)!r}]; "
    probe += f"runpy.run_path({str(script)!r}, run_name='__main__'); "
    probe += "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "report.html"


def test_served_page_is_fresh_and_only_for_this_machine(tmp_path):
    script = REPOSITORY / "launch" / "show_report.py"
    command = [sys.executable, str(script), str(tmp_path), "--serve", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as server:
        guard = threading.Timer(60, server.kill)
        guard.start()
        try:
            assert server.stdout is not None
            server.stdout.readline()
            address = server.stdout.readline().split()[0]
            assert address.startswith("http://127.0.0.1:")
            (tmp_path / "evaluation.json").write_text('{"domains": {"newcomer": {"latent_mse": 1.0}}}')
            with urllib.request.urlopen(address, timeout=60) as answer:
                assert b"newcomer" in answer.read()
            foreign = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(foreign, timeout=60).close()
        finally:
            guard.cancel()
            server.terminate()
