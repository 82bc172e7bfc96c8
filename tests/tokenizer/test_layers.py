"""Folding and unfolding of space into channels, in either memory layout."""

import pytest
import torch
from einops import rearrange

from tokenizer.layers import depth_to_space, space_to_depth


@pytest.mark.parametrize(("fold", "shape"), [(space_to_depth, (2, 3, 4, 6, 8)), (depth_to_space, (2, 24, 2, 3, 4))])
def test_channels_stay_last_in_memory_and_values_do_not_depend_on_the_layout(fold, shape):
    values = torch.randn(shape)
    last = fold(values.contiguous(memory_format=torch.channels_last_3d))
    assert last.is_contiguous(memory_format=torch.channels_last_3d) and not last.is_contiguous()
    assert fold(values).is_contiguous()
    assert torch.equal(last, fold(values))


def test_unfolding_undoes_folding():
    values = torch.randn(2, 3, 4, 6, 8)
    assert torch.equal(depth_to_space(space_to_depth(values)), values)
    cube = rearrange(space_to_depth(values), "b (c i) x y z -> b c i x y z", i=8)[:, :, :, 0, 0, 0]
    assert torch.equal(cube, values[:, :, :2, :2, :2].flatten(2))
