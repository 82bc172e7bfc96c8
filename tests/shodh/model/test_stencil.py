"""The linear experts: neighbours across boundaries, who is asked, and that a linear law is learnt to round-off."""

import pytest
import torch

from shodh.fields import CONDITIONS, NUM_GIVEN, Routing
from shodh.model.stencil import GAIN, StencilExperts, neighbourhoods, surround
from shodh.model.transformer import LatentTransformer, TransformerConfig, change_scale, root_mean_square


def send(expert: torch.Tensor, num_experts: int, gate: float = 1.0) -> Routing:
    probability = torch.nn.functional.one_hot(expert, num_experts).float()
    return Routing(expert[:, None], torch.full((len(expert), 1), gate), probability, probability)


@pytest.mark.parametrize("periodic", [(1, 1, 1), (0, 0, 0), (1, 0, 1)])
def test_neighbours_wrap_where_the_axis_is_periodic_and_are_zero_elsewhere(periodic):
    fields = torch.randn(2, 3, 4, 5, 6)
    modes = ["circular" if wraps else "constant" for wraps in periodic]
    expected = fields
    for axis, mode in enumerate(modes):
        width = [0, 0, 0, 0, 0, 0]
        width[2 * (2 - axis)] = width[2 * (2 - axis) + 1] = 1
        expected = torch.nn.functional.pad(expected, width, mode=mode)
    assert torch.equal(surround(fields, torch.tensor([periodic, periodic]).float()), expected)


def test_samples_of_one_batch_may_have_different_boundaries():
    fields, periodic = torch.randn(2, 3, 4, 4, 4), torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    both = surround(fields, periodic)
    assert all(torch.equal(both[i : i + 1], surround(fields[i : i + 1], periodic[i : i + 1])) for i in range(2))


def random_stencil(num_experts: int) -> StencilExperts:
    stencil = StencilExperts(num_experts, 3, 2)
    for kernel in stencil.kernels:
        torch.nn.init.normal_(kernel)
    return stencil


@pytest.mark.parametrize("patch", [1, 2])
def test_every_token_is_forecast_by_its_own_expert_whatever_its_gate(patch):
    stencil, fields, periodic = random_stencil(3), torch.randn(2, 3, 4, 4, 4), torch.ones(2, 3)
    tokens = (4 // patch) ** 3
    expert = torch.randint(3, (2 * tokens,))
    found = stencil(fields, periodic, send(expert, 3, gate=0.5), patch)
    alone = [stencil(fields, periodic, send(torch.full_like(expert, e), 3), patch) for e in range(3)]
    place = expert.reshape(2, *[4 // patch] * 3)
    for axis in (1, 2, 3):
        place = place.repeat_interleave(patch, axis)
    expected = sum(a * (place == e)[:, None] for e, a in enumerate(alone))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_several_experts_of_a_token_share_it_by_their_gates():
    stencil, fields, periodic = random_stencil(3), torch.randn(1, 3, 4, 4, 4), torch.ones(1, 3)
    expert, gate = torch.tensor([[2, 0]]).expand(64, 2), torch.tensor([[0.6, 0.2]]).expand(64, 2)
    found = stencil(fields, periodic, Routing(expert, gate, torch.rand(64, 3), torch.rand(64, 3)), 1)
    first, _, last = (stencil(fields, periodic, send(torch.full((64,), e), 3), 1) for e in range(3))
    torch.testing.assert_close(found, 0.75 * last + 0.25 * first, rtol=1e-5, atol=1e-6)


def test_rows_of_neighbours_times_a_kernel_are_its_forecast():
    stencil, fields, periodic = random_stencil(1), torch.randn(2, 3, 4, 5, 6), torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    found = stencil(fields, periodic, send(torch.zeros(2 * 120, dtype=torch.long), 1), 1)
    rows = neighbourhoods(fields, periodic) @ (GAIN * stencil.kernels[0].T)
    torch.testing.assert_close(rows.reshape(2, 4, 5, 6, 2).movedim(-1, 1), found, rtol=1e-4, atol=1e-5)


def test_the_router_is_not_taught_by_the_kernels():
    stencil, gate = random_stencil(2), torch.full((64, 1), 0.7, requires_grad=True)
    routing = send(torch.zeros(64, dtype=torch.long), 2)._replace(gate=gate)
    stencil(torch.randn(1, 3, 4, 4, 4), torch.ones(1, 3), routing, 1).square().sum().backward()
    assert gate.grad is None and stencil.kernels[0].grad.any()


def test_a_kernel_holds_any_linear_law_of_the_neighbourhood():
    torch.manual_seed(0)
    fields, periodic = torch.randn(40, 2, 4, 4, 4), torch.ones(40, 3)
    law = torch.randn(1, 2, 3, 3, 3)
    change = torch.nn.functional.conv3d(surround(fields, periodic), law)
    stencil = StencilExperts(1, 2, 1)
    stencil.kernels[0].data = law.reshape(1, -1) / GAIN
    found = stencil(fields, periodic, send(torch.zeros(40 * 64, dtype=torch.long), 1), 1)
    torch.testing.assert_close(found, change, rtol=1e-4, atol=1e-4)


def test_what_is_forecast_scales_with_the_sample():
    config = TransformerConfig(
        latent_channels=4, medium_channels=2, width=24, depth=1, num_heads=2, num_experts=2, hidden=8
    )
    model = LatentTransformer(config)
    torch.nn.init.normal_(model.out.weight)
    states = torch.randn(3, NUM_GIVEN, 4, 4, 4, 4)
    told = torch.zeros(3, len(CONDITIONS))
    change = model(states, torch.zeros(3, 2, 4, 4, 4), told).latent - states[:, -1]
    last = root_mean_square(states[:, -1] - states[:, -2])
    scale = change_scale(states[:, -1], last)
    assert change_scale(10 * states[:, -1], 10 * last).allclose(10 * scale, rtol=1e-4)
    assert change.square().mean((1, 2, 3, 4)).sqrt().gt(0.1 * scale.flatten()).all()
