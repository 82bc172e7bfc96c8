"""Stores of random fields that conserve what their domain conserves: as hard to compress and to read as real ones."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from data.layout import StorePlan, Trajectory
from data.reader import Store, open_store
from data.writer import write_store
from shodh.fields import DomainSpec, Grid
from shodh.physics.helmholtz import Potentials, compose_velocity, snap_potentials


def write_random_store(
    path: Path, domain: DomainSpec, resolution: int, num_trajectories: int, num_snapshots: int
) -> Store:
    """A store at ``path`` whose fields are exactly conservative; snapshots are multiples and copies of a few draws."""
    n = resolution
    grid = Grid(shape=(n, n, n), spacing=(1 / n, 1 / n, 1 / n), boundary=domain.boundary)
    generator = torch.Generator().manual_seed(0)
    potentials = Potentials(
        torch.randn(num_snapshots, 3, n, n, n, generator=generator),
        torch.randn(num_snapshots, n, n, n, generator=generator),
        torch.randn(num_snapshots, 3, generator=generator),
    )
    velocity = compose_velocity(snap_potentials(potentials), domain.boundary, domain.velocity_space).numpy()
    pressure = torch.randn(num_snapshots, n, n, n, generator=generator).numpy()

    def simulate(indices: Sequence[int]) -> Iterator[tuple[int, Trajectory]]:
        for index in indices:
            yield (
                index,
                Trajectory(
                    velocity=np.roll(velocity, index, 0) * np.float32(2.0 ** -(index % 4)),
                    pressure=np.roll(pressure, index, 0) * np.float32(index + 1),
                    medium=pressure[0],
                    time=np.arange(float(num_snapshots)),
                    parameters=dict.fromkeys(domain.parameters, 1.0),
                    seed=index,
                    grid=grid,
                ),
            )

    plan = StorePlan(
        domain=domain,
        num_trajectories=num_trajectories,
        num_snapshots=num_snapshots,
        num_test=1,
        shape=grid.shape,
        solver="random",
        solver_version="0",
        config={},
    )
    write_store(path, plan, simulate)
    return open_store(path)
