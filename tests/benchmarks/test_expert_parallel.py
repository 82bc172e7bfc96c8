"""Two ranks that share out experts train what one rank trains, and what they save fits other ranks."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # last: its tokenizer.py is not the package

from expert_parallel import judge_losses, measure, write_random_latents  # noqa: E402


@pytest.mark.distributed
def test_experts_shared_out_change_no_loss_and_states_move_between_ways_to_the_last_bit(tmp_path):
    write_random_latents(tmp_path / "latents")
    figures = measure(tmp_path, seeds=(0,), num_steps=6)
    assert len(figures) == 12 and all(figure.holds for figure in figures), figures
    sent = next(figure for figure in figures if figure.name.startswith("bytes sent"))
    assert sent.value > 0


def test_a_loss_that_is_off_by_more_than_rounding_is_short():
    alone = [{"losses": [1.0, 2.0]}]
    exact = {"losses": [1.0, 2.0 + 4e-7], "bytes_sent": 8, "bytes_by_formula": 8}
    off = {"losses": [1.0, 2.0 + 4e-6], "bytes_sent": 8, "bytes_by_formula": 12}
    verdicts = [[f.holds for f in judge_losses({"ZeRO 0": [outcome]}, alone)] for outcome in (exact, off)]
    assert verdicts == [[True, True, True], [False, True, False]]
