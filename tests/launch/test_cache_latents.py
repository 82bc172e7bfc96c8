"""`cache_latents.py`: says what it takes, tiles where it must, and ends in one line for fields it cannot encode."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cpu_environment, make_batch, make_domain
from memory import control_group_rooms
from parts import normalised_batch, plan_encoding, require_tokenizer

from data.chunks import write_chunk
from data.digests import read_digests, seal
from data.latents import open_latents
from data.layout import StoreHeader, StorePlan, Trajectory, field_arrays
from data.reader import Store, open_store
from data.statistics import FieldStatistics, measure_statistics
from data.writer import write_store
from shodh.config import ConfigError
from shodh.fields import DomainSpec, Grid
from shodh.physics.exterior import curl_of_edges
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.export import Tokenizer, load_tokenizer, save_tokenizer
from tokenizer.memory import HEAP_BYTES, forecast_memory
from tokenizer.objective import ReconstructionConfig, reconstruction_loss

ROOT = Path(__file__).resolve().parents[2]
CONFIG = AutoencoderConfig(latent_channels=8, medium_channels=4, widths=(8, 16, 32))
SCALES = {"velocity_scale": 2.0, "pressure_scale": 1.0, "medium_mean": 0.0, "medium_scale": 1.0}
READ = 6 * 4  # bytes a cell, of the fields read beside what is encoded
CHANNEL = replace(make_domain(), name="channel")


def make_store(path: Path, domain: DomainSpec = CHANNEL, shape=(16, 16, 16), speed=1.0, pressure=1.0) -> Store:
    """Two trajectories of three random solenoidal snapshots."""
    plan = StorePlan(
        domain=domain,
        num_trajectories=2,
        num_snapshots=3,
        num_test=1,
        shape=shape,
        solver="random potentials",
        solver_version="1",
        config={},
    )

    def simulate(indices):
        for i in indices:
            random = np.random.default_rng(i)
            flux = curl_of_edges(torch.from_numpy(random.normal(size=(3, 3, *shape))), domain.boundary)
            yield (
                i,
                Trajectory(
                    velocity=(speed * flux).float().numpy(),
                    pressure=(pressure * random.normal(size=(3, *shape))).astype(np.float32),
                    medium=random.uniform(1, 2, shape).astype(np.float32),
                    time=np.arange(3) * 0.1,
                    parameters=dict.fromkeys(domain.parameters, 0.5),
                    seed=0,
                    grid=Grid(shape=shape, spacing=(0.5, 0.25, 2.0), boundary=domain.boundary),
                ),
            )

    write_store(path, plan, simulate)
    return open_store(path)


def save(folder: Path, **changes) -> Path:
    domain = replace(CHANNEL, **changes)
    path = folder / "tokenizer.safetensors"
    save_tokenizer(path, Autoencoder(CONFIG), {domain.name: domain}, {domain.name: SCALES})
    return path


def cache(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "launch/cache_latents.py", "configs/cache_latents/debug.yaml", "domains=[channel]"]
    call += [f"stores={folder}/stores", f"tokenizer={folder}/tokenizer.safetensors", f"latents={folder}/latents"]
    return subprocess.run([*call, *overrides], cwd=ROOT, env=cpu_environment(), capture_output=True, text=True)


def one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def put_nan_into(store: Store) -> None:
    """As another program could write it, digests and all: our own writer refuses it."""
    array = field_arrays(StoreHeader(store.plan, store.grid))["pressure"]
    values = np.zeros((3, *store.grid.shape), np.float32)
    values[2, 0, 0, 0] = np.nan
    digests = read_digests(store.path)
    seal(store.path, {**digests, **write_chunk(store.path, array, (1, 0, 0, 0, 0), values)})


def test_says_what_it_takes_and_tiles_with_the_same_latents(tmp_path):
    store, tokenizer = make_store(tmp_path / "stores" / "channel", shape=(64, 64, 64)), load_tokenizer(save(tmp_path))
    whole_bytes = forecast_memory(CONFIG, CHANNEL, store.grid, 1, "encode") - HEAP_BYTES
    budget = HEAP_BYTES + READ * 64**3 + 0.8 * whole_bytes
    done = cache(tmp_path, f"max_gigabytes={budget / 1e9}")
    assert done.returncode == 0, done.stderr[-2000:]
    said = (
        r"channel: to encode 1 of 64x64x64 at once takes \d+ MB of memory, .* in slabs of \d+ cells, which takes \d+ MB"
    )
    assert re.search(said, done.stdout), done.stdout
    tiled = open_latents(tmp_path / "latents" / "channel")
    velocity, pressure = (torch.from_numpy(field) for field in store.snapshot(1, 2))
    fields = velocity[None], pressure[None, None], torch.from_numpy(store.medium(1))[None, None]
    whole = tokenizer.autoencoder.encode(normalised_batch(*fields, store, FieldStatistics(**SCALES)))
    for part, found in zip(whole, (tiled.latent(1, 2), tiled.medium(1)), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), part[0], rtol=0, atol=1e-5 * float(part.abs().max()))


def test_field_with_nan_ends_in_one_line_that_names_it_and_publishes_nothing(tmp_path):
    store, _ = make_store(tmp_path / "stores" / "channel"), save(tmp_path)
    put_nan_into(store)
    line = one_line_error(cache(tmp_path))
    assert "channel: trajectory 1, snapshot 2 holds NaN or infinity. See all with `python -m data.layout" in line
    with pytest.raises(ConfigError, match="no such folder"):
        open_latents(tmp_path / "latents" / "channel")


def test_wrong_unit_ends_in_one_line_before_anything_is_written(tmp_path):
    make_store(tmp_path / "stores" / "channel")
    save(tmp_path, velocity=replace(CHANNEL.velocity, units="m3 s-1"))
    line = one_line_error(cache(tmp_path))
    assert "velocity.units is '1', the tokenizer was trained with 'm3 s-1'. Write the store like that" in line
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pressure": replace(CHANNEL.pressure, units="Pa")}, "pressure.units is '1', .*trained with 'Pa'"),
        ({"medium": replace(CHANNEL.medium, units="m s-1")}, "medium.units is '1'"),
        ({"medium": replace(CHANNEL.medium, name="pore_space")}, "medium.name is 'wall_distance'"),
        ({"velocity_space": "irrotational"}, "velocity_space is 'solenoidal', .*'irrotational'"),
        ({"boundary": ("periodic",) * 3}, "boundary is .*'wall'"),
        ({"parameters": ("dt", "viscosity")}, r"parameters is \('dt',\)"),
        ({"name": "pipe"}, r"domains=channel: the tokenizer was trained without it \(it knows: pipe\)"),
    ],
)
def test_store_unlike_what_the_tokenizer_was_trained_with_is_refused(tmp_path, changes, said):
    store, tokenizer = make_store(tmp_path / "channel"), load_tokenizer(save(tmp_path, **changes))
    with pytest.raises(ConfigError, match=said) as error:
        require_tokenizer(tokenizer, store)
    assert "\n" not in str(error.value)


def test_missing_statistics_and_a_grid_that_8_does_not_divide_are_refused(tmp_path):
    tokenizer = load_tokenizer(save(tmp_path))
    assert require_tokenizer(tokenizer, make_store(tmp_path / "a")) == FieldStatistics(**SCALES)
    without = Tokenizer(tokenizer.autoencoder, tokenizer.domains, {}, tokenizer.digest)
    with pytest.raises(ConfigError, match="domains=channel: the tokenizer has no statistics of it"):
        require_tokenizer(without, open_store(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"its grid \(16, 12, 16\) is not divisible by 8. Crop or regrid it"):
        require_tokenizer(tokenizer, make_store(tmp_path / "b", shape=(16, 12, 16)))


def test_fields_that_never_change_have_no_scale(tmp_path):
    for name, speed, pressure in (("velocity", 0.0, 1.0), ("pressure", 1.0, 0.0)):
        store = make_store(tmp_path / name, speed=speed, pressure=pressure)
        with pytest.raises(ValueError, match=f"store=.*{name}_scale=0.0: must be positive") as error:
            measure_statistics(store)
        assert "\n" not in str(error.value)


def test_constant_snapshot_is_encoded_decoded_and_trained_on():
    """Sound before it arrives is silent."""
    batch = make_batch(make_domain("irrotational", ("open",) * 3))
    batch = batch._replace(velocity=torch.zeros_like(batch.velocity), pressure=torch.zeros_like(batch.pressure))
    model = Autoencoder(CONFIG)
    loss = reconstruction_loss(model(batch), batch, ReconstructionConfig())["total"]
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None) and torch.isfinite(loss)
    fields = model.eval().decode_fields(*model.encode(batch), batch.domain, batch.grid)
    assert all(torch.isfinite(field).all() for field in fields)


@pytest.mark.parametrize(("name", "channels"), [("velocity", 2), ("medium", 2), ("pressure", 3)])
def test_wrong_channel_count_ends_in_one_line(name, channels):
    batch = make_batch(make_domain())
    wrong = batch._replace(**{name: torch.zeros(2, channels, 16, 16, 16)})
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, {channels}, 16, 16, 16\), not") as error:
        Autoencoder(CONFIG).encode(wrong)
    assert "\n" not in str(error.value)


def test_as_many_snapshots_are_encoded_at_a_time_as_fit(tmp_path):
    store = make_store(tmp_path / "a", shape=(64, 64, 64))
    two, one = (forecast_memory(CONFIG, CHANNEL, store.grid, num, "encode") + num * READ * 64**3 for num in (2, 1))
    assert [plan_encoding(CONFIG, store, most).num_snapshots for most in (two, two - 1)] == [2, 1]
    assert plan_encoding(CONFIG, store, one).plan.tiles is None
    assert plan_encoding(CONFIG, store, one - 1).plan.tiles is not None


@pytest.mark.parametrize(
    ("line", "folder", "files"),
    [
        ("0::/job/step", "", ("memory.max", "memory.current", "inactive_file 100\nanon 1")),
        ("4:memory:/job/step", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file 100")),
    ],
)
def test_room_in_control_groups_is_what_any_limit_above_leaves(tmp_path, line, folder, files):
    limit, usage, stat = files
    for group, most, used in (("job", "1000", "700"), ("job/step", "5000", "200")):
        place = tmp_path / folder / group
        place.mkdir(parents=True, exist_ok=True)
        for name, text in ((limit, most), (usage, used), ("memory.stat", stat)):
            (place / name).write_text(text)
    (tmp_path / "cgroup").write_text(f"1:cpu:/job\n{line}\n")
    assert sorted(control_group_rooms(tmp_path, tmp_path / "cgroup")) == [400, 4900]
    assert control_group_rooms(tmp_path, tmp_path / "none") == []
