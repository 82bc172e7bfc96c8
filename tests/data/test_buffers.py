"""Memory is used again only when nobody can see it any more."""

import torch

from data.buffers import MOST_KEPT, Buffers


def test_memory_comes_back_when_the_last_view_is_gone():
    buffers = Buffers()
    first = buffers.take(4, 3)
    address, view, exported = first.data_ptr(), first[1], first[0].numpy()
    del first
    assert buffers.take(4, 3).data_ptr() != address  # a view still reads it
    del view
    assert buffers.take(4, 3).data_ptr() != address  # so does an array
    del exported
    assert buffers.take(4, 3).data_ptr() == address


def test_tensors_in_use_never_share_memory():
    buffers = Buffers()
    held = [buffers.take(8) for _ in range(MOST_KEPT + 3)]
    for number, tensor in enumerate(held):
        tensor.fill_(number)
    assert [float(t.unique()) for t in held] == list(range(MOST_KEPT + 3))


def test_a_graph_keeps_what_its_backward_needs():
    buffers = Buffers()
    values = buffers.take(3).fill_(2.0)
    weight = torch.ones(3, requires_grad=True)
    product = (weight * values).sum()
    del values
    buffers.take(3).fill_(5.0)
    product.backward()
    assert weight.grad is not None and weight.grad.tolist() == [2.0, 2.0, 2.0]
