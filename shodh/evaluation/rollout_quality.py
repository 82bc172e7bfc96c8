"""How good rollouts are, as a physicist would judge them: errors per step, energy, spectra, permeability, wall shear.

``measure_rollouts`` measures one held-out trajectory, ``summarise_rollouts`` a domain's trajectories together: a block
of the same shape for each forecaster, for persistence and for the tokenizer's floor.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shodh.evaluation.permeability import PorousRows, find_fluid, sample_porous, summarise_porous
from shodh.evaluation.rollout import (
    SHORT,
    SILENT,
    SPANS,
    STRUCTURE_STEPS,
    Decode,
    Predict,
    Steps,
    TrueTrajectory,
    average_present,
    forecast_steps,
    plan_steps,
)
from shodh.evaluation.spectral_error import EMPTY, sample_spectrum
from shodh.evaluation.wall_shear import WallShear, sample_wall_shear, summarise_wall_shear
from shodh.fields import NUM_GIVEN, Grid
from shodh.physics.spectra import vrmse

LOST = 1e6  # whitened latents are of order 1: larger ones, or NaN, decode to nothing
CELLS_AT_ONCE = 2**18  # 8 states of 32^3

Fields = tuple[Tensor, Tensor]  # velocity and pressure
Rows = TypeVar("Rows", bound=tuple)


class Errors(NamedTuple):
    """Of some pairs of a start and a step of one trajectory. A lost forecast is NaN."""

    step: Int[Tensor, "p"]
    loud: Bool[Tensor, "p 2"]  # whether the true velocity and pressure have a relative error worth averaging
    vrmse: Float[Tensor, "p 2"]
    energy: Float[Tensor, "p 2"]  # kinetic: true, predicted


class Structures(NamedTuple):
    """Of those of the pairs whose step is one of ``STRUCTURE_STEPS``."""

    step: Int[Tensor, "s"]
    octaves: Float[Tensor, "s 2 k"]  # energy of velocity about its mean: true, predicted
    porous: PorousRows | None
    walls: list[WallShear]


@torch.no_grad()
def measure_rollouts(
    forecasters: Mapping[str, Predict],
    decode: Decode,
    truth: TrueTrajectory,
    decoded_truth: Fields,
    grid: Grid,
    medium: Float[Tensor, "x y z"],
) -> dict[str, Any]:
    """Measurements of one trajectory by forecaster, for ``summarise_rollouts``; ``medium`` as stored.

    Beside the forecasters ``persistence``, the last given true field kept, and ``decoded_truth``, as well as a perfect
    forecast would do with this tokenizer.
    """
    steps = plan_steps(len(truth.latents))
    latents = {name: forecast_steps(predict, truth, steps) for name, predict in forecasters.items()}
    guesses: dict[str, Callable[[Tensor], Fields]] = {
        name: lambda pairs, latents=latents: decode_unless_lost(decode, latents[pairs], truth.medium)
        for name, latents in latents.items()
    }
    given, time = steps.given, steps.time
    guesses["persistence"] = lambda pairs: (truth.velocity[given[pairs]], truth.pressure[given[pairs]])
    guesses["decoded_truth"] = lambda pairs: (decoded_truth[0][time[pairs]], decoded_truth[1][time[pairs]])
    return {name: _measure_guess(guess, truth, steps, grid, medium) for name, guess in guesses.items()}


def decode_unless_lost(decode: Decode, latents: Float[Tensor, "b c x y z"], medium: Float[Tensor, "m x y z"]) -> Fields:
    """Velocity and pressure of latents of one medium, NaN where these left all bounds."""
    lost = ~(reduce(latents.abs(), "b c x y z -> b 1 1 1 1", "max") < LOST)  # true of NaN
    velocity, pressure = decode(latents.masked_fill(lost, 0), medium.expand(len(latents), *medium.shape))
    return velocity.masked_fill(lost, math.nan), pressure.masked_fill(lost, math.nan)


@torch.no_grad()
def measure_short_rollout(predict: Predict, decode: Decode, truth: TrueTrajectory) -> dict[str, float]:
    """VRMSE of the decoded velocity over the spans up to step 20, from the first given states: cheap to watch."""
    num_steps = min(SHORT, len(truth.latents) - NUM_GIVEN)
    only = Steps((0,), num_steps, torch.zeros(num_steps, dtype=torch.long), torch.arange(1, num_steps + 1))
    latents = forecast_steps(predict, truth, only)
    parts = latents.split(_states_at_once(truth))
    velocity = torch.cat([decode(part, truth.medium.expand(len(part), *truth.medium.shape))[0] for part in parts])
    loud = find_loud(truth.velocity)[only.time]
    errors = _leave_out_silent(vrmse(velocity, truth.velocity[only.time]), loud)
    means = {span: average_present([errors[k - 1] for k in steps if k <= num_steps]) for span, steps in SPANS.items()}
    return {span: mean for span, mean in means.items() if mean is not None and math.isfinite(mean)}


def summarise_rollouts(trajectories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over a domain's trajectories as JSON holds them, per forecaster, quantity and span of steps.

    ``vrmse`` and ``vrmse_pressure`` (also ``..._per_step``, None where none is measured): steps at which the true field
    is silent, such as a wave that has not started, enter no mean. ``energy_drift``: predicted over true kinetic energy
    less 1, and ``octave_energy_ratio``: the same per octave of wavenumber, not less 1; of energies averaged first.
    ``permeability`` and ``wall_shear``: relative errors as the modules named so say; None where they do not apply.
    ``lost``: share of forecasts that left all bounds. A mean that a lost one enters is None, and so is a span without a
    step. Structures are of the steps 1, 2, 5, 10, 15, 20, 30, ... 60.
    """
    means = average_present(list(trajectories))
    return {name: _drop_lost(_finish(block)) for name, block in means.items()}


def _measure_guess(
    guess: Callable[[Tensor], Fields], truth: TrueTrajectory, steps: Steps, grid: Grid, medium: Tensor
) -> dict[str, Any]:
    loud = torch.stack([find_loud(truth.velocity), find_loud(truth.pressure)], 1)
    fluid = find_fluid(medium.to(truth.velocity.device))
    errors, structures = [], []
    for pairs in torch.arange(len(steps.step)).split(_states_at_once(truth)):
        time, step = steps.time[pairs], steps.step[pairs]
        true_fields, fields = (truth.velocity[time], truth.pressure[time]), guess(pairs)
        errors.append(_sample_errors(fields, true_fields, step, loud[time.to(loud.device)].cpu(), grid))
        kept = torch.isin(step, torch.tensor(STRUCTURE_STEPS))
        if bool(kept.any()):
            structures.append(_sample_structures(fields[0][kept], true_fields[0][kept], step[kept], grid, fluid))
    return _summarise_errors(_join(errors), steps.num_steps) | _summarise_structures(structures)


def _states_at_once(truth: TrueTrajectory) -> int:
    return max(1, CELLS_AT_ONCE // truth.velocity[0, 0].numel())


def find_loud(field: Float[Tensor, "t f x y z"]) -> Bool[Tensor, "t"]:
    """The snapshots at which a field is not silent beside its largest deviation in the trajectory."""
    deviation = field.double().var(dim=(-3, -2, -1), correction=0).sum(1).sqrt()
    return deviation > SILENT * deviation.max()


def _sample_errors(fields: Fields, truth: Fields, step: Tensor, loud: Tensor, grid: Grid) -> Errors:
    volume = torch.from_numpy(grid.cell_volume).to(truth[0].device)
    energies = [reduce(u.double() ** 2 * volume, "p f x y z -> p", "sum") / 2 for u in (truth[0], fields[0])]
    errors = [vrmse(guess, true) for guess, true in zip(fields, truth, strict=True)]
    return Errors(step, loud, torch.stack(errors, 1).cpu(), torch.stack(energies, 1).cpu())


def _sample_structures(velocity: Tensor, truth: Tensor, step: Tensor, grid: Grid, fluid: Tensor | None) -> Structures:
    return Structures(
        step=step,
        octaves=reduce(sample_spectrum(truth, velocity, grid).octaves[:, :2], "s two f k -> s two k", "sum"),
        porous=None if fluid is None else sample_porous(truth, velocity, fluid, grid),
        walls=sample_wall_shear(truth, velocity, grid),
    )


def _summarise_errors(errors: Errors, num_steps: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for i, name in enumerate(("vrmse", "vrmse_pressure")):
        each = _leave_out_silent(errors.vrmse[:, i], errors.loud[:, i])
        by_step = [[e for e, s in zip(each, errors.step.tolist(), strict=True) if s == k + 1] for k in range(num_steps)]
        means = [average_present(several) for several in by_step]
        result[name] = {
            span: average_present([means[k - 1] for k in ks if k <= num_steps]) for span, ks in SPANS.items()
        }
        result[f"{name}_per_step"] = means
    result["energy"] = _over_spans(errors.step, lambda chosen: errors.energy[chosen].mean(0).tolist())
    lost = errors.vrmse[:, 0].isnan().double()
    return result | {"lost": _over_spans(errors.step, lambda chosen: lost[chosen].mean().item())}


def _summarise_structures(parts: Sequence[Structures]) -> dict[str, Any]:
    step, octaves = torch.cat([part.step for part in parts]), torch.cat([part.octaves for part in parts])
    flows = [part.porous for part in parts if part.porous is not None]
    porous = _join(flows) if flows else None
    walls = [_join(wall) for wall in zip(*(part.walls for part in parts), strict=True)]
    return {
        "octaves": _over_spans(step, lambda chosen: octaves[chosen].mean(0).tolist()),
        "permeability": None
        if porous is None
        else _over_spans(step, lambda chosen: _permeability(_choose(porous, chosen))),
        "wall_shear": _over_spans(step, lambda chosen: _wall_shear([_choose(wall, chosen) for wall in walls])),
    }


def _permeability(rows: PorousRows) -> dict[str, float] | None:
    measured = summarise_porous([rows])["permeability"]
    return measured and {key: measured[key] for key in ("flow_error", "dissipation_error", "dissipation_bias")}


def _wall_shear(walls: list[WallShear]) -> dict[str, float] | None:
    """Mean over the walls that the true flow sticks to."""
    entries = summarise_wall_shear([walls])
    return average_present([{key: entry[key] for key in ("mean_error", "pattern_vrmse")} for entry in entries])


def _over_spans(step: Tensor, measure: Callable[[Tensor], Any]) -> dict[str, Any]:
    """A measurement of the rows of each span; None for a span without a row."""
    chosen = {span: torch.isin(step, torch.tensor(list(steps))) for span, steps in SPANS.items()}
    return {span: measure(rows) if bool(rows.any()) else None for span, rows in chosen.items()}


def _choose(rows: Rows, chosen: Tensor) -> Rows:
    return type(rows)(*(v[chosen.to(v.device)] if isinstance(v, Tensor) else v for v in rows))


def _join(parts: Sequence[Rows]) -> Rows:
    columns = zip(*parts, strict=True)
    return type(parts[0])(*(torch.cat(c) if isinstance(c[0], Tensor) else c[0] for c in columns))


def _leave_out_silent(errors: Tensor, loud: Tensor) -> list[float | None]:
    return [error if counts else None for error, counts in zip(errors.tolist(), loud.tolist(), strict=True)]


def _finish(block: dict[str, Any]) -> dict[str, Any]:
    """Ratios of averaged energies in place of the energies."""
    energy, octaves = block.pop("energy"), block.pop("octaves")
    drift = {span: pair and pair[1] / max(pair[0], 1e-300) - 1 for span, pair in energy.items()}
    ratios = {span: pair and _octave_ratios(*pair) for span, pair in octaves.items()}
    return block | {"energy_drift": drift, "octave_energy_ratio": ratios}


def _octave_ratios(truth: list[float], predicted: list[float]) -> list[float | None]:
    return [p / t if t > EMPTY * sum(truth) else None for t, p in zip(truth[:-1], predicted[:-1], strict=True)]


def _drop_lost(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _drop_lost(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_drop_lost(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
