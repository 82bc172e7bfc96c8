"""What launch/measure_transfer.py trains: each job is one variant under one seed, solo ones of one domain each.

At equal data, steps and tokens. B is engine.batch_size, E model.num_experts, h model.hidden:

shodh             the mixture of the config, all domains jointly
solo              the same architecture on one domain, B / domains samples a step: those that shodh sees of the domain
solo_dense        the same without routing, as dense_flops
dense_flops       no routing, as many active parameters: one expert of h that every token passes, beside the shared one
dense_parameters  no routing, as many parameters in all: one expert of E h
oracle            the mixture, every domain sent to an expert of its own; experts beyond one per domain are left out
hash              the mixture, tokens sent by a fixed random draw of their place
untold            the mixture, to whose norms and routers no physical parameter or boundary is told
free              the mixture without the information loss
top2, top4        free with k = 2 and 4 of 2E and 4E experts of h / 2 and h / 4: as many parameters, active and in all
pair              open_channel and porous_media alone, E = 2: the setting of the paper

Only shodh, pair and untold have the information loss.
Routers and linear experts are not counted: they are some percent of the parameters. Dense models have one linear
expert, all others E.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from settings import PAIR, PER_DOMAIN, Pretraining, TransferMeasurement, Variant, identity_of

from data.latents import LatentStore
from shodh.evaluation.controls import route_by_domain, route_by_hash
from shodh.fields import DomainSpec
from shodh.model.transformer import LatentTransformer, TransformerConfig
from shodh.training.objectives import ForecastConfig
from shodh.training.tracking import TrackingConfig

INFORMED: tuple[Variant, ...] = ("shodh", "pair", "untold")  # whose routers the information loss teaches
MEASUREMENT = 1  # raised whenever results measured before are no longer comparable


class Job(NamedTuple):
    """One model to be trained and measured."""

    variant: Variant
    seed: int
    domain: str | None = None  # of a solo model

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.variant}{f'_{self.domain}' if self.domain else ''}-{self.seed}"


def list_jobs(config: TransferMeasurement) -> list[Job]:
    """All jobs, those that take longest first."""
    jobs = [
        Job(variant, seed, domain)
        for seed in config.seeds
        for variant in config.variants
        for domain in (config.domains if variant in PER_DOMAIN else (None,))
    ]
    return sorted(jobs, key=lambda job: (-estimate_cost(config, job), job.seed))


def estimate_cost(config: TransferMeasurement, job: Job) -> float:
    """Samples a step, a little more where there are more experts to go through one after another."""
    training = set_job(config, job)
    return training.engine.batch_size * (1 + 0.02 * training.model.num_experts)


def set_job(config: TransferMeasurement, job: Job) -> Pretraining:
    """The job as a pretraining run in a folder of its own."""
    domains = _choose_domains(config, job)
    share = config.engine.batch_size // len(config.domains)
    return Pretraining(
        stores=config.stores,
        latents=config.latents,
        domains=domains,
        tokenizer=config.tokenizer,
        run=config.run / job.name,
        model=_change_model(config.model, job.variant, len(domains)),
        objective=_change_objective(config.objective, job.variant),
        engine=dataclasses.replace(config.engine, batch_size=share * len(domains)),
        loop=dataclasses.replace(config.loop, seed=job.seed),
        tracking=TrackingConfig(wandb="disabled", interval=config.record_interval),
        checkpoint_interval=config.checkpoint_interval,
        measure_interval=config.loop.schedule.num_steps,
    )


def identify(training: Pretraining, job: Job, latents: dict[str, LatentStore], tokenizer_digest: str) -> dict[str, Any]:
    """What decides a job's weights."""
    data = {name: latents[name].digest for name in training.domains}
    return identity_of(training) | {"data": data, "tokenizer": tokenizer_digest, "variant": job.variant}


def control_routers(model: LatentTransformer, job: Job, domains: Sequence[DomainSpec]) -> None:
    """Swap in the routers of a variant whose routing is not learned."""
    if job.variant == "oracle":
        route_by_domain(model, domains)
    if job.variant == "hash":
        route_by_hash(model, job.seed)


def _choose_domains(config: TransferMeasurement, job: Job) -> tuple[str, ...]:
    if job.domain is not None:
        return (job.domain,)
    return tuple(name for name in config.domains if name in PAIR) if job.variant == "pair" else config.domains


def _change_model(model: TransformerConfig, variant: Variant, num_domains: int) -> TransformerConfig:
    num, hidden = model.num_experts, model.hidden
    changes: dict[Variant, dict[str, int | bool]] = {
        "solo_dense": {"num_experts": 1},
        "dense_flops": {"num_experts": 1},
        "dense_parameters": {"num_experts": 1, "expert_hidden": num * hidden},
        "oracle": {"num_experts": num_domains},
        "top2": {"num_experts": 2 * num, "top_k": 2, "expert_hidden": hidden // 2, "num_kernels": num},
        "top4": {"num_experts": 4 * num, "top_k": 4, "expert_hidden": hidden // 4, "num_kernels": num},
        "untold": {"told": False},
        "pair": {"num_experts": num_domains},
    }
    return dataclasses.replace(model, **changes.get(variant, {}))


def _change_objective(objective: ForecastConfig, variant: Variant) -> ForecastConfig:
    return objective if variant in INFORMED else dataclasses.replace(objective, information_weight=0.0)
