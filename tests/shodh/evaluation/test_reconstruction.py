"""Judgements of decoded fields on fields whose errors, shear, permeability and statistics are known in closed form."""

import json
import math

import numpy as np
import pytest
import torch

from shodh.evaluation.permeability import find_fluid, sample_porous, solid_faces, summarise_porous
from shodh.evaluation.reconstruction import TrueFields, sample_trajectory, summarise_reconstruction
from shodh.evaluation.velocity_gradients import sample_gradients, summarise_gradients, velocity_gradients
from shodh.evaluation.wall_shear import sample_wall_shear, summarise_wall_shear
from shodh.fields import DecodedFields, Grid

PERIODIC = ("periodic",) * 3
CHANNEL = ("periodic", "wall", "periodic")
ROUND_OFF = 1e-5  # of FP32 fields, in ratios of their squares


def make_grid(n: int = 16, boundary=PERIODIC, spacing=(1.0, 1.0, 1.0)) -> Grid:
    return Grid(shape=(n, n, n), spacing=spacing, boundary=boundary)


def make_fields(n: int = 16, num: int = 3, medium: torch.Tensor | None = None) -> TrueFields:
    medium = torch.ones(n, n, n) if medium is None else medium
    return TrueFields(torch.randn(num, 3, n, n, n), torch.randn(num, 1, n, n, n), medium)


def measure(fields: TrueFields, grid: Grid, change, baselines=None) -> dict:
    """The judgement of a codec that decodes what ``change`` makes of velocity and pressure."""
    changed = change(torch.cat([fields.velocity, fields.pressure], 1))
    decoded = DecodedFields(changed[:, :3], changed[:, :3], changed[:, 3:])
    return summarise_reconstruction([sample_trajectory(decoded, fields, grid, baselines)], grid)


@pytest.mark.parametrize("boundary", [PERIODIC, CHANNEL, ("open",) * 3])
def test_field_scaled_by_g_keeps_g_squared_of_its_energy_and_errs_by_1_minus_g_squared_in_every_octave(boundary):
    fields, gain = make_fields(), 0.7
    fields.velocity[:, 1, :, 0] *= boundary[1] != "wall"  # nothing crosses a wall
    measured = measure(fields, make_grid(boundary=boundary), lambda latent: gain * latent)
    for name in ("velocity", "velocity_x", "velocity_y", "pressure"):
        block = measured["octaves"][name]
        assert len(block["error"]) == 3
        assert block["energy_ratio"] == pytest.approx([gain**2] * 3, rel=ROUND_OFF)
        assert block["error"] == pytest.approx([(1 - gain) ** 2] * 3, rel=ROUND_OFF)
        assert block["correlation"] == pytest.approx([1] * 3, rel=ROUND_OFF)
        assert sum(block["true_share"]) + block["beyond_nyquist"]["true_share"] == pytest.approx(1, rel=1e-12)
    assert measured["highest_octave_energy_ratio"] == pytest.approx(gain**2, rel=ROUND_OFF)
    assert measured["gradients"]["longitudinal"]["rms_ratio"] == pytest.approx(gain, rel=ROUND_OFF)
    json.dumps(measured, allow_nan=False)


def test_vrmse_is_per_field_and_component_and_leaves_silent_snapshots_out():
    fields = make_fields(num=4)
    fields.velocity[0], fields.pressure[0] = 1e-6 * fields.velocity[0], 1e-6 * fields.pressure[0]
    change = torch.tensor([0.5, 0.0, 0.0, 0.2])[:, None, None, None]

    def spoil(latent):
        noise = torch.zeros_like(latent)
        noise[:, 1] = 1.0  # a uniform flow too much: an error of the mean, relative to the deviation
        return latent * (1 - change) + noise

    measured = measure(fields, make_grid(), spoil, {"half": lambda velocity: velocity / 2})
    vrmse = measured["vrmse"]
    deviation = fields.velocity[1:].var((-3, -2, -1), correction=0)
    assert vrmse["velocity_x"] == pytest.approx(
        (0.25 * (fields.velocity[1:, 0].square().mean((-3, -2, -1)) / deviation[:, 0])).sqrt().mean().item(), rel=1e-5
    )
    assert vrmse["velocity_y"] == pytest.approx(deviation[:, 1].rsqrt().mean().item(), rel=1e-5)
    assert vrmse["velocity_z"] == 0
    assert measured["baseline_vrmse"]["half"] == pytest.approx(
        (0.25 * fields.velocity[1:].square().mean((1, 2, 3, 4)) / deviation.mean(1)).sqrt().mean().item(), rel=1e-5
    )
    assert vrmse["pressure"] == pytest.approx(0.2, rel=1e-2)  # but for the mean of 4096 random values


def test_lost_wave_is_missed_in_its_octave_alone_and_noise_is_energy_without_correlation():
    n = 32
    x = torch.arange(n, dtype=torch.float64) / n
    long, short = (torch.sin(2 * math.pi * k * x).float()[:, None].expand(2, n, n, n) for k in (2, 12))
    velocity = torch.stack([torch.zeros_like(long), long + short, torch.zeros_like(long)], 1)
    fields = TrueFields(velocity, torch.randn(2, 1, n, n, n), torch.ones(n, n, n))

    def blur(latent):
        return torch.stack([latent[:, 0], long, latent[:, 2], latent[:, 3]], 1)

    def shift(latent):  # a quarter of the short wave: as much energy, none of it right
        moved = long + torch.cos(2 * math.pi * 12 * x).float()[:, None]
        return torch.stack([latent[:, 0], moved, latent[:, 2], latent[:, 3]], 1)

    grid = make_grid(n)
    blurred, shifted = (measure(fields, grid, change)["octaves"]["velocity"] for change in (blur, shift))
    assert blurred["energy_ratio"][0] == pytest.approx(1, rel=ROUND_OFF)
    assert blurred["error"][0] == pytest.approx(0, abs=ROUND_OFF)
    assert blurred["energy_ratio"][3] == pytest.approx(0, abs=ROUND_OFF)
    assert blurred["error"][3] == pytest.approx(1, rel=ROUND_OFF)
    assert blurred["energy_ratio"][1:3] == [None, None]  # the truth has nothing there
    assert shifted["energy_ratio"][3] == pytest.approx(1, rel=ROUND_OFF)
    assert shifted["error"][3] == pytest.approx(2, rel=ROUND_OFF)
    assert shifted["correlation"][3] == pytest.approx(0, abs=ROUND_OFF)


def test_spectrum_of_shells_sums_to_the_octaves_and_baselines_get_curves_of_their_own():
    fields = make_fields()
    measured = measure(fields, make_grid(), lambda latent: latent, {"half": lambda velocity: velocity / 2})
    spectrum, octaves = measured["spectrum"], measured["octaves"]["velocity"]
    assert sum(spectrum["truth"]) == pytest.approx(sum(octaves["true_share"]), rel=1e-12)
    assert spectrum["decoded"] == spectrum["truth"] and max(spectrum["error"]) == 0
    assert spectrum["half"] == pytest.approx([value / 4 for value in spectrum["truth"]], rel=ROUND_OFF)
    assert measured["octaves"]["half"]["energy_ratio"] == pytest.approx([0.25] * 3, rel=ROUND_OFF)


def test_measuring_in_chunks_changes_nothing(monkeypatch):
    porous = (torch.rand(16, 16, 16) > 0.3).float()
    fields = make_fields(num=5, medium=porous)
    baselines = {"third": lambda velocity: velocity / 3}
    whole = measure(fields, make_grid(), lambda latent: 0.5 * latent, baselines)
    monkeypatch.setattr("shodh.evaluation.reconstruction.CELLS_AT_ONCE", 2 * 16**3)
    assert json.dumps(measure(fields, make_grid(), lambda latent: 0.5 * latent, baselines)) == json.dumps(whole)
    decoded = DecodedFields(fields.velocity / 2, fields.velocity / 2, fields.pressure / 2)
    rows = sample_trajectory(decoded, fields, make_grid())
    assert rows.vrmse.shape == (5, 5) and rows.vrmse[:, 0].mean().item() == pytest.approx(whole["vrmse"]["velocity"])


def test_no_trajectories_are_refused():
    with pytest.raises(ValueError, match="trajectories: none to measure"):
        summarise_reconstruction([], make_grid())


def couette(grid: Grid, slope: float, num: int = 2) -> torch.Tensor:
    """u = slope y e_x: no slip at y = 0 only."""
    widths = grid.widths(1)
    height = torch.from_numpy(np.cumsum(widths) - widths / 2).float()
    velocity = torch.zeros(num, 3, *grid.shape)
    velocity[:, 0] = slope * height[:, None]
    return velocity


@pytest.mark.parametrize("widths", [0.25, tuple(0.1 * 1.2**k for k in range(16))])
def test_shear_of_couette_flow_is_exact_on_uniform_and_stretched_grids(widths):
    grid = make_grid(16, CHANNEL, (1.0, widths, 2.0))
    truth = couette(grid, 3.0)
    (wall,) = summarise_wall_shear([sample_wall_shear(truth, 0.9 * truth, grid)])  # the moving wall is none to stick to
    assert (wall["axis"], wall["side"]) == ("y", "lower")
    assert wall["mean"] == pytest.approx({"truth": 3.0, "decoded": 2.7}, rel=1e-6)
    assert wall["rms"] == pytest.approx({"truth": 3.0, "decoded": 2.7}, rel=1e-6)
    assert wall["mean_error"] == pytest.approx(0.1, rel=1e-6)
    assert wall["pattern_vrmse"] is None  # a uniform shear has no pattern


def test_both_walls_of_poiseuille_flow_are_measured_and_a_streak_is_a_pattern():
    grid = make_grid(32, CHANNEL)
    y = torch.arange(32) + 0.5
    streak = 1 + 0.5 * torch.sin(2 * math.pi * torch.arange(32) / 32)
    truth = torch.zeros(1, 3, 32, 32, 32)
    truth[:, 0] = (y * (32 - y))[:, None] * streak
    decoded = (y * (32 - y))[:, None] * torch.ones(32)
    smooth = torch.zeros_like(truth)
    smooth[:, 0] = decoded
    walls = summarise_wall_shear([sample_wall_shear(truth, smooth, grid)])
    assert [wall["side"] for wall in walls] == ["lower", "upper"]
    for wall in walls:
        assert wall["mean"]["truth"] == pytest.approx(31.5, rel=1e-5)  # 32 - y at the first centre
        assert wall["mean_error"] == pytest.approx(0, abs=1e-6)
        assert wall["pattern_vrmse"] == pytest.approx(1, rel=1e-5)
        assert wall["rms"]["truth"] / wall["rms"]["decoded"] == pytest.approx(math.sqrt(1 + 0.25 / 2), rel=1e-5)


def test_walls_that_slip_and_boxes_without_walls_have_no_shear():
    grid = make_grid(16, CHANNEL)
    plug = torch.zeros(1, 3, 16, 16, 16)
    plug[:, 0] = 1
    assert summarise_wall_shear([sample_wall_shear(plug, plug, grid)]) == []
    fields = make_fields()
    assert measure(fields, make_grid(), lambda latent: latent)["wall_shear"] is None


def slit(n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Fluid for 4 <= y < 12, and a shear flow along x that is 0 on every face of solid."""
    medium = torch.zeros(n, n, n)
    medium[:, 4:12] = 1
    velocity = torch.zeros(2, 3, n, n, n)
    y = torch.arange(8) + 0.5
    velocity[:, 0, :, 4:12] = (y * (8 - y))[:, None]
    return medium, velocity


def test_permeability_by_flow_and_by_dissipation_are_those_of_closed_forms():
    medium, velocity = slit()
    fluid = find_fluid(medium)
    assert fluid is not None
    grid = make_grid()
    rough = velocity.clone()
    rough[:, 0, :, 4:12] += 2.0 * (-1.0) ** torch.arange(16)  # stripes across z: the same mean flow, more dissipation
    truth_rows = sample_porous(velocity, rough, fluid, grid)
    measured = summarise_porous([truth_rows])["permeability"]
    assert measured["flow_error"] == pytest.approx(0, abs=1e-6)
    y = torch.arange(8, dtype=torch.float64) + 0.5
    profile = torch.cat([torch.zeros(1), y * (8 - y), torch.zeros(1)])
    dissipation = profile.diff().square().sum() / 16  # per cell of the box
    # stripes: differences of 4 across z in half the box; and of 2 at the two faces of the slit
    added = 16 * 8 / 16 + 2 * 2.0**2 / 16
    assert truth_rows.dissipation[0].item() == pytest.approx(dissipation.item(), rel=1e-6)
    assert truth_rows.decoded_dissipation[0].item() == pytest.approx((dissipation + added).item(), rel=1e-6)
    assert measured["dissipation_bias"] == pytest.approx((1 / (1 + added / dissipation)).item() - 1, rel=1e-6)
    half = summarise_porous([sample_porous(velocity, velocity / 2, fluid, grid)])["permeability"]
    assert half["flow_error"] == pytest.approx(0.5, rel=1e-6)
    assert half["dissipation_error"] == pytest.approx(0, abs=1e-6)  # a scaled flow has the same resistance


def test_snapshots_near_reversal_do_not_count():
    medium, velocity = slit()
    fluid = find_fluid(medium)
    assert fluid is not None
    velocity[1] *= 0.05
    decoded = velocity.clone()
    decoded[1] *= -3
    measured = summarise_porous([sample_porous(velocity, decoded, fluid, make_grid())])["permeability"]
    assert measured["num_snapshots"] == 1 and measured["flow_error"] == 0


def test_flux_in_solid_is_the_share_on_faces_that_touch_it():
    medium, velocity = slit()
    fluid = find_fluid(medium)
    assert fluid is not None
    faces = solid_faces(fluid, make_grid())
    assert faces[0, 0, :, 0].sum() == 8 and faces[1, 0, :, 0].sum() == 9  # the slit's upper face and lower face count
    leaky = velocity.clone()
    leaky[:, 1, :, 12] = 5.0
    measured = summarise_porous([sample_porous(velocity, leaky, fluid, make_grid())])["flux_in_solid"]
    assert measured["truth"] == 0
    inside = velocity[0, 0, 0, :, 0].square().sum().item()
    assert measured["decoded"] == pytest.approx(25 / (25 + inside), rel=1e-6)


def test_only_a_medium_of_zeros_and_ones_is_porous():
    ones = torch.ones(4, 4, 4)
    layers = torch.full((4, 4, 4), 1500.0)
    layers[2:] = 3000.0
    distance = torch.rand(4, 4, 4)
    assert find_fluid(ones) is None and find_fluid(0 * ones) is None
    assert find_fluid(layers) is None and find_fluid(distance) is None
    assert measure(make_fields(), make_grid(), lambda latent: latent)["flux_in_solid"] is None


def test_gradients_of_a_linear_flow_are_its_matrix_where_values_are_stored():
    spacing = (0.5, 0.25, 2.0)
    for boundary in (("open",) * 3, CHANNEL):
        grid = make_grid(8, boundary, spacing)
        face = torch.arange(8, dtype=torch.float64)
        velocity = torch.zeros(1, 3, 8, 8, 8, dtype=torch.float64)
        velocity[:, 2] = 3 * spacing[1] * face[:, None]  # dw/dy = 3, the centres' offset plays no part
        longitudinal, transverse = velocity_gradients(velocity, grid)
        assert longitudinal.abs().max() == 0
        values = transverse[0][transverse[0] != 0]
        torch.testing.assert_close(values, torch.full_like(values, 3.0))
        assert len(values) == 8 * 7 * 8  # none at the wall or the open end, where it would need what is not stored


def test_gaussian_gradients_have_flatness_three_and_no_skewness_within_sampling_error():
    n, num = 24, 4
    k = torch.fft.fftfreq(n, 1 / n)
    smooth = torch.exp(-(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2) / 18)
    velocity = torch.fft.ifftn(torch.fft.fftn(torch.randn(num, 3, n, n, n), dim=(-3, -2, -1)) * smooth).real
    grid = make_grid(n)
    truth = sample_gradients(velocity, velocity, grid)
    measured = summarise_gradients(truth, sample_gradients(2 * velocity, velocity, grid))
    correlated = (n / 3) ** 3 / 10  # independent values a component: fewer than (cells per correlation length)^3
    samples = 3 * num * correlated
    for kind in ("longitudinal", "transverse"):
        block = measured[kind]
        assert block["truth"]["rms"] == pytest.approx(1, rel=1e-6)
        assert abs(block["truth"]["skewness"]) < 4 * math.sqrt(6 / samples)
        assert abs(block["truth"]["flatness"] - 3) < 4 * math.sqrt(24 / samples)
        assert block["rms_ratio"] == pytest.approx(2, rel=1e-6)
        assert block["decoded"]["flatness"] == pytest.approx(block["truth"]["flatness"], rel=1e-6)
        width = measured["centres"][1] - measured["centres"][0]
        assert sum(block["truth"]["density"]) * width == pytest.approx(1 - block["truth"]["outside"], rel=1e-9)
        centre = len(measured["centres"]) // 2
        bell = math.exp(-(measured["centres"][centre] ** 2) / 2) / math.sqrt(2 * math.pi)
        assert block["truth"]["density"][centre] == pytest.approx(bell, rel=0.1)


def test_skewness_and_flatness_of_two_valued_gradients_are_those_of_the_coin():
    n = 10  # du/dx = 9 on one cell of ten, -1 on the others: a coin of probability 0.1
    velocity = torch.zeros(1, 3, n, n, n)
    velocity[:, :] = torch.cumsum(torch.tensor([0.0, 9.0] + [-1.0] * 8), 0)[:, None, None]
    velocity[:, 1:] = 0
    fluid = torch.ones(n, n, n, dtype=torch.bool)
    longitudinal, _ = velocity_gradients(velocity, make_grid(n), fluid)
    first = longitudinal[:, : n**3]  # du/dx; dv/dy and dw/dz are 0
    assert sorted(set(first[0].tolist())) == [-1.0, 9.0]
    rows = sample_gradients(velocity, velocity, make_grid(n), fluid)
    block = summarise_gradients(rows, rows)["longitudinal"]["truth"]
    second, third, fourth = (value / 3 for value in (9.0, 72.0, 657.0))  # means of powers, two of three components 0
    assert block["rms"] == pytest.approx(1, rel=1e-6)
    assert block["skewness"] == pytest.approx(third / second**1.5, rel=1e-6)
    assert block["flatness"] == pytest.approx(fourth / second**2, rel=1e-6)


def test_gradients_deep_in_the_solid_do_not_count():
    medium, velocity = slit()
    fluid = find_fluid(medium)
    assert fluid is not None
    longitudinal, transverse = velocity_gradients(velocity, make_grid(), fluid)
    assert longitudinal.shape[1] == 3 * 8 * 16 * 16
    # edges that touch the slit: 9 layers where the edge lies between layers (du/dy, dv/dx, dv/dz, dw/dy), else 8
    assert transverse.shape[1] == (4 * 9 + 2 * 8) * 16 * 16
    everywhere = velocity_gradients(velocity, make_grid())[1]
    assert transverse.square().sum().item() == pytest.approx(everywhere.square().sum().item(), rel=1e-12)
