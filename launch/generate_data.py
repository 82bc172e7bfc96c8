"""Simulate the training data: one store per domain, checked, digested, and continued where it was interrupted.

    python launch/generate_data.py configs/generate_data/quickstart.yaml [domain=open_channel] [open_channel.seed=1]

Writes FOLDER/<domain name>/ for each section in the config (acoustics, open_channel, porous_media, taylor_green,
convection). Says first what each costs in time, memory and disk, and refuses what does not fit this machine. Running it
again adds what is missing and leaves a complete store as it is. Check one with: python -m data.layout FOLDER/<name>

Several processes fill the same stores side by side with shard=i/n: each takes trajectories i, i + n, ...; any of them
may be killed and started again; whichever completes a store verifies every digest and publishes it. As a Slurm array:

    sbatch --array=0-7 --wrap 'python launch/generate_data.py CONFIG shard=$SLURM_ARRAY_TASK_ID/8'
"""

import dataclasses
import multiprocessing
import os
import sys
import threading
import tomllib
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shodh.command_line import run, split_arguments
from shodh.config import ConfigError, load_config, parse_config, to_plain

if TYPE_CHECKING:
    from data.layout import StorePlan
    from data.simulate.forecast import Job

Section = Literal["acoustics", "open_channel", "porous_media", "taylor_green", "convection"]
# the longest first
SECTIONS: tuple[Section, ...] = ("convection", "open_channel", "porous_media", "taylor_green", "acoustics")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Which domains are simulated; a section holds the simulator's own config, see data/simulate/<section>.py."""

    folder: Path
    num_test: int  # trajectories held out, the last ones
    num_processes: int = 2  # domains simulated side by side
    device: Literal["cpu", "cuda", "auto"] = "cpu"  # auto: CUDA where there is one
    shard: str = "0/1"  # i/n: of n processes that fill the same stores, the one that takes trajectories i, i + n, ...
    domain: Literal["all", "acoustics", "open_channel", "porous_media", "taylor_green", "convection"] = "all"
    acoustics: dict[str, Any] | None = None
    open_channel: dict[str, Any] | None = None
    porous_media: dict[str, Any] | None = None
    taylor_green: dict[str, Any] | None = None  # new physics: kept out of pretraining
    convection: dict[str, Any] | None = None  # likewise

    def __post_init__(self) -> None:
        from data.journal import parse_share

        parse_share(self.shard)  # before anything takes minutes


def main(arguments: list[str]) -> None:
    path, overrides = split_arguments(arguments, "python launch/generate_data.py CONFIG [key=value ...]")
    config = load_config(GenerateConfig, path, overrides)
    chosen: list[Section] = [s for s in SECTIONS if getattr(config, s) is not None and config.domain in ("all", s)]
    if not chosen:
        raise ConfigError(f"domain={config.domain}: {path} has no such section. Sections: {', '.join(SECTIONS)}.")
    if config.num_processes < 1:
        raise ConfigError(f"num_processes={config.num_processes}: must be at least 1. Raise it.")
    config = dataclasses.replace(config, device=_choose_device(config.device))
    sources: dict[Section, str] = {section: f"{path}, section {section}" for section in chosen}
    _forecast({section: _plan_store(section, config, source)[2] for section, source in sources.items()}, config)
    context = multiprocessing.get_context("spawn")
    lock = (context.RLock(),)  # shared, so that the bars of several processes do not write over each other
    with ProcessPoolExecutor(config.num_processes, context, initializer=_start_worker, initargs=lock) as pool:
        jobs: dict[Future[str], Section] = {
            pool.submit(_generate, s, config, source, k): s for k, (s, source) in enumerate(sources.items())
        }
        failures = {jobs[job]: error for job in as_completed(jobs) if (error := _report(job, jobs[job]))}
    if len(failures) == 1:
        sys.exit(1)  # its one line was said when it failed
    if failures:
        names = ", ".join(failures)
        said = f"{len(failures)} of {len(jobs)} domains failed ({names}), see above. The same command continues them."
        raise RuntimeError(said) from next(iter(failures.values()))


def _choose_device(device: Literal["cpu", "cuda", "auto"]) -> Literal["cpu", "cuda"]:
    """The device asked for; ConfigError where it is CUDA and there is none."""
    import torch

    from shodh.device import find_device

    if device == "auto":
        return "cuda" if find_device().type == "cuda" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this machine has none that PyTorch can use. Set device=cpu.")
    return device


def _report(job: Future[str], section: Section) -> BaseException | None:
    """Print what a domain came to as soon as it is known, while others go on; returns why it failed."""
    from tqdm import tqdm

    error = job.exception()
    if error is None:
        tqdm.write(job.result())
    else:
        tqdm.write(f"error: {section}: {' '.join(str(error).split()) or repr(error)}", file=sys.stderr)
    return error


def _start_worker(lock: Any) -> None:
    """Share the lock of the progress bars, and end with the parent however that ends: nobody else would stop this."""
    from tqdm import tqdm

    tqdm.set_lock(lock)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # from a thread; a store written so far is continued by the next run


def _forecast(jobs: "dict[Section, Job]", config: GenerateConfig) -> None:
    """Print what is left to do and what it costs; raise ConfigError when memory or disk are too small for it."""
    import torch

    from data.simulate import forecast

    left = [job for job in jobs.values() if job.num_left > 0]
    if not left:
        return
    num_workers = min(config.num_processes, len(left), os.cpu_count() or 1)
    for line in (*map(forecast.describe_job, left), forecast.describe_total(left, num_workers)):
        print(line, flush=True)
    forecast.require_memory(left, num_workers, forecast.available_memory())
    if config.device == "cuda":
        forecast.require_cuda_memory(left, num_workers, torch.cuda.mem_get_info()[0])
    forecast.require_disk(left, config.folder)


def _plan_store(section: Section, config: GenerateConfig, source: str) -> "tuple[Any, Any, Job, StorePlan]":
    """The simulator, its config, what is left to do, and the plan of the store."""
    from data.journal import count_missing, parse_share
    from data.layout import StorePlan, partial_folder
    from data.simulate.forecast import Job, folder_bytes

    simulator, config_class = _load_simulator(section)
    physics = parse_config(config_class, getattr(config, section), source=source)
    plan = StorePlan(
        domain=simulator.DOMAIN,
        num_trajectories=physics.num_trajectories,
        num_snapshots=physics.num_snapshots,
        num_test=config.num_test,
        shape=(physics.resolution,) * 3,
        solver=f"shodh {simulator.__name__}",
        solver_version=_read_version(),
        config=to_plain(physics),
    )
    store = config.folder / plan.domain.name
    written = plan.num_bytes if store.exists() else min(folder_bytes(partial_folder(store)), plan.num_bytes)
    num_left = (
        0 if store.exists() else count_missing(partial_folder(store), plan.num_trajectories, parse_share(config.shard))
    )
    forecast = simulator.forecast(physics)
    forecast = forecast.on_cuda() if config.device == "cuda" else forecast
    return simulator, physics, Job(section, forecast, num_left, plan.num_bytes - written), plan


def _generate(section: Section, config: GenerateConfig, source: str, line: int) -> str:
    """Complete one domain's store, with a progress bar on a line of the terminal; returns what was done."""
    import torch
    from tqdm import tqdm

    from data.journal import parse_share
    from data.writer import write_store

    torch.set_num_threads(1)  # a second thread slows these sizes down; domains run side by side instead
    simulator, physics, _, plan = _plan_store(section, config, source)
    store = config.folder / plan.domain.name
    with tqdm(desc=str(store), unit="step", dynamic_ncols=True, mininterval=1.0, position=line, delay=0.5) as bar:

        def simulate(indices):
            bar.reset(total=simulator.total_work(physics, len(indices)))
            return simulator.simulate(physics, indices, device=config.device, progress=bar.update)

        written = write_store(store, plan, simulate, parse_share(config.shard))
    what = f"{written.num_written} trajectories added" if written.num_written else "complete already"
    return f"{store}: {what}, {_describe_state(written.digest, written.missing, config.shard)}"


def _read_version() -> str:
    """Of Shodh: as installed, or that of the source tree it is run from."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("shodh")
    except PackageNotFoundError:
        return tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]["version"]


def _describe_state(digest: str, missing: tuple[int, ...], shard: str) -> str:
    """The digest of a complete store, or which processes have still to finish."""
    if digest:
        return f"digest {digest[:12]}"
    count = int(shard.partition("/")[2])
    others = ", ".join(f"shard={i}/{count}" for i in sorted({trajectory % count for trajectory in missing}))
    return f"{len(missing)} trajectories are missing or damaged: run or await {others}"


def _load_simulator(section: Section) -> tuple[Any, type]:
    """The simulator's module and the class of its config."""
    if section == "acoustics":
        from data.simulate import acoustics

        return acoustics, acoustics.AcousticsConfig
    if section == "open_channel":
        from data.simulate import open_channel

        return open_channel, open_channel.OpenChannelConfig
    if section == "porous_media":
        from data.simulate import porous_media

        return porous_media, porous_media.PorousMediaConfig
    if section == "taylor_green":
        from data.simulate import taylor_green

        return taylor_green, taylor_green.TaylorGreenConfig
    from data.simulate import convection

    return convection, convection.ConvectionConfig


if __name__ == "__main__":
    run(main)
