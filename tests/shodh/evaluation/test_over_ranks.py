"""Losses, biases and telemetry are of the global batch: two ranks with half of it each find what one rank finds."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import cpu_environment, deepspeed_command


def train_on(num_ranks: int, folder: Path) -> dict:
    script, file = Path(__file__).with_name("train_over_ranks.py"), folder / f"{num_ranks}.json"
    command = [*deepspeed_command(num_ranks), script, file]
    done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.mark.distributed
def test_two_ranks_find_what_one_finds_on_the_whole_batch(tmp_path):
    alone, shared = train_on(1, tmp_path), train_on(2, tmp_path)
    assert shared["biases"] == alone["biases"] and any(map(any, alone["biases"]))
    for one, two in zip(alone["steps"], shared["steps"], strict=True):
        assert one.keys() == two.keys()
        for name in one:  # sums in another order, in FP32, over four steps of training
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    for one, two in zip(alone["ranks"], shared["ranks"], strict=True):
        whole, parts = torch.tensor(one), torch.tensor(two)  # (rank, layer, domain, expert)
        assert torch.equal(parts.sum(0), whole[0])
        assert not parts[0, :, 1].any() and not parts[1, :, 0].any()  # each rank holds one of the two domains
