"""Reads stores: a snapshot is two chunk files, read and verified without xarray.

The codec's checksum is verified on every read, and a chunk that is missing raises; nothing is ever read as zeros.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.chunks import ArrayLayout, StoreError, read_attributes, read_chunk, read_digest, read_whole
from data.layout import Split, StoreHeader, check, field_arrays, parse_header, split_trajectories
from shodh.config import ConfigError
from shodh.fields import PARAMETERS, DomainSpec


class Store:
    """A complete store of fields, open for reading; get one from ``open_store``.

    ``digest`` stands for every byte in it: what is trained on the store records that string.
    """

    def __init__(self, path: Path, header: StoreHeader, digest: str):
        self.path, self.digest = path, digest
        self.plan, self.grid = header
        self._folder, self._arrays = str(path), field_arrays(header)
        domain = self.plan.domain
        self._velocity = self._arrays[domain.velocity.name]
        self._pressure = self._arrays[domain.pressure.name]
        self._medium = self._arrays[domain.medium.name]
        self._time = read_whole(path, self._arrays["time"])
        self._parameters = read_parameters(path, self._arrays, domain)
        measure = self.grid.face_distance if domain.velocity_space == "irrotational" else self.grid.face_area
        self._to_velocity = (self.plan.velocity_scale / measure).astype(np.float32)

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
        """float32 in the order of ``shodh.fields.PARAMETERS``; 0 for those that the domain does not have."""
        return self._parameters[trajectory]

    def time(self, trajectory: int) -> np.ndarray:
        """float64 (t,): when the snapshots were taken."""
        return self._time[trajectory]

    def trajectory_array(self, name: str) -> np.ndarray:
        """``time``, ``seed`` or a parameter of all trajectories, as stored."""
        return read_whole(self.path, self._arrays[name])

    def snapshot(self, trajectory: int, time: int) -> tuple[np.ndarray, np.ndarray]:
        """Velocity (3, x, y, z) on lower faces and pressure (x, y, z), float32, in the domain's units.

        Velocity is flux over face area, or circulation over spacing. Raises StoreError for a damaged or missing chunk.
        """
        stored = read_chunk(self._folder, self._velocity, self._index(self._velocity, trajectory, time))
        pressure = read_chunk(self._folder, self._pressure, self._index(self._pressure, trajectory, time))
        return stored[0, 0] * self._to_velocity, pressure[0, 0].copy()

    def stored_velocity(self, trajectory: int, time: int) -> np.ndarray:
        """Flux or circulation (3, x, y, z) as stored, without its scale: exact sums stay exact."""
        return read_chunk(self._folder, self._velocity, self._index(self._velocity, trajectory, time))[0, 0].copy()

    def medium(self, trajectory: int) -> np.ndarray:
        """The static medium (x, y, z), float32, in the domain's units."""
        return read_chunk(self._folder, self._medium, self._index(self._medium, trajectory))[0].copy()

    def _index(self, array: ArrayLayout, *leading: int) -> tuple[int, ...]:
        for value, length, name in zip(leading, array.shape, array.dims, strict=False):
            if not 0 <= value < length:
                raise IndexError(f"{name}={value}: store {self.path} has {length}.")
        return *leading, *(0,) * (len(array.shape) - len(leading))


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


def read_parameters(folder: Path, arrays: Mapping[str, ArrayLayout], domain: DomainSpec) -> np.ndarray:
    """float32 (trajectory, q) in the order of ``shodh.fields.PARAMETERS``; 0 where the domain has none."""
    columns = np.zeros((arrays["time"].shape[0], len(PARAMETERS)), np.float32)
    for q, name in enumerate(PARAMETERS):
        if name in domain.parameters:
            columns[:, q] = read_whole(folder, arrays[name])
    return columns


def with_count(problems: list[str], command: str) -> str:
    """The first problem, and where to see the others."""
    return problems[0] + (f" And {len(problems) - 1} more: {command}" if len(problems) > 1 else "")
