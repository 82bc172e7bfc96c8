"""Small stores of random fields that obey their domain's constraint, made without any simulator."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from data.layout import StorePlan, Trajectory
from data.reader import Store, open_store
from data.writer import write_store
from shodh.fields import DomainSpec, FieldSpec, Grid
from shodh.physics.exterior import curl_of_edges, gradient_of_cells

DOMAINS = {
    "channel": DomainSpec(
        name="channel",
        velocity_space="solenoidal",
        boundary=("periodic", "wall", "periodic"),
        velocity=FieldSpec(name="flux", units="1", location="face", long_name="volume flux through lower faces"),
        pressure=FieldSpec(name="pressure", units="1", location="cell", long_name="kinematic pressure"),
        medium=FieldSpec(name="wall_distance", units="1", location="cell", long_name="distance from the bed"),
        parameters=("viscosity", "dt"),
    ),
    "sound": DomainSpec(
        name="sound",
        velocity_space="irrotational",
        boundary=("open", "open", "open"),
        velocity=FieldSpec(name="circulation", units="m2 s-1", location="face", long_name="velocity times spacing"),
        pressure=FieldSpec(name="pressure", units="Pa", location="cell", long_name="acoustic pressure"),
        medium=FieldSpec(name="wave_speed", units="m s-1", location="cell", long_name="speed of sound"),
        parameters=("frequency",),
    ),
    "plume": DomainSpec(
        name="plume",
        velocity_space="solenoidal",
        boundary=("periodic", "wall", "periodic"),
        velocity=FieldSpec(name="flux", units="m3 s-1", location="face", long_name="volume flux through lower faces"),
        pressure=FieldSpec(name="pressure", units="Pa", location="cell", long_name="pressure"),
        medium=FieldSpec(name="conductivity", units="W m-1 K-1", location="cell", long_name="thermal conductivity"),
        parameters=("viscosity", "diffusivity"),
        scalars=(
            FieldSpec(name="temperature", units="K", location="cell", long_name="temperature"),
            FieldSpec(name="salinity", units="1", location="cell", long_name="mass fraction of salt"),
        ),
    ),
}
SPACING = (0.5, 0.25, 2.0)
STRETCHED = (0.5, (0.25, 0.5, 1.0, 1.0, 0.5, 0.25), 2.0)  # powers of two, so that products of them are exact


def make_plan(name: str, **changes) -> StorePlan:
    values = {
        "num_trajectories": 4,
        "num_snapshots": 5,
        "num_test": 1,
        "shape": (4, 6, 8),
        "solver": "random potentials",
        "solver_version": "1",
        "config": {"seed": 7, "ranges": [1.0, 2.0]},
    }
    return StorePlan(domain=DOMAINS[name], **(values | changes))


def make_trajectory(plan: StorePlan, index: int) -> Trajectory:
    random = np.random.default_rng([plan.config["seed"], index])
    domain, num = plan.domain, plan.num_snapshots
    if domain.velocity_space == "solenoidal":
        velocity = curl_of_edges(torch.from_numpy(random.normal(size=(num, 3, *plan.shape))), domain.boundary)
    else:
        velocity = gradient_of_cells(torch.from_numpy(random.normal(size=(num, *plan.shape))), domain.boundary)
    return Trajectory(
        velocity=velocity.float().numpy(),
        pressure=random.normal(size=(num, *plan.shape)).astype(np.float32),
        medium=random.uniform(1, 2, plan.shape).astype(np.float32),
        time=np.arange(num) * 0.1,
        parameters={name: float(random.uniform()) for name in domain.parameters},
        seed=plan.config["seed"],
        grid=Grid(
            shape=plan.shape, spacing=STRETCHED if plan.config.get("stretched") else SPACING, boundary=domain.boundary
        ),
        scalars={spec.name: random.normal(size=(num, *plan.shape)).astype(np.float32) for spec in domain.scalars},
    )


def simulate_plan(plan: StorePlan):
    def simulate(indices: Sequence[int]) -> Iterator[tuple[int, Trajectory]]:
        return ((i, make_trajectory(plan, i)) for i in indices)

    return simulate


def make_store(path: Path, name: str, **changes) -> Store:
    plan = make_plan(name, **changes)
    write_store(path, plan, simulate_plan(plan))
    return open_store(path)


def encode_blocks(velocity: torch.Tensor, pressure: torch.Tensor, medium: torch.Tensor):
    """Block means over 2^3 cells: linear, and different for every input."""
    blocks = torch.nn.functional.avg_pool3d(torch.cat([velocity, pressure], 1), 2)
    return blocks, torch.nn.functional.avg_pool3d(medium, 2)


class Stores:
    """What the tests build stores with."""

    plan = staticmethod(make_plan)
    trajectory = staticmethod(make_trajectory)
    simulate = staticmethod(simulate_plan)
    make = staticmethod(make_store)
    encode = staticmethod(encode_blocks)


@pytest.fixture(scope="session")
def stores() -> Stores:
    return Stores()


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """One sound store per domain, to read and to copy, never to alter."""
    folder = tmp_path_factory.mktemp("templates")
    return {name: make_store(folder / name, name) for name in DOMAINS}


@pytest.fixture
def channel(templates: dict[str, Store], tmp_path: Path) -> Store:
    return open_store(shutil.copytree(templates["channel"].path, tmp_path / "channel"))


@pytest.fixture
def plume(templates: dict[str, Store], tmp_path: Path) -> Store:
    return open_store(shutil.copytree(templates["plume"].path, tmp_path / "plume"))


@pytest.fixture
def sound(templates: dict[str, Store], tmp_path: Path) -> Store:
    return open_store(shutil.copytree(templates["sound"].path, tmp_path / "sound"))
