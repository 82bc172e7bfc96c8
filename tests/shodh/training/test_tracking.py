"""metrics.jsonl stays readable whatever ended the run before."""

import json

import pytest

from shodh.training.line_log import open_for_appending


@pytest.mark.parametrize(
    ("before", "kept"),
    [("", []), ('{"step": 1}\n', [1]), ('{"step": 1}\n{"step": 2, "lo', [1]), ('{"step": 1}', [1])],
)
def test_a_torn_last_line_does_not_swallow_the_next(tmp_path, before, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text(before)
    with open_for_appending(path) as file:
        file.write('{"step": 9}\n')
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["step"] for line in whole] == [*kept, 9]
