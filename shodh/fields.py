"""What flows through Shodh: grids, field and domain specifications, batches.

Axis legend, used in every shape annotation and einops pattern:
``b`` batch, ``t`` time, ``f`` field component, ``x y z`` space, ``c`` latent channel, ``n`` token, ``d`` width,
``h`` head, ``e`` expert, ``q`` physical parameter.

Grids are staggered (marker and cell). Every array has the cell box's shape ``(x, y, z)`` and holds *lower* entities:
``velocity[i]`` at index (x, y, z) sits on the face between that cell and its lower neighbour along axis i, an edge
quantity on that cell's lower edge. At a walled axis index 0 lies in the lower wall and the upper wall (index n) is
not stored: whatever lives there is zero.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Boundary = Literal["periodic", "wall", "open"]
VelocitySpace = Literal["solenoidal", "irrotational", "full"]
Spacing = float | tuple[float, ...]  # one width for all cells along an axis, or the width of each

# Every physical parameter that the model may be told, in the order of its input vector; a domain that has no such
# parameter leaves it 0. Nondimensional by the domain's own scales, see the data cards.
PARAMETERS = ("dt", "viscosity", "frequency", "porosity", "diffusivity")

# What a model is told of a sample beside its states and medium: the physical parameters, 0 where there is none such,
# and for each axis whether the box repeats itself (1) or ends there (0).
CONDITIONS = (*PARAMETERS, "periodic_x", "periodic_y", "periodic_z")


# Successive states that a forecast is made from. A coarse latent does not hold all that decides its future; what its
# past adds to that is worth a third state (docs/decisions/0008-three-states.md).
NUM_GIVEN = 3


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A box of cells; lengths in the domain's unit of length. Raises ValueError for widths that are no lengths.

    An axis is uniform (one width) or stretched (the widths of its cells; not for a periodic axis). The arrays below are
    FP64 and broadcast against fields: an axis along which nothing varies has size 1.
    """

    shape: tuple[int, int, int]
    spacing: tuple[Spacing, Spacing, Spacing]
    boundary: tuple[Boundary, Boundary, Boundary]

    def __post_init__(self) -> None:
        if min(self.shape) < 2:
            raise ValueError(f"grid.shape={self.shape}: every axis needs at least 2 cells.")
        for axis, (widths, boundary) in enumerate(zip(self.spacing, self.boundary, strict=True)):
            if not (np.isfinite(widths).all() and np.min(widths) > 0):
                raise ValueError(f"grid.spacing={self.spacing}: must be positive and finite.")
            if isinstance(widths, tuple) and len(widths) != self.shape[axis]:
                raise ValueError(f"grid.spacing[{axis}]: {len(widths)} widths for {self.shape[axis]} cells.")
            if isinstance(widths, tuple) and boundary == "periodic":
                raise ValueError(f"grid.spacing[{axis}]: stretched, but the axis is periodic. Give one width.")

    def widths(self, axis: int) -> np.ndarray:
        """Widths (n,) of the cells along an axis."""
        return np.broadcast_to(np.asarray(self.spacing[axis], np.float64), self.shape[axis])

    def is_uniform(self, axis: int) -> bool:
        """Whether all cells along an axis are equally wide."""
        return not isinstance(self.spacing[axis], tuple)

    @property
    def mean_spacing(self) -> tuple[float, float, float]:
        """Mean cell width along each axis."""
        hx, hy, hz = (math.fsum(h) / len(h) if isinstance(h, tuple) else h for h in self.spacing)
        return hx, hy, hz

    @property
    def edge_length(self) -> np.ndarray:
        """Length (3, x, y, z) of the edges along each axis."""
        return np.stack(np.broadcast_arrays(*(self._along(i, self.spacing[i]) for i in range(3))))

    @property
    def face_area(self) -> np.ndarray:
        """Area (3, x, y, z) of the faces normal to each axis."""
        return self.cell_volume / self.edge_length

    @property
    def face_distance(self) -> np.ndarray:
        """Distance (3, x, y, z) between the centres of the two cells of each lower face; twice that to a boundary."""
        distances = []
        for axis, widths in enumerate(self.spacing):
            if isinstance(widths, tuple):
                widths = (widths[0], *((low + high) / 2 for low, high in pairwise(widths)))
            distances.append(self._along(axis, widths))
        return np.stack(np.broadcast_arrays(*distances))

    @property
    def cell_volume(self) -> np.ndarray:
        """Volume (x, y, z) of the cells."""
        return self.edge_length.prod(0)

    @property
    def relative(self) -> "Grid":
        """The same box in units of its mean cell size, so that the mean cell volume is 1."""
        mean = math.prod(self.mean_spacing) ** (1 / 3)
        hx, hy, hz = (tuple(w / mean for w in h) if isinstance(h, tuple) else h / mean for h in self.spacing)
        return Grid(shape=self.shape, spacing=(hx, hy, hz), boundary=self.boundary)

    def _along(self, axis: int, lengths: Spacing) -> np.ndarray:
        return np.asarray(lengths, np.float64).reshape([-1 if a == axis else 1 for a in range(3)])


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """One stored variable: name, SI or nondimensional unit, and where on the grid it lives."""

    name: str
    units: str
    location: Literal["cell", "face"]
    long_name: str


@dataclass(frozen=True, kw_only=True)
class DomainSpec:
    """One kind of physics. Its name serves stores, statistics and telemetry; the model never sees it."""

    name: str
    velocity_space: VelocitySpace
    boundary: tuple[Boundary, Boundary, Boundary]
    velocity: FieldSpec
    pressure: FieldSpec
    medium: FieldSpec
    parameters: tuple[str, ...]  # subset of PARAMETERS
    scalars: tuple[FieldSpec, ...] = ()  # further cell fields of the state, such as temperature

    def __post_init__(self) -> None:
        unknown = set(self.parameters) - set(PARAMETERS)
        if unknown:
            raise ValueError(f"domain {self.name}: parameters {sorted(unknown)} unknown. Known: {PARAMETERS}.")
        if self.velocity_space == "full" and "open" in self.boundary:
            raise ValueError(
                f"domain {self.name}: an open axis carries no full velocity (boundary={self.boundary}). "
                "Use solenoidal or irrotational."
            )


class FieldBatch(NamedTuple):
    """Snapshots of one domain on one grid, in normalised units (see ``data.statistics``)."""

    velocity: Float[Tensor, "b 3 x y z"]  # velocity on lower faces
    pressure: Float[Tensor, "b 1 x y z"]
    medium: Float[Tensor, "b 1 x y z"]
    domain: DomainSpec
    grid: Grid

    def to(self, device: torch.device) -> "FieldBatch":
        """The same batch with its tensors on ``device``."""
        return self._replace(
            velocity=self.velocity.to(device), pressure=self.pressure.to(device), medium=self.medium.to(device)
        )


class DecodedFields(NamedTuple):
    """What a decoder gives for storage and evaluation, in normalised units and on ``grid.relative``."""

    flux: Float[
        Tensor, "b 3 x y z"
    ]  # FP32 on a lattice: exactly zero divergence (or curl); circulation if irrotational
    velocity: Float[Tensor, "b 3 x y z"]
    pressure: Float[Tensor, "b 1 x y z"]


class LatentBatch(NamedTuple):
    """Successive latent states per sample, of any mixture of domains, whitened: those given and at least one more."""

    states: Float[Tensor, "b t c x y z"]
    medium: Float[Tensor, "b m x y z"]
    parameters: Float[Tensor, "b q"]
    domain: Int[Tensor, "b"]  # for telemetry and evaluation only; no model input

    @property
    def given(self) -> Float[Tensor, "b t c x y z"]:
        """What a forecast is made from, oldest first."""
        return self.states[:, :NUM_GIVEN]

    @property
    def current(self) -> Float[Tensor, "b c x y z"]:
        """The last given state."""
        return self.states[:, NUM_GIVEN - 1]

    @property
    def following(self) -> Float[Tensor, "b c x y z"]:
        """The state one interval after ``current``."""
        return self.states[:, NUM_GIVEN]

    def to(self, device: torch.device) -> "LatentBatch":
        """The same batch on ``device``."""
        return LatentBatch(*(tensor.to(device) for tensor in self))


class Routing(NamedTuple):
    """What one router decided; the MoE layer, the balance loss and telemetry all read this."""

    expert: Int[Tensor, "n k"]  # chosen experts per token, best first
    gate: Float[Tensor, "n k"]  # their probabilities, FP32
    probability: Float[Tensor, "n e"]  # all probabilities, FP32
    score: Float[Tensor, "n e"]  # logits before the softmax, FP32 (z-loss)
