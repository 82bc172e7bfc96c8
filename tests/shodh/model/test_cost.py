"""Forecast costs of a model are those that are counted when it is built, run and taken back."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from shodh.model.cost import Keeping, block_bytes, count_by_kind, count_operations, name_parameters, saved_bytes
from shodh.model.transformer import LatentTransformer, TransformerConfig, find_stacks
from shodh.training.objectives import ForecastConfig, ForecastObjective

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))  # last: its tokenizer.py is not the package

from operation_counter import counting_operations  # noqa: E402
from random_latents import make_latents  # noqa: E402

SMALL = TransformerConfig(
    latent_channels=10, medium_channels=3, width=48, depth=2, num_heads=3, num_experts=5, hidden=37, semantic_width=11
)
CONFIGS = {
    "small": SMALL,
    "top 2, narrow experts": replace(SMALL, top_k=2, expert_hidden=29),
    "patch 2, shared kernels": replace(SMALL, patch=2, num_experts=4, num_kernels=2),
    "wide and deep": replace(SMALL, width=96, num_heads=4, hidden=200, depth=4),
    "recomputed": replace(SMALL, recompute=True),
    "untold, two experts": replace(SMALL, told=False, num_experts=2),
}


@pytest.fixture
def single_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def make_training(config, side, num_samples, num_predicted, low):
    model = LatentTransformer(config)
    batch = make_latents(config, num_samples, num_predicted, (side, side, side))
    objective = ForecastObjective(ForecastConfig(unroll=((0, num_predicted),)))

    def run():
        def call(*inputs):
            with torch.autocast("cpu", torch.bfloat16, enabled=low == 2):
                return model(*inputs)

        objective.begin_step(0)
        terms, routed = objective(call, batch)
        return terms["total"], routed

    return model, batch, run


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_of_each_kind_are_those_of_the_built_model(config):
    model = LatentTransformer(config)
    count = count_by_kind(name_parameters(config))
    assert count.routed == sum(p.numel() for p in find_stacks(model))
    assert count.linear == sum(p.numel() for p in model.stencil.parameters())
    assert sum(count) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("num_predicted", [1, 2])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_operations_are_those_that_pytorch_counts(single_process, config, num_predicted):
    side, num_samples = 4, 2
    _, _, run = make_training(config, side, num_samples, num_predicted, low=4)
    with counting_operations() as counter:
        loss, _ = run()
        forward = counter.get_total_flops()
        loss.backward()
    operations = count_operations(config, (side,) * 3)
    assert forward == num_predicted * num_samples * operations.forward
    again = num_predicted * operations.blocks if config.recompute else 0
    expected = num_samples * (operations.train(float(num_predicted)) + again)
    # left out: gradients of the conditions' first product, of later forecasts and of the sizes among them
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # norms of bfloat16, on CPU
@pytest.mark.parametrize(("low", "num_predicted", "side"), [(4, 1, 4), (4, 3, 4), (2, 1, 8)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bytes_are_those_of_what_autograd_and_telemetry_keep(single_process, config, low, num_predicted, side):
    num_samples = 3
    model, batch, run = make_training(config, side, num_samples, num_predicted, low)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *batch)}
    kept, sizes = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.append(tensor)  # else an address could be given out again
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        _, routed = run()
    for routing in routed.routings:
        for tensor in routing:
            pack(tensor)
    expected = saved_bytes(config, (side,) * 3, Keeping(num_samples, low, 1, num_predicted))
    # left out: a few numbers for each sample and each expert
    assert sum(sizes.values()) == pytest.approx(expected, rel=0.01)


def test_what_is_kept_grows_with_samples_and_shrinks_where_blocks_are_recomputed():
    grid, one, two, four = (8, 8, 8), Keeping(1), Keeping(2), Keeping(4)
    sizes = [saved_bytes(SMALL, grid, keeping) for keeping in (one, two, four)]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]))
    deep = replace(SMALL, depth=8)
    recomputed = saved_bytes(replace(deep, recompute=True), grid, four)
    assert recomputed + block_bytes(deep, grid, four) < saved_bytes(deep, grid, four) / 2
    assert saved_bytes(SMALL, grid, four._replace(low=2)) < sizes[2]


def test_a_patch_that_does_not_divide_the_grid_is_refused():
    with pytest.raises(ValueError, match="patch=2: does not divide the latent grid"):
        count_operations(replace(SMALL, patch=2), (4, 5, 4))
