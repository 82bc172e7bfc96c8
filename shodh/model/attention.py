"""Self-attention over the latent tokens of a sample, with normalised queries and keys and 3-D rotary positions."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from shodh.model.embedding import rotate


class Attention(nn.Module):
    """Multi-head attention, every token to every token of its sample (FlashAttention kernels where torch has them)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.key_norm = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, tokens: Float[Tensor, "b n d"], angles: Float[Tensor, "n a"]) -> Float[Tensor, "b n d"]:
        query, key, value = rearrange(
            self.query_key_value(tokens), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        query, key = rotate(self.query_norm(query.float()), angles), rotate(self.key_norm(key.float()), angles)
        mixed = functional.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))
