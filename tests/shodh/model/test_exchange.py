"""Rows that travel: whole layers stay what they are, and shared experts work while rows are on their way."""

import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import cpu_environment, deepspeed_command

from shodh.model.exchange import Journey
from shodh.model.experts import SharedExpert, StackedExperts, own_experts
from shodh.model.moe import MixtureOfExperts
from shodh.model.router import SemanticRouter
from shodh.training.engine import distributed


@pytest.fixture
def group():
    """A process group of this process alone: rows travel to where they are."""
    with distributed(threads_per_rank=1):
        yield dist.group.WORLD


def make_mixture(group=None, num_experts=4) -> MixtureOfExperts:
    torch.manual_seed(0)
    router, shared = SemanticRouter(16, num_experts, 2, 8, 0.1), SharedExpert(16, 24)
    torch.nn.init.normal_(shared.down.weight)
    return MixtureOfExperts(router, shared, StackedExperts(num_experts, 16, 24, group))


def run(mixture, tokens):
    tokens = tokens.clone().requires_grad_()
    output, _ = mixture(tokens)
    return [output, *torch.autograd.grad(output.square().sum(), [tokens, *mixture.parameters()])]


def test_a_layer_whose_rows_travel_is_the_layer_whose_rows_stay_gradients_too(group):
    tokens = torch.randn(3, 9, 16)
    for there, here in zip(run(make_mixture(group), tokens), run(make_mixture(), tokens), strict=True):
        assert (there - here).norm() <= 16 * torch.finfo(torch.float32).eps * here.norm()


def test_shared_experts_work_while_rows_travel_forward_and_backward(group, monkeypatch):
    mixture, events = make_mixture(group), []
    for name in ("depart", "arrive"):
        original = getattr(Journey, name)
        monkeypatch.setattr(
            Journey, name, lambda *args, name=name, original=original: (events.append(name), original(*args))[1]
        )

    def note(module, inputs, output):
        events.append("shared expert")
        output.register_hook(lambda slopes: events.append("shared expert"))

    mixture.shared.register_forward_hook(note)
    output, _ = mixture(torch.randn(3, 9, 16, requires_grad=True))
    forward = list(events)
    output.sum().backward()
    way = ["depart", "shared expert", "arrive"]
    assert forward == 2 * way and events[len(forward) :] == 2 * way


def test_ranks_hold_every_expert_once_or_are_refused():
    held = [list(range(12))[own_experts(12, 4, rank)] for rank in range(4)]
    assert sum(held, []) == list(range(12)) and {len(own) for own in held} == {3}
    with pytest.raises(ValueError, match="num_experts=4: 3 ranks cannot share them out evenly.*Choose a multiple"):
        own_experts(4, 3, 0)


@pytest.mark.distributed
def test_layers_whose_experts_two_ranks_share_out_are_whole_layers_gradients_too():
    command = [*deepspeed_command(2), Path(__file__).with_name("exchange_ranks.py")]
    done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "layers shared out are whole layers" in done.stdout
