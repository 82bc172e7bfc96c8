"""Routing: the best expert by cosine, probabilities that sum to one, gradient where it belongs."""

import torch

from shodh.model.router import SemanticRouter, measure_tokens


def make_router(top_k: int = 1) -> SemanticRouter:
    return SemanticRouter(width=16, num_experts=5, top_k=top_k, semantic_width=8, temperature=0.1)


def test_chosen_expert_is_the_most_probable_and_its_gate_that_probability():
    routing = make_router(top_k=2)(torch.randn(3, 7, 16))
    torch.testing.assert_close(routing.probability.sum(1), torch.ones(21))
    assert torch.equal(routing.expert[:, 0], routing.probability.argmax(1))
    assert torch.equal(routing.gate, routing.probability.gather(1, routing.expert))
    assert (routing.gate[:, 0] >= routing.gate[:, 1]).all()


def test_routing_depends_on_direction_not_on_length_of_tokens():
    router, tokens = make_router(), torch.randn(2, 5, 16)
    torch.testing.assert_close(router(7.0 * tokens).probability, router(tokens).probability, rtol=1e-4, atol=1e-6)


def test_context_of_the_sample_can_change_a_tokens_expert():
    router, tokens = make_router(), torch.randn(1, 64, 16)
    other = tokens.clone()
    other[:, 1:] += 3.0
    assert not torch.allclose(router(tokens).probability[0], router(other).probability[0], atol=1e-3)


def test_scores_are_fp32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = make_router()(torch.randn(2, 4, 16).bfloat16())
    assert routing.probability.dtype == routing.score.dtype == torch.float32


def test_mean_and_variance_of_a_samples_tokens_and_their_gradient():
    tokens = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    mean, variance = measure_tokens(tokens)
    torch.testing.assert_close((variance, mean), torch.var_mean(tokens, 1, keepdim=True, correction=0))
    assert torch.autograd.gradcheck(measure_tokens, (tokens,))
