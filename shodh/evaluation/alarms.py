"""What a person should look at in a run, each as one sentence with its remedy. Imports no torch: reports use it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from shodh.training.alarm_log import Alarm

STARVED = 0.1  # of an even share: such an expert sees in ten steps what an even share would show it in one
RANKS_DIFFER = 0.5  # half of a domain's tokens go elsewhere than on the other ranks, whose weights should be the same
MIN_SAMPLES = 20  # of a domain on a rank: chance moves loads over 4 to 8 experts by 0.15 to 0.25 then
WAITING = 1 / 3  # of a step, while another rank does something between its steps

COLLAPSE_REMEDY = (
    "Stop, and begin again in a new run folder with a larger objective.balance_weight, or with objective.bias_rate "
    "(say 0.02), which shifts the choice where no gradient arrives; a higher model.temperature or a lower "
    "loop.schedule.learning_rate keeps the router from hardening early."
)
STARVATION_REMEDY = (
    "Begin again in a new run folder with a larger objective.balance_weight, with objective.bias_rate (say 0.02) or "
    "objective.information_weight (say 0.02), or with fewer experts: model.num_experts."
)
NOT_FINITE_REMEDY = (
    "Lower loop.schedule.learning_rate or engine.gradient_clipping, and check the data of that step with "
    "`python -m data.layout STORE`."
)


def most_lopsided(num_domains: int, top_k: int) -> float:
    """The share of the ``top_k`` busiest experts above which a layer has collapsed; loads mean over domains.

    The most lopsided routing that still separates a domain from the rest sends one choice of one domain elsewhere and
    leaves those experts 1 - 1 / (domains k); a collapsed layer leaves them 1. The limit lies halfway. A single
    domain has none to be separated from: it is held to the limit of two.
    """
    return 1 - 1 / (2 * top_k * max(num_domains, 2))


def find_routing_alarms(load: np.ndarray, top_k: int = 1) -> list[Alarm]:
    """Collapse and starvation, layer by layer."""
    collapsed = find_collapse(load, top_k)
    return collapsed + leave_out_collapsed(find_starvation(load, top_k), collapsed)


def leave_out_collapsed(starving: Sequence[Alarm], collapsed: Sequence[Alarm]) -> list[Alarm]:
    """The starved experts of a collapsed layer go without saying."""
    layers = {alarm.layer for alarm in collapsed}
    return [alarm for alarm in starving if alarm.layer not in layers]


def find_collapse(load: np.ndarray, top_k: int = 1) -> list[Alarm]:
    """Layers whose ``top_k`` busiest experts take almost everything, from loads (domain, layer, expert) that sum to 1.

    One expert that serves all of one domain is what routing is for, so this is judged over all domains together, each
    weighing the same whatever its number of tokens. Where every token visits all experts there is nothing to find.
    """
    num_domains, num_layers, num_experts = load.shape
    if num_experts <= top_k:
        return []
    mean = load.mean(0)
    busiest = np.argsort(-mean, axis=-1)[:, :top_k]
    taken = np.take_along_axis(mean, busiest, -1).sum(-1)
    limit = most_lopsided(num_domains, top_k)
    layers = [layer for layer in range(num_layers) if taken[layer] > limit]
    return [_name_collapse(layer, busiest[layer].tolist(), float(taken[layer])) for layer in layers]


def find_starvation(load: np.ndarray, top_k: int = 1) -> list[Alarm]:
    """Experts to which no domain gives more than a tenth of an even share; loads as for ``find_collapse``."""
    num_experts = load.shape[-1]
    if num_experts <= top_k:
        return []
    most = load.max(0) * num_experts
    return [alarm for layer in range(len(most)) for alarm in _name_starving(layer, most[layer])]


def find_rank_alarms(choices: np.ndarray, num_samples: np.ndarray, seconds: np.ndarray) -> list[Alarm]:
    """Ranks that route or pace otherwise than the rest, from sums over some steps.

    ``choices`` (rank, layer, domain, expert), ``num_samples`` (rank, domain), ``seconds`` (rank,) of a step. Loads are
    compared domain by domain, since ranks may hold different domains. Ranks end a step together, so the one whose
    step is *short* began it late.
    """
    alarms = []
    for domain in range(choices.shape[2]):
        enough = np.flatnonzero(num_samples[:, domain] >= MIN_SAMPLES)
        if len(enough) > 1 and not alarms:
            alarms += _compare_ranks(choices[enough, :, domain], enough)
    waiting = 1 - seconds.min() / seconds.max() if seconds.max() > 0 else 0.0
    if waiting > WAITING:
        rank = int(seconds.argmin())
        message = f"Rank {rank} begins its steps late: the others wait for {waiting:.0%} of each step. "
        remedy = "Raise tracking.interval or set tracking.wandb=disabled (rank 0), or look at the disk of its node."
        alarms.append(Alarm("rank pace", message + remedy))
    return alarms


def find_evaluation_alarms(evaluation: dict[str, Any]) -> list[str]:
    """Routing alarms, and domains that do not conserve or are predicted no better than by standing still."""
    domains = evaluation.get("domains", {})
    alarms = [alarm.message for alarm in _find_summarised(domains)]
    for name, domain in domains.items():
        for kind in ("divergence", "curl"):
            largest = (domain.get(kind) or {}).get("max_abs")
            if largest is not None and largest != 0:
                alarms.append(
                    f"{name}: the largest {kind} is {largest:.2g}, not 0. Decode through the snapped potentials, and "
                    "rescale no stored array."
                )
        ratio = domain.get("latent_mse_over_persistence")
        if ratio is not None and not ratio < 1:
            alarms.append(
                f"{name}: one step ahead the model errs {ratio:.2g} times as much as the unchanged state would. "
                "Train longer, or check that the latents are whitened by the statistics they were trained with."
            )
    return alarms


def find_metric_alarms(metrics: Iterable[dict[str, Any]]) -> list[str]:
    """Steps of a run whose loss was not a number."""
    broken = [m["step"] for m in metrics if "loss" in m and not math.isfinite(m["loss"])]
    if not broken:
        return []
    where = f"The loss was not finite at {len(broken)} logged steps, first at step {broken[0]}. "
    return [where + NOT_FINITE_REMEDY]


def _find_summarised(domains: Mapping[str, Any]) -> list[Alarm]:
    routings = [d["routing"] for d in domains.values() if (d.get("routing") or {}).get("load")]
    if len({np.shape(routing["load"]) for routing in routings}) != 1:  # none, or of different models
        return []
    load = np.array([routing["load"] for routing in routings], float)
    return find_routing_alarms(load, max(int(routing.get("choices_per_token", 1)) for routing in routings))


def _name_collapse(layer: int, experts: list[int], share: float) -> Alarm:
    verb = "takes" if len(experts) == 1 else "take"
    message = f"Layer {layer}: collapse, {_name(experts)} {verb} {share:.0%} of the tokens, whatever their domain. "
    return Alarm("collapse", message + COLLAPSE_REMEDY, layer, tuple(experts))


def _name_starving(layer: int, most: np.ndarray) -> list[Alarm]:
    """Of one layer; ``most`` (expert,) is the largest load over domains in even shares."""
    dead, starved = np.flatnonzero(most == 0).tolist(), np.flatnonzero((most > 0) & (most < STARVED)).tolist()
    alarms = []
    if dead:
        message = f"Layer {layer}: {_name(dead)} {_be(dead)} dead, without a token of any domain. "
        alarms.append(Alarm("death", message + STARVATION_REMEDY, layer, tuple(dead)))
    if starved:
        share = f"below {STARVED:.0%} of an even share in every domain. "
        message = f"Layer {layer}: {_name(starved)} {_be(starved)} starved, {share}{STARVATION_REMEDY}"
        alarms.append(Alarm("starvation", message, layer, tuple(starved)))
    return alarms


def _compare_ranks(choices: np.ndarray, ranks: np.ndarray) -> list[Alarm]:
    """The rank that differs most from all others together, if it differs much; ``choices`` (rank, layer, expert)."""
    others = choices.sum(0, keepdims=True) - choices
    own, rest = (c / np.maximum(c.sum(-1, keepdims=True), 1) for c in (choices, others))
    distance = np.abs(own - rest).sum(-1) / 2
    rank, layer = np.unravel_index(distance.argmax(), distance.shape)
    if distance[rank, layer] <= RANKS_DIFFER:
        return []
    expert = int(np.abs(own - rest)[rank, layer].argmax())
    message = (
        f"Rank {ranks[rank]}, layer {layer}: {own[rank, layer, expert]:.0%} of a domain's tokens go to expert "
        f"{expert}, on the other ranks {rest[rank, layer, expert]:.0%}: their weights or data differ. Stop and start "
        "the same command again: all ranks then have the newest checkpoint. If it comes back, compare their stores."
    )
    return [Alarm("rank load", message, int(layer), (expert,))]


def _name(experts: list[int]) -> str:
    return ("experts " if len(experts) > 1 else "expert ") + ", ".join(map(str, experts))


def _be(experts: list[int]) -> str:
    return "are" if len(experts) > 1 else "is"
