"""Crops of segmented micro-CT images as periodic rocks.

A crop of half the box per axis is continued by its mirror images, so that the box is periodic and every pore goes on
across its faces; a crop that is merely wrapped would have its pores cut off there.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from data.rocks import RockImage, open_rock

MOST_PORES = 0.6  # share of pores from which on the phases of a rock are taken to be swapped


@lru_cache(maxsize=1)
def open_source(source: str) -> RockImage:
    """The image at ``source``, a store that ``ingest_data digital_rocks`` wrote.

    Raises ValueError or ConfigError in one line where it is none, or where its phases seem swapped: more than
    ``MOST_PORES`` pores.
    """
    if Path(source).is_file():
        raise ValueError(
            f"source={source}: a file, must be a store. Ingest it first: python launch/ingest_data.py digital_rocks "
            f"{source} STORE"
        )
    rock = open_rock(source)
    if rock.porosity > MOST_PORES:
        raise ValueError(
            f"source={source}: {rock.porosity:.0%} of the voxels are pores. Ingest the image again with pore= set to "
            "its other value."
        )
    return rock


def draw_crop(rng: np.random.Generator, rock: RockImage, size: int) -> Bool[np.ndarray, "x y z"]:
    """True in the pores of a cube of ``size`` voxels at a random place. Raises ValueError if the image is smaller."""
    if min(rock.shape) < size:
        raise ValueError(f"resolution={2 * size}: half of it exceeds the image of {rock.shape} voxels. Lower it.")
    start = [int(rng.integers(length - size + 1)) for length in rock.shape]
    return rock.crop(start, (size, size, size))


def mirror(pore: Bool[np.ndarray, "x y z"]) -> Bool[np.ndarray, "x2 y2 z2"]:
    """The block continued by its mirror image along every axis: periodic, twice as wide."""
    for axis in range(3):
        pore = np.concatenate([pore, np.flip(pore, axis)], axis)
    return pore
