"""The mixture of experts equals its slow, obvious definition, and trains only what it used."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shodh.model import swiglu
from shodh.model.experts import SharedExpert, StackedExperts
from shodh.model.moe import MixtureOfExperts
from shodh.model.router import SemanticRouter
from shodh.training.balance import count_tokens


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
def test_dispatch_and_its_gradients_equal_one_token_at_a_time(top_k):
    mixture, tokens = make_mixture(top_k=top_k), torch.randn(3, 9, 16, requires_grad=True)
    wanted = [tokens, *mixture.parameters()]
    fast, slow = (differentiate(run, mixture, tokens, wanted) for run in (run_fast, run_slowly))
    for found, expected in zip(fast, slow, strict=True):
        assert (found - expected).norm() < 64 * torch.finfo(torch.float32).eps * expected.norm()


def run_fast(mixture: MixtureOfExperts, tokens: torch.Tensor) -> torch.Tensor:
    return mixture(tokens)[0]


def differentiate(run, mixture, tokens, wanted):
    output = run(mixture, tokens)
    return [output, *torch.autograd.grad((output * output.detach().sin()).sum(), wanted)]


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


WAITS = ("_local_scalar_dense", "nonzero", "bincount", "is_nonzero", "equal", "unique", "masked_select")


class ForbidWaiting(TorchDispatchMode):
    """Fails where an operation needs a value on the host before the next one can be launched."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        assert not name.startswith(WAITS), f"{name} waits for the device"
        return operation(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_where_there_is_a_grouped_kernel(monkeypatch):
    monkeypatch.setattr(swiglu, "has_grouped_kernel", lambda rows: True)
    mixture, tokens = make_mixture(top_k=2), torch.randn(4, 64, 16, requires_grad=True)
    with ForbidWaiting(), torch.autocast("cpu", dtype=torch.bfloat16):
        output, routing = mixture(tokens)
        output.float().sum().backward()
        count = count_tokens(routing)
    assert count.sum() == 2 * 4 * 64
    with pytest.raises(AssertionError, match="waits for the device"), ForbidWaiting():
        mixture(tokens)[0].max().item()


def test_grouped_kernel_equals_the_chunks_to_bf16(monkeypatch):
    mixture, tokens = make_mixture(top_k=2), torch.randn(4, 64, 16)
    results = []
    for grouped in (False, True):
        monkeypatch.setattr(swiglu, "has_grouped_kernel", lambda rows, grouped=grouped: grouped)
        inputs = tokens.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = mixture(inputs)[0].float()
        weights = [mixture.routed.gate_up, mixture.routed.down, mixture.router.prototype]
        results.append([output, *torch.autograd.grad(output.square().sum(), [inputs, *weights])])
    for chunked, grouped in zip(*results, strict=True):
        assert (grouped - chunked).norm() < 2.0**-6 * chunked.norm(), "more than a few roundings of 2^-8"


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
