"""Networks applied by chunks: their gradient is that of the formula, whatever rows each of them takes."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional

from shodh.model import swiglu
from shodh.model.swiglu import Dispatch, apply_networks

CASES = {
    "empty runs": [0, 7, 7, 12],
    "all to one": [0, 0, 12, 12],
    "even": [3, 6, 9, 12],
    "no rows": [0, 0, 0, 0],
}


def make_rows(end, dtype=torch.float64):
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(7, 5, dtype=dtype, generator=draw)
    gate_up = torch.randn(len(end), 5, 6, dtype=dtype, generator=draw)
    down = torch.randn(len(end), 3, 5, dtype=dtype, generator=draw)
    weight = torch.rand(end[-1], dtype=dtype, generator=draw)
    source = torch.randint(0, 7, (end[-1],), generator=draw)  # some rows several times, some never
    tensors = [tensor.requires_grad_() for tensor in (rows, weight, gate_up, down)]
    return tensors, source, torch.tensor(end)


@pytest.fixture(autouse=True)
def _chunks_of_three(monkeypatch):
    monkeypatch.setattr(swiglu, "CHUNK", 3)


@pytest.mark.parametrize("end", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("weighted", [True, False])
def test_gradient_is_that_of_finite_differences_in_fp64(end, weighted):
    (rows, weight, gate_up, down), source, end = make_rows(end)

    def apply(rows, weight, gate_up, down):
        return apply_networks(rows, Dispatch(source, weight if weighted else None, end), gate_up, down)

    assert gradcheck(apply, (rows, weight, gate_up, down))


@pytest.mark.parametrize("weighted", [True, False])
def test_rows_in_their_order_need_no_source(weighted):
    (rows, weight, gate_up, down), _, end = make_rows([2, 2, 5, 7])
    weight = weight if weighted else None
    results = []
    for source in (None, torch.arange(7)):
        output = apply_networks(rows, Dispatch(source, weight, end), gate_up, down)
        wanted = [rows, gate_up, down, *([weight] if weighted else [])]
        results.append([output, *torch.autograd.grad((output * output.detach().cos()).sum(), wanted)])
    for plain, sorted_ in zip(*results, strict=True):
        torch.testing.assert_close(plain, sorted_)


def test_rows_get_the_weighted_sum_of_their_networks():
    (rows, weight, gate_up, down), source, end = make_rows([2, 2, 9, 12])
    expected = torch.zeros_like(rows)
    for place, (row, scale) in enumerate(zip(source, weight, strict=True)):
        network = int((end <= place).sum())
        gate, up = (rows[row] @ gate_up[network]).chunk(2)
        expected[row] += scale * ((functional.silu(gate) * up) @ down[network])
    found = apply_networks(rows, Dispatch(source, weight, end), gate_up, down)
    torch.testing.assert_close(found, expected)


def test_only_the_products_with_gate_up_are_kept_of_the_hidden_features():
    rows, hidden = torch.randn(64, 8, requires_grad=True), 32
    gate_up, down = torch.randn(1, 8, 2 * hidden, requires_grad=True), torch.randn(1, hidden, 8, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        apply_networks(rows, Dispatch(None, None, torch.tensor([64])), gate_up, down)
    inputs = {tensor.data_ptr() for tensor in (rows, gate_up, down)}
    of_hidden = sum(t.numel() for t in kept if t.is_floating_point() and t.data_ptr() not in inputs)
    assert of_hidden == 64 * 2 * hidden
