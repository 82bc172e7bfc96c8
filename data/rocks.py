"""Segmented images of rock as a store of its own kind: ``pore`` (x, y, z) uint8, 1 in pores, a slice along x a chunk.

A crop is read without the rest, so that images larger than memory serve as geometry.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from data.array_store import open_array_store
from data.chunks import ArrayLayout
from data.reader import open_arrays
from shodh.config import ConfigError

KIND = "rock"


class RockImage:
    """A complete store of one image, open for reading; get one from ``open_rock``."""

    def __init__(self, path: Path, attributes: dict[str, Any], digest: str):
        self.path, self.attributes, self.digest = path, attributes, digest
        self._pore = open_arrays(path, rock_arrays(attributes))["pore"]

    @property
    def shape(self) -> tuple[int, int, int]:
        num, rows, columns = self._pore.array.shape
        return num, rows, columns

    @property
    def porosity(self) -> float:
        """Pores' share of the image."""
        return self.attributes["porosity"]

    @property
    def voxel_size(self) -> float | None:
        """Edge of a voxel [m], where it is known."""
        return self.attributes["voxel_size"]

    def crop(self, start: Sequence[int] = (0, 0, 0), shape: Sequence[int] | None = None) -> Bool[np.ndarray, "x y z"]:
        """True in the pores of a box of the image; only its slices are read. Raises ConfigError for one beyond it."""
        size = tuple(shape) if shape is not None else tuple(n - s for n, s in zip(self.shape, start, strict=True))
        ends = [s + n for s, n in zip(start, size, strict=True)]
        if min(start) < 0 or min(size) < 1 or any(e > n for e, n in zip(ends, self.shape, strict=True)):
            raise ConfigError(
                f"crop={tuple(start)}+{size}: beyond the image of {self.shape} in {self.path}. Choose a box inside it."
            )
        box = slice(start[1], ends[1]), slice(start[2], ends[2])
        return np.stack([self._pore.read(x)[0][box] == 1 for x in range(start[0], ends[0])])


def open_rock(path: str | Path, *, deep: bool = False) -> RockImage:
    """The image at ``path``. Raises ConfigError in one line when it is missing, incomplete or damaged."""
    return RockImage(Path(path), *open_array_store(Path(path), KIND, rock_arrays, deep=deep))


def rock_arrays(attributes: Mapping[str, Any]) -> dict[str, ArrayLayout]:
    """Every array of a store of rock by name."""
    num, rows, columns = attributes["shape"]
    meaning = {
        "units": "1",
        "long_name": "1 in pores, 0 in the solid",
        "flag_values": [0, 1],
        "flag_meanings": "solid pore",
    }
    return {"pore": ArrayLayout("pore", ("x", "y", "z"), (num, rows, columns), (1, rows, columns), "uint8", meaning)}
