"""What is held in memory for an evaluation: how much is left is asked late, and what does not fit is said."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_domain
from gain import forecast_largest_gain, require_room
from parts import hold_out, normalised_batch
from torch.profiler import ProfilerActivity, profile

from data.latents import open_latents, write_latents
from data.layout import StorePlan, Trajectory
from data.reader import open_store
from data.statistics import FieldStatistics
from data.writer import write_store
from shodh.evaluation.held_out import evaluate
from shodh.evaluation.latent_quality import LatentSample, LatentTrajectory, measure_largest_gain, measure_latent_quality
from shodh.fields import NUM_GIVEN, Grid
from shodh.model.transformer import LatentTransformer, TransformerConfig
from shodh.physics.exterior import curl_of_edges
from shodh.physics.masked_projection import PORE_SPACE
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.export import Tokenizer, load_tokenizer, save_tokenizer
from tokenizer.memory import HEAP_BYTES

NUM_SNAPSHOTS = NUM_GIVEN + 1
CONFIG = AutoencoderConfig(latent_channels=8, medium_channels=4, widths=(8, 16, 32))
MODEL = TransformerConfig(
    latent_channels=8, medium_channels=4, width=24, depth=2, num_heads=2, num_experts=4, hidden=16, patch=1
)
SHAPE = (16, 16, 16)
SCALES = {"velocity_scale": 2.0, "pressure_scale": 1.0, "medium_mean": 0.5, "medium_scale": 0.5}
CHANNEL = replace(make_domain(), name="channel")
GRID = Grid(shape=SHAPE, spacing=(0.5, 0.25, 2.0), boundary=CHANNEL.boundary)
ROCK = replace(CHANNEL, name="rock", medium=replace(CHANNEL.medium, name=PORE_SPACE))


def simulate(indices, domain):
    """A few random solenoidal snapshots in a random pore space."""
    for i in indices:
        random = np.random.default_rng(i)
        flux = curl_of_edges(torch.from_numpy(random.normal(size=(NUM_SNAPSHOTS, 3, *SHAPE))), domain.boundary)
        yield (
            i,
            Trajectory(
                velocity=flux.float().numpy(),
                pressure=random.normal(size=(NUM_SNAPSHOTS, *SHAPE)).astype(np.float32),
                medium=(random.uniform(size=SHAPE) < 0.7).astype(np.float32),
                time=np.arange(NUM_SNAPSHOTS) * 0.1,
                parameters=dict.fromkeys(domain.parameters, 0.5),
                seed=0,
                grid=GRID,
            ),
        )


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    domains = {domain.name: domain for domain in (CHANNEL, ROCK)}
    path = tmp_path / "tokenizer.safetensors"
    save_tokenizer(path, Autoencoder(CONFIG), domains, dict.fromkeys(domains, SCALES))
    return load_tokenizer(path)


def hold(folder: Path, tokenizer: Tokenizer, domain=CHANNEL, **options):
    plan = StorePlan(
        domain=domain,
        num_trajectories=2,
        num_snapshots=NUM_SNAPSHOTS,
        num_test=1,
        shape=SHAPE,
        solver="random potentials",
        solver_version="1",
        config={},
    )
    write_store(folder / domain.name, plan, lambda indices: simulate(indices, domain))
    store = open_store(folder / domain.name)

    @torch.no_grad()
    def encode(velocity, pressure, medium):
        batch = normalised_batch(velocity, pressure, medium, store, FieldStatistics(**SCALES))
        return tokenizer.autoencoder.encode(batch)

    write_latents(folder / "latents" / domain.name, store, encode, tokenizer.digest)
    latents = open_latents(folder / "latents" / domain.name)
    return hold_out(tokenizer, store, latents, torch.device("cpu"), **options)


def test_memory_is_asked_for_at_the_first_decoding_and_once(tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("parts.memory_to_use", lambda device: asked.append(device) or 10**10)
    held_out = hold(tmp_path, tokenizer)
    assert not asked
    (trajectory,) = held_out.trajectories
    for _ in range(2):
        decoded = held_out.decode(trajectory.latents, trajectory.medium.expand(NUM_SNAPSHOTS, *trajectory.medium.shape))
    assert held_out.encode is not None
    held_out.encode(decoded.velocity, decoded.pressure, held_out.medium[0].expand(NUM_SNAPSHOTS, 1, *SHAPE))
    assert len(asked) == 1


def test_gradients_that_do_not_fit_are_skipped_with_a_reason_and_the_rest_is_measured(tokenizer, tmp_path, monkeypatch):
    held_out = hold(tmp_path, tokenizer)
    (trajectory,), (medium,) = held_out.trajectories, held_out.medium
    enough = forecast_largest_gain(CONFIG, CHANNEL, GRID)
    monkeypatch.setattr("parts.memory_to_use", lambda device: enough - 1)
    latents = LatentTrajectory(trajectory.latents, trajectory.medium, medium)
    quality = measure_latent_quality([latents], held_out.decode, held_out.decode_velocity, held_out.encode)
    assert "to differentiate the decoder of 16x16x16 twice takes" in quality["largest_gain_skipped"]
    assert quality["smoothness"]["velocity"]["largest_gain"] is None and quality["round_trip"] > 0
    require_room(CONFIG, CHANNEL, GRID, enough)  # which is enough


def test_only_media_with_solid_are_projected_into(tokenizer, tmp_path):
    rock = hold(tmp_path, tokenizer, ROCK, project=True)
    assert rock.project
    assert not hold(tmp_path / "again", tokenizer, ROCK).project
    assert not hold(tmp_path, tokenizer, CHANNEL, project=True).project
    model = LatentTransformer(MODEL).eval().requires_grad_(False)
    block = evaluate(model, [rock._replace(decode_velocity=None, encode=None)])["domains"]["rock"]
    assert block["projected"] and block["divergence"]["max_abs"] == 0
    leaks = block["reconstruction"]["flux_in_solid"]
    assert leaks["decoded"] == 0 and leaks["truth"] > 0  # random flux minds no solid


def test_forecast_of_the_largest_gain_is_at_most_1_3_times_what_is_allocated_and_never_below():
    model = Autoencoder(CONFIG).eval().requires_grad_(False)
    latent, still = torch.randn(1, CONFIG.latent_channels, 2, 2, 2), torch.randn(1, CONFIG.medium_channels, 2, 2, 2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        measure_largest_gain(
            lambda z, m: model.decode(z, m, CHANNEL, GRID).velocity,
            LatentSample(latent, still, still[0, 0]),
            num_iterations=3,
        )
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    allocated, forecast = int(np.cumsum(sizes).max()), forecast_largest_gain(CONFIG, CHANNEL, GRID) - HEAP_BYTES
    assert allocated <= forecast <= 1.3 * allocated, (forecast / 1e6, allocated / 1e6)
