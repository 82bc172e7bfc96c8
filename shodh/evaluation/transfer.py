"""Negative transfer: does learning several physics jointly harm any? Statistics over the results of many trainings.

Differences are relative, (model - reference) / reference, of errors, so that negative is better; they are paired by
seed, as all variants of a seed saw the same samples in the same order. Their mean over seeds has a two-sided 95 %
interval by Student's t with n - 1 degrees of freedom; intervals are not corrected for how many there are.

"Not worse, within the seeds' 95 % interval" holds where that interval reaches 0 or lies below it. It is then either
"better" (all of it below) or "equal" (0 inside); it fails where all of it lies above 0: "worse".
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t as student

CONFIDENCE = 0.95
METRICS = {  # errors, as they are named in a result
    "latent_mse_over_persistence": "one-step latent MSE over persistence",
    "1": "one-step velocity VRMSE",
    "2-20": "rollout velocity VRMSE, steps 2-20",
    "20": "rollout velocity VRMSE, step 20",
    "21-60": "rollout velocity VRMSE, steps 21-60",
}
LOSS = "latent_mse_over_persistence"  # what the verdicts are first about: the joint loss, domain by domain
REFERENCES = ("solo", "solo_dense", "dense_flops", "dense_parameters", "oracle")  # that shodh must not be worse than
LEARNED = ("shodh", "pair", "untold", "free", "top2", "top4")  # variants whose router learns

Result = Mapping[str, Any]  # one job's result.json


class Comparison(NamedTuple):
    """A mean relative difference over seeds and its interval; without one (NaN) of fewer than two seeds."""

    mean: float
    low: float
    high: float
    num_seeds: int
    num_lost: int = 0  # seeds of which the model has no finite error, but the reference does

    @property
    def verdict(self) -> str:
        """What the interval says of the model beside the reference."""
        if self.num_lost:
            return "diverged"
        if self.num_seeds < 2:
            return "one seed, no interval" if self.num_seeds else "not measured"
        if self.low > 0:
            return "worse"
        return "better" if self.high < 0 else "equal"

    @property
    def holds(self) -> bool:
        """Whether the model is not worse, within the interval; of one seed, not worse at all."""
        if self.num_lost or not self.num_seeds:
            return False
        return (self.low if self.num_seeds > 1 else self.mean) <= 0


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results below a folder, by the names of their jobs. Raises ValueError where there is none."""
    paths = sorted(folder.glob("*/result.json"))
    if not paths:
        raise ValueError(f"run={folder}: holds no result.json. Measure with launch/measure_transfer.py first.")
    return [json.loads(path.read_text()) for path in paths]


def compare(differences: Sequence[float], num_lost: int = 0) -> Comparison:
    """Mean of paired differences and its 95 % interval: mean -+ t s / sqrt(n), s with n - 1."""
    num = len(differences)
    if num == 0:
        return Comparison(math.nan, math.nan, math.nan, 0, num_lost)
    mean = math.fsum(differences) / num
    if num == 1:
        return Comparison(mean, math.nan, math.nan, 1, num_lost)
    variance = math.fsum((value - mean) ** 2 for value in differences) / (num - 1)
    half = float(student.ppf((1 + CONFIDENCE) / 2, num - 1)) * math.sqrt(variance / num)
    return Comparison(mean, mean - half, mean + half, num, num_lost)


def read_error(block: Mapping[str, Any], metric: str, of: str = "vrmse") -> float | None:
    """One metric of a domain's block of a result; ``of`` may be "persistence_vrmse"."""
    if metric == LOSS:
        return block[LOSS] if of == "vrmse" else 1.0
    return block[metric][of]


def collect_errors(results: Sequence[Result], variant: str, domain: str, metric: str) -> dict[int, float | None]:
    """The error of a variant by seed; of solo models, those of this domain."""
    return {
        result["job"]["seed"]: read_error(result["domains"][domain], metric)
        for result in results
        if result["job"]["variant"] == variant and domain in result["domains"]
    }


def compare_variants(results: Sequence[Result], variant: str, reference: str, domain: str, metric: str) -> Comparison:
    """(variant - reference) / reference, paired by seed."""
    ours, theirs = (collect_errors(results, v, domain, metric) for v in (variant, reference))
    differences, num_lost = [], 0
    for seed in sorted(ours.keys() & theirs.keys()):
        error, base = (found[seed] if is_finite(found[seed]) else None for found in (ours, theirs))
        num_lost += error is None and base is not None
        if error is not None and base is not None:
            differences.append((error - base) / base)
    return compare(differences, num_lost)


def is_finite(error: float | None) -> bool:
    """Whether there is an error to compare at all."""
    return error is not None and math.isfinite(error)


def summarise_transfer(results: Sequence[Result]) -> dict[str, Any]:
    """What stands in transfer.json: errors by variant, domain, metric and seed; their differences to solo, and Shodh's
    to each reference; sizes; and how each seed and layer specialised."""
    variants = _in_order([r["job"]["variant"] for r in results])
    domains = _in_order([name for r in results if r["job"]["variant"] != "pair" for name in r["domains"]])
    measured = [m for m in METRICS if any(collect_persistence(results, name, m) is not None for name in domains)]

    def over(variant: str, reference: str) -> dict[str, Any]:
        return {
            domain: {
                metric: _describe(compare_variants(results, variant, reference, domain, metric)) for metric in measured
            }
            for domain in domains
            if collect_errors(results, variant, domain, LOSS)
        }

    return {
        "confidence": CONFIDENCE,
        "num_steps": max(r["num_steps"] for r in results),
        "seeds": sorted({r["job"]["seed"] for r in results}),
        "domains": domains,
        "metrics": measured,
        "variants": {variant: _describe_size(results, variant) for variant in variants},
        "errors": {v: {d: {m: collect_errors(results, v, d, m) for m in measured} for d in domains} for v in variants},
        "persistence": {d: {m: collect_persistence(results, d, m) for m in measured} for d in domains},
        "over_solo": {variant: over(variant, "solo") for variant in variants if variant != "solo"},
        "shodh_over": {reference: over("shodh", reference) for reference in REFERENCES if reference in variants},
        "specialisation": list_specialisation(results),
    }


def collect_persistence(results: Sequence[Result], domain: str, metric: str) -> float | None:
    """Persistence's error, the same for all models; None where the trajectories are too short for the metric."""
    blocks = [r["domains"][domain] for r in results if domain in r["domains"]]
    return next((read_error(block, metric, "persistence_vrmse") for block in blocks), None)


def list_specialisation(results: Sequence[Result], variants: Sequence[str] = LEARNED) -> list[dict[str, Any]]:
    """A row per learned router: variant, seed and layer, and what the held-out tokens of its domains did there."""
    chosen = [r for r in results if r["job"]["variant"] in variants]
    return [
        {
            "variant": result["job"]["variant"],
            "seed": result["job"]["seed"],
            "layer": number,
            "purity": layer.get("purity"),
            "information": layer["normalised_mutual_information"],  # I(domain; expert) / H(domain)
            "dead_experts": layer["dead_experts"],
            "own_expert": share_on_own_expert(result["routing"]["domains"], number),
            "load": layer["load"],
        }
        for result in sorted(chosen, key=lambda r: (variants.index(r["job"]["variant"]), r["job"]["seed"]))
        for number, layer in enumerate(result["routing"]["layers"])
    ]


def share_on_own_expert(domains: Mapping[str, Any], layer: int) -> dict[str, float]:
    """Share of each domain's tokens on its own expert: the one that it uses most, if no other domain uses that most."""
    loads = {name: domain["load"][layer] for name, domain in domains.items()}
    favourite = {name: max(range(len(load)), key=load.__getitem__) for name, load in loads.items()}
    used = list(favourite.values())
    return {name: loads[name][best] if used.count(best) == 1 else 0.0 for name, best in favourite.items()}


def _describe(comparison: Comparison) -> dict[str, Any]:
    numbers = {key: None if math.isnan(value) else value for key, value in comparison._asdict().items()}
    return numbers | {"verdict": comparison.verdict, "holds": comparison.holds}


def _describe_size(results: Sequence[Result], variant: str) -> dict[str, Any]:
    """Parameters, mean CPU seconds of a training (of those that were not interrupted), and the chosen gates' sum."""
    own = [result for result in results if result["job"]["variant"] == variant]
    seconds = [result["cpu_seconds"] for result in own if result["cpu_seconds"] is not None]
    gates = [layer for result in own for layer in result["gates"]]
    return {
        "parameters_total": own[0]["parameters_total"],
        "parameters_active": own[0]["parameters_active"],
        "samples_per_step": own[0]["samples_per_step"],
        "cpu_seconds": math.fsum(seconds) / len(seconds) if seconds else None,
        "gate_sum": math.fsum(layer["sum"] for layer in gates) / len(gates),
        "gate_best_share": math.fsum(layer["best_share"] for layer in gates) / len(gates),
        "num_results": len(own),
    }


def _in_order(names: Sequence[str]) -> list[str]:
    """Each once: the known variants first as they are told, else as they come."""
    order = ["solo", "solo_dense", "shodh", "dense_flops", "dense_parameters", "oracle", "hash", *LEARNED[2:], "pair"]
    return sorted(dict.fromkeys(names), key=lambda name: order.index(name) if name in order else -1)
