"""Decoder features -> potentials -> a velocity that conserves mass (or is free of rotation) by construction."""

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from shodh.fields import DomainSpec, Grid
from shodh.physics.helmholtz import Potentials, compose_velocity, snap_potentials
from tokenizer.layers import BoundaryConv, depth_to_space


class HelmholtzHead(nn.Module):
    """Emits edge circulations, a scalar potential and one mean flux per axis, always in FP32.

    The network sees no domain: all potentials are always emitted, and the domain's ``velocity_space`` says which are
    used. Potentials are in units of the normalised velocity times the grid's mean cell size.
    """

    def __init__(self, coarse_width: int, fine_width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, fine_width)
        self.out = BoundaryConv(fine_width, 8 * 5)  # 3 circulations, scalar potential, pressure in each 2x2x2 cube
        self.mean_flow = nn.Linear(coarse_width, 3)
        with torch.no_grad():  # begin near rest: differences of random potentials would be a storm
            self.out.conv.weight *= 0.1

    def forward(
        self, coarse: Float[Tensor, "b d i j k"], fine: Float[Tensor, "b w i j k"], domain: DomainSpec
    ) -> tuple[Potentials, Float[Tensor, "b 1 x y z"]]:
        with torch.autocast(fine.device.type, enabled=False):  # bf16 potentials cost up to 7.6 % of the velocity
            features = functional.silu(self.norm(fine.float()))
            values = depth_to_space(self.out(features, domain.boundary))
            mean_flow = self.mean_flow(reduce(coarse.float(), "b d i j k -> b d", "mean"))
        return Potentials(values[:, :3], values[:, 3], mean_flow), values[:, 4:]


def to_grid(potentials: Potentials, grid: Grid) -> Potentials:
    """Potentials as the integrals that a grid stores: circulations A·edge, fluxes U·area, lengths in mean cell sizes."""
    length = torch.tensor(grid.relative.spacing, device=potentials.scalar.device)
    area = torch.tensor(grid.relative.face_area, device=potentials.scalar.device)
    return Potentials(
        potentials.circulation * length.reshape(3, 1, 1, 1), potentials.scalar, potentials.mean_flow * area
    )


def face_measure(domain: DomainSpec, grid: Grid, device: torch.device) -> Float[Tensor, "3 1 1 1"]:
    """What turns a velocity into what is stored: the face's area, or the spacing across it if irrotational."""
    relative = grid.relative
    measure = relative.spacing if domain.velocity_space == "irrotational" else relative.face_area
    return torch.tensor(measure, device=device).reshape(3, 1, 1, 1)


def velocity_from_potentials(potentials: Potentials, domain: DomainSpec, grid: Grid) -> Float[Tensor, "b 3 x y z"]:
    """Normalised velocity on lower faces, differentiable; for training."""
    stored = compose_velocity(to_grid(potentials, grid), domain.boundary, domain.velocity_space)
    return stored / face_measure(domain, grid, stored.device)


def exact_flux(potentials: Potentials, domain: DomainSpec, grid: Grid) -> Float[Tensor, "b 3 x y z"]:
    """The flux (or circulation) on the lattice: its FP32 values sum to exactly zero divergence (or curl).

    Divide by ``face_measure`` for the normalised velocity; units are a scale kept beside it, never multiplied in.
    """
    return compose_velocity(snap_potentials(to_grid(potentials, grid)), domain.boundary, domain.velocity_space)
