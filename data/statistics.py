"""The scale of each field of a domain, measured once on its training trajectories.

Velocity and pressure are only scaled, never shifted: zero stays zero, so walls stay walls and a divergence-free
velocity stays so. The medium is shifted and scaled.
"""

import math
from dataclasses import dataclass

import numpy as np

from data.reader import Store


@dataclass(frozen=True, kw_only=True)
class FieldStatistics:
    """normalised velocity = velocity / velocity_scale, pressure alike; normalised medium = (medium - mean) / scale."""

    velocity_scale: float  # root mean square of what deviates from each snapshot's mean flow, three components pooled
    pressure_scale: float  # root mean square
    medium_mean: float
    medium_scale: float  # standard deviation; 1 for a medium that is constant

    def __post_init__(self) -> None:
        for name in ("velocity_scale", "pressure_scale", "medium_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value}: must be positive and finite. Is the field constant, or zero?")

    def normalise_medium(self, medium: np.ndarray) -> None:
        """(medium - mean) / scale, in place."""
        medium -= np.float32(self.medium_mean)
        medium /= np.float32(self.medium_scale)


def measure_statistics(store: Store, max_snapshots: int = 512) -> FieldStatistics:
    """Statistics of the training split, from at most ``max_snapshots`` snapshots spread evenly over it.

    Means are over the volume, whatever the widths of the cells; sums run in FP64, one snapshot in memory at a time.
    Raises ValueError when velocity or pressure is zero everywhere.
    """
    of_cells, of_faces = _shares(store.grid.cell_volume), _shares(store.grid.face_area * store.grid.face_distance)
    trajectories = store.trajectories("train")
    states = [(i, t) for i in trajectories for t in range(store.num_snapshots)]
    velocity = pressure = 0.0
    chosen = _spread(len(states), max_snapshots)
    for n in chosen:
        u, p = store.snapshot(*states[n])
        velocity += np.mean([_variance(component, share) for component, share in zip(u, of_faces, strict=True)])
        pressure += _moments(p, of_cells)[1]
    media = [_moments(store.medium(trajectories[n]), of_cells) for n in _spread(len(trajectories), max_snapshots)]
    mean, square = np.mean(media, axis=0)
    variance = float(square - mean**2)
    constant = variance <= 1e-12 * float(square)  # FP32 values, so a smaller relative variance is round-off
    try:
        return FieldStatistics(
            velocity_scale=math.sqrt(velocity / len(chosen)),
            pressure_scale=math.sqrt(pressure / len(chosen)),
            medium_mean=float(mean),
            medium_scale=1.0 if constant else math.sqrt(variance),
        )
    except ValueError as error:
        raise ValueError(f"store={store.path}: {error}") from None


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``range(count)``, evenly spaced."""
    most = min(count, most)
    return [(2 * k + 1) * count // (2 * most) for k in range(most)]


def _shares(measure: np.ndarray) -> np.ndarray:
    """Weights (..., x, y, z) of mean 1; of size 1 along axes on which nothing varies."""
    return measure / measure.mean((-3, -2, -1), keepdims=True)


def _moments(values: np.ndarray, share: np.ndarray) -> tuple[float, float]:
    """Weighted mean of the values (x, y, z) and of their squares."""
    wide = values.astype(np.float64)
    return float((wide * share).mean()), float((np.square(wide) * share).mean())


def _variance(values: np.ndarray, share: np.ndarray) -> float:
    wide = values.astype(np.float64)
    deviation = wide - (wide * share).mean()
    return float((np.square(deviation) * share).mean())
