"""What generate_data says before it starts: memory against measured peaks, and refusals that name the remedy."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from data.simulate.forecast import (
    LIBRARY_BYTES,
    Forecast,
    Job,
    available_memory,
    describe_job,
    describe_total,
    interpolate_cost,
    memory_needed,
    require_cuda_memory,
    require_disk,
    require_memory,
)
from shodh.config import ConfigError

ROOT = Path(__file__).resolve().parents[3]

# Growth of the peak resident memory by a batch at 32^3, after a small run has loaded and warmed the libraries. Not by
# getrusage, whose peak a process inherits from the test runner that starts it.
MEASURE = """
import importlib, re, sys, torch
torch.set_num_threads(1)
simulator = importlib.import_module(f"data.simulate.{sys.argv[1]}")
config_class = getattr(simulator, sys.argv[2])
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
small = dict(reynolds=(20.0, 30.0)) if sys.argv[1] == "taylor_green" else dict(rayleigh=(2e3, 3e3), spinup_time=0.1)
list(simulator.simulate(config_class(resolution=8, num_trajectories=1, num_snapshots=2, **small), [0]))
before = peak()
short = {} if sys.argv[1] == "taylor_green" else dict(spinup_time=0.1)
config = config_class(num_trajectories=8, snapshot_interval=0.02, **short)
for _ in simulator.simulate(config, range(8)):
    pass
print(peak() - before, simulator.forecast(config).peak_bytes)
"""


def make_job(
    name: str = "taylor_green", peak: int = 2_000_000_000, num_left: int = 10, disk: int = 4_000_000_000
) -> Job:
    return Job(name, Forecast(6.0, peak), num_left, disk)


@pytest.mark.parametrize(
    ("section", "config"), [("taylor_green", "TaylorGreenConfig"), ("convection", "ConvectionConfig")]
)
def test_forecast_of_memory_is_within_half_of_the_measured_peak(section: str, config: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, section, config], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    measured, forecast = map(int, done.stdout.split())
    assert 1 / 1.5 < forecast / measured < 1.5


def test_cost_grows_with_resolution_and_with_what_is_asked() -> None:
    from data.simulate.convection import ConvectionConfig
    from data.simulate.convection import forecast as forecast_convection
    from data.simulate.taylor_green import TaylorGreenConfig
    from data.simulate.taylor_green import forecast as forecast_vortices

    layers = [forecast_convection(ConvectionConfig(resolution=n)) for n in (32, 64, 128)]
    vortices = [forecast_vortices(TaylorGreenConfig(resolution=n)) for n in (32, 64, 128)]
    for costs, longer in (
        (layers, forecast_convection(ConvectionConfig(num_snapshots=49))),
        (vortices, forecast_vortices(TaylorGreenConfig(num_snapshots=49))),
    ):
        for coarse, fine in pairwise(costs):
            # eight times the cells and at least twice the steps, but for those on coarser grids
            assert fine.seconds_per_trajectory > 8 * coarse.seconds_per_trajectory
        assert costs[2].peak_bytes == 8 * costs[1].peak_bytes  # one box at a time each; at 32^3 eight side by side
        assert longer.seconds_per_trajectory > costs[0].seconds_per_trajectory
        assert longer.peak_bytes > costs[0].peak_bytes


def test_interpolated_cost_meets_the_measurements_and_stays_between_them() -> None:
    measured = {10: 1.0, 1000: 3.0}
    assert interpolate_cost(10, measured) == 1.0
    assert interpolate_cost(1000, measured) == 3.0
    assert interpolate_cost(100, measured) == pytest.approx(2.0)
    assert interpolate_cost(1, measured) == 1.0
    assert interpolate_cost(10**6, measured) == 3.0


def test_lines_name_time_memory_and_disk() -> None:
    assert describe_job(make_job()) == (
        "taylor_green: 10 trajectories of 6 s, together 60 s on one CPU core; memory 2.5 GB, disk at most 4 GB"
    )
    jobs = [make_job(), make_job("convection", num_left=600)]
    total = describe_total(jobs, 2)
    assert "1 h" not in total and "60 min with 2 at a time" in total  # the longer one alone takes an hour
    assert "memory 5 GB, disk at most 8 GB" in total


def test_memory_is_that_of_the_largest_sections_side_by_side() -> None:
    jobs = [make_job(peak=1), make_job(peak=5), make_job(peak=3)]
    assert memory_needed(jobs, 1) == 5 + LIBRARY_BYTES
    assert memory_needed(jobs, 2) == 8 + 2 * LIBRARY_BYTES


def test_what_does_not_fit_is_refused_with_the_remedy() -> None:
    jobs = [make_job(), make_job("convection")]
    require_memory(jobs, 2, 5_000_000_000)
    with pytest.raises(ConfigError, match=r"^num_processes=2: needs 5 GB .* Set num_processes=1, which needs 2.5 GB"):
        require_memory(jobs, 2, 4_999_999_999)
    with pytest.raises(ConfigError, match=r"^taylor_green: needs 2.5 GB .* Lower taylor_green.resolution"):
        require_memory(jobs, 1, 2_400_000_000)
    require_cuda_memory(jobs, 2, 4_000_000_000)
    with pytest.raises(ConfigError, match=r"^device=cuda: needs 4 GB of GPU memory, 1 GB are free"):
        require_cuda_memory(jobs, 2, 1_000_000_000)


def test_a_gpu_s_batches_are_counted_in_the_memory_of_its_host() -> None:
    """The snapshots of all trajectories that 2^24 cells hold side by side wait on the host: 16 or 20 bytes a cell."""
    from data.simulate.convection import ConvectionConfig
    from data.simulate.convection import forecast as forecast_convection
    from data.simulate.porous_media import PorousMediaConfig
    from data.simulate.porous_media import forecast as forecast_rock
    from data.simulate.taylor_green import TaylorGreenConfig
    from data.simulate.taylor_green import forecast as forecast_vortices

    vortices = forecast_vortices(TaylorGreenConfig(resolution=64, num_trajectories=100)).on_cuda()
    assert vortices.peak_bytes == 25 * 16 * 2**24
    layers = forecast_convection(ConvectionConfig(resolution=64, num_trajectories=100)).on_cuda()
    assert layers.peak_bytes == 25 * 20 * 2**24
    assert forecast_rock(PorousMediaConfig(resolution=64, num_trajectories=100)).on_cuda().peak_bytes > 25 * 16 * 2**21
    assert Forecast(1.0, 5).on_cuda() == Forecast(1.0, 5, cuda_bytes=5)


def test_a_disk_too_small_is_refused_before_the_folder_exists(tmp_path: Path) -> None:
    require_disk([make_job(disk=1)], tmp_path / "not" / "yet")
    with pytest.raises(ConfigError, match=r"^folder=.*: needs 1e\+06 TB of disk, .* are free. Free space"):
        require_disk([make_job(disk=10**18)], tmp_path / "not" / "yet")
    assert not (tmp_path / "not").exists()


def test_available_memory_is_the_systems_own_figure(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 2000 kB\nMemFree: 100 kB\nMemAvailable: 1500 kB\n")
    assert available_memory(tmp_path / "meminfo") == 1500 * 1024
    assert available_memory(tmp_path / "none") > 0  # psutil's, where there is no /proc


def test_generate_data_refuses_what_does_not_fit_in_one_line_before_it_writes(tmp_path: Path) -> None:
    call = [
        sys.executable,
        "launch/generate_data.py",
        "configs/generate_data/new_physics_debug.yaml",
        f"folder={tmp_path}/stores",
        "domain=taylor_green",
        "taylor_green.resolution=4096",
    ]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout.startswith("taylor_green: 4 trajectories of ")  # the forecast comes first
    assert done.stderr.startswith("error: taylor_green: needs ") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "stores").exists()
