"""The mixture of experts equals its slow, obvious definition, and trains only what it used."""

import pytest
import torch

from shodh.model.experts import SharedExpert, StackedExperts, grouped_product
from shodh.model.moe import MixtureOfExperts
from shodh.model.router import SemanticRouter


def make_mixture(num_experts: int = 4, top_k: int = 1) -> MixtureOfExperts:
    mixture = MixtureOfExperts(
        SemanticRouter(16, num_experts, top_k, 8, 0.1), SharedExpert(16, 24), StackedExperts(num_experts, 16, 24)
    )
    torch.nn.init.normal_(mixture.shared.down.weight)
    return mixture


def run_slowly(mixture: MixtureOfExperts, tokens: torch.Tensor) -> torch.Tensor:
    """One token at a time, exactly as the layer is described."""
    routing, flat = mixture.router(tokens), tokens.flatten(0, 1)
    rows = []
    for n, token in enumerate(flat):
        row = mixture.shared(token[None])[0]
        for expert, gate in zip(routing.expert[n], routing.gate[n], strict=True):
            gated, up = (token @ mixture.routed.gate_up[expert]).chunk(2)
            row = row + gate * ((torch.nn.functional.silu(gated) * up) @ mixture.routed.down[expert])
        rows.append(row)
    return torch.stack(rows).reshape(tokens.shape)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_dispatch_equals_one_token_at_a_time(top_k):
    mixture, tokens = make_mixture(top_k=top_k), torch.randn(3, 9, 16)
    torch.testing.assert_close(mixture(tokens)[0], run_slowly(mixture, tokens), rtol=1e-4, atol=1e-5)


def test_no_token_is_dropped_when_all_choose_one_expert():
    mixture, tokens = make_mixture(), torch.randn(1, 1, 16).expand(2, 50, 16).contiguous()
    output, routing = mixture(tokens)
    assert len(routing.expert.unique()) == 1
    torch.testing.assert_close(output, run_slowly(mixture, tokens), rtol=1e-4, atol=1e-5)


def test_only_chosen_experts_get_gradient():
    mixture = make_mixture(num_experts=8)
    output, routing = mixture(torch.randn(1, 6, 16))
    output.square().sum().backward()
    used = torch.zeros(8, dtype=torch.bool)
    used[routing.expert.flatten()] = True
    for parameter in (mixture.routed.gate_up, mixture.routed.down):
        touched = parameter.grad.flatten(1).abs().sum(1) > 0
        assert torch.equal(touched, used)


def test_permuting_tokens_permutes_outputs():
    mixture, tokens = make_mixture(), torch.randn(2, 12, 16)
    order = torch.randperm(12)
    torch.testing.assert_close(mixture(tokens[:, order])[0], mixture(tokens)[0][:, order], rtol=1e-4, atol=1e-5)


def test_grouped_product_accepts_experts_without_tokens():
    rows, matrices = torch.randn(5, 3), torch.randn(4, 3, 2)
    count = torch.tensor([0, 2, 0, 3])
    expected = torch.cat([rows[:2] @ matrices[1], rows[2:] @ matrices[3]])
    torch.testing.assert_close(grouped_product(rows, matrices, count), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_grouped_kernel_on_cuda_equals_the_loop_to_bf16_and_trains():
    mixture, tokens = make_mixture(), torch.randn(4, 64, 16)
    expected, _ = mixture(tokens)
    mixture, tokens = mixture.cuda(), tokens.cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output, routing = mixture(tokens)
    error = (output.float().cpu() - expected).norm() / expected.norm()
    assert error < 2.0**-5, "more than a few roundings of 2^-8"
    output.float().square().sum().backward()
    used = torch.bincount(routing.expert.flatten(), minlength=4) > 0
    touched = mixture.routed.gate_up.grad.flatten(1).abs().sum(1) > 0
    assert torch.equal(touched, used)
