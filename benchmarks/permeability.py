"""Permeability of public Berea blocks of 128^3 voxels against their published labels, along all three axes.

    OMP_NUM_THREADS=1 python benchmarks/permeability.py IMAGE.npz LABELS.csv [--quick]

IMAGE.npz holds ``pore`` (1 in pores), LABELS.csv columns start_axis0..2 and K_axis0..2_over_dx2 of
LukasMosser/PorousMediaGan (porefoam: pressure planes at the ends, no-slip walls at the sides). Every block that the
image holds whole, 18 with 256 x 400 x 400 voxels, then eight of 64^3: some 15 minutes on one core; ``--quick`` takes
the first six of 128^3.
"""

import argparse
import csv
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from figures import Figure, at_least, at_most, report, stated

from data.simulate.stokes import solve_stokes

SIZE = 128  # voxels of a labelled block per axis
QUICK = 6  # blocks
SMALL_SIZE = 64
SMALL = 8  # blocks of 64^3 that are timed, spread over the image
TOLERANCE = 1e-3  # off by 6e-6 of a permeability


class Measurement(NamedTuple):
    """One permeability of one block, with what was published for it."""

    measured: float  # K / dx^2
    published: float
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("image", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--quick", action="store_true", help=f"the first {QUICK} blocks")
    arguments = parser.parse_args()
    try:
        pore, labels = read_image(arguments.image), read_labels(arguments.labels)
    except (OSError, KeyError, ValueError, BadZipFile) as error:
        print(f"error: cannot read the image or its labels ({error}). Name IMAGE.npz and LABELS.csv.", file=sys.stderr)
        return 1
    rows = [row for row in labels if cut_block(row, pore).shape == (SIZE,) * 3]
    rows = rows[:QUICK] if arguments.quick else rows
    measurements = [measure(row, axis, pore) for row in rows for axis in range(3)]
    return report("permeability", [*compare(measurements), time_smaller(pore)])


def read_image(path: Path) -> np.ndarray:
    with path.open("rb") as stream, np.load(stream) as file:
        return file["pore"] == 1


def read_labels(path: Path) -> list[dict[str, str]]:
    """The rows of the table, which must have the columns that are used."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    needed = {"sample"} | {f"start_axis{axis}" for axis in range(3)} | {f"K_axis{axis}_over_dx2" for axis in range(3)}
    missing = needed - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{path} has no column {min(missing)}")
    return rows


def cut_block(row: dict[str, str], pore: np.ndarray) -> np.ndarray:
    """The labelled block, or what of it lies inside the image."""
    starts = (int(row[f"start_axis{axis}"]) for axis in range(3))
    return pore[tuple(slice(start, start + SIZE) for start in starts)]


def measure(row: dict[str, str], axis: int, pore: np.ndarray) -> Measurement:
    """Solve along one axis and print the outcome."""
    start = time.perf_counter()
    flow = solve_stokes(cut_block(row, pore), axis, boundary="confined", walls="voxel", tolerance=TOLERANCE)
    seconds = time.perf_counter() - start
    published = float(row[f"K_axis{axis}_over_dx2"])
    print(
        f"block {row['sample']} axis {axis}: K {flow.permeability:.5f}, published {published:.5f}, "
        f"{flow.permeability / published - 1:+.1%}, {flow.num_iterations} iterations, {seconds:.1f} s",
        flush=True,
    )
    return Measurement(flow.permeability, published, seconds)


def compare(measurements: list[Measurement]) -> list[Figure]:
    """The targets for accuracy and time, and how the errors spread."""
    measured, published, seconds = np.array(measurements).T
    error = np.abs(measured / published - 1)
    return [
        at_least("blocks", len(measured) / 3, QUICK),
        at_most("largest error of K", float(error.max()), 0.15),
        stated("error of K", error),
        stated("K / published K", measured / published),
        at_least("correlation over blocks and axes", float(np.corrcoef(measured, published)[0, 1]), 0.97),
        at_most("128^3, slowest of one axis", float(seconds.max()), 300, "s"),
        at_most("128^3, slowest of three axes", float(seconds.reshape(-1, 3).sum(axis=1).max()), 300, "s"),
    ]


def time_smaller(pore: np.ndarray) -> Figure:
    """All three axes of the slowest of several blocks of 64^3, at random places."""
    rng, seconds = np.random.default_rng(0), []
    for _ in range(SMALL):
        first = [int(rng.integers(length - SMALL_SIZE + 1)) for length in pore.shape]
        block = pore[tuple(slice(start, start + SMALL_SIZE) for start in first)]
        start = time.perf_counter()
        for axis in range(3):
            solve_stokes(block, axis, boundary="confined", walls="voxel", tolerance=TOLERANCE)
        seconds.append(time.perf_counter() - start)
        print(f"block at {first} of {SMALL_SIZE}^3, three axes: {seconds[-1]:.1f} s", flush=True)
    return at_most(f"64^3, three axes, slowest of {SMALL} blocks", max(seconds), 20, "s")


if __name__ == "__main__":
    sys.exit(main())
