"""Losses against closed forms, and the scope of balancing."""

import math

import pytest
import torch

from shodh.fields import LatentBatch, Routing
from shodh.training.objectives import balance_loss, count_tokens, relative_change_error, z_loss


def make_routing(expert: torch.Tensor, num_experts: int, sharpness: float = 20.0) -> Routing:
    score = sharpness * torch.nn.functional.one_hot(expert, num_experts).float()
    probability = score.softmax(-1)
    gate, chosen = probability.topk(1, dim=-1)
    return Routing(chosen, gate, probability, score)


def test_balance_loss_is_one_when_balanced_and_e_when_collapsed():
    balanced = make_routing(torch.arange(80) % 8, 8)
    collapsed = make_routing(torch.zeros(80, dtype=torch.long), 8)
    assert balance_loss(balanced, count_tokens(balanced)) == pytest.approx(1.0, rel=1e-5)
    assert balance_loss(collapsed, count_tokens(collapsed)) == pytest.approx(8.0, rel=1e-5)


def test_specialised_micro_batches_are_not_punished_when_the_global_batch_is_balanced():
    parts = [make_routing(torch.full((50,), expert), 4) for expert in range(4)]  # each all on one expert
    total = torch.stack([count_tokens(part) for part in parts]).sum(0)
    mean_loss = sum(float(balance_loss(part, total)) for part in parts) / 4
    assert mean_loss == pytest.approx(1.0, rel=1e-5)
    alone = sum(float(balance_loss(part, count_tokens(part))) for part in parts) / 4
    assert alone == pytest.approx(4.0, rel=1e-5)


def test_z_loss_of_uniform_scores_is_the_squared_log_of_e():
    routing = make_routing(torch.zeros(5, dtype=torch.long), 8, sharpness=0.0)
    assert float(z_loss(routing)) == pytest.approx(math.log(8) ** 2, rel=1e-6)


def test_persistence_scores_one_whatever_the_speed_of_the_sample():
    current, change = torch.randn(2, 4, 3, 2, 2, 2)
    change = change * torch.tensor([0.1, 1.0, 10.0, 100.0]).reshape(4, 1, 1, 1, 1)
    rest = torch.zeros(4, 1)
    batch = LatentBatch(current, current, current + change, current[:, :1], rest, torch.zeros(4, dtype=torch.long))
    assert float(relative_change_error(current, batch, floor=0.0)) == pytest.approx(1.0, rel=1e-4)
    assert float(relative_change_error(batch.following, batch, floor=0.0)) == 0.0
