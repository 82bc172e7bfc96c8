"""What readers who take the stored velocities for something else would report: derivatives that do not match them.

Each gives, from the stored array in FP64, a divergence (one component) or curl (three) per unit of volume or area.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shodh.fields import Grid
from shodh.physics.exterior import (
    Boundaries,
    curl_of_faces,
    divergence_of_faces,
    mismatched_curl,
    mismatched_divergence,
)

CENTRAL = "central differences of cell-centred averages"
RESCALED = "one-sided differences of velocity rescaled in float32"
SPECTRAL = "spectral derivatives of face values taken for cell values"


def careless_divergences(flux: Tensor, grid: Grid, velocity_scale: float) -> dict[str, Tensor]:
    """Of stored fluxes (b, 3, x, y, z), by operator; the spectral one only where every axis is periodic."""
    area, volume = (torch.from_numpy(a).to(flux.device) for a in (grid.face_area, grid.cell_volume))

    def divergence(operator: Callable[[Tensor, Boundaries], Tensor], values: Tensor) -> Tensor:
        return operator(values.double(), grid.boundary).unsqueeze(1) / volume

    velocity = _rescale(flux, area, velocity_scale)
    found = {
        CENTRAL: divergence(mismatched_divergence, flux),
        RESCALED: divergence(divergence_of_faces, velocity * area),
    }
    if _is_spectral(grid):
        slopes = [_spectral_slope(flux.double()[:, i] / area[i], i, grid) for i in range(3)]
        found[SPECTRAL] = torch.stack(slopes).sum(0).unsqueeze(1)
    return found


def careless_curls(circulation: Tensor, grid: Grid, velocity_scale: float) -> dict[str, Tensor]:
    """Of stored circulations (b, 3, x, y, z), by operator; see ``careless_divergences``."""
    distance = torch.from_numpy(grid.face_distance).to(circulation.device)
    loop_area = torch.from_numpy(grid.face_distance.prod(0) / grid.face_distance).to(circulation.device)
    velocity = _rescale(circulation, distance, velocity_scale)
    found = {
        CENTRAL: mismatched_curl(circulation.double(), grid.boundary) / loop_area,
        RESCALED: curl_of_faces(velocity * distance, grid.boundary) / loop_area,
    }
    if _is_spectral(grid):
        v = (circulation.double() / distance).unbind(1)
        turns = [
            _spectral_slope(v[(i + 2) % 3], (i + 1) % 3, grid) - _spectral_slope(v[(i + 1) % 3], (i + 2) % 3, grid)
            for i in range(3)
        ]
        found[SPECTRAL] = torch.stack(turns, 1)
    return found


def _rescale(stored: Tensor, measure: Tensor, scale: float) -> Tensor:
    """The velocity in physical units as FP32 holds it, over the scale again in FP64, so that operators compare."""
    return (stored.float() / measure.float() * scale).double() / scale


def _is_spectral(grid: Grid) -> bool:
    return all(boundary == "periodic" for boundary in grid.boundary)


def _spectral_slope(values: Tensor, axis: int, grid: Grid) -> Tensor:
    n, dim = grid.shape[axis], axis - 3
    wavenumber = 2 * torch.pi * torch.fft.rfftfreq(n, grid.mean_spacing[axis], dtype=torch.float64).to(values.device)
    if n % 2 == 0:
        wavenumber[-1] = 0.0  # the sawtooth's slope is not known
    shape = [-1 if a == axis else 1 for a in range(3)]
    return torch.fft.irfft(torch.fft.rfft(values, dim=dim) * (1j * wavenumber.reshape(shape)), n=n, dim=dim)
