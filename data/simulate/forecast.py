"""What a simulation will cost in time, memory and disk, said and held against this machine before it starts."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from shodh.config import ConfigError
from shodh.units import format_bytes

LIBRARY_BYTES = 500_000_000  # of each process once PyTorch and a simulator are imported; measured 0.3-0.45 GB


class Forecast(NamedTuple):
    """Time and memory of one section of ``generate_data``; figures of one core of a 2.6 GHz AMD EPYC."""

    seconds_per_trajectory: float  # on one CPU core
    peak_bytes: int  # of memory while simulating, on top of the imported libraries
    cuda_bytes: int = 0  # of GPU memory instead when simulated there; 0: as much as peak_bytes
    cuda_host_bytes: int = 0  # of memory when simulated on a GPU, whose batches are larger; 0: as much as peak_bytes

    def on_cuda(self) -> "Forecast":
        """The same with the memory that a GPU's batches take."""
        return self._replace(
            peak_bytes=self.cuda_host_bytes or self.peak_bytes, cuda_bytes=self.cuda_bytes or self.peak_bytes
        )


class Job(NamedTuple):
    """What is left to do of one section."""

    name: str
    forecast: Forecast
    num_left: int  # trajectories
    disk_bytes: int  # at most

    @property
    def seconds(self) -> float:
        """All that is left, on one core."""
        return self.num_left * self.forecast.seconds_per_trajectory


def describe_job(job: Job) -> str:
    """One line: time per trajectory and for what is left, memory, disk."""
    each, peak = job.forecast.seconds_per_trajectory, job.forecast.peak_bytes + LIBRARY_BYTES
    return (
        f"{job.name}: {job.num_left} trajectories of {_format_time(each)}, together {_format_time(job.seconds)} on one "
        f"CPU core; memory {format_bytes(peak)}, disk at most {format_bytes(job.disk_bytes)}"
    )


def describe_total(jobs: Sequence[Job], num_workers: int) -> str:
    """One line for all sections, of which ``num_workers`` are simulated at a time."""
    seconds = max(sum(job.seconds for job in jobs) / num_workers, max(job.seconds for job in jobs))
    disk = sum(job.disk_bytes for job in jobs)
    return (
        f"forecast: {_format_time(seconds)} with {num_workers} at a time (within a factor of two; a GPU is faster), "
        f"memory {format_bytes(memory_needed(jobs, num_workers))}, disk at most {format_bytes(disk)}"
    )


def memory_needed(jobs: Sequence[Job], num_workers: int) -> int:
    """Bytes of the ``num_workers`` largest sections side by side, each with the libraries it imports."""
    largest = sorted((job.forecast.peak_bytes for job in jobs), reverse=True)[:num_workers]
    return sum(peak + LIBRARY_BYTES for peak in largest)


def require_memory(jobs: Sequence[Job], num_workers: int, available: int) -> None:
    """Raise ConfigError when the largest sections do not fit the ``available`` bytes of memory side by side."""
    largest = max(jobs, key=lambda job: job.forecast.peak_bytes)
    alone = memory_needed([largest], 1)
    if alone > available:
        raise ConfigError(
            f"{largest.name}: needs {format_bytes(alone)} of memory, {format_bytes(available)} are available. "
            f"Lower {largest.name}.resolution or {largest.name}.num_snapshots."
        )
    together = memory_needed(jobs, num_workers)
    if together > available:
        raise ConfigError(
            f"num_processes={num_workers}: needs {format_bytes(together)} of memory, {format_bytes(available)} are "
            f"available. Set num_processes=1, which needs {format_bytes(alone)}."
        )


def require_cuda_memory(jobs: Sequence[Job], num_workers: int, available: int) -> None:
    """Raise ConfigError when the largest sections do not fit the ``available`` bytes of GPU memory side by side."""
    needs = sorted(((job.forecast.cuda_bytes or job.forecast.peak_bytes) for job in jobs), reverse=True)
    together = sum(needs[:num_workers])
    if together > available:
        raise ConfigError(
            f"device=cuda: needs {format_bytes(together)} of GPU memory, {format_bytes(available)} are free. "
            "Lower num_processes or resolution, or set device=cpu."
        )


def require_disk(jobs: Sequence[Job], folder: Path) -> None:
    """Raise ConfigError when the stores may not fit the disk that ``folder`` is or will be on."""
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, sum(job.disk_bytes for job in jobs)
    if needed > free:
        raise ConfigError(
            f"folder={folder}: needs {format_bytes(needed)} of disk, {format_bytes(free)} are free. "
            "Free space, choose another folder, or lower num_trajectories."
        )


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that new processes can take without swapping; what psutil says where there is no /proc."""
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    import psutil

    return psutil.virtual_memory().available


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def interpolate_cost(cells: int, measured: dict[int, float]) -> float:
    """Cost at this number of cells between those measured at others: linear in log cells, beyond them the nearest."""
    sizes = sorted(measured)
    if not sizes[0] < cells < sizes[-1]:
        return measured[sizes[0] if cells <= sizes[0] else sizes[-1]]
    upper = next(size for size in sizes if size >= cells)
    lower = sizes[sizes.index(upper) - 1]
    return measured[lower] + (measured[upper] - measured[lower]) * math.log(cells / lower) / math.log(upper / lower)


def _format_time(seconds: float) -> str:
    for size, unit in ((3600 * 24, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
