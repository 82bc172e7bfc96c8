"""Flow through a porous medium: how well decoded fields keep its permeability, and what they leak into the solid."""

from typing import Any, NamedTuple

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor

from shodh.evaluation.divergence import squared_gradient
from shodh.fields import Grid

REVERSING = 0.1  # of a trajectory's largest mean flow: a slower one has no meaningful relative error


class PorousRows(NamedTuple):
    """Per snapshot; fluxes and lengths in the grid's units."""

    flow: Float[Tensor, "b 3"]  # mean velocity of the true flow through the box
    decoded_flow: Float[Tensor, "b 3"]
    dissipation: Float[Tensor, "b"]  # mean of |grad u|^2 over the volume, per unit of viscosity
    decoded_dissipation: Float[Tensor, "b"]
    solid_flux: Float[Tensor, "b 4"]  # sum of flux^2 on faces of solid, and on all faces: true, then decoded


def find_fluid(medium: Float[Tensor, "x y z"]) -> Bool[Tensor, "x y z"] | None:
    """Where a medium of ones (fluid) and zeros (solid) is fluid; None for any other medium, also without solid."""
    fluid = medium == 1
    return fluid if bool((fluid | (medium == 0)).all()) and bool(fluid.any()) and not bool(fluid.all()) else None


def sample_porous(
    truth: Float[Tensor, "b 3 x y z"],
    decoded: Float[Tensor, "b 3 x y z"],
    fluid: Bool[Tensor, "x y z"],
    grid: Grid,
) -> PorousRows:
    """What permeability and solid flux are made of, of velocities on lower faces."""
    area, volume = (torch.from_numpy(a).to(truth.device) for a in (grid.face_area, grid.cell_volume))
    solid = solid_faces(fluid, grid)
    share = area / area.mean((1, 2, 3), keepdim=True)
    values = [velocity.double() for velocity in (truth, decoded)]
    flows = [reduce(velocity * share, "b f x y z -> b f", "mean") for velocity in values]
    weight = volume / volume.mean()
    losses = [reduce(squared_gradient(velocity, grid) * weight, "b x y z -> b", "mean") for velocity in values]
    squares = [(velocity * area).square() for velocity in values]
    leaks = [reduce(square * part, "b f x y z -> b", "sum") for square in squares for part in (solid, solid | True)]
    return PorousRows(flows[0], flows[1], losses[0], losses[1], torch.stack(leaks, 1))


def solid_faces(fluid: Bool[Tensor, "x y z"], grid: Grid) -> Bool[Tensor, "3 x y z"]:
    """Lower faces that touch a solid cell on either side; a periodic axis wraps."""
    faces = []
    for axis, boundary in enumerate(grid.boundary):
        below = torch.roll(fluid, 1, axis)
        if boundary != "periodic":
            below.select(axis, 0).fill_(True)
        faces.append(~(fluid & below))
    return torch.stack(faces)


def summarise_porous(trajectories: list[PorousRows]) -> dict[str, Any]:
    """``permeability`` and ``flux_in_solid`` of decoded fields; one ``PorousRows`` a trajectory.

    Permeability is viscosity U / force with U the mean flow along the axis on which a trajectory flows fastest. Force
    and viscosity are the same for truth and decoded, so ``flow_error`` = |U' / U - 1| is the error of that definition;
    a tokenizer that passes the mean flow through its latent has none. In steady flow force times U is what viscosity
    dissipates, so permeability is also U^2 / mean |grad u|^2: ``dissipation_error`` and the signed
    ``dissipation_bias`` are of that, and show what decoded throats are worth. Both are means over the snapshots whose
    flow is not about to reverse. ``flux_in_solid``: share of flux^2 on faces that touch solid.
    """
    flow_errors, resistance_errors = [], []
    for rows in trajectories:
        axis = int(rows.flow.square().sum(0).argmax())
        flow, decoded_flow = rows.flow[:, axis], rows.decoded_flow[:, axis]
        kept = (flow.abs() > REVERSING * flow.abs().max()) & (rows.dissipation > 0)
        flow_errors.append((decoded_flow / flow - 1)[kept])
        permeability = (decoded_flow**2 / rows.decoded_dissipation.clamp_min(1e-300))[kept]
        resistance_errors.append(permeability * (rows.dissipation / flow**2)[kept] - 1)
    flows, resistances = torch.cat(flow_errors), torch.cat(resistance_errors)
    leaks = torch.cat([rows.solid_flux for rows in trajectories]).sum(0).tolist()
    return {
        "permeability": {
            "flow_error": flows.abs().mean().item(),
            "dissipation_error": resistances.abs().mean().item(),
            "dissipation_bias": resistances.mean().item(),
            "num_snapshots": len(flows),
        }
        if len(flows)
        else None,
        "flux_in_solid": {"truth": leaks[0] / max(leaks[1], 1e-300), "decoded": leaks[2] / max(leaks[3], 1e-300)},
    }
