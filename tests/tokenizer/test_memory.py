"""Memory is forecast before it is taken, never below what is taken, and what does not fit is cut."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import cpu_environment, make_batch, make_domain
from torch.profiler import ProfilerActivity, profile

from shodh.config import ConfigError
from shodh.fields import FieldBatch, Grid
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.budget import decode_fields_within, describe_plan, plan_memory
from tokenizer.memory import HEAP_BYTES, forecast_memory
from tokenizer.objective import ReconstructionConfig, reconstruction_loss
from tokenizer.tiling import Tiles, decode_fields_tiled, encode_tiled

ROOT = Path(__file__).resolve().parents[2]
CONFIG = AutoencoderConfig()
SMALL = AutoencoderConfig(latent_channels=8, medium_channels=4, widths=(8, 16, 32))
DOMAIN = make_domain()


def make_grid(*shape: int) -> Grid:
    return Grid(shape=(shape[0], shape[1], shape[2]), spacing=(0.2, 0.03, 0.1), boundary=DOMAIN.boundary)


def run_task(config: AutoencoderConfig, grid: Grid, num_samples: int, task: str, tiles: Tiles | None) -> profile:
    """What PyTorch's profiler saw of the task on random fields."""
    model = Autoencoder(config).train(task == "train").requires_grad_(task == "train")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if task == "decode":
            sizes = (config.latent_channels, config.medium_channels)
            latent, medium = (torch.randn(num_samples, c, *(n // 8 for n in grid.shape)) for c in sizes)
            if tiles is None:
                result = model.decode_fields(latent, medium, DOMAIN, grid)
            else:
                result = decode_fields_tiled(model, latent, medium, DOMAIN, grid, tiles)
        else:
            fields = (torch.randn(num_samples, f, *grid.shape) for f in (3, 1, 1))
            batch = FieldBatch(*fields, DOMAIN, grid)  # type: ignore[call-arg]
            if task == "train":
                result = reconstruction_loss(model(batch), batch, ReconstructionConfig())["total"].backward()
            else:
                result = model.encode(batch) if tiles is None else encode_tiled(model, batch, tiles)
    del result
    return profiler


def allocated_at_most(config: AutoencoderConfig, grid: Grid, num_samples: int, task: str, tiles: Tiles | None) -> int:
    """The highest sum of bytes that PyTorch's allocator had given out, as its profiler saw it."""
    profiler = run_task(config, grid, num_samples, task, tiles)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("config", "num_samples", "task", "tiles"),
    [
        (CONFIG, 1, "encode", None),
        (CONFIG, 1, "decode", Tiles(1, 2, 2)),
        (AutoencoderConfig(recompute=True), 1, "train", None),
    ],
)
def test_forecast_is_at_most_1_3_times_what_is_allocated_and_never_below(config, num_samples, task, tiles):
    grid = make_grid(48, 32, 48)
    weights = sum(4 * parameter.numel() for parameter in Autoencoder(config).parameters())
    moments = 2 * weights if task == "train" else 0  # the optimizer's, which does not run here
    allocated = allocated_at_most(config, grid, num_samples, task, tiles)
    forecast = forecast_memory(config, DOMAIN, grid, num_samples, task, tiles) - HEAP_BYTES - moments
    assert allocated <= forecast <= 1.3 * allocated, (forecast / 1e6, allocated / 1e6)


GROWTH = """
import sys, torch
torch.set_num_threads(1)
from shodh.fields import FieldBatch, Grid
from tests.conftest import make_domain
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.budget import decode_fields_within, encode_within, plan_memory

def memory(name):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

n, task, budget = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
config, domain = AutoencoderConfig(), make_domain()
grid = Grid(shape=(n, n, n), spacing=(0.2, 0.03, 0.1), boundary=domain.boundary)
model = Autoencoder(config).eval().requires_grad_(False)

def call(grid, budget):
    if task == "decode":
        coarse = [size // 8 for size in grid.shape]
        latent, medium = (torch.randn(1, channels, *coarse) for channels in (16, 8))
        return decode_fields_within(model, latent, medium, domain, grid, budget)
    fields = (torch.randn(1, channels, *grid.shape) for channels in (3, 1, 1))
    return encode_within(model, FieldBatch(*fields, domain, grid), budget)

call(Grid(shape=(16, 16, 16), spacing=grid.spacing, boundary=domain.boundary), budget)  # imports and code
plan = plan_memory(config, domain, grid, 1, task, budget)
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak is measured from here
call(grid, budget)
print(memory("VmHWM") - before, plan.num_bytes, plan.tiles is not None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("task", ["encode", "decode"])
@pytest.mark.parametrize("budget", [10**10, 10**9])
def test_process_grows_by_no_more_than_is_forecast_and_not_much_less(task, budget):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is measured through Linux's /proc")
    call = [sys.executable, "-c", GROWTH, "192", task, str(budget)]
    done = subprocess.run(call, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, forecast, tiled = done.stdout.split()
    assert (tiled == "True") == (budget == 10**9)
    assert int(grown) <= int(forecast) <= 1.3 * int(grown) + HEAP_BYTES, done.stdout


def test_forecast_leaves_nothing_behind_that_a_later_run_meets():
    """Fake tensors of the dry run must not stay in any cache."""
    domain = make_domain("full", ("periodic",) * 3)
    batch = make_batch(domain, n=16, spacing=(0.7, 0.3, 0.9))  # a grid that no other test has cached
    for task in ("encode", "decode", "train"):
        forecast_memory(SMALL, domain, batch.grid, 2, task)
    model = Autoencoder(SMALL)
    assert torch.isfinite(reconstruction_loss(model(batch), batch, ReconstructionConfig())["total"])
    assert torch.isfinite(model.decode_fields(*model.encode(batch), domain, batch.grid).flux).all()


@torch.no_grad()
def test_what_does_not_fit_is_cut_and_gives_the_same_fields():
    model, grid = Autoencoder(SMALL).eval(), make_grid(64, 64, 64)
    latent, medium = (torch.randn(2, channels, 8, 8, 8) for channels in (8, 4))
    whole_bytes = forecast_memory(SMALL, DOMAIN, grid, 2, "decode") - HEAP_BYTES
    plans = [
        plan_memory(SMALL, DOMAIN, grid, 2, "decode", HEAP_BYTES + int(share * whole_bytes)) for share in (1, 0.85)
    ]
    assert plans[0].tiles is None and plans[1].tiles is not None
    assert whole_bytes + HEAP_BYTES == plans[0].num_bytes > plans[1].num_bytes
    whole = model.decode_fields(latent, medium, DOMAIN, grid)
    for plan in plans:
        fields = decode_fields_within(model, latent, medium, DOMAIN, grid, plan.num_bytes)
        for tiled, other in zip(fields, whole, strict=True):
            torch.testing.assert_close(tiled, other, rtol=0, atol=1e-5 * float(other.abs().max()))  # see test_tiling


def test_plan_is_said_in_one_line_and_refused_in_one_where_nothing_fits():
    grid = make_grid(256, 256, 256)
    plan = plan_memory(CONFIG, DOMAIN, grid, 1, "decode", 2 * 10**9)
    line = describe_plan(plan, "decode", 1, grid, 2 * 10**9)
    assert plan.tiles is not None and plan.num_bytes <= 2 * 10**9
    assert line.startswith("to decode 1 of 256x256x256 at once takes 2.") and "1 at a time in slabs of" in line
    whole = plan_memory(CONFIG, DOMAIN, grid, 1, "decode", 24 * 10**9)
    assert describe_plan(whole, "decode", 1, grid, 24 * 10**9).endswith("24 GB may be used: not tiled")
    with pytest.raises(ConfigError, match=r"to encode 1 of \(32, 32, 32\) takes \d+ MB even in slabs, 50 MB"):
        plan_memory(SMALL, DOMAIN, make_grid(32, 32, 32), 1, "encode", 50 * 10**6)


def test_recomputed_activations_give_the_same_loss_and_gradients_bit_for_bit_in_less_memory():
    batch, results = make_batch(DOMAIN, n=16), []
    for recompute in (False, True):
        torch.manual_seed(0)
        config = AutoencoderConfig(widths=(8, 16, 32), encoder_depths=(1, 2, 1), recompute=recompute)
        model = Autoencoder(config)
        for parameter in model.parameters():  # the blocks begin as the identity, which would hide a difference
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        loss = reconstruction_loss(model(batch), batch, ReconstructionConfig())["total"]
        loss.backward()
        memory = forecast_memory(config, DOMAIN, make_grid(64, 64, 64), 2, "train")
        results.append((loss, [parameter.grad for parameter in model.parameters()], memory - HEAP_BYTES))
    (loss, gradients, whole), (same, again, less) = results
    assert torch.equal(loss, same) and all(torch.equal(*pair) for pair in zip(gradients, again, strict=True))
    assert less < 0.75 * whole, (less / 1e6, whole / 1e6)
