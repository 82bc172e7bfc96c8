"""Errors and spectra of fields: VRMSE and band-wise energy."""

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from shodh.fields import Boundary


def vrmse(prediction: Float[Tensor, "b f x y z"], truth: Float[Tensor, "b f x y z"]) -> Float[Tensor, "b"]:
    """Root mean square error over the standard deviation of the truth, per sample, components pooled.

    sqrt(mean |p - t|^2 / mean |t - mean(t)|^2), the mean taken per component over space: predicting the mean gives 1.
    Source: Ohana et al., The Well (2024), section 4.
    """
    error = reduce((prediction - truth).double() ** 2, "b f x y z -> b", "mean")
    centred = truth.double() - reduce(truth.double(), "b f x y z -> b f 1 1 1", "mean")
    return torch.sqrt(error / reduce(centred**2, "b f x y z -> b", "mean").clamp_min(1e-30))


def band_energy(
    field: Float[Tensor, "b f x y z"], boundary: tuple[Boundary, ...], num_bands: int
) -> Float[Tensor, "b k"]:
    """Energy in octaves of wavenumber, components summed; the last band ends at the grid's Nyquist wavenumber.

    Band k of K holds |kappa| / Nyquist in (2^(k-K), 2^(k-K+1)], the first also all below; corners beyond Nyquist go to
    the last. A walled or open axis is mirrored first, so that its jump across the box does not pollute the high bands.
    """
    values = field
    for axis in range(3):
        if boundary[axis] != "periodic":
            values = torch.cat([values, values.flip(axis - 3)], axis - 3)
    energy = torch.fft.fftn(values, dim=(-3, -2, -1), norm="forward").abs() ** 2
    wavenumber = torch.zeros(energy.shape[-3:], device=field.device)
    for axis in range(3):
        k = torch.fft.fftfreq(energy.shape[axis - 3], d=0.5, device=field.device)  # in units of Nyquist
        wavenumber = wavenumber + (k**2).reshape([-1 if a == axis else 1 for a in range(3)])
    band = (num_bands + torch.ceil(torch.log2(wavenumber.sqrt().clamp_min(1e-9))) - 1).clamp(0, num_bands - 1).long()
    per_cell = reduce(energy, "b f x y z -> b (x y z)", "sum")
    return torch.zeros(len(field), num_bands, device=field.device, dtype=per_cell.dtype).index_add(
        1, band.flatten(), per_cell
    )
