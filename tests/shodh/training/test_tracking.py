"""metrics.jsonl stays readable whatever ended the run before, and says how fast a run is."""

import json

import pytest
import torch.distributed

from shodh.training.line_log import open_for_appending
from shodh.training.loop import StepRecord
from shodh.training.tracking import StepSize, Track, TrackingConfig, measure_speed


@pytest.fixture
def single_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


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


def test_speed_is_what_a_step_handles_over_its_seconds_and_mfu_is_known_only_with_a_peak():
    record = StepRecord(step=3, scalars={}, seconds=2.0, outputs=[])
    assert measure_speed(StepSize(100), record) == {"tokens_per_second": 50.0}
    operations = {2: 4e12}.__getitem__  # of the third step
    speed = measure_speed(StepSize(100, operations), record)
    assert speed == {"tokens_per_second": 50.0, "teraflops_per_second": 2.0}
    assert measure_speed(StepSize(100, operations, peak=8e12), record)["mfu"] == 0.25


def test_speed_stands_in_every_line_of_the_log(tmp_path, single_process):
    size = StepSize(tokens=100, operations=lambda step: 1e12 * (step + 1), peak=1e13)
    track = Track(tmp_path, "pretrain", TrackingConfig(wandb="disabled"), 0, 2, size)
    for step in (1, 2):
        track.after_step(StepRecord(step, {"loss": 1.0}, seconds=0.5, outputs=[]))
    track.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["teraflops_per_second"] for line in lines] == [2.0, 4.0]
    assert [line["mfu"] for line in lines] == pytest.approx([0.2, 0.4])
