"""Projection into pores: exact conservation in any pore space, and the nearest such flux."""

import itertools

import numpy as np
import pytest
import torch

from shodh.fields import DecodedFields, Grid
from shodh.physics.exterior import curl_of_edges, divergence_of_faces
from shodh.physics.helmholtz import remove_divergence
from shodh.physics.masked_projection import (
    balance,
    connect_pores,
    find_pores,
    lattice_step,
    open_faces,
    project_fields,
    project_into_pores,
    remove_divergence_in_pores,
)

PERIODIC = ("periodic", "periodic", "periodic")
CLOSED = list(itertools.product(["periodic", "wall"], repeat=3))
SHAPE = (8, 6, 10)


def make_grid(boundary, stretched: bool) -> Grid:
    hx, hy, hz = (
        tuple(h * 1.2**k for k in range(n)) if stretched and b == "wall" else h
        for h, n, b in zip((0.5, 0.25, 1.0), SHAPE, boundary, strict=True)
    )
    return Grid(shape=SHAPE, spacing=(hx, hy, hz), boundary=boundary)


def require_exact(flux: torch.Tensor, pore: torch.Tensor, grid: Grid) -> None:
    assert flux.dtype == torch.float32
    assert divergence_of_faces(flux.double(), grid.boundary).abs().max() == 0
    assert not flux[~open_faces(pore, grid.boundary)].any()


@pytest.mark.parametrize("stretched", [False, True])
@pytest.mark.parametrize("boundary", CLOSED)
def test_projected_flux_of_any_values_has_exactly_no_divergence_and_none_in_the_solid(boundary, stretched):
    """Six cells in ten are pore, at random: some are connected, many are isolated."""
    grid, pore = make_grid(boundary, stretched), torch.rand(3, *SHAPE) < 0.6
    for scale in (1e-30, 1.0, 1e30):
        flux = project_into_pores(scale * torch.randn(3, 3, *SHAPE), pore, grid)
        require_exact(flux, pore, grid)
        assert flux.abs().amax((1, 2, 3, 4)).min() > 0


@pytest.mark.parametrize("boundary", CLOSED)
def test_without_solid_it_is_the_exact_projection_by_transforms(boundary):
    grid = make_grid(boundary, stretched=True)
    velocity, area = torch.randn(1, 3, *SHAPE, dtype=torch.float64), torch.from_numpy(grid.face_area)
    expected = remove_divergence(velocity, grid) * area
    flux = project_into_pores((velocity * area).float(), torch.ones(1, *SHAPE, dtype=torch.bool), grid)
    # the iteration stops at half a step in all; each face is rounded, and passes on what some hundred others left
    step = 2.0**-22 * expected.abs().max()
    assert (flux - expected).abs().max() < 30 * step


def test_what_is_removed_is_orthogonal_in_energy_to_every_flow_through_the_pores():
    grid, pore = make_grid(("periodic", "wall", "periodic"), stretched=True), torch.rand(*SHAPE) < 0.8
    network = connect_pores(pore, grid.boundary)
    mass = np.broadcast_to(grid.face_distance / grid.face_area, (3, *SHAPE)).ravel()[network.face]
    flux, other = (np.random.default_rng(0).normal(size=(2, len(network.face))) for _ in range(2))
    flux, other = flux[0], remove_divergence_in_pores(other[1], network, grid)
    removed = flux - remove_divergence_in_pores(flux, network, grid)
    # both flows keep a divergence of half a step of 2^-22 in all
    assert abs((removed * other * mass).sum()) < 2.0**-22 * np.sqrt((removed**2 * mass).sum() * (other**2 * mass).sum())


def test_a_conserving_flux_is_changed_by_rounding_alone():
    grid, pore = make_grid(PERIODIC, stretched=False), torch.rand(2, *SHAPE) < 0.8
    once = project_into_pores(torch.randn(2, 3, *SHAPE), pore, grid)
    assert torch.equal(project_into_pores(once, pore, grid), once)


def test_rounding_is_balanced_within_a_few_steps_of_the_lattice():
    """At most what all faces around a subtree were rounded by, here fewer than the 480 cells' 1440 halves."""
    grid, pore = make_grid(PERIODIC, stretched=False), torch.rand(*SHAPE) < 0.8
    network = connect_pores(pore, grid.boundary)
    flux = remove_divergence_in_pores(np.random.default_rng(1).normal(size=len(network.face)), network, grid)
    step = lattice_step(np.abs(flux).max())
    change = np.abs(balance(flux, network, step) - flux) / step
    assert change.max() < 720 and np.sqrt(np.mean(change**2)) < 4


def test_cells_cut_off_from_all_others_and_boxes_of_solid_carry_nothing():
    grid = make_grid(PERIODIC, stretched=False)
    pore = torch.zeros(2, *SHAPE, dtype=torch.bool)
    pore[1, ::2, ::2, ::2] = True
    assert not project_into_pores(torch.randn(2, 3, *SHAPE), pore, grid).any()


def test_flow_along_a_straight_pore_passes_unchanged_and_a_dead_end_carries_none():
    grid = make_grid(("periodic", "wall", "wall"), stretched=False)
    pore = torch.zeros(1, *SHAPE, dtype=torch.bool)
    pore[0, :, 2, 3] = True  # through the box along x, which is periodic
    pore[0, 4, 2, 4:7] = True  # a dead end off it
    flux = torch.zeros(1, 3, *SHAPE)
    flux[0, 0] = 3.0
    flux[0, 2] = 1.0
    projected = project_into_pores(flux, pore, grid)
    expected = torch.zeros_like(flux)
    expected[0, 0, :, 2, 3] = 3.0
    assert torch.equal(projected, expected)


@pytest.mark.parametrize("part_of_the_flux", [1.0, 1e-6])
def test_divergence_left_by_the_iteration_is_below_half_a_step_of_the_given_fluxes_lattice(part_of_the_flux):
    """Of a flux that the pores nearly stop altogether, too: then the step it is rounded to is finer."""
    grid, pore = make_grid(PERIODIC, stretched=False), torch.rand(SHAPE) < 0.7
    network = connect_pores(pore, grid.boundary)
    potential = torch.randn(network.num_cells, dtype=torch.float64).numpy()
    given = potential[network.lower] - potential[network.upper]
    given *= np.broadcast_to(grid.face_area / grid.face_distance, (3, *SHAPE)).ravel()[network.face]
    given += part_of_the_flux * torch.randn(len(given), dtype=torch.float64).numpy()
    left = network.divergence(remove_divergence_in_pores(given, network, grid))
    assert 0 < np.linalg.norm(left) <= lattice_step(np.abs(given).max()) / 2


def test_two_faces_between_the_same_cells_of_a_box_two_cells_wide_are_told_apart():
    grid = Grid(shape=(2, 2, 2), spacing=(1.0, 1.0, 1.0), boundary=PERIODIC)
    for _ in range(20):
        pore = torch.rand(1, 2, 2, 2) < 0.8
        require_exact(project_into_pores(torch.randn(1, 3, 2, 2, 2), pore, grid), pore, grid)


def test_projected_fields_keep_pressure_and_hold_the_velocity_of_their_flux():
    grid, pore = make_grid(PERIODIC, stretched=False), torch.rand(1, *SHAPE) < 0.8
    edges = curl_of_edges(torch.randn(1, 3, *SHAPE), grid.boundary)
    fields = DecodedFields(edges, edges, torch.randn(1, 1, *SHAPE))
    projected = project_fields(fields, pore, grid)
    require_exact(projected.flux, pore, grid)
    assert torch.equal(projected.pressure, fields.pressure)
    area = torch.from_numpy(grid.relative.face_area).float()
    assert torch.equal(projected.velocity, projected.flux / area)


def test_pores_are_found_in_a_normalised_medium_and_in_no_other():
    stored = (torch.rand(2, 1, *SHAPE) < 0.6).float()
    normalised = (stored - 0.5432) / 0.4981
    assert torch.equal(find_pores(normalised, 0.5432, 0.4981), stored[:, 0] > 0)
    with pytest.raises(ValueError, match="medium: not 0 or 1"):
        find_pores(normalised)


def test_flux_that_cannot_be_projected_is_refused_in_one_line():
    grid, pore = make_grid(PERIODIC, stretched=False), torch.ones(1, *SHAPE, dtype=torch.bool)
    with pytest.raises(ValueError, match="flux: not finite"):
        project_into_pores(torch.full((1, 3, *SHAPE), torch.nan), pore, grid)
    sides = Grid(shape=SHAPE, spacing=(1.0, 1.0, 1.0), boundary=("open", "wall", "wall"))
    with pytest.raises(ValueError, match="open side"):
        project_into_pores(torch.zeros(1, 3, *SHAPE), pore, sides)
