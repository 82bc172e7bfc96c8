"""Whether the axes of a compressible flow are in the stated order: mass is conserved along the right ones only.

Between two states d rho/dt + div(rho u) = 0. The share of the sum in its two parts (0 where mass is conserved, 1 where
they know nothing of each other) is measured as the fields stand, and with axes swapped, reversed, or one field swapped
alone. States lie far apart in public data, so means over blocks of cells are compared that flow crosses in no less than
two states.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.ingest.source import Say
from shodh.config import ConfigError

BLOCK = 96  # cells a side of the middle block that is looked at
FEWEST = 6  # block means along an axis
RESOLVED = 0.7  # a share above this, in the best order too, tells nothing
CLEARLY = 2.0  # the best order must have so many times less than the next


class TwoStates(NamedTuple):
    """Density (2, x, y, z) and velocity (2, 3, x, y, z) of a state and the next, ``step`` apart."""

    density: np.ndarray
    velocity: np.ndarray
    spacing: Sequence[float]
    step: float


def require_axes(states: TwoStates, path: Path, say: Say) -> None:
    """Says what mass conservation tells of the order of axes; ConfigError where another order is clearly right."""
    factor = _block_size(states)
    middle = tuple(slice(max(0, (n - BLOCK) // 2), (n + BLOCK) // 2) for n in states.density.shape[1:])
    states = states._replace(density=states.density[:, *middle], velocity=states.velocity[:, :, *middle])
    if min(states.density.shape[1:]) < FEWEST * factor:
        say(f"{path.name}: states are too far apart to verify the order of axes by mass conservation")
        return
    own = _imbalance(states, factor)
    share, order = min((_imbalance(other, factor), name) for name, other in _alternatives(states))
    if share < RESOLVED and share * CLEARLY < own:
        raise ConfigError(
            f"source={path}: mass is conserved to {own:.2f} as its axes stand, to {share:.2f} with {order}. Write the "
            "fields in the order of their coordinates."
        )
    if own < RESOLVED and own * CLEARLY < share:
        say(f"{path.name}: order of axes verified, mass is conserved to {own:.2f}, in other orders to {share:.2f}")
    else:
        say(f"{path.name}: order of axes not verified: mass is conserved to {own:.2f}, with {order} to {share:.2f}")


def _block_size(states: TwoStates) -> int:
    """Cells a side of a block that the flow crosses in two states or more."""
    speed = math.sqrt(float(np.mean(np.square(states.velocity, dtype=np.float64))))
    return max(1, math.ceil(2 * speed * states.step / min(states.spacing)))


def _alternatives(states: TwoStates) -> Iterator[tuple[str, TwoStates]]:
    """The states as they would be if they had been written otherwise, and what would then be wrong."""
    shape = states.density.shape[1:]
    for axis, name in enumerate("xyz"):
        spacing = [-h if a == axis else h for a, h in enumerate(states.spacing)]
        yield f"{name} reversed", states._replace(spacing=spacing)
    yield "time reversed", states._replace(step=-states.step)
    for order in itertools.permutations(range(3)):
        if order == (0, 1, 2) or tuple(shape[a] for a in order) != shape:
            continue
        axes = "".join("xyz"[a] for a in order)
        density, velocity = _transposed(states.density, order), _transposed(states.velocity, order)
        yield f"all fields as {axes}", states._replace(density=density, velocity=velocity)
        yield f"density as {axes}", states._replace(density=density)
        yield f"the velocity as {axes}", states._replace(velocity=velocity)
        for i, name in enumerate("xyz"):
            mixed = states.velocity.copy()
            mixed[:, i] = velocity[:, i]
            yield f"the velocity along {name} as {axes}", states._replace(velocity=mixed)


def _transposed(values: np.ndarray, order: Sequence[int]) -> np.ndarray:
    first = values.ndim - 3
    return values.transpose(*range(first), *(first + axis for axis in order))


def _imbalance(states: TwoStates, factor: int) -> float:
    """RMS of d rho/dt + div(rho u) over that of its two parts, of block means, where differences are central."""
    density, velocity = states.density.astype(np.float64), states.velocity.astype(np.float64)
    momentum = _block_means((density[:, None] * velocity).mean(0), factor)
    first, second = _block_means(density, factor)
    inside = (slice(1, -1),) * 3
    change = ((second - first) / states.step)[inside]
    outflow = sum(np.gradient(momentum[a], factor * states.spacing[a], axis=a)[inside] for a in range(3))
    whole = float(np.mean(change**2) + np.mean(np.square(outflow)))
    return math.sqrt(float(np.mean((change + outflow) ** 2)) / whole) if whole > 0 else 1.0


def _block_means(values: np.ndarray, factor: int) -> np.ndarray:
    """Means over blocks of ``factor`` cells a side; what is left over at the upper ends is dropped."""
    first = values.ndim - 3
    for axis in range(first, values.ndim):
        num = values.shape[axis] // factor
        kept = values.take(range(num * factor), axis)
        values = kept.reshape(*kept.shape[:axis], num, factor, *kept.shape[axis + 1 :]).mean(axis + 1)
    return values
