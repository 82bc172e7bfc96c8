"""What the rate ladder counts: CPU time of every attempt, loud snapshots, equally many fields of each domain."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # last: its tokenizer.py must not be taken for the package

from parts import training_velocities  # noqa: E402
from random_store import write_random_store  # noqa: E402
from rate_ladder_rungs import CPU_FILE, compare, read_cpu_seconds, train_rung  # noqa: E402

from data.simulate import open_channel, porous_media  # noqa: E402


def test_cpu_time_of_all_attempts_adds_up_and_a_lost_attempt_leaves_it_unknown(tmp_path):
    assert math.isnan(read_cpu_seconds(tmp_path))
    (tmp_path / CPU_FILE).write_text(json.dumps([1.5, 2.0]))
    assert read_cpu_seconds(tmp_path) == 3.5
    (tmp_path / CPU_FILE).write_text(json.dumps([1.5, None]))
    assert math.isnan(read_cpu_seconds(tmp_path))


def test_a_rung_that_fails_says_why_and_its_cpu_time_is_kept(tmp_path):
    with pytest.raises(RuntimeError, match="C=4: training ended with code 1.*no such store"):
        train_rung(4, tmp_path / "c4", [f"stores={tmp_path}/nowhere"])
    assert read_cpu_seconds(tmp_path / "c4") > 0


def test_truth_has_no_error_its_mean_has_1_and_silent_snapshots_do_not_count():
    truth = torch.randn(3, 3, 8, 8, 8)
    truth[1] *= 1e-12
    mean = truth.mean((-3, -2, -1), keepdim=True).expand_as(truth)
    errors = compare(truth, [truth, mean])
    assert errors[1].isnan().all()
    assert errors[[0, 2], 0].eq(0).all()
    torch.testing.assert_close(errors[[0, 2], 1], torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)  # FP32 means


@pytest.mark.parametrize("most", [None, 3])
def test_codes_are_fitted_to_equally_many_fields_of_each_domain(tmp_path, most):
    stores = [
        write_random_store(tmp_path / domain.name, domain, 8, num, num_snapshots=2)
        for domain, num in ((open_channel.DOMAIN, 3), (porous_media.DOMAIN, 6))
    ]  # one trajectory of each is held out
    statistics = {store.domain.name: {"velocity_scale": 2.0} for store in stores}
    velocities = list(training_velocities(stores, statistics, most))
    num = most or 2 * 2
    states = [(i, t) for i in stores[1].trajectories("train") for t in range(2)]
    last = stores[1].snapshot(*states[(num - 1) * len(states) // num])[0]
    assert len(velocities) == 2 * num
    torch.testing.assert_close(velocities[-1][0], torch.from_numpy(last) / 2, rtol=0, atol=0)
    assert len({velocity.numpy().tobytes() for velocity in velocities[num:]}) == num
