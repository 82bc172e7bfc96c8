"""Mean flow and stresses over the height of a channel, collected while it runs; no snapshot is kept.

Everything is summed in FP64, per trajectory, over time and the two periodic axes. The shear stress is taken on the
edges, with the averages that the momentum flux uses: in a steady state the total stress is then linear, exactly.
A velocity on the grid is the mean over its face (that is what conserves mass); the variances are those of point values,
which the faces' extent along x and z would hide by h^2 / 12 of the squared gradients: a tenth of vv at 9 wall units.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.simulate.channel_flow import Channel, advance
from data.simulate.wide_momentum_flux import carry_along_y, sharpen

_ACROSS = ((-1,), (-3, -1), (-3,))  # periodic dims of the faces that u, v and w are means over


class WallStatistics(NamedTuple):
    """Sums over samples of plane means; statistics of one channel at different times can be added."""

    num_samples: int
    velocity: Float[np.ndarray, "b 3 y"]  # of u, v, w; v at lower faces, the others in cells
    square: Float[np.ndarray, "b 3 y"]  # of u u, v v, w w, there too
    shear: Float[np.ndarray, "b faces"]  # of u v at the faces 0 to y


class WallProfiles(NamedTuple):
    """Averages over time and planes at their heights; a Reynolds stress is a covariance, uv that of u with v."""

    cell_height: Float[np.ndarray, "y"]
    face_height: Float[np.ndarray, "faces"]
    velocity: Float[np.ndarray, "b y"]  # along x, in cells
    uu: Float[np.ndarray, "b y"]  # in cells
    vv: Float[np.ndarray, "b faces"]  # on faces
    ww: Float[np.ndarray, "b y"]  # in cells
    uv: Float[np.ndarray, "b faces"]  # on faces
    viscous_stress: Float[np.ndarray, "b faces"]  # viscosity dU/dy on faces, walls included
    bulk_velocity: Float[np.ndarray, "b"]

    @property
    def total_stress(self) -> Float[np.ndarray, "b faces"]:
        """viscosity dU/dy - uv on faces: in a steady state the force times the distance from the plane of symmetry."""
        return self.viscous_stress - self.uv

    @property
    def bed_stress(self) -> Float[np.ndarray, "b"]:
        """Shear stress on the bed."""
        return self.viscous_stress[:, 0]


def measure(velocity: Float[Tensor, "b 3 x y z"], channel: Channel) -> WallStatistics:
    """The statistics of one instant."""
    fields = velocity.double()
    u_edge = (fields[:, 0, :, 1:] + fields[:, 0, :, :-1]) / 2
    v_edge = (fields[:, 1] + fields[:, 1].roll(1, 1))[:, :, 1:] / 2
    if channel.stencil == "wide":
        v_edge = carry_along_y(v_edge)
    shear = torch.nn.functional.pad((u_edge * v_edge).mean((1, 3)), (1, 1))  # nothing crosses the bed or the top
    points = torch.stack([sharpen(fields[:, i], dims) for i, dims in enumerate(_ACROSS)], 1)
    means = fields.mean((2, 4)), points.square().mean((2, 4)), shear
    return WallStatistics(1, *(mean.cpu().numpy() for mean in means))


def merge(parts: list[WallStatistics]) -> WallStatistics:
    """The statistics of all times of the parts."""
    num_samples, *sums = zip(*parts, strict=True)
    return WallStatistics(sum(num_samples), *(np.sum(arrays, 0) for arrays in sums))


def advance_and_measure(
    velocity: Float[Tensor, "b 3 x y z"], channel: Channel, dt: float, num_steps: int, every: int
) -> tuple[Float[Tensor, "b 3 x y z"], WallStatistics]:
    """The velocity ``num_steps`` steps later, and the statistics of every ``every``-th step on the way."""
    parts = []
    for done in range(0, num_steps, every):
        velocity = advance(velocity, channel, dt, min(every, num_steps - done))
        parts.append(measure(velocity, channel))
    return velocity, merge(parts)


def compute_profiles(statistics: WallStatistics, channel: Channel) -> WallProfiles:
    """Averages and stresses of the collected sums."""
    widths = channel.grid.widths(1)
    faces = np.concatenate([[0.0], np.cumsum(widths)])
    mean, square = statistics.velocity / statistics.num_samples, statistics.square / statistics.num_samples
    variance = square - mean**2
    u = mean[:, 0]
    ghosted = np.concatenate([-u[:, :1], u, u[:, -1:] * (1 if channel.top == "free" else -1)], 1)
    distance = np.convolve(np.pad(widths, 1, mode="edge"), [0.5, 0.5], "valid")
    viscosity = channel.viscosity.double().cpu().numpy()[:, None]
    return WallProfiles(
        cell_height=(faces[1:] + faces[:-1]) / 2,
        face_height=faces,
        velocity=u,
        uu=variance[:, 0],
        vv=np.pad(variance[:, 1], ((0, 0), (0, 1))),
        ww=variance[:, 2],
        uv=statistics.shear / statistics.num_samples,  # the mean of v is 0: no mass crosses a plane
        viscous_stress=viscosity * np.diff(ghosted, axis=1) / distance,
        bulk_velocity=(u * widths).sum(1) / widths.sum(),
    )


def fold(profiles: WallProfiles) -> WallProfiles:
    """Both halves of a closed channel as one: the mean over heights y and 2 - y, up to the middle."""

    def half(values: np.ndarray, sign: int = 1) -> np.ndarray:
        count = (values.shape[-1] + 1) // 2
        return (values + sign * values[..., ::-1])[..., :count] / 2

    num_cells, num_faces = (len(profiles.cell_height) + 1) // 2, (len(profiles.face_height) + 1) // 2
    return WallProfiles(
        cell_height=profiles.cell_height[:num_cells],
        face_height=profiles.face_height[:num_faces],
        velocity=half(profiles.velocity),
        uu=half(profiles.uu),
        vv=half(profiles.vv),
        ww=half(profiles.ww),
        uv=half(profiles.uv, -1),
        viscous_stress=half(profiles.viscous_stress, -1),
        bulk_velocity=profiles.bulk_velocity,
    )
