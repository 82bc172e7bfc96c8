"""Where in wavenumber a decoded field errs, and how much of the truth's energy it keeps there."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from shodh.fields import Grid
from shodh.physics.spectra import fourier_modes, mode_wavenumbers, octave_of, shell_of, sum_by_bin

EMPTY = 1e-12  # of a field's energy: less is the round-off of FP32 amplitudes, (8 eps)^2, and gives no ratio


class SpectrumRows(NamedTuple):
    """Energy of truth, decoded field and error, per snapshot and component, by octave and by shell of wavenumber.

    The last octave and the last shell hold what lies beyond Nyquist.
    """

    octaves: Float[Tensor, "b 3 f k"]
    shells: Float[Tensor, "b 3 f s"]


def sample_spectrum(truth: Tensor, decoded: Tensor, grid: Grid) -> SpectrumRows:
    on_faces = truth.shape[1] == 3
    true_modes, modes = (fourier_modes(field, grid.boundary, on_faces=on_faces) for field in (truth, decoded))
    energies = torch.stack([m.abs().square() for m in (true_modes, modes, modes - true_modes)], 1)
    wavenumber = mode_wavenumbers(grid.shape, grid.boundary, truth.device)
    num_octaves, num_shells = _num_octaves(grid), _num_shells(grid)
    both = octave_of(wavenumber, num_octaves) * (num_shells + 1) + shell_of(wavenumber, num_shells)
    sums = sum_by_bin(energies.flatten(1, 2), both, (num_octaves + 1) * (num_shells + 1))
    sums = sums.unflatten(1, energies.shape[1:3]).unflatten(-1, (num_octaves + 1, num_shells + 1)).cpu()
    return SpectrumRows(sums.sum(-1), sums.sum(-2))


def _num_octaves(grid: Grid) -> int:
    return max(1, int(math.log2(min(grid.shape))) - 1)  # the lowest ends at 2 waves in the box's shortest axis


def _num_shells(grid: Grid) -> int:
    return min(grid.shape) // 2


def summarise_octaves(spectra: Mapping[str, SpectrumRows], grid: Grid) -> dict[str, Any]:
    """Per field and octave: energy of the error and of the decoded field over the truth's, and the truth's share.

    Energy alone may be noise in the right place: ``correlation``, of modes, says how much of it is the truth's.
    """
    num = _num_octaves(grid)
    result: dict[str, Any] = {"upper_wavenumber_over_nyquist": [2.0 ** (k + 1 - num) for k in range(num)]}
    sums = {name: rows.octaves.sum(0) for name, rows in spectra.items()}
    fields = {name: s.sum(1) for name, s in sums.items()}
    fields |= {name: sums["velocity"][:, i] for i, name in enumerate(("velocity_x", "velocity_y", "velocity_z"))}
    for name, (truth, decoded, error) in fields.items():
        empty = truth <= EMPTY * truth.sum()
        correlation = (truth + decoded - error) / (2 * (truth * decoded).sqrt()).clamp_min(1e-300)
        ratios = {"error": error / truth, "energy_ratio": decoded / truth, "correlation": correlation}
        values = {key: ratio.masked_fill(empty, math.nan).tolist() for key, ratio in ratios.items()}
        values = {key: [None if math.isnan(v) else v for v in row] for key, row in values.items()}
        values["true_share"] = (truth / truth.sum().clamp_min(1e-300)).tolist()
        result[name] = {key: row[:num] for key, row in values.items()}
        result[name]["beyond_nyquist"] = {key: row[num] for key, row in values.items()}
    return result


def summarise_shells(spectra: Mapping[str, SpectrumRows], grid: Grid) -> dict[str, Any]:
    """Energy per shell, in units of the truth's whole, of velocity: truth, decoded, error and the baselines'."""
    num = _num_shells(grid)
    truth, decoded, error = spectra["velocity"].shells.sum((0, 2))[:, :num]
    curves = {"truth": truth, "decoded": decoded, "error": error}
    curves |= {n: rows.shells.sum((0, 2))[1, :num] for n, rows in spectra.items() if n not in ("velocity", "pressure")}
    total = spectra["velocity"].shells[:, 0].sum().clamp_min(1e-300)
    return {"wavenumber_over_nyquist": [(s + 0.5) / num for s in range(num)]} | {
        name: (energy / total).tolist() for name, energy in curves.items()
    }
