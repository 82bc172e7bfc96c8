"""The launch script as a user runs it: one line per error, every format's store at the end, help that is instant."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.reader import open_store
from shodh.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch/ingest_data.py"


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def main():
    return load("ingest_data_script", SCRIPT).main


@pytest.fixture(scope="module")
def published():
    return load("published_layouts", ROOT / "tests/data/ingest/conftest.py").Published()


def test_each_format_becomes_a_store_by_its_name(main, published, tmp_path, capsys):
    sources = {
        "openfwi": (published.openfwi(tmp_path / "a"), ["times=240", "receivers=24", "depth=24"]),
        "jhtdb": (
            published.jhtdb(tmp_path / "b", (16, 16, 16), spacing=2 * np.pi / 16, start=0.0),
            ["dataset=isotropic1024coarse"],
        ),
        "digital_rocks": (published.rock(tmp_path / "c"), ["voxel_size=2.25e-6"]),
        "the_well": (published.the_well(tmp_path / "d"), []),
        "pdebench": (published.pdebench(tmp_path / "e"), ["num_test=1"]),
    }
    for name, (source, overrides) in sources.items():
        published.manifest(source)
        main([name, str(source), str(tmp_path / "stores" / name), *overrides])
        assert "written, digest" in capsys.readouterr().out
        main([name, str(source), str(tmp_path / "stores" / name), *overrides])
        assert "complete already, digest" in capsys.readouterr().out
    store = open_store(tmp_path / "stores/pdebench")
    assert store.plan.config["source"]["verified_by_manifest"] is True and store.domain.name == "pdebench"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["pdebench", "SOURCE"], "three are needed. Usage: launch/ingest_data.py openfwi|jhtdb"),
        (["pdebench", "SOURCE", "num_test=1"], "three are needed"),
        (["netcdf", "SOURCE", "STORE"], "format=netcdf: not known"),
        (["pdebench", "SOURCE/none", "STORE"], "no such file or folder"),
        (["pdebench", "SOURCE", "STORE", "num_tests=1"], "Did you mean num_test?"),
        (["pdebench", "SOURCE", "STORE", "num_test"], "not key=value"),
        (["pdebench", "SOURCE", "STORE"], "no digest vouches for it"),
        (["pdebench", "SOURCE", "FILE", "unverified=accept"], "store=.*file: is a file"),
        (["pdebench", "SOURCE", "FILE/store", "unverified=accept"], "store=.*file/store: cannot be written"),
        (["pdebench", "SOURCE", "/proc/nowhere/store", "unverified=accept"], "store=/proc/nowhere/store: cannot be"),
        (
            ["pdebench", "SOURCE", "STORE", "num_test=5", "unverified=accept"],
            "num_test=5: the source holds 2 trajectories",
        ),
        (["jhtdb", "SOURCE", "STORE"], "dataset: missing in the command line"),
    ],
)
def test_what_a_user_gets_wrong_is_said_in_one_line(arguments, reason, main, published, tmp_path):
    source, file = published.pdebench(tmp_path / "source"), tmp_path / "file"
    file.touch()
    words = [
        w.replace("SOURCE", str(source)).replace("STORE", str(tmp_path / "store")).replace("FILE", str(file))
        for w in arguments
    ]
    with pytest.raises(ConfigError, match=reason.replace("|", r"\|").replace("?", r"\?")) as error:
        main(words)
    assert "\n" not in str(error.value)


def test_a_damaged_source_ends_the_script_with_one_line_and_code_1(published, tmp_path):
    source = published.pdebench(tmp_path / "source")
    published.manifest(source)
    file = next(source.glob("*.hdf5"))
    file.write_bytes(file.read_bytes()[:-1])
    command = [sys.executable, str(SCRIPT), "pdebench", str(source), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not (tmp_path / "store").exists()
    assert (
        done.stderr.startswith("error: source=") and done.stderr.count("\n") == 1 and "its manifest says" in done.stderr
    )


def test_help_names_every_format_and_imports_nothing_heavy():
    code = (
        f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__');"
        "assert not {'torch', 'h5py', 'zarr'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("openfwi", "jhtdb", "digital_rocks", "the_well", "pdebench"):
        assert name in done.stdout
