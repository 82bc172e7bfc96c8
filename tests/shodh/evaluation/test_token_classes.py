"""Classes say where a token stands; experts that follow them are told from experts that do not."""

import math

import numpy as np
import pytest
import torch

from data.simulate.open_channel import OpenChannelConfig, make_grid, wall_distance
from data.simulate.pore_space import draw_blobs, place_spheres
from shodh.evaluation.token_classes import (
    TokenClasses,
    exchange_classes,
    local_thickness,
    near_wall,
    periodic_distance,
    place_information,
    pore_share,
    pore_size,
    share_of_first_expert,
    shuffle_classes,
)
from shodh.fields import Routing


def route(expert: torch.Tensor, num_experts: int = 4) -> Routing:
    probability = torch.nn.functional.one_hot(expert, num_experts).float()
    return Routing(expert[:, None], torch.ones(len(expert), 1), probability, probability)


@pytest.mark.parametrize(("top", "layers"), [("free", [0, 1, 1, 2]), ("wall", [0, 2, 2, 0])])
def test_wall_tokens_are_those_at_walls_and_the_farthest_are_opposite_or_between(top, layers):
    grid = make_grid(OpenChannelConfig(top=top, resolution=16), 16)
    field = np.broadcast_to(wall_distance(grid, top)[:, None], grid.shape)
    label = near_wall(field, 4).label.reshape(4, 4, 4)
    assert torch.equal(label, torch.tensor(layers)[:, None].expand(4, 4, 4))


def test_periodic_distance_is_the_least_over_all_solid_cells_and_their_images():
    pore = np.random.default_rng(0).random((6, 7, 8)) < 0.9
    size = np.array(pore.shape)
    cells, solid = np.argwhere(np.ones_like(pore)), np.argwhere(~pore)
    apart = np.abs(cells[:, None] - solid)
    expected = np.linalg.norm(np.minimum(apart, size - apart), axis=-1).min(1).reshape(pore.shape)
    np.testing.assert_allclose(periodic_distance(pore), expected, rtol=1e-12, atol=0)


def test_local_thickness_is_that_of_the_largest_sphere_found_by_trying_all():
    pore = draw_blobs(np.random.default_rng(1), 10, (0.6, 0.6), (0.3, 0.3))
    distance, expected = periodic_distance(pore), np.zeros(pore.shape)
    cells = np.argwhere(np.ones_like(pore))
    for centre in np.argwhere(pore):
        apart = np.abs(cells - centre)
        inside = np.linalg.norm(np.minimum(apart, 10 - apart), axis=1) < distance[tuple(centre)]
        held = expected.reshape(-1)
        held[inside] = np.maximum(held[inside], distance[tuple(centre)])
    np.testing.assert_array_equal(local_thickness(pore), expected)
    assert (local_thickness(pore) > 0).tolist() == pore.tolist()


def test_thickness_moves_with_the_rock_and_has_no_end_without_one():
    pore = draw_blobs(np.random.default_rng(2), 12, (0.6, 0.6), (0.3, 0.3))
    moved = np.roll(pore, (5, 1, 7), (0, 1, 2))
    np.testing.assert_array_equal(local_thickness(moved), np.roll(local_thickness(pore), (5, 1, 7), (0, 1, 2)))
    assert np.isinf(local_thickness(np.ones((4, 4, 4), bool))).all()


def test_a_wide_channel_is_a_body_and_a_narrow_one_a_throat():
    pore = np.zeros((16, 16, 16), bool)
    pore[:, :8, :8] = True
    pore[:, 10:13, 10:13] = True
    label = pore_size(pore, 8).label.reshape(2, 2, 2)
    assert label[:, 0, 0].tolist() == [1, 1]
    assert label[:, 1, 1].tolist() == [0, 0]
    assert label[:, 0, 1].tolist() == label[:, 1, 0].tolist() == [-1, -1]  # no pore there
    assert pore_share(pore, 8).label.reshape(2, 2, 2)[:, 0, 0].tolist() == [1, 1]


def test_around_a_sphere_the_corners_of_its_cell_are_bodies():
    pore = place_spheres(np.array([[0.5, 0.5, 0.5, 0.9]]), 16)
    size, share = (classes(pore, 2).label.reshape(8, 8, 8) for classes in (pore_size, pore_share))
    assert size[0, 0, 0] == share[0, 0, 0] == 1
    assert size[0, 4, 4] == 0  # where it all but touches its image
    assert size[4, 4, 4] == -1


def test_experts_that_follow_the_classes_know_them_and_a_shuffle_knows_nothing():
    generator = torch.Generator().manual_seed(0)
    classes = [TokenClasses(("a", "b"), torch.randint(2, (64,), generator=generator)) for _ in range(6)]
    routings = [[route(own.label.repeat(5) + 2), route(torch.zeros(320, dtype=torch.long))] for own in classes]
    known = place_information(routings, classes)
    assert known[0] == pytest.approx(1, abs=1e-12)
    assert known[1] == pytest.approx(0, abs=1e-12)
    drawn = torch.stack([place_information(routings, shuffle_classes(classes, generator))[0] for _ in range(20)])
    # 6 x 64 places are independent draws: I / H is chi2(1) / (2 * 384 ln 2), 0.0019 on average; 99.99 % lie below 0.03
    assert drawn.max() < 0.03
    others = [place_information(routings, exchange_classes(classes, shift))[0].item() for shift in range(1, 6)]
    assert max(others) < 0.03


def test_tokens_of_no_class_are_not_counted_and_half_a_map_is_refused():
    label = torch.tensor([0, 1, -1, -1])
    classes = [TokenClasses(("a", "b"), label)]
    for others in (0, 1, 3):
        expert = torch.where(label < 0, others, label).repeat(50)
        assert place_information([[route(expert)]], classes)[0] == pytest.approx(1, abs=1e-12)
    unseen = [TokenClasses(("a", "never", "b"), label.where(label < 1, 2))]
    assert place_information([[route(label.abs().repeat(50))]], unseen)[0] == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="4 labels for 7 tokens"):
        place_information([[route(torch.zeros(7, dtype=torch.long))]], classes)


def test_the_share_of_the_first_expert_is_1_for_whole_states_and_an_even_share_for_divided_ones():
    whole = torch.tensor([0] * 4 + [3] * 4)
    divided = torch.tensor([0, 1, 2, 3] * 2)
    found = share_of_first_expert([[route(whole), route(divided)]], num_tokens=4)
    assert found.tolist() == [1, 0.25]


def test_a_block_that_does_not_divide_the_field_is_refused():
    with pytest.raises(ValueError, match="block=3: does not divide"):
        pore_share(np.ones((8, 8, 8), bool), 3)
    assert math.isclose(pore_share(np.ones((8, 8, 8), bool), 4).label.sum(), 0)
