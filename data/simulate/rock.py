"""Wave speed of drawn rock in a 3-D box: layered, curved, faulted, folded or random; axis z is depth.

Every draw is decided by the generator alone and lies within the given range of speeds. A cell that an interface crosses
holds the volume mean of the compressibility 1 / c^2, so that a layer's travel time does not jump with the grid.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import ndtr

# folded: gentle folds and up to two faults at once; the others show one kind of structure alone
Medium = Literal["layered", "curved", "faulted", "folded", "random"]
NUM_FAULTS: dict[Medium, tuple[int, int]] = {"faulted": (1, 3), "folded": (0, 2)}
FOLD_HEIGHT: dict[Medium, float] = {"curved": 0.08, "folded": 0.04}  # rms of each of three waves, share of the box


class RockRanges(NamedTuple):
    """What rock is drawn from, uniformly."""

    speed: tuple[float, float]  # m/s
    num_layers: tuple[int, int]
    correlation_length: tuple[float, float]  # of random media, in cells


def draw_rock(medium: Medium, cells: int, ranges: RockRanges, rng: np.random.Generator) -> np.ndarray:
    """Wave speed (x, y, z) [m/s] in a cube of ``cells`` per axis, float32."""
    if medium == "random":
        speed = _draw_random_speed(cells, ranges, rng)
    else:
        speed = _draw_layers(medium, cells, ranges, rng)
    return speed.clip(*ranges.speed).astype(np.float32)


def gaussian_random_field(shape: tuple[int, ...], correlation_length: float, rng: np.random.Generator) -> np.ndarray:
    """Normal deviates of mean 0 and variance 1 with correlation exp(-(r / correlation_length)^2), lengths in cells.

    White noise filtered by the root of the spectrum exp(-(k correlation_length)^2 / 4) on a torus three correlation
    lengths longer than ``shape``, across which less than 2e-4 of the correlation wraps around.
    """
    torus = [torus_edge(cells, correlation_length) for cells in shape]
    frequencies = [np.fft.fftfreq(n) for n in torus[:-1]] + [np.fft.rfftfreq(torus[-1])]
    squared = sum(f**2 for f in np.meshgrid(*frequencies, indexing="ij", sparse=True))
    response = np.exp(-((2 * math.pi * correlation_length) ** 2) / 8 * squared)
    axes = range(len(torus))
    field = np.fft.irfftn(np.fft.rfftn(rng.standard_normal(torus)) * response, torus, axes)
    twice = np.full(response.shape[-1], 2.0)  # rfft keeps half of the spectrum
    twice[0] = 1.0
    if torus[-1] % 2 == 0:
        twice[-1] = 1.0
    variance = float((response**2 * twice).sum()) / math.prod(torus)
    return field[tuple(slice(cells) for cells in shape)] / math.sqrt(variance)


def torus_edge(cells: int, correlation_length: float) -> int:
    """Cells along the torus that a field of ``cells`` is cut out of."""
    return cells + math.ceil(3 * correlation_length)


def _draw_random_speed(cells: int, ranges: RockRanges, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian random field mapped onto a drawn part of the range of speeds: every speed in it is equally likely."""
    low, high = ranges.speed
    width = (high - low) * rng.uniform(0.3, 1.0)
    slowest = rng.uniform(low, high - width)
    length = rng.uniform(*ranges.correlation_length)
    return slowest + width * ndtr(gaussian_random_field((cells,) * 3, length, rng))


def _draw_layers(medium: Medium, cells: int, ranges: RockRanges, rng: np.random.Generator) -> np.ndarray:
    """Layers of uneven thickness, faster with depth on the whole, bent and cut as ``medium`` says."""
    x, y, z = np.meshgrid(*[(np.arange(cells) + 0.5) / cells] * 3, indexing="ij")
    depth = z
    if medium in NUM_FAULTS:
        fewest, most = NUM_FAULTS[medium]
        depth = z + _fault_throw(x, y, z, int(rng.integers(fewest, most + 1)), rng)
    num_layers = int(rng.integers(ranges.num_layers[0], ranges.num_layers[1] + 1))
    speeds = _layer_speeds(ranges.speed, num_layers, rng)
    thickness = rng.uniform(0.5, 1.5, num_layers)
    interfaces = np.cumsum(thickness)[:-1] / thickness.sum()
    fold, fading = np.zeros_like(x), 0.0
    if medium in FOLD_HEIGHT:
        fold, fading = _fold(x, y, FOLD_HEIGHT[medium], rng), rng.uniform()
    compressibility = np.full_like(z, speeds[0] ** -2)
    for upper, lower, interface in zip(speeds[:-1], speeds[1:], interfaces, strict=True):
        below = np.clip((depth - interface - fold * (1 - fading * interface)) * cells + 0.5, 0, 1)
        compressibility += below * (lower**-2 - upper**-2)
    return compressibility**-0.5


def _layer_speeds(limits: tuple[float, float], num_layers: int, rng: np.random.Generator) -> np.ndarray:
    low, high = limits
    top, bottom = low + (high - low) * rng.uniform([0.0, 0.5], [0.5, 1.0])
    scatter = 0.1 * (high - low) * rng.standard_normal(num_layers)
    return (np.linspace(top, bottom, num_layers) + scatter).clip(low, high)


def _fold(x: np.ndarray, y: np.ndarray, height: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth undulation of a few percent of the box."""
    fold = np.zeros_like(x)
    for _ in range(3):
        wave_x, wave_y = rng.uniform(-1.5, 1.5, 2)
        fold += height * rng.standard_normal() * np.cos(2 * math.pi * (wave_x * x + wave_y * y + rng.uniform()))
    return fold


def _fault_throw(x: np.ndarray, y: np.ndarray, z: np.ndarray, num_faults: int, rng: np.random.Generator) -> np.ndarray:
    """How far rock has slipped along steep planes of random strike, as a share of the box."""
    throw = np.zeros_like(x)
    for _ in range(num_faults):
        strike, dip = rng.uniform(0, 2 * math.pi), rng.uniform(math.radians(50), math.radians(85))
        along = math.cos(strike) * (x - rng.uniform(0.3, 0.7)) + math.sin(strike) * (y - rng.uniform(0.3, 0.7))
        throw += np.where(along * math.tan(dip) > z - 0.5, rng.uniform(-0.15, 0.15), 0.0)
    return throw
