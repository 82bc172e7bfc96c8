"""Shot gathers of a 2-D acoustic survey along the surface: what OpenFWI records over a velocity map.

    (1 / c^2) p_tt = laplace(p) + s(t) delta_ij,    absorbing on all four sides (no free surface)

stepped exactly as OpenFWI steps it (leapfrog, 4th order in space, no substeps), in its units and sign: a source adds
(c dt)^2 s(t) to its cell, the Ricker wavelet begins with the recording and peaks at sample 73, and sample n is the
pressure after step n + 1. Sources and receivers lie in the second row of cells. Set-up: C. Deng et al.,
OpenFWI, NeurIPS 2022, arXiv:2111.02926; its constants are in github.com/lanl/OpenFWI, dataset_config.json.

Where it differs: OpenFWI damps waves in 120 cells around the map, which send back up to 2 percent of a gather (L2)
where fast and slow rock meet; a convolutional PML does so here and sends back 0.01 percent. Solver: deepwave
(A. Richardson, doi:10.5281/zenodo.3829886).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import deepwave
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from data.simulate.wave import ricker

ABSORBING_CELLS = 20
ABSORBED_BEST = 1 / 3  # of the wavelet's peak frequency: measured best of 1/3, 1 and 2
PADDING = 4  # cells of the same rock around the map, so that no source's stencil reaches into the absorbing layer
LARGEST_COURANT = 0.86  # c dt sqrt(2) / h; leapfrog with 4th-order differences in 2-D is stable up to sqrt(3) / 2


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Where and how is shot and recorded; the defaults are OpenFWI's."""

    spacing: float = 10.0  # m
    time_step: float = 1e-3  # s
    num_samples: int = 1000
    num_shots: int = 5  # spread evenly from the first to the last column
    frequency: float = 15.0  # Hz, peak of the Ricker wavelet
    row: int = 1  # of sources and receivers: 10 m depth
    fastest: float = 4500.0  # m/s, bounds every wave speed

    def __post_init__(self) -> None:
        courant = self.fastest * self.time_step * math.sqrt(2) / self.spacing
        if courant > LARGEST_COURANT:
            raise ValueError(
                f"time_step={self.time_step}: unstable at {self.fastest} m/s on a {self.spacing} m grid. "
                f"Use at most {self.time_step * LARGEST_COURANT / courant:.3g} s."
            )

    @property
    def wavelet(self) -> np.ndarray:
        """The source function s(t), FP64 (num_samples,): a Ricker wavelet cut off 1.1 periods from its peak."""
        half_length = math.floor(2.2 / self.frequency / self.time_step / 2)
        sample = np.arange(self.num_samples) - half_length
        return np.where(np.abs(sample) <= half_length, ricker(sample * self.time_step, self.frequency), 0.0)

    def shot_columns(self, num_columns: int) -> list[int]:
        """Columns of the sources; a half is rounded to even, as OpenFWI does: 0, 17, 34, 52, 69 of 70."""
        return [round(c) for c in np.linspace(0, num_columns - 1, self.num_shots)]


def record_gathers(wave_speed: Float[Tensor, "b z x"], survey: Survey) -> Float[Tensor, "b s t x"]:
    """Pressure at every column of ``survey.row``, for each map [m/s] and shot, on the device of ``wave_speed``.

    Raises ValueError for speeds that are not within (0, survey.fastest].
    """
    if not bool(((wave_speed > 0) & (wave_speed <= survey.fastest)).all()):
        raise ValueError(f"wave_speed: not all within (0, {survey.fastest}] m/s. Mend the map or raise `fastest`.")
    num_maps, _, num_columns = wave_speed.shape
    device = wave_speed.device
    padded = pad(wave_speed[:, None], (PADDING,) * 4, mode="replicate")[:, 0]
    sources = _surface_cells(survey, survey.shot_columns(num_columns)).to(device)
    receivers = _surface_cells(survey, range(num_columns)).to(device)
    num_traces = num_maps * len(sources)
    # one sample more, since deepwave's sample n is the wave before step n + 1
    wavelet = torch.from_numpy(np.append(survey.wavelet, 0.0)).to(device, wave_speed.dtype)
    with torch.no_grad():
        recorded = deepwave.scalar(
            padded.repeat_interleave(len(sources), 0),
            survey.spacing,
            survey.time_step,
            source_amplitudes=-wavelet.expand(num_traces, 1, -1),  # deepwave has its source on the left-hand side
            source_locations=sources[:, None].repeat(num_maps, 1, 1),
            receiver_locations=receivers.expand(num_traces, -1, -1),
            accuracy=4,
            pml_width=ABSORBING_CELLS,
            pml_freq=survey.frequency * ABSORBED_BEST,
            max_vel=survey.fastest,
            courant_number=LARGEST_COURANT,
        ).receiver_amplitudes
    return recorded[..., 1:].transpose(1, 2).unflatten(0, (num_maps, len(sources))).contiguous()


def _surface_cells(survey: Survey, columns: Iterable[int]) -> Int[Tensor, "n 2"]:
    """(row, column) of each within the padded map."""
    return torch.tensor([[survey.row + PADDING, column + PADDING] for column in columns])
