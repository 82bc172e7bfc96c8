"""The soft-semantic router: tokens choose experts by cosine similarity to learned prototypes."""

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from shodh.fields import Routing


class SemanticRouter(nn.Module):
    """Scores = cosine(semantics, prototype) / temperature; softmax and scores always in FP32.

    A token's semantics are its own projection joined with the pooled projection of its sample, so that what kind of
    field surrounds it can speak, without any label. Chi et al., On the Representation Collapse of Sparse MoE (2022).
    """

    def __init__(self, width: int, num_experts: int, top_k: int, semantic_width: int, temperature: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.temperature = temperature
        self.token = nn.Linear(width, semantic_width, bias=False)
        self.context = nn.Linear(width, semantic_width, bias=False)
        self.prototype = nn.Parameter(torch.randn(num_experts, semantic_width))

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Routing:
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            pooled = reduce(tokens, "b n d -> b 1 d", "mean")
            semantics = functional.normalize(self.token(tokens) + self.context(pooled), dim=-1).flatten(0, 1)
            score = semantics @ functional.normalize(self.prototype, dim=-1).T / self.temperature
            probability = score.softmax(-1)
            gate, expert = probability.topk(self.top_k, dim=-1)
        return Routing(expert, gate, probability, score)
