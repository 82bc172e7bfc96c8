"""The report's sections on decoded fields and latents, from real measurements of random fields."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from shodh.evaluation.latent_quality import LatentTrajectory, measure_latent_quality, sum_moments, summarise_moments
from shodh.evaluation.reconstruction import TrueFields, sample_trajectory, summarise_reconstruction
from shodh.evaluation.report import _find_sharpness_tiles, write_report
from shodh.evaluation.report_run import read_run
from shodh.fields import DecodedFields, Grid

N = 16
BOUNDARIES = {"porous_media": ("periodic",) * 3, "open_channel": ("periodic", "wall", "periodic")}


def encode(velocity, pressure, medium):
    return torch.cat([velocity, pressure], 1), medium


def decode(latent, medium):
    blurred = 0.5 * latent
    return DecodedFields(blurred[:, :3], blurred[:, :3], blurred[:, 3:])


def measure_domain(name: str) -> dict:
    """A porous one with solid, and a walled one whose velocity rises from the wall."""
    medium = (torch.rand(N, N, N) > 0.4).float() if name == "porous_media" else torch.full((N, N, N), 0.3)
    velocity = torch.randn(4, 3, N, N, N)
    velocity[:, 0] += 10 * (torch.arange(N) + 0.5)[:, None]
    grid = Grid(shape=(N, N, N), spacing=(1.0, 1.0, 1.0), boundary=BOUNDARIES[name])
    fields = TrueFields(velocity, torch.randn(4, 1, N, N, N), medium)
    baselines = {"block_klt": lambda field: 0.3 * field}
    latents = LatentTrajectory(torch.cat([velocity, fields.pressure], 1), medium[None], medium)
    decoded = decode(latents.latents, medium)
    return {
        "reconstruction": summarise_reconstruction([sample_trajectory(decoded, fields, grid, baselines)], grid),
        "latents": measure_latent_quality([latents], decode, lambda z, m: decode(z, m).velocity, encode),
    }


def read_text(path: Path) -> str:
    parts: list[str] = []
    parser = HTMLParser()
    parser.handle_data = parts.append
    parser.feed(path.read_text(encoding="utf-8"))
    return " ".join(parts)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    domains = {name: measure_domain(name) for name in BOUNDARIES}
    together = summarise_moments(sum_moments(torch.randn(2, 4, N, N, N)))
    (folder / "evaluation.json").write_text(json.dumps({"domains": domains, "latents": together}))
    write_report(folder)
    return folder


def test_sections_show_the_figures_of_the_measurement(run_folder):
    text = read_text(run_folder / "report.html")
    for words in (
        "1/2 to 1",
        "open_channel: block KLT, energy ÷ true",
        "open_channel, lower y",
        "error by dissipation",
        "flux in solid",
        "all domains",
        "porous_media, pattern",
        "Energy in the highest octave",
    ):
        assert words in text, words
    assert text.count("0.250") >= 2 * 2 * 3  # energy and error of half the field, in all octaves of both domains


def test_each_domain_has_a_spectrum_and_two_distributions_and_all_share_the_gains(run_folder):
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 * (2 * 3 + 1)  # light and dark


def test_what_does_not_apply_is_not_shown(tmp_path):
    block = measure_domain("open_channel")
    block["reconstruction"]["wall_shear"] = None
    del block["latents"]["smoothness"], block["latents"]["round_trip"]
    (tmp_path / "evaluation.json").write_text(json.dumps({"domains": {"sound": block}}))
    text = read_text(write_report(tmp_path))
    assert "Wall shear" not in text and "Flow through solids" not in text and "Smoothness" not in text
    assert "1/2 to 1" in text and "effective channels" in text


@pytest.mark.parametrize(
    ("ratios", "shown", "verdict"),
    [
        ((0.0, 1.1), "0.0", "bad"),
        ((3.0, 0.0), "0.0", "bad"),
        ((0.9, 3.0), "3.000", "bad"),
        ((0.6, 1.1), "0.600", "good"),
    ],
)
def test_sharpness_tile_shows_the_worst_domain_and_no_energy_at_all_is_the_worst(tmp_path, ratios, shown, verdict):
    reconstructions = [{"highest_octave_energy_ratio": ratio} for ratio in (*ratios, None)]
    evaluation = {"domains": {f"domain{i}": {"reconstruction": block} for i, block in enumerate(reconstructions)}}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tile,) = _find_sharpness_tiles(read_run(tmp_path))
    assert (tile.value, tile.verdict) == (shown, verdict)


def test_skipped_worst_direction_is_a_dash_and_its_reason_one_line(tmp_path):
    block = measure_domain("open_channel")
    for gain in block["latents"]["smoothness"].values():
        gain["largest_gain"] = None
    block["latents"]["largest_gain_skipped"] = "to differentiate takes 26 GB."
    (tmp_path / "evaluation.json").write_text(json.dumps({"domains": {"sound": block}}))
    text = read_text(write_report(tmp_path))
    assert text.count("sound, worst direction not measured: to differentiate takes 26 GB.") == 1


def test_run_without_these_measurements_says_so(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"domains": {"older": {"latent_mse": 1.0}}}')
    text = read_text(write_report(tmp_path))
    assert "Decoded fields have not been measured yet." in text and "Latents have not been measured yet." in text
