"""The verb as a user runs it: files that a public loader reads, verified on a second call, refused in one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import cpu_environment

from data.gathers import open_gathers
from data.ingest.openfwi import OpenFWIConfig, ingest
from data.simulate.openfwi_families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]


def launch(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    call = [
        sys.executable,
        "launch/generate_gathers.py",
        "configs/generate_gathers/debug.yaml",
        f"folder={folder}",
        *overrides,
    ]
    return subprocess.run(call, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=300)


def test_debug_run_writes_gathers_within_the_published_amplitudes_and_verifies_them(tmp_path: Path):
    done = launch(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "6 pairs of files added, 0 intact before" in done.stdout
    for name, gathers, maps in (
        ("flatvel-a", "FlatVel_A/data/data1.npy", "FlatVel_A/model/model1.npy"),
        ("curvefault-b", "CurveFault_B/seis7_1_0.npy", "CurveFault_B/vel7_1_0.npy"),
        ("style-b", "Style_B/data/data2.npy", "Style_B/model/model2.npy"),
    ):
        data, label, family = np.load(tmp_path / gathers), np.load(tmp_path / maps), FAMILIES[name]
        assert data.shape == (2, 5, 1000, 70) and label.shape == (2, 1, 70, 70)
        assert family.data_min <= data.min() < family.data_min / 2
        assert family.data_max / 2 < data.max() <= family.data_max
        assert 1500 <= label.min() < label.max() <= 4500
    # FlatVel_A's digests are beside its files, so that ingest takes them as verified
    said: list[str] = []
    ingest(tmp_path / "FlatVel_A", tmp_path / "gathers", OpenFWIConfig(), said.append)
    assert open_gathers(tmp_path / "gathers").attributes["source"]["verified_by_manifest"] is True
    again = launch(tmp_path)
    assert again.returncode == 0 and "0 pairs of files added, 6 intact before" in again.stdout


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("families=[flatvel-c]", "flatvel-c"),
        ("seed=-1", "seed=-1: must not be negative"),
        ("families=[style-a,style-a]", "style-a is named twice"),
        ("shard=3/2", "shard=3/2: not i/n"),
        ("maps_per_fil=2", "Did you mean maps_per_file"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path: Path, override: str, said: str):
    done = launch(tmp_path, override)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and said in lines[0], done.stderr
    assert not list(tmp_path.iterdir())
