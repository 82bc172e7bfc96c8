"""The open channel against laminar and vortex solutions, its invariants, and the statistics of wall turbulence."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.simulate.channel_flow import Channel, advance, momentum_tendency, refine, solve_pressure
from data.simulate.open_channel import (
    DOMAIN,
    OpenChannelConfig,
    forecast,
    make_initial_velocity,
    require_stable,
    simulate,
    total_work,
)
from data.simulate.open_channel import make_grid as make_channel_grid
from shodh.fields import Grid
from shodh.physics.exterior import divergence_of_faces
from shodh.physics.helmholtz import remove_divergence

SHORT = OpenChannelConfig(num_trajectories=4, num_snapshots=3, resolution=16, spinup_time=0.5)


def make_grid(*shape: int) -> Grid:
    box = (2 * math.pi, 1.0, math.pi)
    spacing = (box[0] / shape[0], box[1] / shape[1], box[2] / shape[2])
    return Grid(shape=(shape[0], shape[1], shape[2]), spacing=spacing, boundary=DOMAIN.boundary)


def make_flow(grid: Grid) -> Tensor:
    """A strong solenoidal flow, FP64."""
    velocity, _ = make_initial_velocity(SHORT, 0, grid)
    return remove_divergence(velocity[None], grid)


def make_channel(grid: Grid, viscosity: float, force: float) -> Channel:
    return Channel(grid, torch.tensor([viscosity], dtype=torch.float64), force)


def make_vortices(grid: Grid, profile: bool) -> tuple[Tensor, Tensor]:
    """u = d psi / dz, w = -d psi / dx with psi = sin(x) sin(2 z), and its Euler pressure; also times sin(pi y / 2)."""
    (nx, ny, nz), (hx, hy, hz) = grid.shape, grid.mean_spacing
    face_x, face_z = (torch.arange(n, dtype=torch.float64) * h for n, h in ((nx, hx), (nz, hz)))
    x, y, z = (face_x + hx / 2)[:, None, None], (torch.arange(ny) + 0.5)[:, None] * hy, face_z + hz / 2
    shape = torch.sin(math.pi / 2 * y) if profile else torch.ones_like(y)
    velocity = torch.zeros(1, 3, nx, ny, nz, dtype=torch.float64)
    velocity[0, 0] = 2 * torch.sin(face_x)[:, None, None] * torch.cos(2 * z) * shape
    velocity[0, 2] = -torch.cos(x) * torch.sin(2 * face_z) * shape
    u, w, psi = 2 * torch.sin(x) * torch.cos(2 * z), -torch.cos(x) * torch.sin(2 * z), torch.sin(x) * torch.sin(2 * z)
    pressure = (-(u**2 + w**2 + 5 * psi**2) / 2).expand(nx, ny, nz)
    return velocity, (pressure - pressure.mean())[None]


def test_poiseuille_error_falls_at_second_order() -> None:
    errors = []
    for ny in (2, 4, 8):
        grid = make_grid(2, ny, 2)
        y = (torch.arange(ny, dtype=torch.float64) + 0.5) / ny
        exact = torch.zeros(1, 3, 2, ny, 2, dtype=torch.float64)
        exact[:, 0] = (y - y**2 / 2)[:, None]
        num_steps = 8 * ny**2  # to t = 4 at half the diffusive limit: what is left of the start is exp(-pi^2) = 5e-5
        steady = advance(0.5 * exact, make_channel(grid, viscosity=1.0, force=1.0), 4 / num_steps, num_steps)
        errors.append((steady - exact).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_inviscid_energy_drift_falls_at_third_order_in_the_time_step() -> None:
    grid = make_grid(16, 16, 16)
    start, channel = make_flow(grid), make_channel(grid, viscosity=0.0, force=0.0)
    energy = start.square().sum()
    drifts = [(advance(start, channel, 0.08 / n, n).square().sum() / energy - 1).abs().item() for n in (16, 32, 64)]
    assert drifts[0] / drifts[1] == pytest.approx(8, rel=0.1)
    assert drifts[1] / drifts[2] == pytest.approx(8, rel=0.1)


def test_advection_does_no_work() -> None:
    grid = make_grid(12, 10, 8)
    velocity = make_flow(grid)
    tendency = momentum_tendency(velocity, make_channel(grid, viscosity=0.0, force=0.0))
    scale = (velocity.abs() * tendency.abs()).sum()
    assert (velocity * tendency).sum().abs() < 1e-13 * scale  # FP64 round-off of a sum of 3000 terms


def test_only_force_and_bed_friction_change_the_mean_flow() -> None:
    grid, viscosity = make_grid(12, 10, 8), 0.02
    velocity = make_flow(grid)
    tendency = momentum_tendency(velocity, make_channel(grid, viscosity, force=1.0))
    friction = viscosity * velocity[0, 0, :, 0].mean() / (grid.mean_spacing[1] / 2)
    torch.testing.assert_close(tendency[0, 0].mean(), 1 - friction, rtol=0, atol=1e-12)


def test_viscous_term_is_the_laplacian_for_solenoidal_flow() -> None:
    grid = make_grid(12, 10, 8)
    velocity = make_flow(grid)
    viscous = momentum_tendency(velocity, make_channel(grid, 1.0, 0.0)) - momentum_tendency(
        velocity, make_channel(grid, 0.0, 0.0)
    )
    w, (hx, hy, hz) = velocity[:, 2], grid.mean_spacing
    laplacian = (w.roll(1, 1) + w.roll(-1, 1) - 2 * w) / hx**2 + (w.roll(1, 3) + w.roll(-1, 3) - 2 * w) / hz**2
    ghosted = torch.cat([-w[:, :, :1], w, w[:, :, -1:]], 2)
    laplacian = laplacian + ghosted.diff(n=2, dim=2) / hy**2
    torch.testing.assert_close(viscous[:, 2], laplacian, rtol=0, atol=1e-12 * laplacian.abs().max().item())


def test_pressure_of_steady_vortices_converges_at_second_order() -> None:
    errors = []
    for n in (32, 64, 128):
        grid = make_grid(n, 2, n)
        velocity, exact = make_vortices(grid, profile=False)
        errors.append((solve_pressure(velocity, make_channel(grid, 0.0, 0.0)) - exact).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_refinement_errs_at_second_order() -> None:
    errors = []
    for n in (8, 16, 32):
        fine = make_grid(2 * n, 2 * n, 2 * n)
        coarse_velocity, _ = make_vortices(make_grid(n, n, n), profile=True)
        fine_velocity, _ = make_vortices(fine, profile=True)
        errors.append((refine(coarse_velocity, fine, "free") - fine_velocity).square().mean().sqrt().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.15)


def test_stored_flux_is_solenoidal_to_round_off_and_stops_at_the_bed() -> None:
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
        np.testing.assert_array_equal(together[index].pressure, again[index].pressure)
    assert together[1].parameters == alone[1].parameters
    # round-off, 2e-7 of the velocity a step, grows by exp(3 t) at most in the half time unit this takes
    scale = float(np.abs(alone[1].velocity).max())
    np.testing.assert_allclose(together[1].velocity, alone[1].velocity, rtol=0, atol=1e-4 * scale)
    assert np.abs(together[0].velocity - together[2].velocity).max() > 0.1 * scale


def test_pressure_is_that_of_the_stored_velocity() -> None:
    _, trajectory = next(simulate(SHORT, [3]))
    grid = trajectory.grid
    area = torch.from_numpy(grid.face_area)
    velocity = torch.from_numpy(trajectory.velocity).double() / area
    viscosity = torch.full((len(velocity),), trajectory.parameters["viscosity"], dtype=torch.float64)
    pressure = solve_pressure(velocity, Channel(grid, viscosity)).numpy()
    np.testing.assert_allclose(trajectory.pressure, pressure, rtol=0, atol=1e-4 * float(np.abs(pressure).max()))


def test_blow_up_names_the_trajectory_and_the_time() -> None:
    config = OpenChannelConfig(resolution=16, friction_reynolds=(1e30, 1e30))  # far faster than time steps allow for
    with pytest.raises(RuntimeError, match=r"trajectory 5: blew up by t = -9"):
        next(simulate(config, [5]))


@pytest.mark.parametrize(("stencil", "limit"), [("narrow", math.sqrt(3)), ("wide", math.sqrt(3) * 6 / 7)])
def test_a_flow_too_fast_for_its_time_step_is_refused_by_name(stencil, limit) -> None:
    grid = make_grid(8, 8, 8)
    channel = Channel(grid, torch.ones(2), stencil=stencil)
    velocity = torch.zeros(2, 3, 8, 8, 8)
    velocity[1, 0, 3, 4, 5] = grid.mean_spacing[0]  # dt is the Courant number
    require_stable(velocity, channel, 0.999 * limit, [3, 7], -2.0)
    with pytest.raises(RuntimeError, match=rf"trajectory 7: Courant number .* at t = -2 .* exceeds {limit:.3g}\."):
        require_stable(velocity, channel, 1.001 * limit, [3, 7], -2.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_snapshots", 0),
        ("snapshot_interval", 0.0),
        ("resolution", 4),
        ("friction_reynolds", (200.0, 100.0)),
        ("spinup_time", math.inf),
        ("stretching", -1.0),
    ],
)
def test_bad_config_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}="):
        OpenChannelConfig(**{field: value})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_takes_the_same_steps_as_the_cpu() -> None:
    on_cpu, on_gpu = (next(simulate(SHORT, [0], device=device))[1].velocity for device in ("cpu", "cuda"))
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=1e-3 * float(np.abs(on_cpu).max()))


def test_a_closed_channel_is_recorded_between_two_walls_on_a_grid_that_is_finest_there() -> None:
    config = OpenChannelConfig(num_snapshots=2, resolution=16, spinup_time=1.0, top="wall", stretching=1.7)
    _, trajectory = next(simulate(config, [0]))
    widths = trajectory.grid.widths(1)
    assert widths.sum() == pytest.approx(2.0, rel=1e-12)
    np.testing.assert_allclose(widths, widths[::-1], rtol=1e-12)
    assert (np.diff(widths[:8]) > 0).all()
    faces = np.concatenate([[0.0], np.cumsum(widths)])
    distance = np.minimum((faces[1:] + faces[:-1]) / 2, 2 - (faces[1:] + faces[:-1]) / 2)
    np.testing.assert_allclose(trajectory.medium[3, :, 5], distance, rtol=1e-6)
    flux = torch.from_numpy(trajectory.velocity)
    divergence = divergence_of_faces(flux.double(), DOMAIN.boundary)
    assert divergence.abs().max() < 6 * 4 * torch.finfo(torch.float32).eps * flux.abs().max()
    mean = (trajectory.velocity / trajectory.grid.face_area)[:, 0].mean((0, 1, 3))
    assert 0 < mean[0] < mean[7] and 0 < mean[-1] < mean[8]  # the wind is slow at both walls
    np.testing.assert_allclose(mean, mean[::-1], rtol=0, atol=0.3 * mean.max())


def test_an_open_channel_is_stretched_away_from_the_bed_only() -> None:
    config = OpenChannelConfig(resolution=32, stretching=1.7)
    widths = make_channel_grid(config, 32).widths(1)
    assert widths.sum() == pytest.approx(1.0, rel=1e-12)
    assert (np.diff(widths) > 0).all()
    assert make_channel_grid(OpenChannelConfig(), 32).is_uniform(1)


def test_forecast_grows_with_the_work_and_the_memory_of_finer_grids() -> None:
    coarse, fine = (forecast(OpenChannelConfig(resolution=n)) for n in (32, 64))
    longer = forecast(OpenChannelConfig(num_snapshots=50))
    # twice the cells per axis: 8 times the cells and about twice the steps; spin-up starts on the same coarse grid
    assert 8 < fine.seconds_per_trajectory / coarse.seconds_per_trajectory < 32
    assert longer.seconds_per_trajectory > coarse.seconds_per_trajectory
    assert longer.peak_bytes > coarse.peak_bytes
    assert fine.peak_bytes >= 25 * 16 * 64**3  # the snapshots of one trajectory


@pytest.mark.slow
def test_recorded_flow_is_developed_wall_turbulence() -> None:
    config = OpenChannelConfig(num_trajectories=6, num_snapshots=41, snapshot_interval=0.05)
    stresses, fluctuations = [], []
    for _, trajectory in simulate(config, range(config.num_trajectories)):
        grid, viscosity = trajectory.grid, trajectory.parameters["viscosity"]
        velocity = trajectory.velocity / grid.face_area
        mean = velocity[:, 0].mean((0, 1, 3))
        fluctuation = velocity - velocity.mean((2, 4), keepdims=True)
        u, v = fluctuation[:, 0], fluctuation[:, 1]
        u_edge, v_edge = (u[:, :, 1:] + u[:, :, :-1]) / 2, (v + np.roll(v, 1, 1))[:, :, 1:] / 2
        stresses.append(viscosity * np.diff(mean) / grid.mean_spacing[1] - (u_edge * v_edge).mean((0, 1, 3)))
        fluctuations.append(np.sqrt((fluctuation**2).mean((0, 2, 4))).max(1))
    face_height = np.arange(1, config.resolution) / config.resolution
    # Scatter of one run: 0.08 in stress; 3 standard errors of 6 runs are 0.1.
    assert np.abs(np.mean(stresses, 0) - (1 - face_height)).max() < 0.1
    # Peaks in friction velocities; direct simulation has 2.6-2.8, 0.8-0.9 and 1.0-1.1 at these Re_tau.
    lowest, highest = np.min(fluctuations, 0), np.max(fluctuations, 0)
    assert 2.0 < lowest[0] and highest[0] < 3.6
    assert 0.5 < lowest[1] and highest[1] < 1.2
    assert 0.6 < lowest[2] and highest[2] < 1.5


@pytest.mark.slow
@pytest.mark.shared_data
def test_closed_channel_agrees_with_published_direct_simulations(shared_data: Path, tmp_path: Path) -> None:
    """64^3 at Re_tau 180: mean velocity, stresses and their sum within the benchmark's bounds for a short run."""
    script = Path(__file__).parents[3] / "benchmarks" / "channel.py"
    command = [sys.executable, script, "--quick", "--tables", shared_data / "turbulence", "--folder", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
