"""The house rules that a machine can hold us to."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {  # package -> what of our own it may import
    "shodh/config.py": set(),
    "shodh/command_line.py": set(),
    "shodh/fields.py": set(),
    "shodh/device.py": set(),
    "shodh/disk.py": set(),
    "shodh/units.py": set(),
    "shodh/parcel.py": {"shodh.config"},
    "shodh/tensor_file.py": {"shodh.config", "shodh.disk"},
    "shodh/physics": {"shodh.fields", "shodh.physics"},
    "shodh/model": {"shodh.config", "shodh.fields", "shodh.physics", "shodh.tensor_file", "shodh.model"},
    "shodh/training": {"shodh.config", "shodh.device", "shodh.disk", "shodh.fields", "shodh.training"},
    "shodh/planning": {
        "shodh.config", "shodh.fields", "shodh.units", "shodh.model", "shodh.training", "shodh.planning",
    },
    "shodh/evaluation": {
        "shodh.config", "shodh.fields", "shodh.physics", "shodh.model", "shodh.training", "shodh.evaluation",
    },
    "tokenizer": {
        "shodh.config", "shodh.fields", "shodh.physics", "shodh.tensor_file", "shodh.units", "tokenizer",
    },
    "data": {"shodh.config", "shodh.disk", "shodh.fields", "shodh.physics", "shodh.units", "data"},
}  # fmt: skip


def own_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {
        name for name in names if name.split(".")[0] in ("shodh", "tokenizer", "data", "launch", "benchmarks", "tests")
    }


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_run_one_way(place):
    root = ROOT / place
    for path in [root] if root.is_file() else root.rglob("*.py"):
        for name in own_imports(path):
            allowed = any(name == a or name.startswith(a + ".") for a in ALLOWED[place])
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_no_launch_file_hides_a_standard_module_or_a_dependency():
    names = {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert not names & (
        sys.stdlib_module_names | {"torch", "deepspeed", "zarr", "wandb", "numpy", "shodh", "data", "tokenizer"}
    )


def test_no_file_has_a_name_that_says_nothing():
    vague = {"utils", "helpers", "common", "misc", "base", "manager"}
    assert not [p for p in ROOT.glob("[sdtl]*/**/*.py") if p.stem in vague]
