"""What kind of place a token stands in, from the static medium alone, and whether the experts follow it.

A token sees a cube of ``block``^3 cells (8 x the model's patch). Classes are labels per token, in the tokens' order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from shodh.evaluation.routing import (
    RoutingCounts,
    count_routing,
    describe,
    merge_counts,
    normalise_information,
    select_domains,
)
from shodh.fields import Routing


class TokenClasses(NamedTuple):
    """Which class each token of a field belongs to; -1: to none."""

    names: tuple[str, ...]
    label: Int[Tensor, "n"]


def near_wall(wall_distance: Float[np.ndarray, "x y z"], block: int) -> TokenClasses:
    """Tokens that touch a wall; those that hold the farthest cells, as at a free surface; and the bulk between.

    Raises ValueError unless ``block`` divides the field.
    """
    blocks = _cut(wall_distance, block)
    label = np.ones(len(blocks), int)
    label[blocks.max(1) == wall_distance.max()] = 2
    label[blocks.min(1) == wall_distance.min()] = 0
    return TokenClasses(("wall", "bulk", "farthest"), torch.from_numpy(label))


def pore_size(pore: Bool[np.ndarray, "x y z"], block: int) -> TokenClasses:
    """Throats and bodies: tokens whose pores are locally thinner or thicker than the median token's.

    A token's thickness is the mean of ``local_thickness`` over its pore cells; a token without any has no class.
    Raises ValueError unless ``block`` divides the field.
    """
    inside = _cut(pore, block)
    num_cells = inside.sum(1)
    mean = _cut(local_thickness(pore), block).sum(1) / num_cells.clip(1)
    return TokenClasses(("throat", "body"), torch.from_numpy(_halve(mean, num_cells > 0)))


def pore_share(pore: Bool[np.ndarray, "x y z"], block: int) -> TokenClasses:
    """Tokens that hold less or more pore than the median one. Raises ValueError unless ``block`` divides the field."""
    share = _cut(pore, block).mean(1)
    return TokenClasses(("solid-rich", "pore-rich"), torch.from_numpy(_halve(share, np.ones(len(share), bool))))


def local_thickness(pore: Bool[np.ndarray, "x y z"]) -> Float[np.ndarray, "x y z"]:
    """Radius, in cells, of the largest sphere within the pores that holds the cell; 0 in the solid; periodic.

    Hildebrand and Ruegsegger, A new method for the model-independent assessment of thickness (1997). A sphere ends at
    the centre of the nearest solid cell. Without any solid the radius is infinite.
    """
    distance = periodic_distance(pore)
    thickness = np.zeros(pore.shape)
    for radius in np.unique(distance[pore]):  # upwards, so that the largest stays
        thickness[periodic_distance(distance < radius) < radius] = radius
    return thickness


def periodic_distance(mask: Bool[np.ndarray, "x y z"]) -> Float[np.ndarray, "x y z"]:
    """Distance in cells from each cell to the nearest False one in the periodic box; infinite where there is none."""
    if mask.all():
        return np.full(mask.shape, np.inf)
    margins = [n // 2 + 1 for n in mask.shape]  # nothing is farther off along an axis
    padded = distance_transform_edt(np.pad(mask, [(m, m) for m in margins], mode="wrap"))
    return np.asarray(padded)[tuple(slice(m, -m) for m in margins)]


def place_information(routings: Sequence[Sequence[Routing]], classes: Sequence[TokenClasses]) -> Float[Tensor, "layer"]:
    """I(class; expert) / H(class) per layer, tokens of all samples together, corrected as ``mutual_information`` is.

    ``routings`` holds, per sample, the Routing of each layer for all its states, state after state; ``classes`` holds
    the sample's classes, the same for every state. The correction takes tokens for independent, which those of a
    sample are not: compare with ``shuffle_classes`` and ``exchange_classes``. 0 where all tokens are of one class.
    """
    num_classes = len(classes[0].names)
    counts = merge_counts(
        [_count_places(routing, own, num_classes) for routing, own in zip(routings, classes, strict=True)]
    )
    seen = counts.num_tokens.nonzero().flatten().tolist()  # a small box may have no bulk
    return normalise_information(describe(select_domains(counts, seen)))


def shuffle_classes(classes: Sequence[TokenClasses], generator: torch.Generator) -> list[TokenClasses]:
    """The same labels at other tokens of their own sample: what is left of the information is chance."""
    return [own._replace(label=own.label[torch.randperm(len(own.label), generator=generator)]) for own in classes]


def exchange_classes(classes: Sequence[TokenClasses], shift: int) -> list[TokenClasses]:
    """Each sample with the labels of the ``shift``-th next one: what is left is chance between maps as smooth as these,
    or a place in the box that all samples have in common."""
    return [classes[(i + shift) % len(classes)] for i in range(len(classes))]


def share_of_first_expert(routings: Sequence[Sequence[Routing]], num_tokens: int) -> Float[Tensor, "layer"]:
    """Per layer, the share of a state's tokens on its most used expert, mean over states; 1: states are not divided."""

    def per_layer(routing: Routing) -> Tensor:
        chosen = torch.nn.functional.one_hot(routing.expert[:, 0].long(), routing.probability.shape[-1])
        return reduce(chosen.double(), "(t n) e -> t e", "mean", n=num_tokens).amax(-1).mean()

    return torch.stack([torch.stack([per_layer(layer) for layer in sample]) for sample in routings]).mean(0)


def _count_places(routings: Sequence[Routing], classes: TokenClasses, num_classes: int) -> RoutingCounts:
    num_states, rest = divmod(len(routings[0].expert), len(classes.label))
    if rest:
        raise ValueError(
            f"classes: {len(classes.label)} labels for {len(routings[0].expert)} tokens. Give those of one state."
        )
    label = classes.label.repeat(num_states)
    kept = label >= 0
    chosen = [Routing(*(value[kept] for value in routing)) for routing in routings]
    return count_routing(chosen, label[kept], num_classes)


def _cut(field: np.ndarray, block: int) -> np.ndarray:
    if any(n % block for n in field.shape):
        raise ValueError(f"block={block}: does not divide the field {field.shape}. Take 8 x the model's patch.")
    return rearrange(field, "(x i) (y j) (z k) -> (x y z) (i j k)", i=block, j=block, k=block)


def _halve(values: Float[np.ndarray, "n"], counted: Bool[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """0 up to the median of those counted, 1 above, -1 for the others."""
    label = np.full(len(values), -1)
    if counted.any():
        label[counted] = values[counted] > np.median(values[counted])
    return label
