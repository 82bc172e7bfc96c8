"""Errors and spectra of fields: VRMSE, band-wise energy, energy of every Fourier mode."""

import math

import torch
from einops import reduce
from jaxtyping import Float, Int, Num
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


def fourier_modes(
    field: Float[Tensor, "b f x y z"], boundary: tuple[Boundary, ...], *, on_faces: bool = False
) -> Num[Tensor, "b f x y z"]:
    """Amplitudes of the modes of each component less its box mean: the sum of |amplitude|^2 is the mean square.

    Waves along periodic axes; along walled and open ones cosines, as if the field were continued by its mirror image.
    With ``on_faces``, component i of 3 sits on lower faces along axis i and is 0 in walls there: along it sines, and
    its box mean, which no wall lets through, stays in. The mirror image of a no-slip profile has a kink at the wall,
    whose energy falls as wavenumber^-4: of developed turbulence in a channel it is some percent of the highest octave.
    """
    periodic = [axis - 3 for axis in range(3) if boundary[axis] == "periodic"]
    modes = []
    for i, component in enumerate(field.unbind(1)):
        normal = on_faces and boundary[i] == "wall"
        values = component if normal else component - reduce(component, "b x y z -> b 1 1 1", "mean")
        for axis in range(3):
            if boundary[axis] != "periodic":
                transform = _sines if normal and axis == i else _cosines
                matrix = transform(values.shape[axis - 3], values.device).to(values.dtype)
                values = (values.movedim(axis - 3, -1) @ matrix.T).movedim(-1, axis - 3)
        modes.append(torch.fft.fftn(values, dim=periodic, norm="forward") if periodic else values)
    return torch.stack(modes, 1)


def mode_wavenumbers(
    shape: tuple[int, int, int], boundary: tuple[Boundary, ...], device: torch.device | str = "cpu"
) -> Float[Tensor, "x y z"]:
    """Length of the wave vector of every mode of ``fourier_modes``, each axis in units of its Nyquist wavenumber."""
    squares = torch.zeros(1, 1, 1, dtype=torch.float64, device=device)
    for axis, n in enumerate(shape):
        if boundary[axis] == "periodic":
            k = torch.fft.fftfreq(n, d=0.5, dtype=torch.float64, device=device)
        else:
            k = torch.arange(n, dtype=torch.float64, device=device) / n
        squares = squares + k.square().reshape([-1 if a == axis else 1 for a in range(3)])
    return squares.sqrt()


def octave_of(wavenumber: Float[Tensor, "*k"], num_octaves: int) -> Int[Tensor, "*k"]:
    """The octave of wavenumbers in units of Nyquist: k of K is (2^(k-K), 2^(k+1-K)], the first also all below.

    So the highest, K - 1, is (1/2, 1]; what lies beyond Nyquist, in the corners of the box of wave vectors, is K.
    """
    octave = num_octaves - 1 + torch.ceil(torch.log2(wavenumber.clamp_min(1e-9)) - 1e-9)  # 1e-9: 1/2 may be rounded up
    return octave.clamp(0, num_octaves).long()


def shell_of(wavenumber: Float[Tensor, "*k"], num_shells: int) -> Int[Tensor, "*k"]:
    """The shell of wavenumbers in units of Nyquist: s of S is (s/S, (s+1)/S]; beyond Nyquist S."""
    return (torch.ceil(wavenumber * num_shells - 1e-9) - 1).clamp(0, num_shells).long()


def sum_by_bin(
    values: Float[Tensor, "b f x y z"], index: Int[Tensor, "x y z"], num_bins: int
) -> Float[Tensor, "b f n"]:
    """Sums, in FP64, of the values whose index is the bin's."""
    rows = [torch.bincount(index.flatten(), row, num_bins) for row in values.double().flatten(2).flatten(0, 1)]
    return torch.stack(rows).unflatten(0, values.shape[:2])


def _cosines(n: int, device: torch.device) -> Float[Tensor, "n n"]:
    """Modes of samples in the middle of n cells (DCT-II), one a row, such that squares of amplitudes sum to a mean."""
    k = torch.arange(n, dtype=torch.float64, device=device)
    rows = torch.cos(math.pi / n * k[:, None] * (k[None, :] + 0.5)) * (math.sqrt(2) / n)
    rows[0] /= math.sqrt(2)
    return rows


def _sines(n: int, device: torch.device) -> Float[Tensor, "n n"]:
    """Modes of samples on the lower faces of n cells between walls (DST-I); row and column 0 are 0."""
    k = torch.arange(n, dtype=torch.float64, device=device)
    return torch.sin(math.pi / n * k[:, None] * k[None, :]) * (math.sqrt(2) / n)
