"""Decoder features -> potentials -> a velocity that conserves mass (or is free of rotation) by construction."""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from shodh.fields import Boundary, DomainSpec, Grid
from shodh.physics.helmholtz import Potentials, compose_velocity, snap_potentials
from tokenizer.layers import ChannelNorm, Convolution, pad_one

NUM_OUTPUTS = 5  # 3 circulations, scalar potential, pressure
PRESSURE = 4
ALL_OUTPUTS = (0, 1, 2, 3, 4)
OUTPUTS = {"solenoidal": (0, 1, 2, 4), "irrotational": (3, 4), "full": ALL_OUTPUTS}  # that a domain uses


class HelmholtzHead(nn.Module):
    """Emits edge circulations, a scalar potential and pressure, always in FP32; the mean flow comes from the latent.

    The network sees no domain: it can always emit all potentials, and the domain's ``velocity_space`` says which of
    them are computed. Potentials are in units of the normalised velocity times the grid's mean cell size. They are a
    sum over resolutions, each in units of its own cell size: velocity is a difference of potentials, so a large eddy
    needs a potential as many times larger as it is wider, and without this its gradient would be as many times weaker.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.norms = nn.ModuleList(ChannelNorm(width) for width in (coarse, middle, fine))
        self.coarse = Convolution(coarse, NUM_OUTPUTS)
        self.middle = Convolution(middle, NUM_OUTPUTS)
        self.fine = Convolution(fine, 8 * NUM_OUTPUTS)  # a 2x2x2 cube of the full resolution per position

    def forward(
        self, features: Sequence[Tensor], mean_flow: Float[Tensor, "b 3"], domain: DomainSpec
    ) -> tuple[Potentials, Float[Tensor, "b 1 x y z"]]:
        """Potentials and pressure; potentials that the domain does not use are 0 and cost nothing."""
        coarse, middle, fine = features
        outputs = OUTPUTS[domain.velocity_space]
        begun = self.begin(coarse, middle, domain.boundary, outputs)
        values = self.refine(begun, fine, domain.boundary, outputs)
        return as_potentials(values[:, :-1], mean_flow, domain), values[:, -1:]

    def begin(
        self, coarse: Tensor, middle: Tensor, boundary: Sequence[Boundary], outputs: Sequence[int] = ALL_OUTPUTS
    ) -> Float[Tensor, "b o x y z"]:
        """Potentials and pressure at 1/4 of the resolution, from the two coarser features."""
        with torch.autocast(coarse.device.type, enabled=False):  # bf16 potentials cost up to 7.6 % of the velocity
            values = _convolve_to_few(self.coarse, self._activate(0, coarse), boundary, outputs, 8)
            values = upsample_smoothly(values, boundary)
            return values + _convolve_to_few(self.middle, self._activate(1, middle), boundary, outputs, 4)

    def refine(
        self, begun: Tensor, fine: Tensor, boundary: Sequence[Boundary], outputs: Sequence[int] = ALL_OUTPUTS
    ) -> Float[Tensor, "b o x y z"]:
        """Circulations, scalar potential and pressure at full resolution, from what was begun and the fine features."""
        with torch.autocast(fine.device.type, enabled=False):
            kernels, biases = self.fine.weight.chunk(NUM_OUTPUTS), self.fine.bias.chunk(NUM_OUTPUTS)
            kernel = torch.cat([kernels[output] for output in outputs]).reshape(-1, *self.fine.shape[1:])
            bias = torch.cat([biases[output] for output in outputs])
            detail = functional.conv3d(pad_one(self._activate(2, fine), boundary), kernel, bias)
            smooth = upsample_smoothly(upsample_smoothly(begun, boundary), boundary)
            return _add_cubes(smooth, detail)

    def _activate(self, level: int, features: Tensor) -> Tensor:
        return functional.silu(self.norms[level](features.float()))


def as_potentials(
    values: Float[Tensor, "b o x y z"], mean_flow: Float[Tensor, "b 3"], domain: DomainSpec
) -> Potentials:
    """The head's outputs but pressure by name; potentials that the domain does not use are 0 and take no memory."""
    outputs, zero = OUTPUTS[domain.velocity_space], values.new_zeros(())
    circulation = values[:, :3] if 0 in outputs else zero.expand(len(values), 3, *values.shape[2:])
    scalar = values[:, -1] if 3 in outputs else zero.expand(len(values), *values.shape[2:])
    return Potentials(circulation, scalar, mean_flow.float())


def upsample_smoothly(values: Float[Tensor, "b f x y z"], boundary: Sequence[Boundary]) -> Float[Tensor, "b f u v w"]:
    """Twice the resolution by trilinear interpolation that knows the boundaries."""
    for axis in (2, 1, 0):  # the largest arrays are then written in long runs
        lower, upper = (_shift(values, axis, boundary[axis], step) for step in (1, -1))
        pair = torch.stack([torch.lerp(values, lower, 0.25), torch.lerp(values, upper, 0.25)], axis + 3)
        values = pair.flatten(axis + 2, axis + 3)
    return values


def _add_cubes(smooth: Float[Tensor, "b o x y z"], detail: Float[Tensor, "b p u v w"]) -> Float[Tensor, "b o x y z"]:
    """``smooth + depth_to_space(detail)`` in one pass over memory."""
    cubes = rearrange(detail, "b (o i j k) x y z -> b o x i y j z k", i=2, j=2, k=2)
    return (rearrange(smooth, "b o (x i) (y j) (z k) -> b o x i y j z k", i=2, j=2, k=2) + cubes).reshape(smooth.shape)


def _convolve_to_few(
    layer: Convolution, values: Tensor, boundary: Sequence[Boundary], outputs: Sequence[int], cell: int
) -> Float[Tensor, "b o x y z"]:
    """``layer(values, boundary)`` for few outputs: mix channels for all 27 taps in one product, then shift and add.

    So no kernel is filled up with outputs that nobody asked for. Potentials come in units of ``cell`` cells.
    """
    units = [1 if output == PRESSURE else cell for output in outputs]
    weight, bias = (
        torch.stack([parameter[output] * unit for output, unit in zip(outputs, units, strict=True)])
        for parameter in (layer.weight, layer.bias)
    )
    taps = rearrange(weight, "o (n k) -> (k o) n", k=27)
    mixed = torch.einsum("kn,bnxyz->bkxyz", taps, values)
    for axis in range(3):
        below, here, above = mixed.unflatten(1, (3, -1)).unbind(1)
        mixed = here + _shift(below, axis, boundary[axis], 1) + _shift(above, axis, boundary[axis], -1)
    return mixed + bias.reshape(-1, 1, 1, 1)


def _shift(values: Float[Tensor, "b f x y z"], axis: int, boundary: Boundary, step: Literal[1, -1]) -> Tensor:
    """The values of the cells one below (step 1) or one above (-1), continued beyond the ends as by ``pad_one``."""
    dim, num = axis - 3, values.shape[axis - 3]
    ends = values.narrow(dim, 0, 1), values.narrow(dim, num - 1, 1)
    if boundary == "wall":
        end = torch.zeros_like(ends[0])
    else:
        end = ends[(step == 1) == (boundary == "periodic")]  # the other end if periodic, else the same
    if step == 1:
        return torch.cat([end, values.narrow(dim, 0, num - 1)], dim)
    return torch.cat([values.narrow(dim, 1, num - 1), end], dim)


class _Lengths(NamedTuple):
    """What a grid measures, in units of its mean cell size."""

    edge: Float[Tensor, "3 x y z"]
    area: Float[Tensor, "3 x y z"]
    distance: Float[Tensor, "3 x y z"]
    mean_area: Float[Tensor, "3"]  # of a box whose mean cell volume is 1


@functools.lru_cache(maxsize=64)
def _lengths(grid: Grid, dtype: torch.dtype, device: torch.device) -> _Lengths:
    relative = grid.relative
    arrays = relative.edge_length, relative.face_area, relative.face_distance
    with torch.inference_mode(False):  # kept for later callers, who may need gradients through the product
        mean_area = 1 / torch.tensor(relative.mean_spacing).to(device, dtype)
        edge, area, distance = (torch.from_numpy(array).to(device, dtype) for array in arrays)
        return _Lengths(edge, area, distance, mean_area)


def to_grid(potentials: Potentials, grid: Grid) -> Potentials:
    """Potentials as a grid stores them: circulations A·edge and fluxes U·area, lengths in mean cell sizes."""
    lengths = _lengths(grid, potentials.scalar.dtype, potentials.scalar.device)
    flow = potentials.mean_flow * lengths.mean_area
    return Potentials(potentials.circulation * lengths.edge, potentials.scalar, flow)


def face_area(grid: Grid, device: torch.device) -> Float[Tensor, "3 x y z"]:
    """Areas of lower faces in units of the mean cell size; an axis along which nothing varies may have size 1."""
    return _lengths(grid, torch.float32, device).area


def face_measure(domain: DomainSpec, grid: Grid, device: torch.device) -> Float[Tensor, "3 x y z"]:
    """What turns a velocity into what is stored: the face's area, or the distance across it if irrotational."""
    lengths = _lengths(grid, torch.float32, device)
    return lengths.distance if domain.velocity_space == "irrotational" else lengths.area


def velocity_from_potentials(potentials: Potentials, domain: DomainSpec, grid: Grid) -> Float[Tensor, "b 3 x y z"]:
    """Normalised velocity on lower faces, differentiable; for training."""
    stored = compose_velocity(to_grid(potentials, grid), domain.boundary, domain.velocity_space)
    return stored / face_measure(domain, grid, stored.device)


def exact_flux(potentials: Potentials, domain: DomainSpec, grid: Grid) -> Float[Tensor, "b 3 x y z"]:
    """The flux (or circulation) on the lattice: its FP32 values sum to exactly zero divergence (or curl).

    Divide by ``face_measure`` for the normalised velocity; units are a scale kept beside it, never multiplied in.
    """
    return compose_velocity(
        snap_potentials(to_grid(potentials, grid), domain.velocity_space), domain.boundary, domain.velocity_space
    )
