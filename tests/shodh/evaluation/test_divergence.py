import math

import numpy as np
import pytest
import torch

from shodh.evaluation.divergence import (
    measure_curl,
    measure_divergence,
    merge_sums,
    squared_gradient,
    sum_divergence,
    summarise_sums,
)
from shodh.fields import Grid
from shodh.physics.helmholtz import Potentials, compose_velocity, snap_potentials

PERIODIC = ("periodic", "periodic", "periodic")
CHANNEL = ("periodic", "wall", "periodic")


def make_grid(num_cells: int = 16, boundary=PERIODIC, lengths=(1.0, 2.0, 0.5)) -> Grid:
    hx, hy, hz = (length / num_cells for length in lengths)
    return Grid(shape=(num_cells, num_cells, num_cells), spacing=(hx, hy, hz), boundary=boundary)


def random_potentials(seed: int, num_fields: int = 2, num_cells: int = 16) -> Potentials:
    generator = torch.Generator().manual_seed(seed)
    cells = (num_cells,) * 3
    return Potentials(
        torch.randn(num_fields, 3, *cells, generator=generator),
        torch.randn(num_fields, *cells, generator=generator),
        torch.randn(num_fields, 3, generator=generator),
    )


@pytest.mark.parametrize("boundary", [PERIODIC, CHANNEL])
def test_flux_of_snapped_potentials_measures_exactly_zero_and_of_plain_ones_does_not(boundary):
    grid, potentials = make_grid(boundary=boundary), random_potentials(0)
    snapped = measure_divergence(compose_velocity(snap_potentials(potentials), boundary, "solenoidal"), grid)
    plain = measure_divergence(compose_velocity(potentials, boundary, "solenoidal"), grid)
    assert snapped["max_abs"] == snapped["rms"] == snapped["mean_abs"] == snapped["rms_over_rms_gradient"] == 0.0
    assert 0 < plain["rms_over_rms_gradient"] < 8 * torch.finfo(torch.float32).eps
    assert snapped["mismatched_rms_over_rms_gradient"] > 1e-2


@pytest.mark.parametrize("boundary", [PERIODIC, CHANNEL, ("open", "open", "open")])
def test_curl_of_snapped_potential_flow_measures_exactly_zero(boundary):
    grid, potentials = make_grid(boundary=boundary), random_potentials(1)
    measured = measure_curl(compose_velocity(snap_potentials(potentials), boundary, "irrotational"), grid)
    assert measured["max_abs"] == measured["rms_over_rms_gradient"] == 0.0


def test_single_source_reports_its_strength_per_cell():
    grid = make_grid(8, lengths=(8.0, 8.0, 8.0))
    flux = torch.zeros(1, 3, 8, 8, 8)
    flux[0, 0, 4, 4, 4] = 2.0  # out of cell 3, into cell 4
    measured = measure_divergence(flux, grid)
    assert measured["max_abs"] == 2.0
    assert measured["mean_abs"] == pytest.approx(4 / 8**3)
    assert measured["rms"] == pytest.approx(math.sqrt(8 / 8**3))
    assert measured["rms_over_rms_gradient"] == pytest.approx(math.sqrt(1 / 3))  # 2 of the 6 differences are along x


def test_ratio_to_gradient_does_not_depend_on_units_or_on_aspect_ratio_of_the_source():
    potentials = random_potentials(2)
    flux = compose_velocity(potentials, PERIODIC, "full")
    narrow, wide = make_grid(lengths=(1.0, 2.0, 0.5)), make_grid(lengths=(10.0, 20.0, 5.0))
    small, large = measure_divergence(flux, narrow), measure_divergence(flux, wide)
    assert small["rms_over_rms_gradient"] == pytest.approx(large["rms_over_rms_gradient"], rel=1e-12)
    assert small["mean_flow"] == pytest.approx(100 * large["mean_flow"], rel=1e-12)


def test_gradient_of_a_shear_wave_converges_at_second_order_to_its_analytic_mean_square():
    errors = []
    for num_cells in (16, 32):
        grid = make_grid(num_cells)
        y = (torch.arange(num_cells, dtype=torch.float64) + 0.5) * grid.spacing[1]
        velocity = torch.zeros(1, 3, *grid.shape, dtype=torch.float64)
        velocity[:, 0] = torch.sin(math.pi * y)[None, :, None]  # one period of length 2
        errors.append(abs(squared_gradient(velocity, grid).mean().item() - math.pi**2 / 2))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.05)


def test_gradient_of_a_shear_on_a_stretched_grid_is_exact_away_from_walls():
    widths = tuple(0.1 * 1.3**k for k in range(8))
    grid = Grid(shape=(8, 8, 8), spacing=(0.5, widths, 2.0), boundary=CHANNEL)
    height = torch.from_numpy(np.cumsum(widths) - np.array(widths) / 2)
    velocity = torch.zeros(1, 3, 8, 8, 8, dtype=torch.float64)
    velocity[:, 0] = 3 * height[None, :, None]
    gradient = squared_gradient(velocity, grid)
    torch.testing.assert_close(gradient[:, :, 1:], torch.full_like(gradient[:, :, 1:], 9.0), rtol=1e-12, atol=0)


def test_mean_flow_is_the_rms_of_box_means_in_units_of_velocity():
    grid = make_grid(lengths=(1.0, 1.0, 1.0))
    velocity = torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]]).reshape(2, 3, 1, 1, 1).expand(2, 3, *grid.shape)
    measured = measure_divergence(velocity * grid.face_area[0].item(), grid)
    assert measured["mean_flow"] == pytest.approx(5 / math.sqrt(2))
    assert measured["num_fields"] == 2


def test_merged_batches_measure_the_same_as_one_batch():
    grid = make_grid()
    flux = compose_velocity(random_potentials(3, num_fields=5), PERIODIC, "full")
    whole = measure_divergence(flux, grid)
    parts = summarise_sums(merge_sums([sum_divergence(flux[:2], grid), sum_divergence(flux[2:], grid)]))
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        assert parts[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-12))


def test_unusable_fields_are_refused_with_their_name():
    grid, flux = make_grid(8), torch.zeros(1, 3, 8, 8, 8)
    flux[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="flux: not finite"):
        measure_divergence(flux, grid)
    with pytest.raises(ValueError, match="circulation: shape"):
        measure_curl(torch.zeros(1, 3, 4, 8, 8), grid)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_sums([])
