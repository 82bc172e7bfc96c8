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
PERIODIC = ("periodic", "periodic", "periodic")


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


def test_potentials_whose_flux_fp32_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="beyond FP32"):
        snap_potentials(random_potentials(1e38))


@pytest.mark.parametrize("space", ["solenoidal", "irrotational"])
def test_potentials_that_a_space_does_not_use_cost_it_no_digits(space):
    potentials = random_potentials()
    unused = ("scalar",) if space == "solenoidal" else ("circulation", "mean_flow")
    larger = potentials._replace(**{name: 1e30 * getattr(potentials, name) for name in unused})
    small, large = (compose_velocity(snap_potentials(p, space), PERIODIC, space) for p in (potentials, larger))
    assert torch.equal(small, large)
    circulation, scalar, mean_flow = (values.abs().max() for values in potentials)
    step = 2.0**-22 * (4 * circulation + mean_flow if space == "solenoidal" else 4 * scalar)
    # up to 5 terms are half a step off each, and FP32 sums of the plain ones round by less than half a step more
    assert (small - compose_velocity(potentials, PERIODIC, space)).abs().max() <= 3 * step


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-36])
def test_potentials_where_fp32_loses_digits_still_conserve_exactly(scale):
    flux = compose_velocity(snap_potentials(random_potentials(scale)), PERIODIC, "solenoidal")
    assert divergence_of_faces(flux.double(), PERIODIC).abs().max() == 0
    assert (flux == 0).all() or flux[flux != 0].abs().min() >= 2.0**-120


def test_snapping_equals_rounding_in_fp64():
    potentials = random_potentials()
    bound = 4 * (potentials.circulation.abs().amax((1, 2, 3, 4)) + potentials.scalar.abs().amax((1, 2, 3)))
    step = 2.0 ** (torch.floor(torch.log2(bound.double() + potentials.mean_flow.abs().amax(1))) - 22)
    for before, after in zip(potentials, snap_potentials(potentials), strict=True):
        unit = step.reshape([-1] + [1] * (before.ndim - 1))
        assert torch.equal(after.double(), torch.round(before.double() / unit) * unit)
