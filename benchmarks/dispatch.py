"""What a mixture's feed-forward layer costs on a CPU beside a dense one of equal active FLOPs, and beside DeepSpeed's.

    python benchmarks/dispatch.py [--quick]

Forward and backward of 16,384 tokens, FP32, one thread, seconds of the CPU. The dense network is run in every way that
could be its fastest: chunk by chunk through autograd, and through this package's own function; the fastest counts.
Where tokens go is made up beforehand: evenly, or 30 % to one expert. DeepSpeed's layer has no shared expert, so ours is
measured without it beside that.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import sys
import time
from collections.abc import Callable
from unittest import mock

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from einops import rearrange
from figures import Figure, at_most, control, report, stated, time_interleaved
from torch import Tensor, nn

from shodh.device import keep_freed_memory
from shodh.model.experts import SharedExpert, StackedExperts
from shodh.model.moe import MixtureOfExperts, sort_by_expert
from shodh.model.router import SemanticRouter
from shodh.training import engine
from shodh.training.engine import distributed

SAMPLES, TOKENS = 32, 512
WIDTH, HIDDEN, SEMANTIC = 256, 1024, 32
SKEW = 0.3  # share of the tokens that one expert gets
CHUNKS = (256, 512, 1024, 2048, 4096)
NAME = f"DeepSpeed {deepspeed.__version__}'s layer"

Work = Callable[[], object]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    num_rounds = 3 if parser.parse_args(arguments).quick else 11
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with mock.patch.object(engine, "keep_freed_memory"), distributed(threads_per_rank=1):
        deepspeed_figures = compare_with_deepspeed(num_rounds)
        return report("dispatch", [*compare_with_dense(num_rounds), *deepspeed_figures])


def compare_with_dense(num_rounds: int) -> list[Figure]:
    """The whole layer, shared expert and router included."""
    chunk, dense = find_fastest_dense()
    works = {
        "dense": dense,
        "8": pass_mixture(8),
        "again": dense,
        "64": pass_mixture(64),
        "8 skewed": pass_mixture(8, SKEW),
    }
    seconds = time_interleaved(works, num_rounds, time.process_time)
    return [
        stated(f"dense feed-forward, {chunk}", seconds["dense"], "s"),
        at_most("mixture of 8 over dense of equal active FLOPs", seconds["8"] / seconds["dense"], 1.12),
        at_most("mixture of 64 over mixture of 8", seconds["64"] / seconds["8"], 1.25),
        at_most("mixture of 8, 30 % on one expert, over balanced", seconds["8 skewed"] / seconds["8"], 1.05),
        control("dense over itself", seconds["again"] / seconds["dense"]),
    ]


def compare_with_deepspeed(num_rounds: int) -> list[Figure]:
    """Routed experts alone: balanced with capacity for 1.25 of an even share, and skewed with nothing dropped.

    Without drops DeepSpeed pads every expert to the busiest, so what that costs grows with their number, in gigabytes
    too: balanced layers are compared by themselves.
    """
    figures, skewed = compare_balanced(num_rounds), {}
    for n in (8, 64):
        works = {
            "ours": pass_mixture(n, SKEW, routed_only=True),
            "theirs": pass_deepspeed(n, SKEW, drop_tokens=False),
        }
        seconds = time_interleaved(works, num_rounds, time.process_time)
        skewed[n] = seconds["ours"] / seconds["theirs"]
    return [
        *figures,
        stated(f"8 experts, 30 % on one, over {NAME} without drops", skewed[8]),
        at_most(f"64 experts, 30 % on one, over {NAME} without drops", skewed[64], 0.2),
    ]


def compare_balanced(num_rounds: int) -> list[Figure]:
    """As the C library manages memory by itself, and as ``distributed`` has it for both, which serves large arrays."""
    works = {
        "ours": pass_mixture(8, routed_only=True),
        "theirs": pass_deepspeed(8, capacity_factor=1.25),
        "again": pass_mixture(8, routed_only=True),
    }
    by_itself = time_interleaved(works, 2 * num_rounds, time.process_time)
    keep_freed_memory()
    kept = time_interleaved(works, 2 * num_rounds, time.process_time)
    name = f"8 experts, balanced, over {NAME} at capacity 1.25"
    return [
        at_most(name, by_itself["ours"] / by_itself["theirs"], 0.8),
        control("routed experts over themselves", by_itself["again"] / by_itself["ours"]),
        stated(f"{name}, freed memory kept for both", kept["ours"] / kept["theirs"]),
        control("the same over themselves", kept["again"] / kept["ours"]),
    ]


def find_fastest_dense() -> tuple[str, Work]:
    """The fastest of all ways to run a dense network of as many active FLOPs, and what it is."""
    network = SharedExpert(WIDTH, 2 * HIDDEN)
    nn.init.normal_(network.down.weight, std=HIDDEN**-0.5)
    tokens = torch.randn(SAMPLES * TOKENS, WIDTH)
    ways: dict[str, Work] = {"by the function of experts": passing(network, network, tokens)}
    for chunk in CHUNKS:

        def in_chunks(rows: Tensor, chunk: int = chunk) -> Tensor:
            return torch.cat([swiglu(network, part) for part in rows.split(chunk)])

        ways[f"{chunk} rows at once through autograd"] = passing(in_chunks, network, tokens)
    seconds = time_interleaved(ways, 3, time.process_time)
    fastest = min(ways, key=lambda way: seconds[way].min())
    return fastest, ways[fastest]


def swiglu(network: SharedExpert, rows: Tensor) -> Tensor:
    """A dense network as one writes it."""
    gate, up = network.gate_up(rows).chunk(2, -1)
    return network.down(nn.functional.silu(gate) * up)


def pass_mixture(num_experts: int, skew: float = 0.0, routed_only: bool = False) -> Work:
    """Forward and backward of our layer."""
    router = SemanticRouter(WIDTH, num_experts, 1, SEMANTIC, temperature=0.1)
    mixture = MixtureOfExperts(router, SharedExpert(WIDTH, HIDDEN), StackedExperts(num_experts, WIDTH, HIDDEN))
    nn.init.normal_(mixture.shared.down.weight, std=HIDDEN**-0.5)
    tokens, prototypes, expert = draw_tokens(num_experts, skew)
    with torch.no_grad():
        router.prototype.copy_(prototypes)
        router.token.weight.copy_(torch.eye(SEMANTIC, WIDTH))
        router.context.weight.zero_()
        assert torch.equal(router(tokens).expert[:, 0], expert), "tokens go where they were meant to"

    def routed(tokens: Tensor) -> Tensor:
        dispatch = sort_by_expert(mixture.router(tokens))
        return mixture.routed(rearrange(tokens, "b n d -> (b n) d"), dispatch).reshape(tokens.shape)

    return passing(routed if routed_only else lambda tokens: mixture(tokens)[0], mixture, tokens)


def pass_deepspeed(num_experts: int, skew: float = 0.0, capacity_factor: float = 1.0, drop_tokens: bool = True) -> Work:
    """Forward and backward of DeepSpeed's layer, whose gate sends the same tokens to the same experts."""

    class Expert(SharedExpert):
        def forward(self, tokens: Tensor) -> Tensor:
            return swiglu(self, tokens)

    network = Expert(WIDTH, HIDDEN)
    nn.init.normal_(network.down.weight, std=HIDDEN**-0.5)
    options = {"capacity_factor": capacity_factor, "drop_tokens": drop_tokens}
    layer = MoE(WIDTH, network, num_experts=num_experts, ep_size=1, k=1, **options)
    layer.set_deepspeed_parallelism()
    tokens, prototypes, expert = draw_tokens(num_experts, skew)
    gate: nn.Linear = layer.deepspeed_moe.gate.wg  # pyright: ignore[reportAssignmentType]
    with torch.no_grad():
        gate.weight.copy_(prototypes @ torch.eye(SEMANTIC, WIDTH))
        assert torch.equal(gate(tokens.flatten(0, 1)).argmax(-1), expert), "tokens go where they were meant to"
    return passing(lambda tokens: layer(tokens)[0], layer, tokens)


def draw_tokens(num_experts: int, skew: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (b n d) whose first features say where they go, by prototypes (e s); and where, (b n)."""
    draw = torch.Generator().manual_seed(num_experts)
    prototypes = nn.functional.normalize(torch.randn(num_experts, SEMANTIC, generator=draw), dim=-1)
    num_tokens = SAMPLES * TOKENS
    expert = torch.arange(num_tokens) % num_experts
    if skew:
        moved = int((skew - 1 / num_experts) / (1 - 1 / num_experts) * num_tokens)
        expert[torch.randperm(num_tokens, generator=draw)[:moved]] = 0
    expert = expert[torch.randperm(num_tokens, generator=draw)]
    tokens = torch.randn(num_tokens, WIDTH, generator=draw)
    tokens[:, :SEMANTIC] = 3 * prototypes[expert] + 0.01 * tokens[:, :SEMANTIC]
    return rearrange(tokens, "(b n) d -> b n d", b=SAMPLES), prototypes, expert


def passing(run: Callable[[Tensor], Tensor], module: nn.Module, tokens: Tensor) -> Work:
    """Forward and backward, gradients of tokens and parameters made anew."""
    inputs, slopes = tokens.clone().requires_grad_(), torch.randn_like(tokens)

    def work() -> None:
        run(inputs).backward(slopes)
        inputs.grad = None
        module.zero_grad()

    return work


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
