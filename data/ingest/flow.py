"""A flow read snapshot by snapshot from public files, written as a store of fields; what the formats have in common."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from data.ingest.source import Provenance, Say, Unverified
from data.layout import StorePlan, Trajectory
from data.writer import WrittenStore, write_store
from shodh.config import ConfigError
from shodh.fields import Boundary, DomainSpec, FieldSpec, Grid, VelocitySpace

Boundaries = tuple[Boundary, Boundary, Boundary]


class Snapshot(NamedTuple):
    """One state, as the layout takes it."""

    flux: np.ndarray  # float32 (3, x, y, z) through lower faces
    pressure: np.ndarray  # float32 (x, y, z)
    scalars: dict[str, np.ndarray]  # float32 (x, y, z) each
    removed: float  # share of the velocity that projection removed, or, for a compressible flow, would remove


@dataclass(frozen=True, kw_only=True)
class Flow:
    """What a format's reader hands over: the layout of the flow and how to read one snapshot of it."""

    format: str
    domain: DomainSpec
    grid: Grid
    times: Sequence[np.ndarray]  # per trajectory, float64 (t,), from 0
    parameters: Sequence[dict[str, float]]  # per trajectory
    read: Callable[[int, int], Snapshot]  # (trajectory, time)
    notes: dict[str, Any]  # what the store shall keep of how it was read


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """What every flow is ingested with."""

    num_test: int = 1  # trajectories held out, the last ones
    max_removed: float = 0.1  # largest share of a velocity that projection may remove
    unverified: Unverified = "refuse"  # a source without SHA256SUMS

    def __post_init__(self) -> None:
        if not 0 < self.max_removed <= 1:
            raise ValueError(
                f"max_removed={self.max_removed}: a share of the velocity. Give a value above 0, at most 1."
            )


def make_domain(
    name: str,
    space: VelocitySpace,
    boundary: Boundaries,
    *,
    parameters: tuple[str, ...],
    pressure: str = "pressure",
    scalars: Sequence[str] = (),
) -> DomainSpec:
    """The domain of an ingested flow, nondimensional as its source is; ConfigError where no domain can hold it."""
    wall = "wall" in boundary
    medium = (
        ("wall_distance", "distance to the nearest wall") if wall else ("fluid", "1 where there is fluid: everywhere")
    )
    try:
        return DomainSpec(
            name=name,
            velocity_space=space,
            boundary=boundary,
            velocity=FieldSpec(name="flux", units="1", location="face", long_name="volume flux through lower faces"),
            pressure=FieldSpec(name=pressure, long_name=pressure.replace("_", " "), units="1", location="cell"),
            medium=FieldSpec(name=medium[0], long_name=medium[1], units="1", location="cell"),
            parameters=parameters,
            scalars=tuple(
                FieldSpec(name=s, long_name=s.replace("_", " "), units="1", location="cell") for s in scalars
            ),
        )
    except ValueError as error:
        raise ConfigError(f"source boundary={boundary}: no store can hold such a flow. {error}") from None


def write_flow(store: Path, flow: Flow, config: FlowConfig, provenance: Provenance, say: Say) -> WrittenStore:
    """Write the store, a trajectory at a time, saying what share of each velocity projection removed.

    The share in the first state of each trajectory is kept in the store's ``config``. Raises ConfigError where one
    exceeds ``config.max_removed`` or nothing is left to train on.
    """
    num = len(flow.times)
    if not 0 < config.num_test < num:
        raise ConfigError(
            f"num_test={config.num_test}: the source holds {num} trajectories; one must be held out and one left to "
            "train "
            "on. Change num_test, or give a folder of several files."
        )
    _require_memory(flow)
    removed = [_require_small(flow, config, i, 0, flow.read(i, 0).removed) for i in range(num)]
    solenoidal = flow.domain.velocity_space == "solenoidal"
    what = "removed by projection" if solenoidal else "in the part with divergence (kept)"
    say(f"{store}: share of the velocity {what}, first states: {min(removed):.2e} to {max(removed):.2e}")
    plan = StorePlan(
        domain=flow.domain,
        num_trajectories=num,
        num_snapshots=len(flow.times[0]),
        num_test=config.num_test,
        shape=flow.grid.shape,
        solver=f"shodh data.ingest.{flow.format}",
        solver_version=version("shodh"),
        config={
            "source": provenance.as_config(),
            "divergence_share_removed" if solenoidal else "divergence_share_kept": removed,
            **flow.notes,
        },
    )

    def read(indices: Sequence[int]) -> Iterator[tuple[int, Trajectory]]:
        for i in indices:
            trajectory, worst = _read_trajectory(flow, config, i)
            say(f"{store}: trajectory {i}: largest share {what}: {worst:.2e}")
            yield i, trajectory

    return write_store(store, plan, read)


def _require_memory(flow: Flow) -> None:
    """ConfigError where one trajectory, which is in memory whole, and a copy while it is written, do not fit."""
    num_times, num_fields = len(flow.times[0]), 4 + len(flow.domain.scalars)
    size = 4 * math.prod(flow.grid.shape)
    wanted, free = 2 * num_times * num_fields * size, psutil.virtual_memory().available
    if wanted > free:
        raise ConfigError(
            f"source: a trajectory of {num_times} states of {flow.grid.shape} cells needs {wanted / 1e9:.3g} GB of "
            f"memory, {free / 1e9:.3g} GB are free. Cut out fewer points or states, or use a machine with more memory."
        )


def medium_of(grid: Grid) -> np.ndarray:
    """Distance to the nearest wall in the cells, or 1 everywhere where there is none; float32."""
    nearest = np.full(grid.shape, np.inf)
    for axis in range(3):
        if grid.boundary[axis] == "wall":
            widths = grid.widths(axis)
            centre = np.cumsum(widths) - widths / 2
            distance = np.minimum(centre, widths.sum() - centre)
            nearest = np.minimum(nearest, distance.reshape([-1 if a == axis else 1 for a in range(3)]))
    return np.where(np.isfinite(nearest), nearest, 1.0).astype(np.float32)


def _read_trajectory(flow: Flow, config: FlowConfig, index: int) -> tuple[Trajectory, float]:
    """A trajectory and the largest share removed in it; filled state by state, so that memory holds it once."""
    num, shape, worst = len(flow.times[index]), flow.grid.shape, 0.0
    trajectory = Trajectory(
        velocity=np.empty((num, 3, *shape), np.float32),
        pressure=np.empty((num, *shape), np.float32),
        medium=medium_of(flow.grid),
        time=flow.times[index],
        parameters=flow.parameters[index],
        seed=0,
        grid=flow.grid,
        scalars={spec.name: np.empty((num, *shape), np.float32) for spec in flow.domain.scalars},
    )
    for t in range(num):
        state = flow.read(index, t)
        worst = max(worst, _require_small(flow, config, index, t, state.removed))
        trajectory.velocity[t], trajectory.pressure[t] = state.flux, state.pressure
        for name, values in trajectory.scalars.items():
            values[t] = state.scalars[name]
    return trajectory, worst


def _require_small(flow: Flow, config: FlowConfig, index: int, time: int, removed: float) -> float:
    if flow.domain.velocity_space == "solenoidal" and removed > config.max_removed:
        raise ConfigError(
            f"max_removed={config.max_removed}: projection would remove {removed:.2f} of the velocity of trajectory "
            f"{index}, "
            f"snapshot {time}. Check axes and units; a coarse source needs max_removed={min(1.0, 1.2 * removed):.2f}."
        )
    return removed
