"""Control routers that learn nothing: by domain, as an oracle would, and by place alone. They are swapped into a model.

What a learned router is worth shows only beside them: it should do no worse than the one and better than the other.
"""

from collections.abc import Sequence

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from shodh.config import ConfigError
from shodh.fields import PARAMETERS, DomainSpec, Routing
from shodh.model.transformer import LatentTransformer


class DomainRecogniser:
    """Forward pre-hook that tells each sample's domain from which physical parameters are filled: not 0.

    No label enters the model. Raises ConfigError where two domains fill the same, and ValueError for a sample that
    fills what none does.
    """

    def __init__(self, domains: Sequence[DomainSpec]) -> None:
        patterns = [tuple(name in domain.parameters for name in PARAMETERS) for domain in domains]
        for number, pattern in enumerate(patterns):
            if pattern in patterns[:number]:
                twin = domains[patterns.index(pattern)].name
                raise ConfigError(
                    f"domains={twin}, {domains[number].name}: have the same parameters, {domains[number].parameters}, "
                    "so an oracle cannot tell them apart. Leave one out, or measure without the oracle."
                )
        self.patterns = torch.tensor(patterns)
        self.domain = torch.zeros(0, dtype=torch.int64)  # of each sample of the present pass

    def __call__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        parameters = inputs[2][:, : len(PARAMETERS)]
        same = ((parameters != 0).unsqueeze(1) == self.patterns.to(parameters.device)).all(-1)
        if not bool(same.any(1).all()):
            raise ValueError(f"parameters={parameters[~same.any(1)][0].tolist()}: filled as in no domain. Check them.")
        self.domain = same.int().argmax(1)


class OracleRouter(nn.Module):
    """Sends every token to the expert of its sample's domain, with gate 1."""

    def __init__(self, recogniser: DomainRecogniser, num_experts: int) -> None:
        super().__init__()
        self.recogniser, self.num_experts = recogniser, num_experts

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Routing:
        return _decided(repeat(self.recogniser.domain, "b -> (b n)", n=tokens.shape[1]), self.num_experts)


class HashRouter(nn.Module):
    """Sends a token where a fixed random draw has put its place, whatever it holds, with gate 1; balanced.

    Roller et al., Hash Layers for Large Sparse Models (2021); there the hash is of the token's identity, which a latent
    has not: its place stands for it.
    """

    def __init__(self, num_experts: int, seed: int, layer: int) -> None:
        super().__init__()
        self.num_experts, self.seed = num_experts, seed * 1009 + layer  # layers draw apart; 1009: more than there are

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Routing:
        places = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(self.seed)) % self.num_experts
        return _decided(repeat(places.to(tokens.device), "n -> (b n)", b=tokens.shape[0]), self.num_experts)


def route_by_domain(model: LatentTransformer, domains: Sequence[DomainSpec]) -> None:
    """Replace every layer's router by the oracle; domain i goes to expert i. Raises ConfigError for too few experts."""
    num_experts = model.config.num_experts
    if num_experts < len(domains):
        raise ConfigError(f"model.num_experts={num_experts}: an oracle needs one for each of {len(domains)} domains.")
    recogniser = DomainRecogniser(domains)
    model.register_forward_pre_hook(recogniser)
    _replace_routers(model, [OracleRouter(recogniser, num_experts) for _ in model.blocks])


def route_by_hash(model: LatentTransformer, seed: int) -> None:
    """Replace every layer's router by a draw of its own."""
    _replace_routers(model, [HashRouter(model.config.num_experts, seed, layer) for layer in range(len(model.blocks))])


def _replace_routers(model: LatentTransformer, routers: Sequence[nn.Module]) -> None:
    for block, router in zip(model.blocks, routers, strict=True):
        block.get_submodule("mixture").register_module("router", router)


def _decided(expert: Int[Tensor, "n"], num_experts: int) -> Routing:
    """A routing without doubt; its scores are 0, as nothing was compared."""
    probability = torch.nn.functional.one_hot(expert, num_experts).float()
    return Routing(expert.unsqueeze(1), torch.ones_like(probability[:, :1]), probability, torch.zeros_like(probability))
