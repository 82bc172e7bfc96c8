"""Run by test_exchange.py under the DeepSpeed launcher: layers whose experts 2 ranks share out, beside whole ones.

Each rank has a whole layer too, of the same seed; its routed experts' gradients are added up over ranks.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from shodh.model.exchange import plan_exchange
from shodh.model.experts import SharedExpert, StackedExperts, own_experts
from shodh.model.moe import MixtureOfExperts, sort_by_expert
from shodh.model.router import SemanticRouter
from shodh.training.engine import create_expert_group, distributed

NUM_EXPERTS, WIDTH, HIDDEN = 6, 16, 24
SAMPLES = ((3, 9), (2, 5))  # samples and tokens of each, on rank 0 and on rank 1
FULL = 16 * torch.finfo(torch.float32).eps  # of a norm: sums in another order, in two layers one after the other
# Of a norm: a shared layer's gates are bfloat16, a whole one's are not; then each rounds a product and two sums.
LOW = 4 * 2**-8


def make_layers(top_k, num_layers=1, group=None, bias=None):
    torch.manual_seed(0)
    layers = []
    for _ in range(num_layers):
        router, shared = SemanticRouter(WIDTH, NUM_EXPERTS, top_k, 8, 0.1), SharedExpert(WIDTH, HIDDEN)
        torch.nn.init.normal_(shared.down.weight, std=HIDDEN**-0.5)
        if bias is not None:
            router.bias.copy_(torch.tensor(bias))
        layers.append(MixtureOfExperts(router, shared, StackedExperts(NUM_EXPERTS, WIDTH, HIDDEN, group)))
    return torch.nn.ModuleList(layers)


def draw(rank, seed):
    """Tokens of a rank, or slopes of its output; ranks have different ones, and different numbers of them."""
    generator = torch.Generator().manual_seed(2 * seed + rank)
    return torch.randn(*SAMPLES[rank], WIDTH, generator=generator)


def run(layers, rank, recompute=False):
    """Output, and gradients by name of its product with given slopes."""
    tokens = draw(rank, 1).requires_grad_()
    output = tokens
    for layer in layers:
        step = checkpoint(layer, output, use_reentrant=False, early_stop=False) if recompute else layer(output)
        output = output + step[0]
    names, parameters = zip(*layers.named_parameters(), strict=True)
    slopes = torch.autograd.grad(output, [tokens, *parameters], draw(rank, 2))
    return {"output": output.detach(), "tokens": slopes[0], **dict(zip(names, slopes[1:], strict=True))}


def own_part(found, group):
    """What a rank that holds a share of the experts should find, from what whole layers on all ranks found."""
    own = own_experts(NUM_EXPERTS, group.size(), group.rank())
    for name in found:
        if ".routed." in name:
            found[name] = found[name].float()
            dist.all_reduce(found[name], group=group)
            found[name] = found[name][own]
    return found


def compare(group, tolerance, low=False, recompute=False, **choices):
    """A shared layer with the whole one: output, gradients of tokens, router, shared expert and own routed experts."""
    shared, whole = make_layers(group=group, **choices), make_layers(**choices)
    rank = group.rank()
    with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
        found = run(shared, rank, recompute)
        expected = own_part(run(whole, rank), group)
    assert found.keys() == expected.keys() and len(found) == 2 + 7 * len(shared)
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm().clamp(min=torch.finfo(torch.float32).tiny)
        assert error <= tolerance, (choices, low, recompute, rank, name, float(error))
    return found


def without_gradient(group):
    shared, rank = make_layers(2, group=group)[0], group.rank()
    output, _ = shared(draw(rank, 1))
    with torch.no_grad():
        alone, _ = shared(draw(rank, 1))
    assert output.requires_grad and not alone.requires_grad and torch.equal(output, alone)


def no_row_for_rank_1(group):
    bias = [0.0, 0.0, 0.0, -1e4, -1e4, -1e4]
    for top_k in (1, 2):
        found = compare(group, FULL, top_k=top_k, bias=bias)
        routed = [value for name, value in found.items() if ".routed." in name]
        assert len(routed) == 2 and all(bool(value.any()) == (group.rank() == 0) for value in routed)


def recomputed(group):
    """Two layers whose journeys are travelled again in backward, which changes not a bit."""
    again = compare(group, FULL, top_k=2, num_layers=2, recompute=True)
    once = compare(group, FULL, top_k=2, num_layers=2)
    assert all(torch.equal(again[name], once[name]) for name in once)


def rows_are_counted(group):
    """Rows that leave for the other rank, counted one by one; those that come back are those that left."""
    own = range(NUM_EXPERTS)[own_experts(NUM_EXPERTS, group.size(), group.rank())]
    routing = make_layers(2)[0].router(draw(group.rank(), 1))
    there, back, arrived = plan_exchange(sort_by_expert(routing).end, group)
    leaving = [expert for expert in routing.expert.flatten().tolist() if expert not in own]
    other = 1 - group.rank()
    assert 0 < len(leaving) == there.sent[other] == back.received[other]
    assert int(arrived.end[-1]) == sum(there.received) == sum(back.sent)


def main():
    with distributed(threads_per_rank=1) as whole_group:
        assert whole_group.size == 2
        group = create_expert_group(2)
        for top_k in (1, 2):
            full, low = compare(group, FULL, top_k=top_k), compare(group, LOW, top_k=top_k, low=True)
            assert not torch.equal(full["output"], low["output"])
        no_row_for_rank_1(group)
        without_gradient(group)
        recomputed(group)
        rows_are_counted(group)
        dist.barrier()  # nothing is said to hold before it does on both
        if whole_group.rank == 0:
            print("layers shared out are whole layers")


if __name__ == "__main__":
    main()
