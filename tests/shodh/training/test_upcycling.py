"""Experts that are trained as one network for a while, and part."""

import torch

from shodh.fields import CONDITIONS, NUM_GIVEN
from shodh.model.transformer import LatentTransformer, TransformerConfig, find_stacks
from shodh.training.optimizers import build_optimizer
from shodh.training.upcycling import TrainAsOne

SMALL = TransformerConfig(
    latent_channels=4, medium_channels=2, width=24, depth=2, num_heads=2, num_experts=3, hidden=8, semantic_width=8
)


def make_model() -> LatentTransformer:
    torch.manual_seed(0)
    return LatentTransformer(SMALL)


def learn(model: LatentTransformer, seed: int) -> None:
    """Leave the gradients of a loss of random samples."""
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(4, NUM_GIVEN + 1, 4, 4, 4, 4, generator=draw)
    medium, parameters = torch.randn(4, 2, 4, 4, 4, generator=draw), torch.rand(4, len(CONDITIONS), generator=draw)
    model.zero_grad()
    (model(states[:, :-1], medium, parameters).latent - states[:, -1]).square().mean().backward()


def are_alike(stack: torch.Tensor) -> bool:
    return all(torch.equal(expert, stack[0]) for expert in stack)


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros(()) if parameter.grad is None else parameter.grad


def test_experts_are_one_network_until_they_part():
    model = make_model()
    torch.nn.init.normal_(model.out.weight)
    as_one = TrainAsOne(find_stacks(model), 3)
    optimizer = build_optimizer(model, "muon", 0.1, (0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    alike = []
    for step in range(5):
        as_one.begin_step(step)
        learn(model, step)
        optimizer.step()
        alike.append({are_alike(stack) for stack in find_stacks(model)})
    assert alike == [{True}] * 3 + [{False}] * 2


def test_each_gets_the_mean_of_what_all_would_have_got():
    free, one = make_model(), make_model()
    as_one = TrainAsOne(find_stacks(one), 1)
    as_one.begin_step(0)
    with torch.no_grad():
        for own, stack in zip(find_stacks(free), find_stacks(one), strict=True):
            own.copy_(stack)
    for model in (free, one):
        torch.manual_seed(1)
        torch.nn.init.normal_(model.out.weight)
        learn(model, 7)
    for own, stack in zip(find_stacks(free), find_stacks(one), strict=True):
        gradient = gradient_of(own)
        torch.testing.assert_close(gradient_of(stack), gradient.mean(0, keepdim=True).expand_as(own))
        assert not are_alike(gradient)


def test_no_steps_as_one_change_nothing():
    model, plain = make_model(), make_model()
    TrainAsOne(find_stacks(model), 0).begin_step(0)
    for each in (model, plain):
        learn(each, 3)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        assert torch.equal(gradient_of(parameter), gradient_of(other)), name
