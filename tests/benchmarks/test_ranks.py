"""A script runs once on every rank, and its failure is told."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # last: its tokenizer.py is not the package

from ranks import run_ranks  # noqa: E402


@pytest.mark.distributed
def test_every_rank_runs_the_script_and_a_rank_that_fails_is_told(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import os, pathlib, sys
folder = pathlib.Path(sys.argv[-1])
(folder / os.environ["RANK"]).write_text(os.environ["WORLD_SIZE"])
if folder.name == "broken":
    sys.exit("no bread today")
""")
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    run_ranks(script, [str(tmp_path / "whole")], 2)
    assert {path.name: path.read_text() for path in (tmp_path / "whole").iterdir()} == {"0": "2", "1": "2"}
    with pytest.raises(RuntimeError, match=r"^script.py: 2 ranks failed: (?s:.*)no bread today"):
        run_ranks(script, [str(tmp_path / "broken")], 2)
