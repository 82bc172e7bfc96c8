"""How well stored velocities conserve: divergence of fluxes and curl of circulations in FP64, with what gives meaning.

A divergence without its operator, storage precision and a reference gradient is not a result. Every measurement here
names all three, and adds what a mismatched operator (central differences of cell-centred averages) would have seen.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from shodh.fields import Grid
from shodh.physics.exterior import (
    Boundaries,
    curl_of_faces,
    difference_down,
    difference_up,
    divergence_of_faces,
    mismatched_curl,
    mismatched_divergence,
)

DIVERGENCE_OPERATOR = "staggered incidence d: faces -> cells, coefficients +1 and -1, on the stored flux"
CURL_OPERATOR = "staggered incidence d: faces -> edges, coefficients +1 and -1, on the stored circulation"

Operator = Callable[[Tensor, Boundaries], Tensor]


class ConservationSums(NamedTuple):
    """Sums over cells and fields from which a measurement is made; add batches with ``merge_sums``.

    ``derivative`` is the divergence or the length of the curl vector, per cell.
    """

    max_abs: float
    abs: float
    squares: float
    mismatched_squares: float
    physical_squares: float  # of the derivative per cell volume (or loop area)
    mismatched_physical_squares: float
    gradient_squares: float  # |grad u|^2, all 9 components
    mean_flow_squares: float  # |box mean of u|^2, once a field
    num_cells: int
    num_fields: int
    operator: str
    stored: str


def measure_divergence(flux: Float[Tensor, "b 3 x y z"], grid: Grid) -> dict[str, Any]:
    """Divergence of fluxes as stored; ``max_abs`` of 0.0 means that every cell balances bit for bit."""
    return summarise_sums(sum_divergence(flux, grid))


def measure_curl(circulation: Float[Tensor, "b 3 x y z"], grid: Grid) -> dict[str, Any]:
    """Curl of circulations as stored (irrotational velocities, v times the spacing along the face's normal)."""
    return summarise_sums(sum_curl(circulation, grid))


def sum_divergence(flux: Float[Tensor, "b 3 x y z"], grid: Grid) -> ConservationSums:
    """Sums of one batch of fluxes u·area on lower faces. Raises ValueError for another shape or non-finite values."""
    _check(flux, grid, "flux")
    values, volume = flux.double(), torch.from_numpy(grid.cell_volume).to(flux.device)
    velocity = values / torch.from_numpy(grid.face_area).to(flux.device)

    def divergence(operator: Operator) -> Tensor:
        return operator(values, grid.boundary).unsqueeze(1)

    derivatives = divergence(divergence_of_faces), divergence(mismatched_divergence)
    return _sum(derivatives, volume, velocity, grid, DIVERGENCE_OPERATOR, flux.dtype)


def sum_curl(circulation: Float[Tensor, "b 3 x y z"], grid: Grid) -> ConservationSums:
    """Sums of one batch of circulations v·spacing on lower faces. Raises ValueError as ``sum_divergence``."""
    _check(circulation, grid, "circulation")
    values = circulation.double()
    velocity = values / torch.from_numpy(grid.face_distance).to(values.device)
    derivatives = curl_of_faces(values, grid.boundary), mismatched_curl(values, grid.boundary)
    loop_area = torch.from_numpy(grid.face_distance.prod(0) / grid.face_distance).to(values.device)
    return _sum(derivatives, loop_area, velocity, grid, CURL_OPERATOR, circulation.dtype)


def merge_sums(batches: Sequence[ConservationSums]) -> ConservationSums:
    """The sums of several batches of one domain. Raises ValueError for none, or for different operators or storage."""
    if not batches:
        raise ValueError("batches=[]: there is nothing to merge. Measure at least one batch.")
    if len({(b.operator, b.stored) for b in batches}) > 1:
        raise ValueError("batches: of different operators or storage. Merge them one kind at a time.")
    names = set(ConservationSums._fields) - {"max_abs", "operator", "stored"}
    added = {name: sum(getattr(batch, name) for batch in batches) for name in names}
    return batches[0]._replace(max_abs=max(batch.max_abs for batch in batches), **added)


def summarise_sums(sums: ConservationSums) -> dict[str, Any]:
    """The measurement as JSON holds it; ``max_abs``, ``mean_abs`` and both rms in units of the stored array."""

    def rms(squares: float, count: int = sums.num_cells) -> float:
        return math.sqrt(squares / count)

    gradient = rms(sums.gradient_squares)
    mismatched = rms(sums.mismatched_physical_squares)
    return {
        "max_abs": sums.max_abs,
        "rms": rms(sums.squares),
        "mean_abs": sums.abs / sums.num_cells,
        "rms_over_rms_gradient": _ratio(rms(sums.physical_squares), gradient),
        "operator": sums.operator,
        "dtype": f"stored {sums.stored}, evaluated float64",
        "mismatched_operator_rms": rms(sums.mismatched_squares),
        "mismatched_rms_over_rms_gradient": _ratio(mismatched, gradient),
        "mean_flow": rms(sums.mean_flow_squares, sums.num_fields),
        "num_fields": sums.num_fields,
    }


def find_worst(stored: Float[Tensor, "b 3 x y z"], grid: Grid, operator: str) -> tuple[int, ...]:
    """Field and cell (b, x, y, z) of the largest divergence or curl, whichever ``operator`` names."""
    if operator == CURL_OPERATOR:
        derivative = curl_of_faces(stored.double(), grid.boundary).square().sum(1)
    else:
        derivative = divergence_of_faces(stored.double(), grid.boundary).abs()
    return tuple(int(i) for i in torch.unravel_index(derivative.argmax(), derivative.shape))


def squared_gradient(velocity: Float[Tensor, "b 3 x y z"], grid: Grid) -> Float[Tensor, "b x y z"]:
    """|grad u|^2 from all 9 components by one-sided differences, each where the staggered grid has it.

    Differences through a wall are left out, because they would need to know whether the wall lets the fluid slip.
    """
    total = torch.zeros_like(velocity.select(1, 0))
    width, distance = (torch.from_numpy(a).to(velocity) for a in (grid.edge_length, grid.face_distance))
    for i, component in enumerate(velocity.unbind(1)):
        for j, boundary in enumerate(grid.boundary):
            normal = i == j and boundary != "open"
            difference = difference_up if normal else difference_down
            total = total + (difference(component, j, boundary) / (width if normal else distance)[j]) ** 2
    return total


def _sum(
    derivatives: tuple[Tensor, Tensor], measure: Tensor, velocity: Tensor, grid: Grid, operator: str, dtype: torch.dtype
) -> ConservationSums:
    """``measure`` is the volume or area that the derivatives are per; all sums are over cells, whatever their size."""
    derivative, mismatched = derivatives
    length = derivative.square().sum(1).sqrt()
    physical, mismatched_physical = (d / measure for d in derivatives)
    mean_flow = reduce(velocity, "b f x y z -> b f", "mean")
    return ConservationSums(
        max_abs=length.max().item(),
        abs=length.sum().item(),
        squares=derivative.square().sum().item(),
        mismatched_squares=mismatched.square().sum().item(),
        physical_squares=physical.square().sum().item(),
        mismatched_physical_squares=mismatched_physical.square().sum().item(),
        gradient_squares=squared_gradient(velocity, grid).sum().item(),
        mean_flow_squares=mean_flow.square().sum().item(),
        num_cells=length.numel(),
        num_fields=len(velocity),
        operator=operator,
        stored=str(dtype).removeprefix("torch."),
    )


def _check(values: Tensor, grid: Grid, name: str) -> None:
    if tuple(values.shape[-3:]) != grid.shape:
        raise ValueError(f"{name}: shape {tuple(values.shape)} is not grid.shape={grid.shape}. Pass the field's grid.")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name}: not finite, so it conserves nothing. Check the decoder's input and weights.")


def _ratio(numerator: float, denominator: float) -> float:
    return 0.0 if numerator == 0 else numerator / max(denominator, 1e-300)
