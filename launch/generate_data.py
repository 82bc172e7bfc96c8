"""Simulate the training data: one store per domain, checked, digested, and continued where it was interrupted.

    python launch/generate_data.py configs/generate_data/quickstart.yaml [domain=open_channel] [open_channel.seed=1]

Writes FOLDER/<domain name>/ for each section in the config (acoustics, open_channel, porous_media). Running it again
adds what is missing and leaves a complete store as it is. Check one with: python -m data.layout FOLDER/<domain name>
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shodh.command_line import run, split_arguments
from shodh.config import ConfigError, load_config, parse_config, to_plain

Section = Literal["acoustics", "open_channel", "porous_media"]
SECTIONS: tuple[Section, ...] = ("open_channel", "porous_media", "acoustics")  # the longest first


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Which domains are simulated; a section holds the simulator's own config, see data/simulate/<section>.py."""

    folder: Path
    num_test: int  # trajectories held out, the last ones
    num_processes: int = 2  # domains simulated side by side
    device: Literal["cpu", "cuda"] = "cpu"
    domain: Literal["all", "acoustics", "open_channel", "porous_media"] = "all"
    acoustics: dict[str, Any] | None = None
    open_channel: dict[str, Any] | None = None
    porous_media: dict[str, Any] | None = None


def main(arguments: list[str]) -> None:
    path, overrides = split_arguments(arguments, "python launch/generate_data.py CONFIG [key=value ...]")
    config = load_config(GenerateConfig, path, overrides)
    chosen: list[Section] = [s for s in SECTIONS if getattr(config, s) is not None and config.domain in ("all", s)]
    if not chosen:
        raise ConfigError(f"domain={config.domain}: {path} has no such section. Sections: {', '.join(SECTIONS)}.")
    if config.num_processes < 1:
        raise ConfigError(f"num_processes={config.num_processes}: must be at least 1. Raise it.")
    for section in chosen:  # before any of them takes minutes
        parse_config(_load_simulator(section)[1], getattr(config, section), source=f"{path}, section {section}")
    import torch
    from tqdm import tqdm

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this machine has none that PyTorch can use. Set device=cpu.")
    context = multiprocessing.get_context("spawn")
    lock = (context.RLock(),)  # shared, so that the bars of several processes do not write over each other
    with ProcessPoolExecutor(config.num_processes, context, initializer=tqdm.set_lock, initargs=lock) as pool:
        jobs = [pool.submit(_generate, s, config, f"{path}, section {s}", line) for line, s in enumerate(chosen)]
        for job in as_completed(jobs):
            tqdm.write(job.result())


def _generate(section: Section, config: GenerateConfig, source: str, line: int) -> str:
    """Complete one domain's store, with a progress bar on a line of the terminal; returns what was done."""
    from importlib.metadata import version

    import torch
    from tqdm import tqdm

    from data.layout import StorePlan
    from data.writer import write_store

    torch.set_num_threads(1)  # a second thread slows these sizes down; domains run side by side instead
    simulator, config_class = _load_simulator(section)
    physics = parse_config(config_class, getattr(config, section), source=source)
    plan = StorePlan(
        domain=simulator.DOMAIN,
        num_trajectories=physics.num_trajectories,
        num_snapshots=physics.num_snapshots,
        num_test=config.num_test,
        shape=(physics.resolution,) * 3,
        solver=f"shodh {simulator.__name__}",
        solver_version=version("shodh"),
        config=to_plain(physics),
    )
    store = config.folder / plan.domain.name
    with tqdm(desc=str(store), unit="step", dynamic_ncols=True, mininterval=1.0, position=line, delay=0.5) as bar:

        def simulate(indices):
            bar.reset(total=simulator.total_work(physics, len(indices)))
            return simulator.simulate(physics, indices, device=config.device, progress=bar.update)

        written = write_store(store, plan, simulate)
    what = f"{written.num_written} trajectories added" if written.num_written else "complete already"
    return f"{store}: {what}, digest {written.digest[:12]}"


def _load_simulator(section: Section) -> tuple[Any, type]:
    """The simulator's module and the class of its config."""
    if section == "acoustics":
        from data.simulate import acoustics

        return acoustics, acoustics.AcousticsConfig
    if section == "open_channel":
        from data.simulate import open_channel

        return open_channel, open_channel.OpenChannelConfig
    from data.simulate import porous_media

    return porous_media, porous_media.PorousMediaConfig


if __name__ == "__main__":
    run(main)
