"""Control routers decide by domain or by place alone, whatever tokens hold."""

import pytest
import torch
from conftest import make_domain

from shodh.config import ConfigError
from shodh.evaluation.controls import DomainRecogniser, HashRouter, route_by_domain, route_by_hash
from shodh.fields import CONDITIONS, NUM_GIVEN, PARAMETERS, DomainSpec
from shodh.model.router import SemanticRouter
from shodh.model.transformer import LatentTransformer, TransformerConfig

SMALL = TransformerConfig(
    latent_channels=4, medium_channels=2, width=24, depth=3, num_heads=2, num_experts=4, hidden=16
)


def domain(name: str, *parameters: str) -> DomainSpec:
    return make_domain(name=name, parameters=parameters)


DOMAINS = [domain("a", "dt"), domain("b", "dt", "viscosity"), domain("c", "dt", "frequency", "porosity")]


def inputs(kinds: list[int]) -> tuple[torch.Tensor, ...]:
    """Random states of samples of these domains."""
    parameters = torch.zeros(len(kinds), len(CONDITIONS))
    for row, kind in zip(parameters, kinds, strict=True):
        for name in DOMAINS[kind].parameters:
            row[PARAMETERS.index(name)] = torch.rand(()) + 0.1
    states, medium = torch.randn(len(kinds), NUM_GIVEN, 4, 4, 4, 4), torch.randn(len(kinds), 2, 4, 4, 4)
    return states, medium, parameters


def test_oracle_sends_every_token_of_a_domain_to_its_expert_and_no_other():
    model = LatentTransformer(SMALL)
    route_by_domain(model, DOMAINS)
    for kinds in ([0, 1, 2, 2, 0], [2], [1, 0]):
        for routing in model(*inputs(kinds)).routings:
            assert torch.equal(routing.expert[:, 0], torch.tensor(kinds).repeat_interleave(64))
            assert (routing.gate == 1).all() and torch.equal(routing.probability.argmax(1), routing.expert[:, 0])


def test_only_the_chosen_experts_get_gradient_from_an_oracle():
    model = LatentTransformer(SMALL)
    route_by_domain(model, DOMAINS)
    torch.nn.init.normal_(model.out.weight)
    model(*inputs([0, 2])).latent.square().sum().backward()
    for block in model.blocks:
        gradient = block.mixture.routed.down.grad
        assert [bool(expert.any()) for expert in gradient] == [True, False, True, False]


def test_oracle_refuses_domains_that_it_cannot_tell_apart_and_samples_of_none():
    with pytest.raises(ConfigError, match="domains=b, d: have the same parameters"):
        DomainRecogniser([*DOMAINS, domain("d", "viscosity", "dt")])
    with pytest.raises(ConfigError, match="num_experts=4: an oracle needs one for each of 5"):
        route_by_domain(LatentTransformer(SMALL), [*DOMAINS, domain("d", "diffusivity"), domain("e")])
    model = LatentTransformer(SMALL)
    route_by_domain(model, DOMAINS[:2])
    with pytest.raises(ValueError, match="filled as in no domain"):
        model(*inputs([0, 2]))


def test_hash_is_balanced_fixed_and_deaf_to_content_and_differs_by_layer_and_seed():
    model = LatentTransformer(SMALL)
    route_by_hash(model, seed=3)
    first, second = (model(*inputs(kinds)).routings for kinds in ([0, 0, 1], [2, 1, 0]))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.expert, other.expert)
        places = one.expert[:, 0].reshape(3, 64)
        assert (places == places[0]).all() and places[0].bincount().tolist() == [16] * 4
    assert not torch.equal(first[0].expert, first[1].expert)
    tokens = torch.zeros(1, 64, 24)
    assert not torch.equal(HashRouter(4, 3, 0)(tokens).expert, HashRouter(4, 4, 0)(tokens).expert)


def test_uneven_numbers_of_places_differ_by_one_at_most():
    counts = HashRouter(3, 0, 0)(torch.zeros(1, 64, 24)).expert[:, 0].bincount()
    assert counts.max() - counts.min() == 1


def test_controls_leave_no_learned_router():
    for control in (lambda m: route_by_domain(m, DOMAINS), lambda m: route_by_hash(m, 0)):
        model = LatentTransformer(SMALL)
        control(model)
        assert not any(isinstance(module, SemanticRouter) for module in model.modules())
