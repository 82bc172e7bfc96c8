"""Convection against its linear onset, published rolls and exact balances of heat and energy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.simulate.convection import (
    DOMAIN,
    ConvectionConfig,
    Layer,
    add_temperature_ghosts,
    least_resolution,
    make_grid,
    make_initial_state,
    nusselt_numbers,
    refine,
    simulate,
    solve_total_pressure,
    state_tendency,
    total_work,
)
from data.simulate.momentum import advance, require_stable
from shodh.fields import Grid
from shodh.physics.exterior import divergence_of_faces
from shodh.physics.helmholtz import remove_divergence

SHORT = ConvectionConfig(
    num_trajectories=4, num_snapshots=3, resolution=16, rayleigh=(5e3, 2e4), spinup_time=2.0, snapshot_interval=0.2
)
CRITICAL = 1707.76  # of two no-slip walls, at wavenumber 3.117 (Chandrasekhar 1961, table III)
CLEVER_BUSSE = {5000.0: 2.116, 10000.0: 2.661}  # Nu of steady rolls, Pr = 0.71, wavenumber 3.117 (J. Fluid Mech. 65)


def make_rolls(num_y: int, rayleigh: list[float], prandtl: float, amplitude: float) -> tuple[Tensor, Layer]:
    """One pair of rolls per Rayleigh number, nearly square cells, two cells deep; FP64."""
    length, num_x = 2 * math.pi / 3.117, 2 * num_y
    spacing = (length / num_x, 1 / num_y, 1.0)
    grid = Grid(shape=(num_x, num_y, 2), spacing=spacing, boundary=DOMAIN.boundary)
    numbers = torch.tensor(rayleigh, dtype=torch.float64)
    layer = Layer(grid, (prandtl / numbers).sqrt(), 1 / (numbers * prandtl).sqrt())
    x = (torch.arange(num_x, dtype=torch.float64) + 0.5) * 2 * math.pi / num_x
    y = (torch.arange(num_y, dtype=torch.float64) + 0.5) / num_y
    state = torch.zeros(len(rayleigh), 4, *grid.shape, dtype=torch.float64)
    state[:, 3] = (0.5 - y + amplitude * torch.cos(x)[:, None] * torch.sin(math.pi * y))[:, :, None]
    return state, layer


def march(state: Tensor, layer: Layer, duration: float) -> Tensor:
    """Later by ``duration``, at the diffusive limit of the time step or a Courant number of 1.5 of 1.73 at most."""
    per_axis = [1 / h for h in layer.grid.mean_spacing]
    largest = max(layer.viscosity.max().item(), layer.diffusivity.max().item())
    rate = max(0.27 * sum(per_axis), 4 / 2.4 * largest * sum(h**2 for h in per_axis))
    num_steps = math.ceil(duration * rate)
    return advance(state, lambda now: state_tendency(now, layer), layer.grid, duration / num_steps, num_steps)


def measure_onset(num_y: int) -> float:
    """The Rayleigh number at which the growth rate of weak rolls changes sign, from those at 1650 and 1760."""
    state, layer = make_rolls(num_y, [1650.0, 1760.0], 1.0, 1e-7)  # too weak to feel their own advection
    early = march(state, layer, 10.0)  # what is not the slowest mode decays like exp(-t) at least
    late = march(early, layer, 10.0)
    growth = [(late[b, :3].norm() / early[b, :3].norm()).log().item() for b in range(2)]
    return 1650 - growth[0] * 110 / (growth[1] - growth[0])


def measure_rolls(num_y: int) -> list[dict[str, float]]:
    state, layer = make_rolls(num_y, list(CLEVER_BUSSE), 0.71, 0.1)
    heat = nusselt_numbers(march(state, layer, 60.0), layer)
    return [{name: values[b].item() for name, values in heat.items()} for b in range(2)]


def make_flow(shape: tuple[int, int, int], viscosity: float, diffusivity: float) -> tuple[Tensor, Layer]:
    """A strong random flow and temperature, FP64."""
    grid = Grid(shape=shape, spacing=(0.2, 1 / shape[1], 0.15), boundary=DOMAIN.boundary)
    state = torch.randn(1, 4, *shape, dtype=torch.float64)
    state[:, :3] = remove_divergence(state[:, :3], grid)
    return state, Layer(grid, *(torch.tensor([v], dtype=torch.float64) for v in (viscosity, diffusivity)))


def test_onset_converges_to_the_critical_rayleigh_number_at_second_order() -> None:
    coarse, fine = measure_onset(8), measure_onset(16)
    assert abs(fine / CRITICAL - 1) < 0.02
    assert (CRITICAL - coarse) / (CRITICAL - fine) == pytest.approx(4, rel=0.1)
    assert fine + (fine - coarse) / 3 == pytest.approx(CRITICAL, rel=0.005)  # what second order leaves at h = 0


@pytest.mark.slow
def test_onset_on_a_fine_grid_is_within_one_percent() -> None:
    assert measure_onset(32) == pytest.approx(CRITICAL, rel=0.01)


def test_steady_rolls_transport_the_published_heat_up_to_second_order() -> None:
    coarse, fine = measure_rolls(8), measure_rolls(16)
    for b, published in enumerate(CLEVER_BUSSE.values()):
        low, high = coarse[b]["volume"], fine[b]["volume"]
        assert high + (high - low) / 3 == pytest.approx(published, rel=0.005)  # the table's own accuracy
        assert (low - published) / (high - published) == pytest.approx(4, rel=0.25)
        for name, value in fine[b].items():  # four measures of one heat: what is left of the transient is exp(-10)
            assert value == pytest.approx(high, rel=1e-4), name


def test_advection_conserves_heat_and_its_variance() -> None:
    state, layer = make_flow((6, 8, 10), viscosity=0.0, diffusivity=0.0)
    tendency, temperature = state_tendency(state, layer)[:, 3], state[:, 3]
    assert tendency.sum().abs() < 1e-13 * tendency.abs().sum()  # FP64 round-off of sums of 480 terms
    assert (tendency * temperature).sum().abs() < 1e-13 * (tendency * temperature).abs().sum()


def test_buoyancy_works_as_much_as_heat_is_convected() -> None:
    """d<|u|^2 / 2>/dt = <v T> and d<-y T>/dt = -<v T> without friction and conduction: energy only changes its form."""
    state, layer = make_flow((6, 8, 10), viscosity=0.0, diffusivity=0.0)
    state[:, 3] = state[:, 1]  # warm fluid rises
    tendency = state_tendency(state, layer)
    height = ((torch.arange(8) + 0.5) / 8).double()[:, None]
    kinetic, potential = (tendency[:, :3] * state[:, :3]).sum(), -(tendency[:, 3] * height).sum()
    assert (kinetic + potential).abs() < 1e-12 * (tendency * state).abs().sum()
    assert kinetic > 0.1 * state[:, 1].square().sum()


def test_conduction_is_the_laplacian_with_the_walls_at_their_temperatures() -> None:
    state, layer = make_flow((6, 8, 10), viscosity=0.0, diffusivity=0.3)
    state[:, :3] = 0
    temperature, (hx, hy, hz) = state[:, 3], layer.grid.mean_spacing
    floor, ceiling = 1 - temperature[:, :, :1], -1 - temperature[:, :, -1:]
    laplacian = (temperature.roll(1, 1) + temperature.roll(-1, 1) - 2 * temperature) / hx**2
    laplacian += (temperature.roll(1, 3) + temperature.roll(-1, 3) - 2 * temperature) / hz**2
    laplacian += torch.cat([floor, temperature, ceiling], 2).diff(n=2, dim=2) / hy**2
    torch.testing.assert_close(state_tendency(state, layer)[:, 3], 0.3 * laplacian, rtol=0, atol=1e-10)


def test_still_fluid_with_conducted_temperature_stays_still() -> None:
    state, layer = make_rolls(8, [1e6], 1.0, 0.0)
    later = march(state, layer, 2.0)
    # unstable: round-off in the pressure grows, by exp(0.5 · 2) at most
    torch.testing.assert_close(later, state, rtol=0, atol=1e-13)
    assert nusselt_numbers(later, layer)["walls"].item() == pytest.approx(1, abs=1e-12)


def test_refinement_errs_at_second_order() -> None:
    def exact(n: int) -> Tensor:
        grid = make_grid(SHORT, n)
        x, y, z = (2 * math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n for _ in range(3))
        state = torch.zeros(1, 4, *grid.shape, dtype=torch.float64)
        state[0, 0] = torch.sin(z) * torch.sin(y / 2)[:, None]
        state[0, 2] = torch.cos(x)[:, None, None] * torch.sin(y / 2)[:, None]
        state[0, 3] = torch.cos(y / 2)[:, None] / 2 + torch.cos(x + 0.4)[:, None, None] * torch.sin(y)[:, None]
        state[0, 3] += 0 * z
        return state

    errors = []
    for n in (8, 16, 32):
        refined = refine(exact(n), make_grid(SHORT, 2 * n))
        errors.append((refined - exact(2 * n)).square().mean().sqrt().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_stored_flux_is_solenoidal_to_round_off_and_stops_at_the_walls() -> None:
    for _, trajectory in simulate(SHORT, [0, 1]):
        flux = torch.from_numpy(trajectory.velocity)
        assert flux.dtype == torch.float32
        divergence = divergence_of_faces(flux.double(), DOMAIN.boundary)
        # six faces, each rounded a few times on the scale of the largest flux
        assert divergence.abs().max() < 6 * 4 * torch.finfo(torch.float32).eps * flux.abs().max()
        assert not flux[:, 1, :, 0].any()


def test_trajectories_are_reproducible_and_do_not_depend_on_their_companions() -> None:
    told: list[int] = []
    together = dict(simulate(SHORT, [0, 1, 2], progress=told.append))
    again = dict(simulate(SHORT, [0, 1, 2]))
    alone = dict(simulate(SHORT, [1]))
    assert sum(told) == total_work(SHORT, 3)
    for index in together:
        np.testing.assert_array_equal(together[index].velocity, again[index].velocity)
        np.testing.assert_array_equal(together[index].scalars["temperature"], again[index].scalars["temperature"])
    assert together[1].parameters == alone[1].parameters
    # round-off, 2e-7 a step, grows like the convection itself: by exp(0.5 t) at most in the 2.4 units this takes
    for mine, other in (
        (together[1].velocity, alone[1].velocity),
        (together[1].scalars["temperature"], alone[1].scalars["temperature"]),
    ):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-4 * float(np.abs(other).max()))
    assert set(alone[1].parameters) == set(DOMAIN.parameters)


def test_pressure_and_temperature_are_those_of_the_stored_velocity() -> None:
    _, trajectory = next(simulate(SHORT, [3]))
    velocity = torch.from_numpy(trajectory.velocity).double() / torch.from_numpy(trajectory.grid.face_area)
    temperature = torch.from_numpy(trajectory.scalars["temperature"]).double()
    resistance = (
        torch.full((3,), trajectory.parameters[name], dtype=torch.float64) for name in ("viscosity", "diffusivity")
    )
    state = torch.cat([velocity, temperature[:, None]], 1)
    pressure = solve_total_pressure(state, Layer(trajectory.grid, *resistance)).numpy()
    np.testing.assert_allclose(trajectory.pressure, pressure, rtol=0, atol=1e-4 * float(np.abs(pressure).max()))
    assert temperature.abs().max() < 0.55  # between the walls' temperatures but for the scheme's overshoots


def test_initial_spots_differ_and_walls_keep_their_temperature() -> None:
    grid = make_grid(SHORT, 16)
    first, second = (make_initial_state(np.random.default_rng(seed), grid) for seed in (0, 1))
    assert (first - second).abs().max() > 0.1
    ghosted = add_temperature_ghosts(first[None, 3])
    for wall, value in ((ghosted[:, :, :2], 0.5), (ghosted[:, :, -2:], -0.5)):
        torch.testing.assert_close(wall.mean(2), torch.full_like(wall.mean(2), value), rtol=0, atol=1e-14)


def test_a_grid_too_coarse_for_the_rayleigh_number_is_refused_with_the_one_that_is_not() -> None:
    needed = max(least_resolution(1e7, prandtl, 2.0) for prandtl in (0.5, 2.0))
    with pytest.raises(ValueError, match=rf"^rayleigh=.*Take resolution={needed} or more"):
        ConvectionConfig(resolution=needed - 1, rayleigh=(1e5, 1e7))
    assert ConvectionConfig(resolution=needed, rayleigh=(1e5, 1e7)).resolution == needed


def test_boundary_layers_eddies_and_long_cells_each_ask_for_more_cells() -> None:
    assert least_resolution(1e5, 1.0, 1.0) == math.ceil(3 * 0.186 * 1e5**0.276)  # 1.5 cells in 1 / (2 Nu)
    assert least_resolution(1e6, 0.5, 2.0) > least_resolution(1e6, 1.0, 2.0)
    # half the wavenumbers of the longer cells: twice as many of them, to rounding up
    assert least_resolution(1e6, 0.5, 4.0) == pytest.approx(2 * least_resolution(1e6, 0.5, 2.0), abs=1)
    with pytest.raises(ValueError, match="^rayleigh="):
        ConvectionConfig(resolution=16, rayleigh=(1e4, 8e4), length=4.0)


def test_flow_too_fast_for_its_time_step_is_refused_by_name() -> None:
    grid = make_grid(SHORT, 16)
    state = torch.zeros(2, 4, *grid.shape)
    state[1, 1] = 1.0
    still = 1.7 / 16  # Courant number 1.7 at unit speed along y
    require_stable("convection", state, still, grid, [3, 7], 2.0)
    with pytest.raises(RuntimeError, match="^convection trajectory 7: Courant number 1.8 at t = 2 exceeds 1.73"):
        require_stable("convection", state, 1.8 / 16, grid, [3, 7], 2.0)
    state[0, 3, 0, 0, 0] = math.nan
    with pytest.raises(RuntimeError, match="^convection trajectory 3: blew up by t = 2"):
        require_stable("convection", state, still, grid, [3, 7], 2.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_trajectories", 0),
        ("snapshot_interval", math.nan),
        ("resolution", 4),
        ("rayleigh", (2e5, 1e5)),
        ("prandtl", (0.0, 1.0)),
        ("prandtl", (0.001, 0.001)),
        ("prandtl", (0.5, 5.0)),
        ("length", 100.0),
        ("width", 4.1),
        ("spinup_time", math.inf),
    ],
)
def test_bad_config_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}="):
        ConvectionConfig(**{field: value})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_takes_the_same_steps_as_the_cpu() -> None:
    on_cpu, on_gpu = (next(simulate(SHORT, [0], device=device))[1].velocity for device in ("cpu", "cuda"))
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=1e-3 * float(np.abs(on_cpu).max()))


@pytest.mark.slow
def test_developed_convection_balances_its_heat_four_ways() -> None:
    """Means over runs and time of the four Nusselt numbers; a run's own storage of heat and energy is the scatter."""
    config = ConvectionConfig(num_trajectories=4, num_snapshots=81, rayleigh=(1e5, 1e5), prandtl=(0.7, 0.7))
    means = []
    for _, trajectory in simulate(config, range(4)):
        velocity = torch.from_numpy(trajectory.velocity).double() / torch.from_numpy(trajectory.grid.face_area)
        state = torch.cat([velocity, torch.from_numpy(trajectory.scalars["temperature"]).double()[:, None]], 1)
        resistance = (
            torch.full((81,), trajectory.parameters[name], dtype=torch.float64) for name in ("viscosity", "diffusivity")
        )
        heat = nusselt_numbers(state, Layer(trajectory.grid, *resistance))
        means.append([values.mean().item() for values in heat.values()])
    volume, *others = np.mean(means, 0)
    assert np.abs(np.array(others) / volume - 1).max() < 0.03
    assert 3.5 < volume < 5.5  # 4.46 in a wide box (Kerr 1996); this one is two heights wide and its grid coarse
