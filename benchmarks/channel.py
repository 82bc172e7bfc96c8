"""Is the channel's turbulence right? Re_tau = 180 between two walls at 64^3, against published direct simulations.

    python benchmarks/channel.py --tables FOLDER [--quick] [--folder FOLDER] [--device cuda]

The run's state and statistics are kept in runs/benchmarks/channel (or --folder) after every block of time: the same
command continues an interrupted run. There too: profiles.png, the run's lines over the tables' points.
"""

import argparse
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from channel_tables import QUANTITIES, TABLES, compare, plot, read_tables, standard_errors, to_wall_units
from figures import FOLDER, Figure, at_most, report, stated

from data.simulate.channel_flow import Channel, Stencil, advance, courant_rate, refine
from data.simulate.open_channel import OpenChannelConfig, make_grid, make_initial_velocity
from data.simulate.wall_statistics import (
    WallProfiles,
    WallStatistics,
    advance_and_measure,
    compute_profiles,
    fold,
    merge,
)
from shodh.physics.helmholtz import remove_divergence

PRIMARY = "Lee-Moser"  # the table whose friction Reynolds number is simulated


@dataclass(frozen=True, kw_only=True)
class ValidationRun:
    """A closed channel from its start to converged statistics; lengths in half heights, times in those per u_tau."""

    friction_reynolds: float = 182.09  # of the tables by Lee and Moser that are called "Re_tau = 180"
    resolution: int = 64
    length: float = 8.4
    width: float = np.pi
    stretching: float = 1.7
    stencil: Stencil = "wide"
    drift: float = 11.0  # of the frame: halves the largest speed on the grid and with it the error of advection
    courant: float = 1.1  # of 1.73, the limit
    seed: int = 0
    coarse_time: float = 10.0  # on half the cells per axis
    settle_time: float = 5.0
    average_time: float = 40.0
    samples_per_time: int = 32

    @property
    def config(self) -> OpenChannelConfig:
        """The box and the start."""
        return OpenChannelConfig(
            resolution=self.resolution,
            seed=self.seed,
            friction_reynolds=(self.friction_reynolds, self.friction_reynolds),
            length=self.length,
            width=self.width,
            top="wall",
            stretching=self.stretching,
        )


def simulate(run: ValidationRun, folder: Path, device: str) -> list[WallStatistics]:
    """Statistics per block of one time unit, after the flow has settled; continues what ``folder`` holds."""
    folder.mkdir(parents=True, exist_ok=True)
    state, blocks = load_state(run, folder, device)
    channel = make_channel(run, run.resolution, device)
    if state is None:
        state = (-run.settle_time, refine(spin_up(run, device), channel.grid, "wall"))
    time, velocity = state
    while time < run.average_time - 0.5:
        num_samples = run.samples_per_time
        steps = int(np.ceil(courant_rate(velocity, channel) / run.courant / num_samples))
        dt = 1 / (steps * num_samples)
        velocity, block = advance_and_measure(velocity, channel, dt, steps * num_samples, steps)
        time += 1
        blocks += [block] if time > 0.5 else []
        save_state(run, folder, time, velocity, blocks)
        stress = block.velocity[0, 0, 0] / block.num_samples * 2 / channel.grid.widths(1)[0] / run.friction_reynolds
        print(f"t = {time:g}: {steps * num_samples} steps, bed stress {stress:.3f}", flush=True)
    return blocks


def spin_up(run: ValidationRun, device: str) -> torch.Tensor:
    """Developed turbulence on half the cells per axis."""
    channel = make_channel(run, run.resolution // 2, device)
    start, _ = make_initial_velocity(run.config, 0, channel.grid)
    velocity = remove_divergence(start[None].to(device, torch.float32), channel.grid)
    for _ in range(round(run.coarse_time * 4)):
        steps = int(np.ceil(courant_rate(velocity, channel) / run.courant / 4))
        velocity = advance(velocity, channel, 0.25 / steps, steps)
    return velocity


def make_channel(run: ValidationRun, cells: int, device: str) -> Channel:
    viscosity = torch.tensor([1 / run.friction_reynolds], dtype=torch.float32, device=device)
    return Channel(make_grid(run.config, cells), viscosity, top="wall", stencil=run.stencil, drift=run.drift)


def save_state(run: ValidationRun, folder: Path, time: float, velocity: torch.Tensor, blocks: list) -> None:
    """Replace the state in ``folder`` in one step, so that a stopped run can always go on."""
    arrays: dict[str, Any] = {"time": time, "velocity": velocity.cpu().numpy(), "run": repr(identity(run))}
    if blocks:
        arrays |= {f"sum_{k}": np.stack([getattr(block, k) for block in blocks]) for k in WallStatistics._fields}
    np.savez(folder / "new.npz", **arrays)
    os.replace(folder / "new.npz", folder / "state.npz")


def load_state(run: ValidationRun, folder: Path, device: str) -> tuple[tuple[float, torch.Tensor] | None, list]:
    """Time, velocity and blocks that ``save_state`` wrote; ValueError if they are of another run."""
    path = folder / "state.npz"
    if not path.exists():
        return None, []
    with np.load(path) as file:
        if str(file["run"]) != repr(identity(run)):
            raise ValueError(f"{path}: of another run. Remove it or give another --folder.")
        sums = [file[f"sum_{k}"] for k in WallStatistics._fields] if "sum_shear" in file else [[]]
        blocks = [WallStatistics(int(parts[0]), *parts[1:]) for parts in zip(*sums, strict=True)]
        return (float(file["time"]), torch.from_numpy(file["velocity"]).to(device)), blocks


def identity(run: ValidationRun) -> dict:
    """What a state depends on: all but for how long it is averaged."""
    return {k: v for k, v in asdict(run).items() if k != "average_time"}


def judge(run: ValidationRun, blocks: list[WallStatistics], tables: dict, quick: bool) -> list[Figure]:
    """Every figure of the run; the targets, plus three standard errors where the run is short."""
    channel = make_channel(run, run.resolution, "cpu")
    whole = fold(compute_profiles(merge(blocks), channel))
    parts = [fold(compute_profiles(part, channel)) for part in split(blocks)]
    ours, *units = (to_wall_units(profiles, run.friction_reynolds) for profiles in (whole, *parts))
    errors = standard_errors(units, tables[PRIMARY])
    slack = 3 if quick else 0
    bounds = {quantity: (0.02 if quantity == "U" else 0.08) + slack * errors[quantity] for quantity in QUANTITIES}
    figures = []
    for name, table in tables.items():
        figures += compare(ours, table, name, bounds if name == PRIMARY else {})
    figures += [stated(f"{quantity}+ largest standard error", errors[quantity]) for quantity in QUANTITIES]
    return [*figures, *judge_balance(whole, parts, run, slack), stated("time averaged over", len(blocks))]


def judge_balance(whole: WallProfiles, parts: list[WallProfiles], run: ValidationRun, slack: int) -> list[Figure]:
    """How far the total stress is from the line that a steady state has, with ``slack`` standard errors allowed."""
    linear = 1 - whole.face_height
    stress, wall = whole.total_stress[0] - linear, whole.face_height * run.friction_reynolds
    inside = (wall >= 10) & (wall <= 170)
    error = float(np.std([part.total_stress[0] for part in parts], axis=0, ddof=1).max()) / math.sqrt(len(parts))
    return [
        at_most("total stress - (1 - y), largest at any y", np.abs(stress).max(), 0.02 + slack * error),
        stated("total stress / (1 - y) - 1, largest for y+ 10-170", np.abs(stress[inside] / linear[inside]).max()),
        stated("total stress, largest standard error", error),
        stated("bed stress", whole.bed_stress),
        stated("bulk velocity", whole.bulk_velocity),
    ]


def split(blocks: list[WallStatistics]) -> list[WallStatistics]:
    """Up to eight equal stretches of time, of three units or more: long enough to be nearly independent."""
    length = max(3, len(blocks) // 8)
    return [merge(blocks[first : first + length]) for first in range(0, len(blocks) - length + 1, length)]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, help=f"folder with {', '.join(sum(TABLES.values(), ()))}")
    parser.add_argument("--quick", action="store_true", help="a third of the time; wider bounds")
    parser.add_argument("--folder", type=Path, default=FOLDER / "channel", help="where the state is kept")
    parser.add_argument("--seed", type=int, default=0, help="of the start")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        tables = read_tables(options.tables)
        run = ValidationRun(seed=options.seed)
        if options.quick:
            run = replace(run, settle_time=4.0, average_time=12.0)
        name = ("quick" if options.quick else "full") + (f"-seed-{options.seed}" if options.seed else "")
        blocks = simulate(run, options.folder / name, options.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    figures = judge(run, blocks, tables, options.quick)
    profiles = fold(compute_profiles(merge(blocks), make_channel(run, run.resolution, "cpu")))
    title = (
        f"Closed channel, Re_tau = {run.friction_reynolds:g}, {run.resolution}^3 (lines) over published DNS (points)"
    )
    plot(to_wall_units(profiles, run.friction_reynolds), tables, title, options.folder / name / "profiles.png")
    return report(f"channel-{name}", figures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
