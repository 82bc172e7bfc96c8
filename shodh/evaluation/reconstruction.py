"""How good decoded fields are, as a physicist would judge them: errors, spectra, gradients, walls and solids.

``sample_trajectory`` measures the decoded fields of one trajectory, ``summarise_reconstruction`` those of a domain's
together. All is normalised, on ``grid.relative``, and streams a few snapshots at a time.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from shodh.evaluation.permeability import PorousRows, find_fluid, sample_porous, summarise_porous
from shodh.evaluation.rollout import SILENT
from shodh.evaluation.spectral_error import SpectrumRows, sample_spectrum, summarise_octaves, summarise_shells
from shodh.evaluation.velocity_gradients import GradientRows, sample_gradients, summarise_gradients
from shodh.evaluation.wall_shear import WallShear, sample_wall_shear, summarise_wall_shear
from shodh.fields import DecodedFields, Grid
from shodh.physics.spectra import vrmse

Baselines = Mapping[str, Callable[[Tensor], Tensor]]  # name -> reconstruction of velocity

CELLS_AT_ONCE = 2**18  # 8 snapshots of 32^3: what transforms and gradients of one chunk are held for
FIELDS = ("velocity", "velocity_x", "velocity_y", "velocity_z", "pressure")


class TrueFields(NamedTuple):
    """One trajectory as it is: normalised fields, and the medium as stored (1 in pores and 0 in the solid)."""

    velocity: Float[Tensor, "t 3 x y z"]
    pressure: Float[Tensor, "t 1 x y z"]
    medium: Float[Tensor, "x y z"]


class TrajectoryRows(NamedTuple):
    """All that is kept of one trajectory; what does not apply to its medium or walls is None or empty."""

    vrmse: Float[Tensor, "t 5"]  # of velocity, its components and pressure
    deviation: Float[Tensor, "t 5"]  # true standard deviation of the same
    baseline_vrmse: dict[str, Float[Tensor, "t"]]  # of velocity as the baselines reconstruct it
    spectra: dict[str, SpectrumRows]  # "velocity", "pressure", and velocity as the baselines reconstruct it
    gradients: tuple[GradientRows, GradientRows]  # true, decoded
    walls: list[list[WallShear]]
    porous: PorousRows | None


def sample_trajectory(
    decoded: DecodedFields, fields: TrueFields, grid: Grid, baselines: Baselines | None = None
) -> TrajectoryRows:
    """Measurements of one trajectory that has been decoded already, a few snapshots at a time."""
    size = _chunk_size(grid)
    chunks = (DecodedFields(*parts) for parts in zip(*(field.split(size) for field in decoded), strict=True))
    pairs = zip(chunks, _chunks(fields, grid), strict=True)
    return _join([_sample_chunk(guess, truth, grid, baselines or {}) for guess, truth in pairs])


def summarise_reconstruction(trajectories: list[TrajectoryRows], grid: Grid) -> dict[str, Any]:
    """Measurements as JSON holds them; what does not apply to a domain is None.

    ``vrmse``: mean over snapshots that are not silent, per field and velocity component; ``baseline_vrmse``: that of
    velocity, per baseline, over the same; ``octaves`` and ``spectrum``: energies pooled over snapshots, those of the
    error and of the decoded field over the truth's; ``gradients``, ``wall_shear``, ``permeability``,
    ``flux_in_solid``: as the modules named so say.
    """
    if not trajectories:
        raise ValueError("trajectories: none to measure. Pass the held-out ones.")
    spectra = {
        name: SpectrumRows(*(torch.cat(parts) for parts in zip(*(t.spectra[name] for t in trajectories), strict=True)))
        for name in trajectories[0].spectra
    }
    octaves = summarise_octaves(spectra, grid)
    porous = [t.porous for t in trajectories if t.porous is not None]
    true_gradients, decoded_gradients = (
        GradientRows(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
        for rows in zip(*map(_loud_gradients, trajectories), strict=True)
    )
    absent = {"permeability": None, "flux_in_solid": None}
    return {
        "num_snapshots": sum(len(t.vrmse) for t in trajectories),
        "vrmse": {name: _mean_of_loud(trajectories, lambda t, i=i: t.vrmse[:, i], i) for i, name in enumerate(FIELDS)},
        "baseline_vrmse": {
            name: _mean_of_loud(trajectories, lambda t, name=name: t.baseline_vrmse[name], 0)
            for name in trajectories[0].baseline_vrmse
        },
        "octaves": octaves,
        "highest_octave_energy_ratio": octaves["velocity"]["energy_ratio"][-1],
        "spectrum": summarise_shells(spectra, grid),
        "gradients": summarise_gradients(true_gradients, decoded_gradients),
        "wall_shear": summarise_wall_shear([walls for t in trajectories for walls in t.walls]) or None,
    } | (summarise_porous(porous) if porous else absent)


def _chunk_size(grid: Grid) -> int:
    return max(1, CELLS_AT_ONCE // math.prod(grid.shape))


def _chunks(fields: TrueFields, grid: Grid) -> Iterator[TrueFields]:
    size = _chunk_size(grid)
    for velocity, pressure in zip(fields.velocity.split(size), fields.pressure.split(size), strict=True):
        yield TrueFields(velocity, pressure, fields.medium)


def _sample_chunk(decoded: DecodedFields, fields: TrueFields, grid: Grid, baselines: Baselines) -> TrajectoryRows:
    truth, guess = (torch.cat([f.velocity, f.pressure], 1) for f in (fields, decoded))
    true_velocity, velocity = fields.velocity, decoded.velocity
    fluid = find_fluid(fields.medium.to(velocity.device))
    reconstructed = {name: reconstruct(true_velocity) for name, reconstruct in baselines.items()}
    pairs = {"velocity": (true_velocity, velocity), "pressure": (fields.pressure, decoded.pressure)}
    pairs |= {name: (true_velocity, guess) for name, guess in reconstructed.items()}
    return TrajectoryRows(
        vrmse=_over_fields(vrmse, guess, truth),
        deviation=_over_fields(lambda _, field: _deviation(field), guess, truth),
        baseline_vrmse={name: vrmse(guess, true_velocity).cpu() for name, guess in reconstructed.items()},
        spectra={name: sample_spectrum(*pair, grid) for name, pair in pairs.items()},
        gradients=(
            sample_gradients(true_velocity, true_velocity, grid, fluid),
            sample_gradients(velocity, true_velocity, grid, fluid),
        ),
        walls=[sample_wall_shear(true_velocity, velocity, grid)],
        porous=None if fluid is None else sample_porous(true_velocity, velocity, fluid, grid),
    )


def _mean_of_loud(
    trajectories: list[TrajectoryRows], errors: Callable[[TrajectoryRows], Tensor], field: int
) -> float | None:
    """Mean over the snapshots in which a field, numbered as in ``FIELDS``, is not silent; None if it always is."""
    mean = torch.cat([errors(t)[_loud(t.deviation)[:, field]] for t in trajectories]).mean().item()
    return mean if math.isfinite(mean) else None


def _loud(deviation: Float[Tensor, "t f"]) -> Tensor:
    """Where a field is not silent beside its largest deviation in the trajectory."""
    return deviation > SILENT * deviation.max(0).values


def _loud_gradients(rows: TrajectoryRows) -> tuple[GradientRows, GradientRows]:
    loud = _loud(rows.deviation)[:, 0]
    true_rows, rows_decoded = (GradientRows(*(part[loud] for part in parts)) for parts in rows.gradients)
    return true_rows, rows_decoded


def _over_fields(measure: Callable[[Tensor, Tensor], Tensor], guess: Tensor, truth: Tensor) -> Float[Tensor, "b 5"]:
    """A measurement of velocity, of each of its components and of pressure."""
    parts = (slice(0, 3), *(slice(i, i + 1) for i in range(4)))
    return torch.stack([measure(guess[:, part], truth[:, part]) for part in parts], 1).double().cpu()


def _deviation(field: Float[Tensor, "b f x y z"]) -> Float[Tensor, "b"]:
    return field.double().var(dim=(-3, -2, -1), correction=0).mean(1).sqrt()


def _join(parts: list[TrajectoryRows]) -> TrajectoryRows:
    def joined(rows: list[Any]) -> Any:
        return type(rows[0])(*(torch.cat(columns) for columns in zip(*rows, strict=True)))

    porous = [part.porous for part in parts if part.porous is not None]
    return TrajectoryRows(
        vrmse=torch.cat([part.vrmse for part in parts]),
        deviation=torch.cat([part.deviation for part in parts]),
        baseline_vrmse={n: torch.cat([part.baseline_vrmse[n] for part in parts]) for n in parts[0].baseline_vrmse},
        spectra={name: joined([part.spectra[name] for part in parts]) for name in parts[0].spectra},
        gradients=(joined([part.gradients[0] for part in parts]), joined([part.gradients[1] for part in parts])),
        walls=[walls for part in parts for walls in part.walls],
        porous=joined(porous) if porous else None,
    )
