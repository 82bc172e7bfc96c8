"""Decoder features -> potentials -> a velocity that conserves mass (or is free of rotation) by construction."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from shodh.fields import Boundary, DomainSpec, Grid
from shodh.physics.helmholtz import Potentials, compose_velocity, snap_potentials
from tokenizer.layers import BoundaryConv, depth_to_space, pad_one

NUM_OUTPUTS = 5  # 3 circulations, scalar potential, pressure


class HelmholtzHead(nn.Module):
    """Emits edge circulations, a scalar potential and pressure, always in FP32; the mean flow comes from the latent.

    The network sees no domain: all potentials are always emitted, and the domain's ``velocity_space`` says which are
    used. Potentials are in units of the normalised velocity times the grid's mean cell size. They are a sum over
    resolutions, each in units of its own cell size: velocity is a difference of potentials, so a large eddy needs a
    potential as many times larger as it is wider, and without this its gradient would be as many times weaker.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in (coarse, middle, fine))
        self.coarse = BoundaryConv(coarse, NUM_OUTPUTS)
        self.middle = BoundaryConv(middle, NUM_OUTPUTS)
        self.fine = BoundaryConv(fine, 8 * NUM_OUTPUTS)  # a 2x2x2 cube of the full resolution per position

    def forward(
        self, features: Sequence[Tensor], mean_flow: Float[Tensor, "b 3"], domain: DomainSpec
    ) -> tuple[Potentials, Float[Tensor, "b 1 x y z"]]:
        with torch.autocast(mean_flow.device.type, enabled=False):  # bf16 potentials cost up to 7.6 % of the velocity
            coarse, middle, fine = (
                functional.silu(norm(feature.float())) for norm, feature in zip(self.norms, features, strict=True)
            )
            values = upsample_smoothly(_in_cells_of(8, self.coarse(coarse, domain.boundary)), domain.boundary)
            values = values + _in_cells_of(4, self.middle(middle, domain.boundary))
            values = upsample_smoothly(upsample_smoothly(values, domain.boundary), domain.boundary)
            values = values + depth_to_space(self.fine(fine, domain.boundary))
        return Potentials(values[:, :3], values[:, 3], mean_flow.float()), values[:, 4:]


def upsample_smoothly(values: Float[Tensor, "b f x y z"], boundary: Sequence[Boundary]) -> Tensor:
    """Twice the resolution by trilinear interpolation that knows the boundaries."""
    doubled = functional.interpolate(pad_one(values, boundary), scale_factor=2, mode="trilinear", align_corners=False)
    return doubled[:, :, 2:-2, 2:-2, 2:-2]


def _in_cells_of(size: int, values: Float[Tensor, "b f x y z"]) -> Float[Tensor, "b f x y z"]:
    """Potentials times the cell size; pressure as it is."""
    return torch.cat([values[:, :4] * size, values[:, 4:]], 1)


def to_grid(potentials: Potentials, grid: Grid) -> Potentials:
    """Potentials as a grid stores them: circulations A·edge and fluxes U·area, lengths in mean cell sizes."""
    relative, like = grid.relative, potentials.scalar
    length = torch.from_numpy(relative.edge_length).to(like)
    mean_area = 1 / torch.tensor(relative.mean_spacing).to(like)  # of a box whose mean cell volume is 1
    return Potentials(potentials.circulation * length, potentials.scalar, potentials.mean_flow * mean_area)


def face_measure(domain: DomainSpec, grid: Grid, device: torch.device) -> Float[Tensor, "3 x y z"]:
    """What turns a velocity into what is stored: the face's area, or the distance across it if irrotational."""
    relative = grid.relative
    measure = relative.face_distance if domain.velocity_space == "irrotational" else relative.face_area
    return torch.from_numpy(measure).to(device, torch.float32)


def velocity_from_potentials(potentials: Potentials, domain: DomainSpec, grid: Grid) -> Float[Tensor, "b 3 x y z"]:
    """Normalised velocity on lower faces, differentiable; for training."""
    stored = compose_velocity(to_grid(potentials, grid), domain.boundary, domain.velocity_space)
    return stored / face_measure(domain, grid, stored.device)


def exact_flux(potentials: Potentials, domain: DomainSpec, grid: Grid) -> Float[Tensor, "b 3 x y z"]:
    """The flux (or circulation) on the lattice: its FP32 values sum to exactly zero divergence (or curl).

    Divide by ``face_measure`` for the normalised velocity; units are a scale kept beside it, never multiplied in.
    """
    return compose_velocity(snap_potentials(to_grid(potentials, grid)), domain.boundary, domain.velocity_space)
