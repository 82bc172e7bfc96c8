"""What a model's routers do on the held-out trajectories of a pair: between its members, and within each field."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from einops import reduce
from hard_pairs_models import Pair
from jaxtyping import Float
from torch import Tensor

from data.latents import LatentStore
from shodh.evaluation.rollout import join_successive
from shodh.evaluation.routing import (
    RoutingCounts,
    count_routing,
    describe,
    merge_counts,
    mutual_information,
    normalise_information,
)
from shodh.evaluation.token_classes import (
    TokenClasses,
    exchange_classes,
    near_wall,
    place_information,
    pore_share,
    pore_size,
    share_of_first_expert,
    shuffle_classes,
)
from shodh.fields import PARAMETERS, LatentBatch, Routing
from shodh.model.transformer import LatentTransformer
from shodh.training.objectives import relative_errors
from tokenizer.autoencoder import DOWNSAMPLING

NUM_SHUFFLES = 20
MOST_SPLITS = 200  # of the held-out trajectories into two halves that are tried


class Visit(NamedTuple):
    """One held-out trajectory as a model routes it: all its states, one after another, per layer."""

    member: int
    trajectory: int
    routings: tuple[Routing, ...]
    change: Float[Tensor, "t"]  # of each state's latents to the next, mean square
    error: float  # of one step: squared error over squared change, mean over states; persistence scores 1


@torch.no_grad()
def visit_held_out(model: LatentTransformer, pair: Pair) -> list[Visit]:
    """Every held-out trajectory of both members, in order."""
    visits = []
    for member, latents in enumerate(pair.latents):
        for i in latents.trajectories("test"):
            batch = _all_states(latents, i).to(next(model.parameters()).device)
            forecast = model(batch.given, batch.medium, batch.parameters)
            change = batch.following - batch.current
            error = relative_errors(forecast.latent - batch.following, change, floor=0.0)["data"]
            size = reduce(change**2, "t c x y z -> t", "mean").cpu()
            routings = tuple(Routing(*(value.cpu() for value in routing)) for routing in forecast.routings)
            visits.append(Visit(member, i, routings, size, error.item()))
    return visits


def measure_pair(visits: Sequence[Visit], pair: Pair) -> dict[str, list[float]]:
    """Per layer: purity, I(member; expert) / H(member), and the same for other ways to halve the trajectories.

    Purity is the token-weighted mean over experts of the larger member's share; 0.5 where experts do not distinguish
    equally many of each. A trajectory counts as one sample. Halvings: at the median of each parameter, to see what else
    experts follow; and all that there are, of which the largest is given: what the pair has to exceed before its
    experts know the members rather than single trajectories. Last, states halved at the median of their change.
    """
    own = [visit.member for visit in visits]
    counts = _count_halves(visits, own)
    others = [_information(_count_halves(visits, halves)) for halves in _other_halvings(own)]
    found = {
        "purity": describe(counts).purity,
        "I/H(member)": _information(counts),
        f"I/H(half), largest of {len(others)} other halves": torch.stack(others).amax(0) if others else None,
        "load of the busiest expert over ideal": describe(counts).overall.amax(-1) * counts.choices.shape[-1],
        "I(trajectory; expert)/H(expert)": _of_trajectories(visits),
    }
    for name, halves in _halve_by_parameter(visits, pair).items():
        found[f"I/H({name})"] = _information(_count_halves(visits, halves))
    found["I/H(change of state)"] = _of_change(visits)
    return {name: values.tolist() for name, values in found.items() if values is not None}


def classify_places(pair: Pair, visits: Sequence[Visit], patch: int) -> dict[str, list[TokenClasses]]:
    """The kinds of classes that the domain's medium offers, for every visited trajectory."""
    block = DOWNSAMPLING * patch
    media = [pair.stores[visit.member].medium(visit.trajectory) for visit in visits]
    if pair.domain == "open_channel":
        classes = [near_wall(medium, block) for medium in media]
        return {"wall, bulk, surface": classes, "wall or not": [_merge_away_from_wall(own) for own in classes]}
    pores = [np.asarray(medium > 0.5) for medium in media]
    return {
        "throat or body": [pore_size(pore, block) for pore in pores],
        "solid- or pore-rich": [pore_share(pore, block) for pore in pores],
    }


def measure_places(visits: Sequence[Visit], kinds: Mapping[str, Sequence[TokenClasses]]) -> dict[str, list[float]]:
    """Per layer and kind of class: I(class; expert) / H(class), and the largest of its controls.

    Shuffled: labels among the tokens of a trajectory. Exchanged: the maps of labels among trajectories, where they
    differ; unlike shuffled ones they are as smooth as the right ones.
    """
    routings = [visit.routings for visit in visits]
    num_tokens = len(next(iter(kinds.values()))[0].label)
    found = {"share of a state on its first expert": share_of_first_expert(routings, num_tokens).tolist()}
    for kind, classes in kinds.items():
        generator = torch.Generator().manual_seed(0)
        shuffled = [place_information(routings, shuffle_classes(classes, generator)) for _ in range(NUM_SHUFFLES)]
        found[f"I/H({kind})"] = place_information(routings, classes).tolist()
        found[f"I/H({kind}), largest of {NUM_SHUFFLES} shuffled"] = torch.stack(shuffled).amax(0).tolist()
        if any(not torch.equal(own.label, classes[0].label) for own in classes):
            moved = [place_information(routings, exchange_classes(classes, k)) for k in range(1, len(classes))]
            found[f"I/H({kind}), largest of {len(moved)} exchanged"] = torch.stack(moved).amax(0).tolist()
    return found


def _all_states(latents: LatentStore, trajectory: int) -> LatentBatch:
    whole = torch.stack([torch.from_numpy(latents.latent(trajectory, t)) for t in range(latents.num_snapshots)])
    medium, parameters = (torch.from_numpy(part(trajectory)) for part in (latents.medium, latents.parameters))
    return join_successive(whole, medium, parameters, index=0)


def _information(counts: RoutingCounts) -> Float[Tensor, "layer"]:
    return normalise_information(describe(counts))


def _count_halves(visits: Sequence[Visit], halves: Sequence[int]) -> RoutingCounts:
    return merge_counts([count_routing(v.routings, torch.tensor([h]), 2) for v, h in zip(visits, halves, strict=True)])


def _halve_by_parameter(visits: Sequence[Visit], pair: Pair) -> dict[str, list[int]]:
    """Trajectories above the median (1) or not (0), by each parameter that tells them apart."""
    told = torch.stack([torch.from_numpy(pair.latents[v.member].parameters(v.trajectory)) for v in visits])
    halves = (told > told.quantile(0.5, dim=0)).int()
    return {name: halves[:, q].tolist() for q, name in enumerate(PARAMETERS) if told[:, q].unique().numel() > 1}


def _of_change(visits: Sequence[Visit]) -> Float[Tensor, "layer"]:
    """I(fast or slow; expert) / H for states whose change lies above or below their trajectory's median."""
    counts = [count_routing(v.routings, (v.change > v.change.median()).long(), 2) for v in visits]
    return _information(merge_counts(counts))


def _of_trajectories(visits: Sequence[Visit]) -> Float[Tensor, "layer"]:
    """I(trajectory; expert) / H(expert): how much of the choice is made for a whole trajectory; states are samples."""
    labels = [torch.full_like(visit.change, i).long() for i, visit in enumerate(visits)]
    counts = merge_counts([count_routing(v.routings, own, len(visits)) for v, own in zip(visits, labels, strict=True)])
    entropy = torch.special.entr(describe(counts).overall).sum(-1)
    return torch.where(entropy > 1e-9, mutual_information(counts) / entropy.clamp_min(1e-9), 0.0)


def _other_halvings(members: Sequence[int]) -> list[list[int]]:
    """All the ways to call half of the trajectories 1, but the given one and its reverse; mirrored ones once."""
    num = len(members)
    halvings = [
        [int(i in chosen) for i in range(num)] for chosen in combinations(range(num), sum(members)) if 0 not in chosen
    ]
    mirrored = [1 - member for member in members]
    others = [halving for halving in halvings if halving not in (list(members), mirrored)]
    step = max(1, len(others) // MOST_SPLITS)
    return others[::step]


def _merge_away_from_wall(classes: TokenClasses) -> TokenClasses:
    return TokenClasses(("wall", "away"), classes.label.clamp_max(1))
