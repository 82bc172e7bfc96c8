"""Incidence operators: compositions vanish identically, and they converge to the derivatives they stand for."""

import itertools
import math

import pytest
import torch

from shodh.physics.exterior import (
    curl_of_edges,
    curl_of_faces,
    divergence_of_faces,
    gradient_of_cells,
    mismatched_divergence,
    zero_wall_faces,
)

CLOSED = list(itertools.product(["periodic", "wall"], repeat=3))
ANY = list(itertools.product(["periodic", "wall", "open"], repeat=3))
SHAPE = (6, 8, 5)


@pytest.mark.parametrize("boundary", CLOSED)
def test_divergence_of_a_curl_is_exactly_zero_for_integers(boundary):
    edges = torch.randint(-1000, 1000, (2, 3, *SHAPE)).float()
    assert divergence_of_faces(curl_of_edges(edges, boundary), boundary).abs().max() == 0


@pytest.mark.parametrize("boundary", ANY)
def test_curl_of_a_gradient_is_exactly_zero_for_integers(boundary):
    cells = torch.randint(-1000, 1000, (2, *SHAPE)).float()
    assert curl_of_faces(gradient_of_cells(cells, boundary), boundary).abs().max() == 0


@pytest.mark.parametrize("boundary", CLOSED)
def test_no_flux_of_a_curl_crosses_a_wall(boundary):
    flux = curl_of_edges(torch.randn(3, *SHAPE), boundary)
    for axis in range(3):
        if boundary[axis] == "wall":
            assert flux[axis].select(axis, 0).abs().max() == 0


@pytest.mark.parametrize("boundary", CLOSED)
def test_gradient_is_minus_the_adjoint_of_divergence(boundary):
    flux = zero_wall_faces(torch.randn(3, *SHAPE, dtype=torch.float64), boundary)
    cells = torch.randn(*SHAPE, dtype=torch.float64)
    left = (divergence_of_faces(flux, boundary) * cells).sum()
    right = -(flux * gradient_of_cells(cells, boundary)).sum()
    assert abs(left - right) <= 64 * torch.finfo(torch.float64).eps * math.prod(SHAPE)


def test_box_total_of_divergence_vanishes_between_walls():
    flux = zero_wall_faces(torch.randint(-9, 9, (3, *SHAPE)).double(), ("wall",) * 3)
    assert divergence_of_faces(flux, ("wall",) * 3).sum() == 0


def test_divergence_of_an_analytic_flux_converges_at_second_order():
    errors = []
    for n in (16, 32, 64):
        face, centre = torch.arange(n) / n, (torch.arange(n) + 0.5) / n
        flux = torch.zeros(3, n, 4, 4, dtype=torch.float64)
        flux[0] = torch.sin(2 * math.pi * face).reshape(n, 1, 1)
        derivative = n * divergence_of_faces(flux, ("periodic",) * 3)[:, 0, 0]
        errors.append((derivative - 2 * math.pi * torch.cos(2 * math.pi * centre)).abs().max())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(order - 2) < 0.05 for order in orders), orders


def test_wrong_operator_sees_divergence_where_there_is_none():
    flux = curl_of_edges(torch.randn(3, 8, 8, 8), ("periodic",) * 3)
    assert mismatched_divergence(flux, ("periodic",) * 3).abs().max() > 0.1


def test_a_curl_has_no_divergence_up_to_open_sides():
    """Differences along two axes commute, whatever they do at an end; on a lattice the sums are exact."""
    boundary = ("open", "wall", "open")
    edges = torch.randint(-1000, 1000, (3, 5, 6, 7)).double()
    assert not divergence_of_faces(curl_of_edges(edges, boundary), boundary).any()
