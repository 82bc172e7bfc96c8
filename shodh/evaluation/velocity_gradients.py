"""The distribution of velocity gradients: what a mean square error does not see, and what dissipates and mixes."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shodh.fields import Grid
from shodh.physics.exterior import difference_down, difference_up

WIDEST, NUM_BINS = 10.0, 80  # of the histograms: gradients in units of the true rms
KINDS = ("longitudinal", "transverse")


class GradientRows(NamedTuple):
    """Per snapshot and kind of gradient, in units of the true rms of that snapshot and kind."""

    histogram: Float[Tensor, "b g n"]  # number of values per bin of (-WIDEST, WIDEST)
    moments: Float[Tensor, "b g m"]  # sums of the powers 0 to 4 over all values, also those outside of the bins


def sample_gradients(
    velocity: Float[Tensor, "b 3 x y z"],
    truth: Float[Tensor, "b 3 x y z"],
    grid: Grid,
    fluid: Bool[Tensor, "x y z"] | None = None,
) -> GradientRows:
    """Histograms and moments of du_i/dx_i and of du_i/dx_j of ``velocity``, in units of the rms of ``truth``'s.

    Components pooled; over cells (or edges), whatever their size; with ``fluid``, those that touch it. Differences
    that would need a value that is not stored (at walls and open ends) are left out. A true field without gradients
    counts nothing.
    """
    rows = []
    for values, true_values in zip(
        velocity_gradients(velocity, grid, fluid), velocity_gradients(truth, grid, fluid), strict=True
    ):
        scale = true_values.square().mean(1, keepdim=True).sqrt()
        counted = (scale > 0).double()
        rows.append([part * counted for part in _count(values / scale.clamp_min(1e-300))])
    histogram, moments = (torch.stack(parts, 1).cpu() for parts in zip(*rows, strict=True))
    return GradientRows(histogram, moments)


def velocity_gradients(
    velocity: Float[Tensor, "b 3 x y z"], grid: Grid, fluid: Bool[Tensor, "x y z"] | None = None
) -> tuple[Float[Tensor, "b l"], Float[Tensor, "b t"]]:
    """All du_i/dx_i, at cells, and all du_i/dx_j, at edges, in FP64: one-sided differences of the staggered grid."""
    width, distance = (torch.from_numpy(a).to(velocity.device) for a in (grid.edge_length, grid.face_distance))
    longitudinal, transverse = [], []
    for i, component in enumerate(velocity.double().unbind(1)):
        for j, boundary in enumerate(grid.boundary):
            if i == j:
                stored = slice(0, -1 if boundary == "open" else None)
                values, around = difference_up(component, j, boundary) / width[j], fluid
            else:
                stored = slice(0 if boundary == "periodic" else 1, None)
                values, around = difference_down(component, j, boundary) / distance[j], _touched(fluid, i, j)
            (longitudinal if i == j else transverse).append(_select(values, around, j, stored))
    return torch.cat(longitudinal, 1), torch.cat(transverse, 1)


def summarise_gradients(truth: GradientRows, decoded: GradientRows) -> dict[str, Any]:
    """Per kind: probability density per bin, rms, skewness and flatness (3 for a Gaussian) of truth and decoded."""
    edges = torch.linspace(-WIDEST, WIDEST, NUM_BINS + 1, dtype=torch.float64)
    result: dict[str, Any] = {"centres": ((edges[1:] + edges[:-1]) / 2).tolist()}
    for kind, name in enumerate(KINDS):
        fields = {
            label: _describe(rows.histogram[:, kind].sum(0), rows.moments[:, kind].sum(0))
            for label, rows in (("truth", truth), ("decoded", decoded))
        }
        result[name] = fields | {"rms_ratio": fields["decoded"]["rms"] / max(fields["truth"]["rms"], 1e-300)}
    return result


def _describe(histogram: Tensor, sums: Tensor) -> dict[str, Any]:
    count, *powers = sums.tolist()
    if count == 0:
        return {"density": [0.0] * NUM_BINS, "outside": 0.0, "rms": 0.0, "skewness": None, "flatness": None}
    first, second, third, fourth = (power / count for power in powers)
    variance = second - first**2
    central_third = third - 3 * first * second + 2 * first**3
    central_fourth = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    resolved = variance > 1e-12 * second  # else the values are equal but for round-off
    return {
        "density": (histogram / (count * 2 * WIDEST / NUM_BINS)).tolist(),
        "outside": 1 - histogram.sum().item() / count,
        "rms": second**0.5,
        "skewness": central_third / variance**1.5 if resolved else None,
        "flatness": central_fourth / variance**2 if resolved else None,
    }


def _count(values: Float[Tensor, "b v"]) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b m"]]:
    histogram = torch.zeros(len(values), NUM_BINS + 2, dtype=torch.float64, device=values.device)
    place = torch.floor((values + WIDEST) * (NUM_BINS / (2 * WIDEST))).clamp(-1, NUM_BINS).long() + 1
    histogram.scatter_add_(1, place, torch.ones_like(values))
    squares = values.square()
    powers = torch.ones_like(values), values, squares, squares * values, squares.square()
    return histogram[:, 1:-1], torch.stack([power.sum(1) for power in powers], 1)


def _touched(fluid: Tensor | None, i: int, j: int) -> Bool[Tensor, "x y z"] | None:
    """Lower edges with fluid in any of the four cells around them; the box taken as periodic."""
    if fluid is None:
        return None
    either = fluid | torch.roll(fluid, 1, i)
    return either | torch.roll(either, 1, j)


def _select(
    values: Float[Tensor, "b x y z"], kept: Bool[Tensor, "x y z"] | None, axis: int, stored: slice
) -> Float[Tensor, "b v"]:
    """The values at places that are kept, if any are not, and within the stored range of an axis."""
    box = tuple(stored if a == axis else slice(None) for a in range(3))
    inner = values[(slice(None), *box)]
    return inner.flatten(1) if kept is None else inner[:, kept[box]]
