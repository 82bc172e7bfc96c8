"""The porous-media simulator against analytic flows, a published drag table, and its own invariances."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import data.simulate.porous_flow as flow
import data.simulate.porous_media as porous
from data.ingest import digital_rocks
from data.ingest.digital_rocks import DigitalRocksConfig
from data.layout import Trajectory
from data.simulate.porous_flow import PERIODIC
from data.simulate.porous_media import DOMAIN, PorousMediaConfig
from data.simulate.stokes import solve_stokes
from shodh.physics.exterior import divergence_of_faces

FP32 = torch.finfo(torch.float32).eps
SMALL = PorousMediaConfig(num_trajectories=3, num_snapshots=3, resolution=12, spin_up=0.4, seed=7)


@cache
def small_trajectories() -> dict[int, Trajectory]:
    return dict(porous.simulate(SMALL, range(3)))


def slab(num_pore: int, num_solid: int, num_along: int = 4) -> Tensor:
    """A plane channel along x (and z) between solid slabs, normal to y."""
    pore = torch.zeros(num_along, num_pore + num_solid, num_along, dtype=torch.bool)
    pore[:, :num_pore] = True
    return pore


def random_rock(resolution: int, seed: int = 3) -> Tensor:
    config = PorousMediaConfig(resolution=resolution, porosity=(0.6, 0.6), blobiness=(0.3, 0.3))
    return torch.from_numpy(porous.draw_pore_space(config, np.random.default_rng(seed)))


def womersley_error(width: int, num_steps: int) -> float:
    """Largest error after one period, relative to the largest velocity, from the analytic flow of a plane channel."""
    rock = flow.prepare_rock(slab(width, width // 4)[None], torch.float64)
    height, viscosity = width / 4, 2.0  # the box is 4 cells long, and 1 in units of length
    omega = viscosity * (6 / height) ** 2  # Womersley number height / 2 * sqrt(omega / viscosity) = 3
    root = np.sqrt(1j * omega / viscosity)
    y = (np.arange(width) + 0.5) / 4 - height / 2
    shape = (1 - np.cosh(root * y) / np.cosh(root * height / 2)) / (1j * omega)

    def exact(time: float) -> Tensor:
        velocity = torch.zeros_like(rock.open_face)
        velocity[:, 0, :, :width] = torch.from_numpy((shape * np.exp(1j * omega * time)).real)[:, None]
        return velocity

    period = 2 * math.pi / omega
    step = period / num_steps
    state = flow.rest(rock)._replace(velocity=exact(0.0), previous=exact(-step))
    for k in range(1, num_steps + 1):
        force = torch.tensor([math.cos(omega * k * step)], dtype=torch.float64)
        state = flow.advance(state, rock, torch.tensor([viscosity], dtype=torch.float64), force, step)
    return float((state.velocity - exact(period)).abs().max() / np.abs(shape).max())


def test_oscillating_channel_converges_to_womersley_at_second_order(monkeypatch):
    monkeypatch.setattr(flow, "VISCOUS_TOLERANCE", 1e-7)
    coarse, middle, fine = (womersley_error(width, 4 * width) for width in (16, 32, 64))
    print(f"oscillating channel, 16 / 32 / 64 cells: {coarse:.2e} {middle:.2e} {fine:.2e}")
    assert fine < 1e-3
    assert math.log2(coarse / middle) == pytest.approx(2, abs=0.2)
    assert math.log2(middle / fine) == pytest.approx(2, abs=0.1)


def run_rock(pore: Tensor, *, viscosity: float, force: float, end: float, num_steps: int) -> Tensor:
    """Velocity of FP64 flow from rest under a force that rises smoothly to its full value at ``end``."""
    rock = flow.prepare_rock(pore[None], torch.float64)
    state = flow.rest(rock)
    for k in range(1, num_steps + 1):
        now = torch.tensor([force * math.sin(math.pi / 2 * k / num_steps) ** 2], dtype=torch.float64)
        fluid = torch.tensor([viscosity], dtype=torch.float64)
        state = flow.advance(state, rock, fluid, now, end / num_steps)
    return state.velocity


def test_time_stepping_through_rock_converges_at_second_order(monkeypatch):
    monkeypatch.setattr(flow, "VISCOUS_TOLERANCE", 1e-7)
    monkeypatch.setattr(flow, "PROJECTION_TOLERANCE", 1e-7)
    pore = random_rock(10)
    ends = [run_rock(pore, viscosity=0.02, force=2.0, end=1.0, num_steps=n) for n in (10, 20, 80)]
    coarse, fine = ((velocity - ends[-1]).norm() / ends[-1].norm() for velocity in ends[:2])
    print(f"10 / 20 steps: {coarse:.2e} {fine:.2e}")
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("walls", ["smooth", "voxel"])
def test_steady_limit_of_time_stepping_is_the_stokes_permeability(walls):
    pore = random_rock(10)
    rock = flow.prepare_rock(pore[None], torch.float64, walls)
    state, one = flow.rest(rock), torch.ones(1, dtype=torch.float64)
    for _ in range(60):  # 12 viscous times of the whole box, at a Reynolds number near 1e-6
        state = flow.advance(state, rock, one, one * 1e-4, 0.2 / math.pi**2)
    settled = float(state.velocity[:, 0].mean()) / 1e-4 * 10**2
    steady = solve_stokes(pore.numpy(), axis=0, walls=walls).permeability
    assert settled == pytest.approx(steady, rel=10 * flow.VISCOUS_TOLERANCE)


def test_advection_conserves_energy_between_grains():
    rock = flow.prepare_rock(random_rock(10)[None], torch.float64)
    noise = torch.randn(rock.open_face.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    velocity, _ = flow.project(noise, rock, 1e-12)
    work = velocity * flow.advection(velocity)
    assert abs(float(work.sum())) < 1e-10 * float(work.abs().sum())


def advection_error(resolution: int) -> float:
    """Largest error of (u . grad) u = (sin 2x, sin 2y, 0) / 2 of the vortices u = (sin x cos y, -cos x sin y, 0)."""
    size = 2 * math.pi / resolution
    face = torch.arange(resolution, dtype=torch.float64) * size
    centre = face + size / 2
    velocity, exact = torch.zeros(2, 1, 3, resolution, resolution, 1, dtype=torch.float64)
    velocity[0, 0, :, :, 0] = torch.sin(face)[:, None] * torch.cos(centre)
    velocity[0, 1, :, :, 0] = -torch.cos(centre)[:, None] * torch.sin(face)
    exact[0, 0, :, :, 0] = torch.sin(2 * face)[:, None] / 2
    exact[0, 1, :, :, 0] = torch.sin(2 * face) / 2
    return float((flow.advection(velocity) / size - exact).abs().max())


def test_advection_of_vortices_converges_at_second_order():
    assert math.log2(advection_error(16) / advection_error(32)) == pytest.approx(2, abs=0.1)


def test_laplacian_is_symmetric_and_dissipates():
    rock = flow.prepare_rock(random_rock(10)[None], torch.float64)
    first, second = (
        torch.randn(2, *rock.open_face.shape, generator=torch.Generator().manual_seed(0)).double() * rock.open_face
    )
    left, right = (second * flow.laplacian(first, rock)).sum(), (first * flow.laplacian(second, rock)).sum()
    assert float(left) == pytest.approx(float(right), rel=1e-10)
    assert float((first * flow.laplacian(first, rock)).sum()) < 0


def test_no_flux_crosses_a_solid_face():
    for trajectory in small_trajectories().values():
        pore = trajectory.medium > 0
        for axis in range(3):
            closed = ~(pore & np.roll(pore, 1, axis))
            assert np.all(trajectory.velocity[:, axis][:, closed] == 0)


def test_stored_divergence_is_fp32_round_off():
    for trajectory in small_trajectories().values():
        flux = torch.from_numpy(trajectory.velocity).double()
        divergence = divergence_of_faces(flux, PERIODIC)
        # six fluxes, each rounded to half an ulp
        assert float(divergence.norm() / flux.norm()) < math.sqrt(6) * FP32 / 2


def test_pressure_is_0_in_the_solid_and_on_average_over_the_pores():
    for trajectory in small_trajectories().values():
        assert np.all(trajectory.pressure[:, trajectory.medium == 0] == 0)
        largest = np.abs(trajectory.pressure).max()
        assert np.abs(trajectory.pressure.mean(axis=(1, 2, 3), dtype=float)).max() < 100 * FP32 * largest


def test_trajectory_holds_what_the_domain_promises():
    trajectory = small_trajectories()[0]
    n = SMALL.resolution
    assert trajectory.velocity.shape == (3, 3, n, n, n)
    assert trajectory.velocity.dtype == trajectory.pressure.dtype == trajectory.medium.dtype == np.float32
    assert set(trajectory.parameters) == set(DOMAIN.parameters)
    assert trajectory.parameters["porosity"] == pytest.approx(trajectory.medium.mean())
    assert np.all(np.diff(trajectory.time) == pytest.approx(SMALL.snapshot_interval))
    assert np.abs(np.diff(trajectory.velocity, axis=0)).max() > 0


def test_simulation_repeats_bit_for_bit():
    again = dict(porous.simulate(SMALL, range(3)))
    for index, trajectory in small_trajectories().items():
        assert np.array_equal(trajectory.velocity, again[index].velocity)
        assert np.array_equal(trajectory.pressure, again[index].pressure)


def test_trajectory_does_not_depend_on_its_companions_in_the_batch():
    ((_, alone),) = porous.simulate(SMALL, [1])
    together = small_trajectories()[1]
    assert np.array_equal(alone.medium, together.medium) and alone.parameters == together.parameters
    difference = np.linalg.norm(alone.velocity - together.velocity) / np.linalg.norm(together.velocity)
    assert difference < 10 * flow.PROJECTION_TOLERANCE  # round-off may add or spare one iteration of a step


def test_progress_adds_up_to_the_total_work():
    done: list[int] = []
    list(porous.simulate(SMALL, [0, 2], progress=done.append))
    assert sum(done) == porous.total_work(SMALL, 2)


def test_solution_that_blows_up_is_refused_by_name():
    wild = PorousMediaConfig(resolution=10, amplitude=(1e6, 1e6), num_snapshots=2, seed=1)
    with pytest.raises(RuntimeError, match="trajectory 5 blew up before time"):
        list(porous.simulate(wild, [5]))


def test_coarsest_and_fastest_flows_that_are_simulated_are_those_the_messages_name():
    with pytest.raises(ValueError, match=r"^viscosity=.*Take 0.0063 or more"):
        PorousMediaConfig(resolution=16, viscosity=(0.006, 0.01))
    PorousMediaConfig(resolution=16, viscosity=(0.0063, 0.01))
    with pytest.raises(ValueError, match=r"^frequency=.*20 time steps a period. Take 1.5 or less"):
        PorousMediaConfig(resolution=16, frequency=(0.5, 1.6))  # 6 steps of 1/30 between snapshots
    PorousMediaConfig(resolution=16, frequency=(0.5, 1.5))


@pytest.mark.parametrize(
    "wrong",
    [
        {"porosity": (0.9, 1.0)},
        {"viscosity": (0.1, 0.01)},
        {"resolution": 4},
        {"num_snapshots": 0},
        {"snapshot_interval": 0.0},
        {"snapshot_interval": math.inf},
        {"spin_up": -1.0},
        {"spin_up": math.nan},
        {"frequency": (500.0, 500.0)},
        {"frequency": (2.5, 2.6), "resolution": 64},
        {"viscosity": (1e-5, 1e-5), "resolution": 16},
        {"viscosity": (0.01, math.inf)},
        {"diameter": (0.02, 0.02), "geometry": "spheres"},
        {"diameter": (0.4, 0.6)},
        {"source": None, "geometry": "micro_ct"},
        {"source": "rock.npz"},
        {"resolution": 9, "geometry": "micro_ct", "source": "rock.npz"},
    ],
)
def test_unusable_config_names_the_value(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
        PorousMediaConfig(**wrong)


def divergence_and_leak(trajectory: Trajectory) -> tuple[float, float]:
    flux = torch.from_numpy(trajectory.velocity).double()
    pore = trajectory.medium > 0
    closed = np.stack([~(pore & np.roll(pore, 1, axis)) for axis in range(3)])
    leak = np.abs(trajectory.velocity[:, closed]).max()
    return float(divergence_of_faces(flux, PERIODIC).norm() / flux.norm()), float(leak)


def test_flow_through_spheres_is_solenoidal_and_pulsates():
    config = PorousMediaConfig(resolution=16, geometry="spheres", num_snapshots=2, spin_up=0.4)
    ((_, trajectory),) = porous.simulate(config, [0])
    divergence, leak = divergence_and_leak(trajectory)
    assert divergence < math.sqrt(6) * FP32 / 2 and leak == 0
    assert not np.array_equal(trajectory.velocity[0], trajectory.velocity[1])
    assert trajectory.medium.mean() == pytest.approx(trajectory.parameters["porosity"])


@pytest.mark.shared_data
def test_flow_through_berea_is_solenoidal_and_symmetric_about_the_mirror(shared_data, tmp_path):
    image = shared_data / "porous" / "berea_rows000_256.npz"
    config = DigitalRocksConfig(pore=1, unverified="accept")
    digital_rocks.ingest(image, tmp_path / "berea", config, lambda line: None)
    config = PorousMediaConfig(
        resolution=32, geometry="micro_ct", source=str(tmp_path / "berea"), num_snapshots=1, spin_up=0.4
    )
    ((_, trajectory),) = porous.simulate(config, [0])
    divergence, leak = divergence_and_leak(trajectory)
    assert divergence < math.sqrt(6) * FP32 / 2 and leak == 0
    along = trajectory.velocity[0, 0]  # of one sign of the mirrored axes y and z
    error = np.linalg.norm(along - along[:, ::-1, ::-1]) / np.linalg.norm(along)
    assert error < 100 * flow.VISCOUS_TOLERANCE  # two residuals of that size in each of 22 steps
    assert np.array_equal(trajectory.medium, np.flip(trajectory.medium, (0, 1, 2)))


def test_forecast_grows_with_snapshots_and_resolution():
    small, more = PorousMediaConfig(resolution=32), PorousMediaConfig(resolution=32, num_snapshots=50)
    large = PorousMediaConfig(resolution=128)
    assert porous.forecast(more).seconds_per_trajectory > 1.5 * porous.forecast(small).seconds_per_trajectory
    assert porous.forecast(more).peak_bytes > porous.forecast(small).peak_bytes
    # 4^3 as many cells and 4 times as many steps
    assert porous.forecast(large).seconds_per_trajectory > 4**4 * porous.forecast(small).seconds_per_trajectory
    assert porous.forecast(large).peak_bytes > 25 * 4 * 4 * 128**3  # the snapshots alone


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_repeats_the_cpu():
    ((_, trajectory),) = porous.simulate(SMALL, [0], device="cuda")
    expected = small_trajectories()[0].velocity
    assert np.linalg.norm(trajectory.velocity - expected) < 10 * flow.PROJECTION_TOLERANCE * np.linalg.norm(expected)
