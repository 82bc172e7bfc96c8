"""Linear experts set to their least-squares fit once in a training, which gradient steps would take thousands to reach.

What a kernel sees of 27 neighbours in three states is so much alike that a gradient hardly shows the way.
"""

import random
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, Protocol

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from shodh.fields import NUM_GIVEN, LatentBatch, Routing
from shodh.training.engine import set_parameter
from shodh.training.linear_rollouts import refine_kernels, whitening_directions
from shodh.training.objectives import ForecastConfig, expected_square

# With a tenth of the ridge, or samples that count by their own change however small, the error one step ahead is the
# same, but what grows in a rollout grows faster.
RIDGE = 1e-2  # of a feature's mean square
SOLVE_FLOOR = 0.5  # of the whitened latent's variance
# Of all experts' cells each is given as many as this times the number of features, beside its own: what an expert with
# few or no cells has, whose kernel would otherwise be of no use to the tokens that a router may send it later.
COMMON = 0.1
CELLS_AT_ONCE = 2**14  # rows of features, 92 MB at 1404 of them

# From then on kernels need only follow, and little is left for the layers to add: a step's noise is as large as it is.
GAIN_AFTER = 0.005
CORRECTION_AFTER = 0.1


class LinearExperts(Protocol):
    """A matrix for each expert, which "gain" makes smaller."""

    kernels: Sequence[nn.Parameter]
    gain: Tensor


class PartlyLinear(Protocol):
    """A model whose forecast is that of a linear expert, and "correction" times what its last layer writes."""

    stencil: LinearExperts
    out: nn.Module
    correction: Tensor

    def linear_rows(self, states: Tensor, medium: Tensor, parameters: Tensor) -> Float[Tensor, "n u"]: ...

    def linear_shares(self, routing: Routing, grid: Sequence[int]) -> Float[Tensor, "n e"]: ...


class SolveLinearExperts:
    """Hook that, before step ``solve_at``, gives every linear expert the best forecast of its own cells.

    Its own are those that the router sends to it by then; of k > 1 kernels in a cell each answers as if alone. With
    ``refine_steps`` they are then refined for rollouts (linear_rollouts.py). The last layer begins anew at zero, to add
    what is not linear, and the optimizer forgets both; kernels then move by smaller steps and the layers' word counts
    less. The micro-batches are those that training goes on with, a drawn time of each. Collective over ranks; does
    nothing with ``solve_at`` 0.
    """

    def __init__(
        self, engine: Any, batches_from: Callable[[int], Generator[LatentBatch]], objective: ForecastConfig
    ) -> None:
        self.engine, self.batches_from, self.objective = engine, batches_from, objective

    def begin_step(self, step: int) -> None:
        if step != self.objective.solve_at or step == 0:
            return
        model: PartlyLinear = self.engine.module
        with closing(self.batches_from(step)) as batches:
            kernels = self._solve(step, batches)
        model.stencil.gain.fill_(GAIN_AFTER)
        model.correction.fill_(CORRECTION_AFTER)
        for kernel, value in zip(model.stencil.kernels, kernels, strict=True):
            set_parameter(self.engine, kernel, value.T / model.stencil.gain)
        for parameter in model.out.parameters():
            set_parameter(self.engine, parameter, torch.zeros_like(parameter))

    def _solve(self, step: int, batches: Iterable[LatentBatch]) -> Float[Tensor, "e u c"]:
        num_batches, num_steps = self.objective.solve_batches, self.objective.refine_steps
        say(f"step {step}: solving for linear experts, {num_batches} micro-batches")
        gram, moment, num_cells = sum_products(self.engine, draw_windows(islice(batches, num_batches), 1))
        for total in (gram, moment, num_cells):
            torch.distributed.all_reduce(total)
        for total in (gram, moment):
            total += COMMON * gram.shape[1] / num_cells * total.sum(0)
        kernels = torch.stack([solve_ridge(*sums, RIDGE) for sums in zip(gram, moment, strict=True)]).float()
        if num_steps:
            num_batches = self.objective.refine_batches
            say(f"step {step}: refining them for {num_steps} steps in a row, {num_batches} micro-batches")
            directions = torch.stack([whitening_directions(squares, RIDGE) for squares in gram]).float()
            windows = draw_windows(islice(batches, num_batches), num_steps)
            floor = self.objective.change_floor
            kernels, losses = refine_kernels(self.engine, kernels, directions, windows, num_batches, floor)
            few = max(1, num_batches // 10)
            before, after = (sum(part) / len(part) for part in (losses[:few], losses[-few:]))
            say(f"step {step}: their loss went from {before:.3f} to {after:.3f}")
        torch.distributed.broadcast(kernels, 0)  # unlike processors round unlike
        return kernels


def say(line: str) -> None:
    """One line on rank 0, above the progress bar, which stands still meanwhile."""
    if torch.distributed.get_rank() == 0:
        tqdm.write(line, file=sys.stderr)


def draw_windows(batches: Iterable[LatentBatch], num_predicted: int) -> Iterator[LatentBatch]:
    """Of each batch the given states and as many more, at a time that is drawn, the same on all ranks."""
    length = NUM_GIVEN + num_predicted
    for number, batch in enumerate(batches):
        spare = batch.states.shape[1] - length
        if spare < 0:
            raise ValueError(
                f"states={batch.states.shape[1]} of a batch: {length} are needed. Set num_states={length}."
            )
        first = random.Random(number).randint(0, spare)
        yield batch._replace(states=batch.states[:, first : first + length])


@torch.no_grad()
def sum_products(
    engine: Any, batches: Iterable[LatentBatch]
) -> tuple[Float[Tensor, "e u u"], Float[Tensor, "e u c"], Float[Tensor, ""]]:
    """Of each kernel and its cells: features times features, and times changes, summed up in FP64; cells in all."""
    model: PartlyLinear = engine.module
    num, (channels, features) = len(model.stencil.kernels), model.stencil.kernels[0].shape
    like = {"dtype": torch.float64, "device": model.stencil.kernels[0].device}
    gram, moment = torch.zeros(num, features, features, **like), torch.zeros(num, features, channels, **like)
    num_cells = torch.zeros((), **like)
    for batch in batches:
        num_samples = max(1, CELLS_AT_ONCE // batch.following[0, 0].numel())
        each = (batch.given, batch.following, batch.medium, batch.parameters)
        parts = (values.split(num_samples) for values in each)
        for given, following, medium, parameters in zip(*parts, strict=True):
            routing = engine(given, medium, parameters).routings[-1]
            change, grid = following - given[:, -1], following.shape[-3:]
            weight = model.linear_shares(routing, grid)
            weight = weight / expected_square(change, SOLVE_FLOOR).repeat_interleave(grid.numel())[:, None]
            rows = model.linear_rows(given, medium, parameters)
            asked = rearrange(change.float(), "b c x y z -> (b x y z) c")
            num_cells += len(rows)
            for kernel in range(num):
                own = weight[:, kernel] > 0
                seen = rows[own]
                weighted = (seen * weight[own, kernel, None]).T
                gram[kernel] += weighted @ seen
                moment[kernel] += weighted @ asked[own]
    return gram, moment, num_cells


def solve_ridge(gram: Float[Tensor, "u u"], moment: Float[Tensor, "u c"], ridge: float) -> Float[Tensor, "u c"]:
    """The weights of least squares, ``ridge`` of each feature's mean square added to it."""
    size = gram.diagonal().sqrt()
    size = torch.where(size > 0, size, 1.0)  # a feature that is always 0
    scaled = gram / torch.outer(size, size)
    scaled.diagonal().add_(ridge)
    return torch.linalg.solve(scaled, moment / size[:, None]) / size[:, None]
