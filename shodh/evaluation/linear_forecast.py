"""The best linear forecast of one domain's latents: what a model has to beat that is given no more than states."""

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from shodh.fields import NUM_GIVEN, Boundary, LatentBatch
from shodh.model.stencil import surround
from shodh.training.linear_start import solve_ridge

Boundaries = tuple[Boundary, Boundary, Boundary]

OFFSETS = sorted(product((-1, 0, 1), repeat=3), key=lambda offset: sum(map(abs, offset)))  # the cell itself comes first
STENCILS = (1, 7, 27)  # how many of the offsets: the cell alone, its 6 neighbours, all 26
RIDGES = (1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # over the mean square of a feature
HELD_BACK = 5  # every fifth trajectory chooses between them
CELLS_AT_ONCE = 2**14  # rows of features: 27 * 3 * 16 + 13 FP64 values each, 172 MB


class LinearForecast(NamedTuple):
    """Predicts the change of every latent cell linearly; a ``Predict`` of ``shodh.evaluation.rollout``."""

    weights: Float[Tensor, "u c"]
    stencil: int
    ridge: float
    boundary: Boundaries

    def __call__(self, states: Tensor, medium: Tensor, parameters: Tensor) -> Tensor:
        features = describe_cells(states, medium, parameters, self.boundary, self.stencil)
        current = states[:, -1]
        x, y, z = current.shape[-3:]
        change = rearrange(features @ self.weights, "(b x y z) c -> b c x y z", x=x, y=y, z=z)
        return (current.double() + change).to(current.dtype)


class NormalEquations(NamedTuple):
    """Sums over cells of products of features and changes, FP64."""

    gram: Float[Tensor, "u u"]
    moment: Float[Tensor, "u c"]
    square: Float[Tensor, ""]  # of the changes
    num_cells: int


@torch.no_grad()
def fit_linear_forecast(trajectories: Iterable[LatentBatch], boundary: Boundaries) -> LinearForecast:
    """Ridge regression of a latent cell's change over one interval, for one domain.

    Features: the given states of the cell and of its neighbours (beyond the box a periodic axis wraps, any other
    gives zeros), the medium in the cell, the parameters and 1. ``trajectories``: one batch each, of training
    trajectories only, read once. Every fifth of them, from the second, is held back to choose the stencil and the
    strength of the ridge by the one-step error there; then all are fitted. Where samples are fewer than unknowns the
    ridge decides. It is fair to say of it that it is fitted to one domain and knows which, and the boundaries: what it
    is compared with is told neither. Raises ValueError for fewer than two trajectories.
    """
    fitted = held_back = None
    for number, batch in enumerate(trajectories):
        equations = sum_products(batch, boundary)
        if number % HELD_BACK == 1:
            held_back = _add(held_back, equations)
        else:
            fitted = _add(fitted, equations)
    if fitted is None or held_back is None:
        raise ValueError("trajectories: one is fitted, another chooses the ridge. Give at least two for training.")
    num_states, num_features = NUM_GIVEN * fitted.moment.shape[1], len(fitted.gram)
    chosen = [_choose_columns(num_features, num_states, stencil) for stencil in STENCILS]
    candidates = [
        (float(_mean_error(held_back, weights, columns)), stencil, ridge)
        for stencil, columns in zip(STENCILS, chosen, strict=True)
        for ridge, weights in zip(RIDGES, solve_ridges(fitted, columns, RIDGES), strict=True)
    ]
    _, stencil, ridge = min(candidates)
    columns = chosen[STENCILS.index(stencil)]
    (weights,) = solve_ridges(_add(fitted, held_back), columns, (ridge,))
    return LinearForecast(weights, stencil, ridge, boundary)


def describe_cells(
    states: Float[Tensor, "b t c x y z"],
    medium: Float[Tensor, "b m x y z"],
    parameters: Float[Tensor, "b q"],
    boundary: Boundaries,
    stencil: int,
) -> Float[Tensor, "n u"]:
    """The features of every cell, FP64: states by offset, then medium, parameters and 1."""
    states = rearrange(states, "b t c x y z -> b (t c) x y z").double()
    x, y, z = states.shape[-3:]
    periodic = states.new_tensor([kind == "periodic" for kind in boundary]).expand(len(states), 3)
    padded = surround(states, periodic)
    shifted = [padded[..., 1 + i : 1 + i + x, 1 + j : 1 + j + y, 1 + k : 1 + k + z] for i, j, k in OFFSETS[:stencil]]
    told = torch.cat([parameters, torch.ones_like(parameters[:, :1])], 1).double()
    everywhere = told[..., None, None, None].expand(-1, -1, x, y, z)
    return rearrange(torch.cat([*shifted, medium.double(), everywhere], 1), "b u x y z -> (b x y z) u")


def sum_products(batch: LatentBatch, boundary: Boundaries) -> NormalEquations:
    """The normal equations of one trajectory with the largest stencil, a few states at a time."""
    total = None
    size = max(1, CELLS_AT_ONCE // batch.current[0, 0].numel())
    for part in (LatentBatch(*parts) for parts in zip(*(tensor.split(size) for tensor in batch), strict=True)):
        features = describe_cells(part.given, part.medium, part.parameters, boundary, len(OFFSETS))
        change = rearrange(part.following.double() - part.current.double(), "b c x y z -> (b x y z) c")
        equations = (features.T @ features, features.T @ change, change.square().sum(), len(change))
        total = _add(total, NormalEquations(*equations))
    assert total is not None, "a batch holds at least one sample"
    return total


def solve_ridges(equations: NormalEquations, columns: Tensor, ridges: tuple[float, ...]) -> list[Float[Tensor, "u c"]]:
    """Weights of the chosen features for each strength of the ridge."""
    gram, moment = equations.gram[columns][:, columns], equations.moment[columns]
    return [solve_ridge(gram, moment, ridge) for ridge in ridges]


def _mean_error(equations: NormalEquations, weights: Tensor, columns: Tensor) -> Tensor:
    """Mean square of changes - features @ weights, of the sums alone."""
    gram, moment = equations.gram[columns][:, columns], equations.moment[columns]
    return (equations.square + (weights * (gram @ weights - 2 * moment)).sum()) / equations.num_cells


def _choose_columns(num_features: int, num_states: int, stencil: int) -> Tensor:
    """Which features of the largest stencil a smaller one has."""
    return torch.cat([torch.arange(stencil * num_states), torch.arange(len(OFFSETS) * num_states, num_features)])


def _add(one: NormalEquations | None, other: NormalEquations) -> NormalEquations:
    if one is None:
        return other
    gram, moment, square = one.gram + other.gram, one.moment + other.moment, one.square + other.square
    return NormalEquations(gram, moment, square, one.num_cells + other.num_cells)
