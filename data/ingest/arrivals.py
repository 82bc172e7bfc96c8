"""Whether a gather belongs to its model: the direct wave along the receivers against the speed just beneath them.

In a uniform medium a line source s(t) gives p(t) ~ integral of s(t - T cosh u) du, u from 0 to arccosh(t / T), where T
is the travel time (the 2-D Green function 1 / sqrt(t^2 - T^2)). That decides when a trace passes a tenth of its peak.
Over real models T is the slowness summed along the straight line, which holds a few receivers from the shot: farther
off, waves through faster rock below come first. A time axis that is reversed, z and x swapped, depth reversed, a gather
of another model and speeds in another unit all come too early or too late.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from data.simulate.wave import ricker

OFFSETS = range(2, 9)  # receivers from the shot; nearer, the trace is the source itself
ONSET = 0.1  # of the trace's peak: measured best of 0.05, 0.1 and 0.2
NODES = 400  # of the integral over u, by the midpoint rule


class Survey(NamedTuple):
    """What the first arrivals depend on besides the rock."""

    spacing: float  # m, of grid and receivers
    time_step: float  # s; sample n is at (n + 1) time steps
    frequency: float  # Hz, of the Ricker wavelet, which peaks 1.1 / frequency after the shot
    row: int  # of sources and receivers in the model
    columns: tuple[int, ...]  # of the shots

    @property
    def num_samples(self) -> int:
        """Samples in which the direct wave passes the farthest receiver looked at, in the slowest rock [1400 m/s]."""
        return int((2.2 / self.frequency + OFFSETS[-1] * self.spacing / 1400) / self.time_step) + 1


def arrival_errors(
    gather: Float[np.ndarray, "s t r"], speed: Float[np.ndarray, "z x"], survey: Survey, table: np.ndarray
) -> float:
    """Samples that the direct wave is off the model's uppermost speeds: RMS over shots of the median over receivers.

    ``table`` is that of ``onset_table``.
    """
    slowness = survey.spacing / speed[survey.row].astype(np.float64) / survey.time_step  # samples per receiver
    along = np.concatenate([[0.0], np.cumsum((slowness[1:] + slowness[:-1]) / 2)])
    onsets = _onset(gather)
    found = []
    for shot, column in enumerate(survey.columns):
        receivers = [r for k in OFFSETS for r in (column - k, column + k) if 0 <= r < gather.shape[-1]]
        travel = np.abs(along[receivers] - along[column])
        expected = np.interp(travel, np.arange(1, len(table) + 1), table)
        found.append(float(np.median(onsets[shot, receivers] - expected)))
    return float(np.sqrt(np.mean(np.square(found))))


@lru_cache
def onset_table(survey: Survey) -> np.ndarray:
    """In which sample the direct wave passes ``ONSET`` of its peak, for travel times of 1, 2, ... samples."""
    times = np.arange(1, survey.num_samples + 1)
    traces = np.stack([_direct_wave(travel, times, survey) for travel in range(1, survey.num_samples)], -1)
    return _onset(traces[None])[0].astype(np.float64)


def _direct_wave(travel: int, times: np.ndarray, survey: Survey) -> np.ndarray:
    """The direct wave at ``times``, up to a factor; all in samples."""
    upper = np.arccosh(np.maximum(times / travel, 1.0))[:, None]
    delay = travel * np.cosh((np.arange(NODES) + 0.5) / NODES * upper)
    since = (times[:, None] - delay) * survey.time_step
    return ricker(since - 1.1 / survey.frequency, survey.frequency).sum(1, where=since >= 0) * upper[:, 0] / NODES


def _onset(traces: np.ndarray) -> np.ndarray:
    """First sample (s, r) of traces (s, t, r) beyond ``ONSET`` of their peak."""
    size = np.abs(traces)
    return np.argmax(size > ONSET * size.max(1, keepdims=True), 1)
