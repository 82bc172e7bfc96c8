"""Velocities from potentials: exactly conservative; projection: exact for the same operators."""

import itertools

import pytest
import torch

from shodh.fields import Grid
from shodh.physics.exterior import curl_of_edges, curl_of_faces, divergence_of_faces, gradient_of_cells, zero_wall_faces
from shodh.physics.helmholtz import Potentials, compose_velocity, remove_divergence, snap_potentials, solve_poisson

CLOSED = list(itertools.product(["periodic", "wall"], repeat=3))
ANY = list(itertools.product(["periodic", "wall", "open"], repeat=3))
SHAPE = (8, 6, 10)


def random_potentials(scale: float = 1.0) -> Potentials:
    return Potentials(scale * torch.randn(2, 3, *SHAPE), scale * torch.randn(2, *SHAPE), scale * torch.randn(2, 3))


@pytest.mark.parametrize("boundary", ANY)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_snapped_flux_has_exactly_zero_divergence_in_fp64(boundary, scale):
    flux = compose_velocity(snap_potentials(random_potentials(scale)), boundary, "solenoidal")
    assert flux.dtype == torch.float32 and flux.abs().max() > 0
    assert divergence_of_faces(flux.double(), boundary).abs().max() == 0


@pytest.mark.parametrize("boundary", ANY)
def test_snapped_gradient_has_exactly_zero_curl_in_fp64(boundary):
    velocity = compose_velocity(snap_potentials(random_potentials()), boundary, "irrotational")
    assert curl_of_faces(velocity.double(), boundary).abs().max() == 0


def test_plain_fp32_flux_is_not_exact():
    boundary = ("periodic",) * 3
    flux = compose_velocity(random_potentials(), boundary, "solenoidal")
    assert divergence_of_faces(flux.double(), boundary).abs().max() > 0


def test_snapping_changes_less_than_one_lattice_step():
    potentials = random_potentials()
    snapped = snap_potentials(potentials)
    bound = 4 * (potentials.circulation.abs().max() + potentials.scalar.abs().max()) + potentials.mean_flow.abs().max()
    for before, after in zip(potentials, snapped, strict=True):
        assert (before - after).abs().max() <= bound * 2.0**-22


def test_mean_flow_is_the_flux_through_every_section_of_a_periodic_axis_and_zero_across_walls():
    boundary = ("periodic", "wall", "periodic")
    potentials = random_potentials()
    flux = compose_velocity(potentials, boundary, "solenoidal").double()
    for axis, cells in ((0, SHAPE[1] * SHAPE[2]), (2, SHAPE[0] * SHAPE[1])):
        sections = flux[:, axis].transpose(1, axis + 1).flatten(2).sum(-1)
        expected = cells * potentials.mean_flow[:, axis : axis + 1].double()
        torch.testing.assert_close(sections, expected.expand_as(sections), rtol=1e-4, atol=1e-4)
    assert flux[:, 1, :, 0].abs().max() == 0


def test_full_velocity_is_the_sum_of_both_parts():
    boundary, potentials = ("periodic", "wall", "periodic"), random_potentials()
    parts = [compose_velocity(potentials, boundary, space) for space in ("solenoidal", "irrotational")]
    torch.testing.assert_close(compose_velocity(potentials, boundary, "full"), parts[0] + parts[1])


def test_potentials_that_are_not_finite_are_refused():
    potentials = random_potentials()
    potentials.scalar[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        snap_potentials(potentials)


def make_grids() -> list[Grid]:
    """Every mixture of periodic and walled axes, uniform, and with the walled axes stretched."""
    grids = [Grid(shape=SHAPE, spacing=(0.5, 0.25, 1.0), boundary=boundary) for boundary in CLOSED]
    for uniform in [grid for grid in grids if "wall" in grid.boundary]:
        hx, hy, hz = (
            h if boundary == "periodic" else tuple(h * 1.2**k for k in range(n))
            for h, n, boundary in zip((0.5, 0.25, 1.0), SHAPE, uniform.boundary, strict=True)
        )
        grids.append(Grid(shape=SHAPE, spacing=(hx, hy, hz), boundary=uniform.boundary))
    return grids


@pytest.mark.parametrize("grid", make_grids())
def test_projection_removes_all_divergence_and_keeps_solenoidal_fields(grid):
    projected = remove_divergence(torch.randn(2, 3, *SHAPE, dtype=torch.float64), grid)
    assert torch.equal(projected, zero_wall_faces(projected, grid.boundary))
    flux = projected * torch.from_numpy(grid.face_area)
    assert divergence_of_faces(flux, grid.boundary).abs().max() < 1e-13 * flux.abs().max()
    torch.testing.assert_close(remove_divergence(projected, grid), projected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("grid", make_grids())
def test_projection_is_the_nearest_solenoidal_velocity_by_kinetic_energy(grid):
    velocity = zero_wall_faces(torch.randn(3, *SHAPE, dtype=torch.float64), grid.boundary)
    projected = remove_divergence(velocity, grid)
    flux = curl_of_edges(torch.randn(3, *SHAPE, dtype=torch.float64), grid.boundary)
    mass = torch.from_numpy(grid.face_distance / grid.face_area)  # of the inner product of fluxes
    removed = (velocity - projected) * torch.from_numpy(grid.face_area)
    size = (removed**2 * mass).sum().sqrt() * (flux**2 * mass).sum().sqrt()
    assert abs((removed * flux * mass).sum()) < 1e-13 * size


@pytest.mark.parametrize("grid", make_grids())
def test_poisson_solution_satisfies_the_staggered_equation(grid):
    volume = torch.from_numpy(grid.cell_volume).expand(SHAPE)
    right = torch.randn(*SHAPE, dtype=torch.float64)
    right -= (right * volume).sum() / volume.sum()
    solution = solve_poisson(right, grid)
    assert abs((solution * volume).sum()) < 1e-12 * volume.sum()
    gradient = gradient_of_cells(solution, grid.boundary) / torch.from_numpy(grid.face_distance)
    flux = gradient * torch.from_numpy(grid.face_area)
    torch.testing.assert_close(divergence_of_faces(flux, grid.boundary) / volume, right, rtol=0, atol=1e-11)


def test_poisson_problem_on_an_open_axis_is_refused():
    with pytest.raises(ValueError, match="open"):
        solve_poisson(torch.zeros(4, 4, 4), Grid(shape=(4, 4, 4), spacing=(1.0, 1.0, 1.0), boundary=("open",) * 3))
