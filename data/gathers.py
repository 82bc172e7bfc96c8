"""Seismic gathers with the wave speed they were recorded over: 2-D inversion's pairs, as a store of its own kind.

    seismogram (trajectory, shot, time, receiver) float32     wave_speed (trajectory, z, x) float32 [m/s]

A gather is no field on a grid, so that the layout of fields has no place for it; chunks, checksums and digests are the
same. One trajectory is one pair.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from data.array_store import open_array_store
from data.chunks import ArrayLayout
from data.layout import Split, split_trajectories
from data.reader import open_arrays

KIND = "gathers"


class Gathers:
    """A complete store of gathers, open for reading; get one from ``open_gathers``."""

    def __init__(self, path: Path, attributes: dict[str, Any], digest: str):
        self.path, self.attributes, self.digest = path, attributes, digest
        self._readers = open_arrays(path, gather_arrays(attributes))

    @property
    def num_trajectories(self) -> int:
        return self.attributes["num_trajectories"]

    def trajectories(self, split: Split) -> list[int]:
        """Indices of the pairs of ``train`` or ``test``."""
        return split_trajectories(self.num_trajectories, self.attributes["num_test"])[split]

    def seismogram(self, trajectory: int) -> Float[np.ndarray, "s t r"]:
        """Pressure at the receivers per shot and time, in the sign and unit of the source."""
        return self._read("seismogram", trajectory)

    def wave_speed(self, trajectory: int) -> Float[np.ndarray, "z x"]:
        """Speed of sound [m/s]; z is depth."""
        return self._read("wave_speed", trajectory)

    def coordinate(self, name: str) -> np.ndarray:
        """``time`` [s], or ``shot``, ``receiver``, ``x``, ``z`` [m], FP64."""
        return self._readers[name].read()

    def _read(self, name: str, trajectory: int) -> np.ndarray:
        if not 0 <= trajectory < self.num_trajectories:
            raise IndexError(f"trajectory={trajectory}: store {self.path} has {self.num_trajectories}.")
        return self._readers[name].read(trajectory)[0]


def open_gathers(path: str | Path, *, deep: bool = False) -> Gathers:
    """The store of gathers at ``path``. Raises ConfigError in one line when it is missing, incomplete or damaged."""
    return Gathers(Path(path), *open_array_store(Path(path), KIND, gather_arrays, deep=deep))


def gather_arrays(attributes: Mapping[str, Any]) -> dict[str, ArrayLayout]:
    """Every array of a store of gathers by name."""
    num = attributes["num_trajectories"]
    shots, times, receivers = attributes["gather_shape"]
    depth, width = attributes["model_shape"]
    seismogram = {"units": "1", "long_name": "pressure at the receivers, in the source's unit and sign"}
    speed = {"units": "m s-1", "long_name": "speed of sound"}
    arrays = [
        ArrayLayout("seismogram", ("trajectory", "shot", "time", "receiver"), (num, shots, times, receivers),
                    (1, shots, times, receivers), "float32", seismogram),
        ArrayLayout("wave_speed", ("trajectory", "z", "x"), (num, depth, width), (1, depth, width), "float32", speed),
        _axis("time", times, "s", "time since the shot"),
        _axis("shot", shots, "m", "position of the shot along x"),
        _axis("receiver", receivers, "m", "position of the receiver along x"),
        _axis("z", depth, "m", "depth of the grid point"),
        _axis("x", width, "m", "position of the grid point"),
    ]  # fmt: skip
    return {array.name: array for array in arrays}


def _axis(name: str, length: int, units: str, meaning: str) -> ArrayLayout:
    return ArrayLayout(name, (name,), (length,), (length,), "float64", {"units": units, "long_name": meaning})
