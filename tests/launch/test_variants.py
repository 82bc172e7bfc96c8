"""Variants are equal in what they are said to be equal in: parameters, active ones, samples and their order."""

import dataclasses

import pytest
from conftest import make_domain
from settings import PER_DOMAIN, TransferMeasurement
from variants import Job, control_routers, list_jobs, set_job

from shodh.config import ConfigError, load_config
from shodh.model.transformer import LatentTransformer, count_parameters

CONFIGS = ("configs/measure_transfer/debug.yaml", "configs/measure_transfer/quickstart.yaml")


@pytest.fixture(params=CONFIGS)
def config(request) -> TransferMeasurement:
    return load_config(TransferMeasurement, request.param)


def build(config: TransferMeasurement, variant: str) -> LatentTransformer:
    return LatentTransformer(set_job(config, Job(variant, 0)).model)


def count_of_feed_forward(model: LatentTransformer) -> tuple[int, int]:
    """Parameters of the shared and routed experts of all layers: in all, and those that a token passes."""
    shared = sum(p.numel() for name, p in model.named_parameters() if ".shared." in name)
    routed = sum(p.numel() for name, p in model.named_parameters() if ".routed." in name)
    return shared + routed, shared + routed * model.config.top_k // model.config.num_experts


def count_of_selection(model: LatentTransformer) -> tuple[int, int]:
    """Parameters of the routers and of the linear experts, of which each expert has one."""
    routers = sum(p.numel() for name, p in model.named_parameters() if ".router." in name)
    kernels = sum(p.numel() for name, p in model.named_parameters() if ".kernels." in name)
    return routers + kernels, routers + kernels


@pytest.mark.parametrize(
    ("variant", "equal"),
    [
        ("dense_flops", ["active"]),
        ("dense_parameters", ["total"]),
        ("oracle", ["active"]),
        ("hash", ["active", "total"]),
        ("top2", ["active", "total"]),
        ("top4", ["active", "total"]),
        ("pair", ["active"]),
    ],
)
def test_variants_equal_shodh_in_parameters_but_for_routers_and_linear_experts(config, variant, equal):
    ours, theirs = build(config, "shodh"), build(config, variant)
    for number, name in enumerate(("total", "active")):
        assert (count_of_feed_forward(ours)[number] == count_of_feed_forward(theirs)[number]) == (name in equal)
        without = [count_parameters(m)[number] - count_of_selection(m)[number] for m in (ours, theirs)]
        assert (without[0] == without[1]) == (name in equal)


def test_a_dense_model_routes_nothing(config):
    for variant in ("dense_flops", "dense_parameters"):
        assert build(config, variant).config.num_experts == 1


def test_every_variant_has_a_folder_of_its_own_and_none_is_forgotten(config):
    jobs = list_jobs(config)
    num_models = sum(len(config.domains) if variant in PER_DOMAIN else 1 for variant in config.variants)
    assert len({job.name for job in jobs}) == len(jobs) == 3 * num_models
    sizes = [set_job(config, job).engine.batch_size for job in jobs]
    assert sizes == sorted(sizes, reverse=True)  # what takes longest comes first


def test_solo_models_take_their_domains_share_of_every_batch_under_the_same_seed(config):
    """That these are the same samples in the same order is the mixture's to hold: see its tests."""
    joint = set_job(config, Job("shodh", 5))
    shares = []
    for name in config.domains:
        solo = set_job(config, Job("solo", 5, name))
        assert solo.domains == (name,) and solo.loop == joint.loop and solo.loop.seed == 5
        assert dataclasses.replace(solo.engine, batch_size=joint.engine.batch_size) == joint.engine
        assert solo.model == joint.model
        assert solo.objective == dataclasses.replace(joint.objective, information_weight=0.0)
        shares.append(solo.engine.batch_size)
    assert shares == [joint.engine.batch_size // 3] * 3
    assert set_job(config, Job("pair", 5)).engine.batch_size == 2 * shares[0]


def test_controls_are_swapped_in_for_their_variants_alone(config):
    domains = [dataclasses.replace(make_domain(), parameters=(name,)) for name in ("dt", "viscosity")]
    for variant in config.variants:
        model = build(config, variant)
        control_routers(model, Job(variant, 0), domains)
        learned = any("prototype" in name for name, _ in model.named_parameters())
        assert learned == (variant not in ("oracle", "hash"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.batch_size=7", "engine.batch_size=7: no multiple of 3 domains x 2 windows"),
        ("seeds=[]", "seeds=.*name at least one"),
        ("seeds=[1,1]", "none twice"),
        ("seeds=[-1]", "none may be negative"),
        ("variants=[shod]", "variants.0='shod'"),
        ("model.top_k=2", "model.top_k: is what variants change"),
        ("model.told=false", "model.told: is what variants change"),
        ("model.hidden=30", "model.hidden=30: not a multiple of 4"),
        ("domains=[fwi,open_channel]", "variants=pair: is of the domains"),
        ("model.num_experts=2", "too few for the oracle"),
        ("jobs=0", "jobs=0: must be at least 1"),
        ("sedes=[1]", "no such key.*Did you mean seeds"),
    ],
)
def test_bad_config_is_refused_in_one_line(override, said):
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(TransferMeasurement, CONFIGS[0], [override])
    assert "\n" not in str(caught.value)
