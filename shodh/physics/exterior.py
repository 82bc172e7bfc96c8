"""Incidence operators d of the staggered box: the only derivatives whose compositions are exactly zero.

On the primal complex, edges --curl_of_edges--> faces --divergence_of_faces--> cells.
On the dual complex, cells --gradient_of_cells--> faces --curl_of_faces--> edges.
All coefficients are +1 and -1, so d d = 0 holds identically and, on lattice values, bit for bit.
Arrays end in the axes ``(x, y, z)`` and hold lower entities (see ``shodh.fields``).
Source: Desbrun, Hirani, Leok, Marsden, Discrete Exterior Calculus (2005), section 3.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from shodh.fields import Boundary

Boundaries = Sequence[Boundary]


def difference_up(values: Float[Tensor, "*s x y z"], axis: int, boundary: Boundary) -> Float[Tensor, "*s x y z"]:
    """values[i + 1] - values[i] along space axis 0, 1 or 2; beyond a wall the value is 0.

    At an open end, whose last entity is not stored, linearly extrapolated: d d = 0 holds there too, because
    differences along two axes commute whatever they do at an end.
    """
    dim = axis - 3
    if boundary == "periodic":
        return torch.roll(values, -1, dim) - values
    if boundary == "wall":
        upper = torch.zeros_like(values.narrow(dim, 0, 1))
        return torch.cat([values, upper], dim).diff(dim=dim)
    inner = values.diff(dim=dim)
    return torch.cat([inner, inner.narrow(dim, inner.shape[dim] - 1, 1)], dim)


def difference_down(values: Float[Tensor, "*s x y z"], axis: int, boundary: Boundary) -> Float[Tensor, "*s x y z"]:
    """values[i] - values[i - 1] along an axis; 0 in the lower wall, linearly extrapolated at an open end."""
    dim = axis - 3
    if boundary == "periodic":
        return values - torch.roll(values, 1, dim)
    inner = values.diff(dim=dim)
    first = inner.narrow(dim, 0, 1)
    return torch.cat([torch.zeros_like(first) if boundary == "wall" else first, inner], dim)


def zero_wall_edges(edges: Float[Tensor, "*s 3 x y z"], boundary: Boundaries) -> Float[Tensor, "*s 3 x y z"]:
    """Circulations with those of edges lying in a lower wall set to 0, so that no flux crosses the wall."""
    return torch.stack(_components_off_walls(edges, boundary), -4)


def _components_off_walls(edges: Float[Tensor, "*s 3 x y z"], boundary: Boundaries) -> list[Tensor]:
    """The components of ``zero_wall_edges``, of which only those that a wall changes are copied."""
    components = list(edges.unbind(-4))
    for axis in range(3):
        if boundary[axis] == "wall":
            for tangential in ((axis + 1) % 3, (axis + 2) % 3):
                components[tangential] = _zero_first(components[tangential], axis)
    return components


def zero_wall_faces(faces: Float[Tensor, "*s 3 x y z"], boundary: Boundaries) -> Float[Tensor, "*s 3 x y z"]:
    """Face values with those on lower walls set to 0 (impermeable walls)."""
    parts = [_zero_first(c, i) if boundary[i] == "wall" else c for i, c in enumerate(faces.unbind(-4))]
    return torch.stack(parts, -4)


def curl_of_edges(edges: Float[Tensor, "*s 3 x y z"], boundary: Boundaries) -> Float[Tensor, "*s 3 x y z"]:
    """Flux through faces of the circulation along edges: F = d a. Walls as ``zero_wall_edges`` leaves them."""
    a = _components_off_walls(edges, boundary)
    return torch.stack(
        [
            difference_up(a[(i + 2) % 3], (i + 1) % 3, boundary[(i + 1) % 3]).sub_(
                difference_up(a[(i + 1) % 3], (i + 2) % 3, boundary[(i + 2) % 3])
            )
            for i in range(3)
        ],
        -4,
    )


def divergence_of_faces(flux: Float[Tensor, "*s 3 x y z"], boundary: Boundaries) -> Float[Tensor, "*s x y z"]:
    """Net flux out of each cell: d F."""
    parts = [difference_up(component, i, boundary[i]) for i, component in enumerate(flux.unbind(-4))]
    return parts[0] + parts[1] + parts[2]


def gradient_of_cells(potential: Float[Tensor, "*s x y z"], boundary: Boundaries) -> Float[Tensor, "*s 3 x y z"]:
    """Difference across each lower face of a cell quantity: d phi; 0 through walls."""
    return torch.stack([difference_down(potential, i, boundary[i]) for i in range(3)], -4)


def curl_of_faces(circulation: Float[Tensor, "*s 3 x y z"], boundary: Boundaries) -> Float[Tensor, "*s 3 x y z"]:
    """Circulation around each lower edge of a quantity along the face normals: d v on the dual complex.

    Edges at index 0 of a walled or open axis have faces that are not stored; their entries are 0.
    """
    v = circulation.unbind(-4)

    def inner(values: Tensor, axis: int) -> Tensor:
        return difference_down(values, axis, "periodic" if boundary[axis] == "periodic" else "wall")

    curl = []
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        circulation_around = inner(v[k], j) - inner(v[j], k)
        for axis in (j, k):
            if boundary[axis] != "periodic":
                circulation_around = _zero_first(circulation_around, axis)
        curl.append(circulation_around)
    return torch.stack(curl, -4)


def mismatched_divergence(flux: Float[Tensor, "*s 3 x y z"], boundary: Boundaries) -> Float[Tensor, "*s x y z"]:
    """What a reader with the wrong operator sees: central differences of cell-centred averages of the flux."""
    return sum(
        (
            _central(_to_centre(component, i, boundary[i]), i, boundary[i])
            for i, component in enumerate(flux.unbind(-4))
        ),
        start=torch.zeros_like(flux.select(-4, 0)),
    )


def mismatched_curl(circulation: Float[Tensor, "*s 3 x y z"], boundary: Boundaries) -> Float[Tensor, "*s 3 x y z"]:
    """What a reader who takes face values for cell values sees: their curl by central differences.

    Averaging to the centres first would hide the mistake, because averages and differences of a gradient commute.
    """
    v = circulation.unbind(-4)
    return torch.stack(
        [
            _central(v[(i + 2) % 3], (i + 1) % 3, boundary[(i + 1) % 3])
            - _central(v[(i + 1) % 3], (i + 2) % 3, boundary[(i + 2) % 3])
            for i in range(3)
        ],
        -4,
    )


def _to_centre(component: Tensor, axis: int, boundary: Boundary) -> Tensor:
    upper = torch.roll(component, -1, axis - 3)
    if boundary != "periodic":
        last = upper.narrow(axis - 3, upper.shape[axis - 3] - 1, 1)
        last.copy_(torch.zeros_like(last) if boundary == "wall" else component.narrow(axis - 3, -1, 1))
    return (component + upper) / 2


def _central(values: Tensor, axis: int, boundary: Boundary) -> Tensor:
    dim = axis - 3
    if boundary == "periodic":
        return (torch.roll(values, -1, dim) - torch.roll(values, 1, dim)) / 2
    return torch.gradient(values, dim=dim)[0]


def _zero_first(values: Tensor, axis: int) -> Tensor:
    dim = axis - 3
    inside = values.narrow(dim, 1, values.shape[dim] - 1)
    return torch.cat([torch.zeros_like(values.narrow(dim, 0, 1)), inside], dim)
