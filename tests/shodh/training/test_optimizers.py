"""Muon for the matrices and AdamW for the rest, as one optimizer."""

import copy
import math

import pytest
import torch
from torch import nn

from shodh.config import ConfigError
from shodh.model.transformer import LatentTransformer, TransformerConfig
from shodh.training.optimizers import OptimizerName, build_optimizer, create_moments, is_hidden_matrix

BETAS = (0.9, 0.95)
DECAY = 0.1
RATE = 0.01

# Keller Jordan's quintic, of which Muon applies five steps to the singular values.
QUINTIC = (3.4445, -4.7750, 2.0315)


class Mixture(nn.Module):
    """One of each kind of parameter that the models have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 12)
        self.narrow = nn.Linear(3, 16, bias=False)
        self.prototype = nn.Parameter(torch.randn(8, 16))
        self.experts = nn.Parameter(torch.randn(4, 16, 8))


def build(
    model: nn.Module, name: OptimizerName = "muon", rate: float = RATE, decay: float = DECAY
) -> torch.optim.Optimizer:
    optimizer = build_optimizer(model, name, decay, BETAS)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, gradients: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()
    optimizer.step()
    optimizer.zero_grad()


def draw_gradients(model: nn.Module, num_steps: int) -> list[dict[str, torch.Tensor]]:
    return [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(num_steps)]


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """The same singular vectors; each singular value taken through five quintic steps, in FP64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm()
    for _ in range(5):
        values = QUINTIC[0] * values + QUINTIC[1] * values**3 + QUINTIC[2] * values**5
    return left * values @ right


def test_only_hidden_matrices_go_to_muon():
    chosen = {name for name, parameter in Mixture().named_parameters() if is_hidden_matrix(name, parameter)}
    assert chosen == {"linear.weight", "experts"}


def test_each_expert_of_a_stack_steps_as_a_matrix_of_its_own():
    model = Mixture()
    alone = nn.ParameterList([nn.Parameter(expert.clone()) for expert in model.experts.detach()])
    optimizer, twin = build(model), build(alone)
    for gradients in draw_gradients(model, 3):
        step(model, optimizer, gradients)
        step(alone, twin, {str(i): gradient for i, gradient in enumerate(gradients["experts"])})
    assert torch.equal(model.experts, torch.stack(list(alone)))


def test_an_expert_that_no_token_visited_stands_still():
    model = Mixture()
    optimizer = build(model)
    first, second = draw_gradients(model, 2)
    step(model, optimizer, first)
    second["experts"][1] = 0
    second["linear.weight"][:] = 0  # a linear expert is a matrix of its own
    before, matrix = model.experts.detach().clone(), model.linear.weight.detach().clone()
    step(model, optimizer, second)
    moved = (model.experts != before).flatten(1).any(1)
    assert moved.tolist() == [expert != 1 for expert in range(len(moved))]
    assert torch.equal(model.linear.weight, matrix)


@pytest.mark.parametrize("shape", [(12, 24), (24, 12), (16, 16)])
def test_muon_steps_follow_the_orthogonalised_momentum(shape):
    model = nn.Linear(shape[1], shape[0], bias=False)
    optimizer, momentum = build(model), torch.zeros(shape)
    for gradients in draw_gradients(model, 3):
        before = model.weight.detach().clone()
        step(model, optimizer, gradients)
        momentum = 0.95 * momentum + 0.05 * gradients["weight"]
        nesterov = 0.95 * momentum + 0.05 * gradients["weight"]
        update = (before * (1 - RATE * DECAY) - model.weight.detach()) / (RATE * 0.2 * math.sqrt(max(shape)))
        reference = orthogonalise(nesterov)
        # five iterations of three products, each rounded to bf16 (relative 2^-8)
        assert (update - reference).norm() < 15 * 2**-8 * reference.norm()


def test_one_muon_step_has_the_gradients_singular_vectors_and_nearly_equal_singular_values():
    model = nn.Linear(16, 16, bias=False)
    left, right = torch.linalg.qr(torch.randn(2, 16, 16))[0]
    values = torch.logspace(0, -1, 16)
    before = model.weight.detach().clone()
    step(model, build(model, decay=0.0), {"weight": left * values @ right.T})
    found = left.T @ (before - model.weight.detach()) @ right / (RATE * 0.2 * math.sqrt(16))
    # five quintic steps take [0.01, 1] into [0.6818, 1.1344]; bf16 adds its 2^-8
    assert 0.6818 - 2**-8 < found.diag().min() and found.diag().max() < 1.1344 + 2**-8
    assert (found - found.diag().diag()).norm() < 15 * 2**-8 * found.norm()


def test_all_other_parameters_step_as_under_adamw_alone():
    model = Mixture()
    twin = copy.deepcopy(model)
    joined, alone = build(model), build(twin, "adamw")
    for gradients in draw_gradients(model, 3):
        step(model, joined, gradients)
        step(twin, alone, gradients)
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected) != is_hidden_matrix(name, expected), name


def test_one_learning_rate_moves_every_parameter_and_zero_moves_none():
    model = Mixture()
    start = copy.deepcopy(model.state_dict())
    optimizer = build(model, rate=0.0)
    (gradients,) = draw_gradients(model, 1)
    step(model, optimizer, gradients)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    for group in optimizer.param_groups:
        group["lr"] = RATE
    step(model, optimizer, gradients)
    assert not any(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_moments_made_early_change_no_step_and_each_optimizer_has_its_own():
    model = Mixture()
    twin = copy.deepcopy(model)
    early, late = build(model), build(twin)
    create_moments(early)
    (gradients,) = draw_gradients(model, 1)
    step(model, early, gradients)
    step(twin, late, gradients)
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected)
        assert early.state[found].keys() == late.state[expected].keys()
    assert early.state[model.linear.weight].keys() == {"momentum_buffer"}


def test_a_loaded_state_dict_continues_bit_for_bit():
    model = Mixture()
    optimizer = build(model)
    gradients = draw_gradients(model, 4)
    for each in gradients[:2]:
        step(model, optimizer, each)
    twin = copy.deepcopy(model)
    other = build(twin, rate=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in gradients[2:]:
        step(model, optimizer, each)
        step(twin, other, each)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_model_without_matrices_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="optimizer=muon: .*no trainable matrix.* Set .*=adamw") as caught:
        build_optimizer(nn.Linear(4, 4), "muon", DECAY, BETAS)
    assert "\n" not in str(caught.value)
    frozen = Mixture().requires_grad_(False)
    frozen.experts.requires_grad_(True)
    with pytest.raises(ConfigError, match="no trainable matrix"):
        build_optimizer(frozen, "muon", DECAY, BETAS)


def steps_to(fraction: float, name: OptimizerName, seed: int, num_steps: int = 300, size: int = 32) -> float:
    """Steps until tr(D^T H D K) / 2, D = W - T, is this fraction of its start; H and K have condition number 1e4.

    The rate falls linearly from 0.2, so that Muon's whole path in each singular direction, 0.2 sqrt(n) sum(rate) = 34,
    is three times the largest distance it has to go, about 2 sqrt(n) = 11: no optimizer lacks reach.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.logspace(0, -4, size)
    rotations = torch.linalg.qr(torch.randn(2, size, size, generator=generator))[0]
    hessians = [rotation * spectrum @ rotation.T for rotation in rotations]
    target = torch.randn(size, size, generator=generator)
    model = nn.Linear(size, size, bias=False)
    nn.init.zeros_(model.weight)
    optimizer, losses = build(model, name, decay=0.0), []
    for done in range(num_steps):
        gradient = hessians[0] @ (model.weight.detach() - target) @ hessians[1]
        losses.append(((model.weight.detach() - target) * gradient).sum().item() / 2)
        if losses[-1] < fraction * losses[0]:
            return done
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * (1 - done / num_steps)
        step(model, optimizer, {"weight": gradient})
    return math.inf


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_muon_solves_an_ill_conditioned_quadratic_in_fewer_steps_than_adamw(seed):
    """To 1e-4; to 1e-2 AdamW is sooner, whose steps are longer as long as the gradient keeps its sign."""
    assert steps_to(1e-4, "muon", seed) < steps_to(1e-4, "adamw", seed)


def test_linear_experts_follow_their_gradient_but_do_not_decay():
    config = TransformerConfig(
        latent_channels=8, medium_channels=2, width=24, depth=1, num_heads=2, num_experts=2, hidden=8, semantic_width=8
    )
    for name in ("muon", "adamw"):
        stepped = []
        for decay in (0.0, 0.5):
            torch.manual_seed(0)
            model = LatentTransformer(config)
            for parameter in (*model.stencil.kernels, model.embed.weight):
                nn.init.ones_(parameter)
            step(model, build(model, name, decay=decay), draw_gradients(model, 1)[0])
            stepped.append((*model.stencil.kernels, model.embed.weight))
        *same, decayed = map(torch.equal, *stepped)
        assert all(same) and not decayed
        assert all((kernel != 1).any() for kernel in model.stencil.kernels)
