"""What a person should look at in a run, each as one sentence with its remedy. Imports no torch: reports use it."""

import math
from collections.abc import Iterable
from typing import Any

COLLAPSED = 0.8  # one expert with more than this share of the tokens, mean over domains
STARVED = 0.1  # an expert that no domain gives more than this fraction of an even share


def find_alarms(summary: dict[str, Any], collapsed: float = COLLAPSED, starved: float = STARVED) -> list[str]:
    """Collapse, starvation and death of experts, from the loads in ``summary["domains"]``, layer by layer.

    One expert that serves all of one domain is what routing is for, so collapse and starvation are judged over all
    domains together, each weighing the same whatever its number of tokens.
    """
    loads = [d["load"] for d in summary.get("domains", {}).values() if d.get("load")]
    if not loads:
        return []
    alarms = []
    for layer in range(min(len(load) for load in loads)):
        alarms += _find_layer_alarms(layer, [load[layer] for load in loads], collapsed, starved)
    return alarms


def find_evaluation_alarms(evaluation: dict[str, Any]) -> list[str]:
    """Routing alarms, and domains that do not conserve or are predicted no better than by standing still."""
    domains = evaluation.get("domains", {})
    alarms = find_alarms({"domains": {name: d.get("routing") or {} for name, d in domains.items()}})
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
    return [
        f"The loss was not finite at {len(broken)} logged steps, first at step {broken[0]}. Lower the learning rate or "
        "the clipping norm, and look at the data of that step."
    ]


def _find_layer_alarms(layer: int, loads: list[list[float | int]], collapsed: float, starved: float) -> list[str]:
    num_experts = len(loads[0])
    if num_experts < 2:
        return []
    shares = [[load[expert] for load in loads] for expert in range(num_experts)]
    alarms = []
    fullest = max(range(num_experts), key=lambda expert: sum(shares[expert]))
    mean = sum(shares[fullest]) / len(loads)
    if mean > collapsed:
        alarms.append(
            f"Layer {layer}: collapse, expert {fullest} takes {mean:.0%} of the tokens. Raise the weight of the "
            "balance loss, or the router's temperature."
        )
    dead = [expert for expert in range(num_experts) if max(shares[expert]) == 0]
    if dead:
        alarms.append(
            f"Layer {layer}: {_name(dead)} dead, without a token of any domain. Raise the weight of the balance loss, "
            "or train with fewer experts."
        )
    starving = [expert for expert in range(num_experts) if 0 < max(shares[expert]) * num_experts < starved]
    if starving:
        alarms.append(
            f"Layer {layer}: {_name(starving)} starved, below {starved:.0%} of an even share in every domain. Raise "
            "the weight of the balance loss, and check that counts are reduced over the global batch."
        )
    return alarms


def _name(experts: list[int]) -> str:
    return (
        ("experts " if len(experts) > 1 else "expert ")
        + ", ".join(map(str, experts))
        + (" are" if len(experts) > 1 else " is")
    )
