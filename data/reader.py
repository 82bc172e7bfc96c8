"""Reads stores: a snapshot goes from its files straight into the caller's arrays, verified on the way.

Every byte is compared with the digest of its place, and what is missing raises; nothing is ever read as zeros.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.chunks import ArrayLayout, ArrayReader, Factor, StoreError, read_attributes
from data.digests import read_digest, read_digests
from data.layout import Split, StoreHeader, check, field_arrays, parse_header, split_trajectories
from shodh.config import ConfigError
from shodh.fields import CONDITIONS, PARAMETERS, DomainSpec


class Store:
    """A complete store of fields, open for reading; get one from ``open_store``. Threads may share it.

    ``digest`` stands for every byte in it: what is trained on the store records that string.
    """

    def __init__(self, path: Path, header: StoreHeader, digest: str):
        self.path, self.digest = path, digest
        self.plan, self.grid = header
        domain = self.plan.domain
        self._readers = open_arrays(path, field_arrays(header))
        self._velocity = self._readers[domain.velocity.name]
        self._pressure = self._readers[domain.pressure.name]
        self._medium = self._readers[domain.medium.name]
        self._scalars = [self._readers[spec.name] for spec in domain.scalars]
        self._time = self._readers["time"].read()
        self._parameters = read_parameters(self._readers, self.num_trajectories, domain)
        self._to_velocity = _velocity_factors(header)

    @property
    def domain(self) -> DomainSpec:
        return self.plan.domain

    @property
    def num_trajectories(self) -> int:
        return self.plan.num_trajectories

    @property
    def num_snapshots(self) -> int:
        return self.plan.num_snapshots

    def trajectories(self, split: Split) -> list[int]:
        """Indices of the trajectories of ``train`` or ``test``."""
        return split_trajectories(self.num_trajectories, self.plan.num_test)[split]

    def parameters(self, trajectory: int) -> np.ndarray:
        """float32 in the order of ``shodh.fields.CONDITIONS``; 0 for those that the domain does not have."""
        return self._parameters[trajectory]

    def time(self, trajectory: int) -> np.ndarray:
        """float64 (t,): when the snapshots were taken."""
        return self._time[trajectory]

    def trajectory_array(self, name: str) -> np.ndarray:
        """``time``, ``seed`` or a parameter of all trajectories, as stored."""
        return self._readers[name].read()

    def snapshot(self, trajectory: int, time: int) -> tuple[np.ndarray, np.ndarray]:
        """Velocity (3, x, y, z) on lower faces and pressure (x, y, z), float32, in the domain's units.

        Velocity is flux over face area, or circulation over spacing. Raises StoreError for damaged or missing data.
        """
        velocity, pressure = np.empty((3, *self.grid.shape), np.float32), np.empty(self.grid.shape, np.float32)
        self.read_snapshot(trajectory, time, velocity, pressure)
        return velocity, pressure

    def read_snapshot(
        self,
        trajectory: int,
        time: int,
        velocity: np.ndarray,
        pressure: np.ndarray,
        scales: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """``snapshot`` into contiguous arrays of the caller, such as places in a batch; undefined when it raises.

        Velocity and pressure come divided by ``scales``, at no cost beyond that of the conversion to velocity.
        """
        self._require(trajectory, time)
        of_velocity, of_pressure = (np.float32(1 / scale) for scale in scales)
        factors: list[Factor] = [f * of_velocity for f in self._to_velocity if f is not None]
        self._velocity.fill(velocity, trajectory, time, factors)
        self._pressure.fill(pressure, trajectory, time, (None if of_pressure == 1 else of_pressure,))

    def read_stored(self, trajectory: int, time: int, velocity: np.ndarray, pressure: np.ndarray) -> None:
        """Like ``read_snapshot``, but flux or circulation as stored: the fastest, for who multiplies anyway."""
        self._require(trajectory, time)
        self._velocity.fill(velocity, trajectory, time)
        self._pressure.fill(pressure, trajectory, time)

    def scalars(self, trajectory: int, time: int) -> np.ndarray:
        """The domain's further cell fields (s, x, y, z), float32, in the order of ``DomainSpec.scalars``."""
        self._require(trajectory, time)
        values = np.empty((len(self._scalars), *self.grid.shape), np.float32)
        for place, reader in zip(values, self._scalars, strict=True):
            reader.fill(place, trajectory, time)
        return values

    def stored_velocity(self, trajectory: int, time: int) -> np.ndarray:
        """Flux or circulation (3, x, y, z) as stored, without its scale: exact sums stay exact."""
        self._require(trajectory, time)
        return self._velocity.read(trajectory, time)[0, 0]

    def medium(self, trajectory: int) -> np.ndarray:
        """The static medium (x, y, z), float32, in the domain's units."""
        values = np.empty(self.grid.shape, np.float32)
        self.read_medium(trajectory, values)
        return values

    def read_medium(self, trajectory: int, medium: np.ndarray) -> None:
        """``medium`` into a contiguous array of the caller; undefined when it raises."""
        self._require(trajectory)
        self._medium.fill(medium, trajectory)

    def _require(self, trajectory: int, time: int = 0) -> None:
        require_index(self.path, trajectory, time, (self.num_trajectories, self.num_snapshots))


def open_store(path: str | Path) -> Store:
    """The store at ``path``; header, array shapes and the size of every chunk file are checked, contents when read.

    Raises ConfigError in one line when it is missing, incomplete, damaged or of another layout version.
    """
    path = Path(path)
    problems = check(path, deep=False)
    if problems:
        raise ConfigError(with_count(problems, f"python -m data.layout {path}"))
    try:
        return Store(path, parse_header(read_attributes(path), str(path)), read_digest(path))
    except StoreError as error:
        raise ConfigError(str(error)) from None


def open_arrays(folder: Path, arrays: Mapping[str, ArrayLayout]) -> dict[str, ArrayReader]:
    """A reader for each array. Raises StoreError when the folder's digests are missing, altered or incomplete."""
    digests = read_digests(folder)
    return {name: ArrayReader(folder, array, digests) for name, array in arrays.items()}


def read_parameters(readers: Mapping[str, ArrayReader], num_trajectories: int, domain: DomainSpec) -> np.ndarray:
    """float32 (trajectory, q) in the order of ``shodh.fields.CONDITIONS``; 0 where the domain has none."""
    columns = np.zeros((num_trajectories, len(CONDITIONS)), np.float32)
    for q, name in enumerate(PARAMETERS):
        if name in domain.parameters:
            columns[:, q] = readers[name].read()
    columns[:, len(PARAMETERS) :] = [kind == "periodic" for kind in domain.boundary]
    return columns


def require_index(path: Path, trajectory: int, time: int, counts: tuple[int, int]) -> None:
    """Raise IndexError unless there is such a trajectory and snapshot; negative ones do not count from the end."""
    for name, value, count in zip(("trajectory", "time"), (trajectory, time), counts, strict=True):
        if not 0 <= value < count:
            raise IndexError(f"{name}={value}: store {path} has {count}. Take 0 to {count - 1}.")


def _velocity_factors(header: StoreHeader) -> list[Factor]:
    """Velocity over stored value for each component, or one for all: a number, but along stretched axes an array."""
    plan, grid = header
    measure = grid.face_distance if plan.domain.velocity_space == "irrotational" else grid.face_area
    factors = (plan.velocity_scale / measure).astype(np.float32)
    if factors[0].size > 1:
        return list(factors)
    numbers: list[Factor] = [component.flat[0] for component in factors]
    return numbers[:1] if len(set(numbers)) == 1 else numbers


def with_count(problems: list[str], command: str) -> str:
    """The first problem, and where to see the others."""
    return problems[0] + (f" And {len(problems) - 1} more: {command}" if len(problems) > 1 else "")
