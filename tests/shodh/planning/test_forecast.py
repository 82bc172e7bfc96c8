"""Forecast memory, traffic and time obey what their definitions imply, and agree with counting by hand."""

from dataclasses import replace
from math import inf

import pytest
from planned_training import CLUSTER, MODEL, make_workload

from shodh.config import ConfigError
from shodh.model.cost import count_by_kind, count_operations, name_parameters
from shodh.model.transformer import LatentTransformer
from shodh.planning.memory import forecast_memory
from shodh.planning.plan import count_checkpoint_bytes, forecast, list_warnings
from shodh.planning.step_time import count_drawn, forecast_step, step_operations
from shodh.planning.traffic import count_passes, count_traffic
from shodh.training.engine import BUCKET
from shodh.training.objectives import ForecastConfig
from shodh.training.optimizers import build_optimizer, create_moments


def test_memory_of_parameters_gradients_and_optimizer_falls_with_the_zero_stage():
    stages = [forecast_memory(make_workload(zero_stage=stage), CLUSTER) for stage in (0, 1, 2)]
    assert stages[0].optimizer > stages[1].optimizer == stages[2].optimizer
    assert stages[0].gradients == stages[1].gradients > stages[2].gradients
    assert len({memory.parameters for memory in stages}) == len({memory.activations for memory in stages}) == 1
    held = [memory.parameters + memory.gradients + memory.optimizer for memory in stages]
    assert held == sorted(held, reverse=True) and len(set(held)) == 3
    count = sum(count_by_kind(name_parameters(MODEL)))
    assert held[2] == pytest.approx(4 * (count + 4 * count / CLUSTER.num_ranks))  # gradients, copy and two moments


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_memory_of_experts_falls_with_the_ranks_that_share_them_out(stage):
    whole, *shared = (
        forecast_memory(make_workload(zero_stage=stage, expert_parallel=size), CLUSTER) for size in (1, 2, 4, 8)
    )
    routed = count_by_kind(name_parameters(MODEL)).routed
    for size, memory in zip((2, 4, 8), shared, strict=True):
        assert whole.parameters - memory.parameters == pytest.approx(4 * routed * (1 - 1 / size))
        if stage == 0:
            assert whole.optimizer - memory.optimizer == pytest.approx(8 * routed * (1 - 1 / size))
        else:  # what ZeRO cuts up is cut up already
            assert whole.optimizer == pytest.approx(memory.optimizer)


def test_activations_grow_in_proportion_to_the_micro_batch():
    sizes = [forecast_memory(make_workload(batch_size=8 * n), CLUSTER).activations for n in (1, 2, 4)]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]))
    full = replace(CLUSTER, device="cpu")  # keeps no low copies of matrices; linear experts remain
    one, two = (forecast_memory(make_workload(batch_size=8 * n), full).activations for n in (8, 16))
    assert two / one == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_s_memory_and_the_checkpoint_are_those_of_the_one_that_is_built(optimizer):
    workload = make_workload(optimizer=optimizer)
    model = LatentTransformer(MODEL)
    built = build_optimizer(model, optimizer, weight_decay=0.0, betas=(0.9, 0.95))
    create_moments(built)
    moments = [value for state in built.state.values() for name, value in state.items() if name != "step"]
    size = sum(moment.nbytes for moment in moments)
    assert forecast_memory(workload, CLUSTER).optimizer == size
    assert count_checkpoint_bytes(workload) == size + sum(p.nbytes for p in model.parameters())


def test_zero_has_a_bucket_for_each_precision_as_large_as_the_gradients_at_most():
    in_low = forecast_memory(make_workload(zero_stage=1), CLUSTER)
    in_full = forecast_memory(make_workload(zero_stage=1, precision="fp32"), CLUSTER)
    assert in_full.buffers == in_full.parameters and in_low.buffers == 2 * in_full.buffers
    huge = make_workload(zero_stage=1, precision="fp32")
    huge = replace(huge, model=replace(huge.model, width=8192, num_heads=64, hidden=32768))
    assert forecast_memory(huge, CLUSTER).buffers == 4 * BUCKET
    alone = replace(CLUSTER, num_nodes=1, gpus_per_node=1)
    assert forecast_memory(make_workload(), alone).buffers == 0


def test_no_token_travels_where_every_rank_has_all_experts():
    workload = make_workload()
    assert count_traffic(workload, CLUSTER).all_to_all == 0
    step = forecast_step(workload, CLUSTER)
    assert (step.all_to_all, step.hidden, step.all_to_all_share) == (0, 0, 0)


@pytest.mark.parametrize(("top_k", "size", "accumulation"), [(1, 2, 1), (2, 4, 3)])
def test_bytes_of_all_to_all_are_counted_as_by_hand(top_k, size, accumulation):
    model = replace(MODEL, top_k=top_k)
    workload = make_workload(model, expert_parallel=size, accumulation=accumulation)
    tokens_of_a_rank = 64 // CLUSTER.num_ranks * 8**3
    sent = tokens_of_a_rank * top_k * (size - 1) // size * 64 * 2  # width numbers of bfloat16 each
    there_and_back_in_both_passes = 4 * MODEL.depth
    assert count_traffic(workload, CLUSTER).all_to_all == there_and_back_in_both_passes * sent * accumulation
    again = make_workload(replace(model, recompute=True), expert_parallel=size, accumulation=accumulation)
    assert count_traffic(again, CLUSTER).all_to_all == 6 * MODEL.depth * sent * accumulation


def test_gradients_of_experts_travel_between_the_ranks_that_hold_the_same_ones():
    count = count_by_kind(name_parameters(MODEL))
    everywhere = 2 * (1 - 1 / 8) * 4 * (count.dense + count.linear)
    for size, share in ((1, 2 * (1 - 1 / 8)), (2, 2 * (1 - 1 / 4) / 2), (8, 0)):
        traffic = count_traffic(make_workload(expert_parallel=size), CLUSTER)
        assert traffic.reduction == pytest.approx(everywhere)
        assert traffic.expert_reduction == pytest.approx(share * 4 * count.routed)
    once, thrice = (count_traffic(make_workload(zero_stage=2, accumulation=n), CLUSTER).reduction for n in (1, 3))
    assert 2 * once < thrice < 3 * once  # ZeRO 2 reduces every time, and gathers once


@pytest.mark.parametrize(("size", "members"), [(1, 4), (2, 2), (4, 1)])
def test_ranks_with_the_same_experts_reduce_over_the_links_of_those_of_them_on_a_node(size, members):
    workload, narrow = make_workload(expert_parallel=size), replace(CLUSTER, network_bandwidth=1.0)
    traffic = count_traffic(workload, narrow)
    by_hand = traffic.reduction / 4e9 + traffic.expert_reduction / (members * 1e9)
    assert forecast_step(workload, narrow).reduction == pytest.approx(by_hand)
    alone = replace(narrow, num_nodes=1)
    traffic = count_traffic(workload, alone)
    assert forecast_step(workload, alone).reduction == pytest.approx(sum(traffic[:2]) / 450e9)


def test_products_in_full_precision_take_as_long_as_that_takes():
    slow = replace(CLUSTER, memory_bandwidth=1e9, launch_microseconds=0.0)
    low, full = (forecast_step(make_workload(precision=name), slow).compute for name in ("bf16", "fp32"))
    assert full > 2 * low  # routers and linear experts are in full precision in either
    assert full == pytest.approx(step_operations(make_workload(), slow) / 67e12 / 0.5, rel=0.01)


def test_tokens_that_leave_the_node_wait_for_its_slower_link():
    prompt = replace(CLUSTER, latency_microseconds=0.0)
    near, far = (forecast_step(make_workload(expert_parallel=size), prompt).all_to_all for size in (4, 8))
    sent = [count_traffic(make_workload(expert_parallel=size), CLUSTER).all_to_all for size in (4, 8)]
    assert near == pytest.approx(sent[0] / 450e9)
    assert far == pytest.approx(sent[1] * 4 / 7 / 50e9)  # four of seven peers stand on the other node


@pytest.mark.parametrize(("recompute", "in_a_layer", "agreed"), [(False, 5, 1), (True, 8, 2)])
def test_every_exchange_has_a_latency_and_shared_experts_hide_none_of_what_the_host_waits_for(
    recompute, in_a_layer, agreed
):
    workload = make_workload(replace(MODEL, recompute=recompute), expert_parallel=8, accumulation=3)
    at_once = replace(CLUSTER, node_bandwidth=1e12, network_bandwidth=1e12, latency_microseconds=1.0)
    step = forecast_step(workload, at_once)
    assert step.all_to_all == pytest.approx(3 * MODEL.depth * in_a_layer * 1e-6, rel=1e-4)
    assert step.all_to_all - step.hidden >= 3 * MODEL.depth * agreed * 1e-6 * (1 - 1e-9)
    assert forecast_step(make_workload(), at_once).all_to_all == 0


@pytest.mark.parametrize("field", ["peak_teraflops", "memory_bandwidth", "node_bandwidth", "network_bandwidth"])
def test_a_faster_cluster_never_takes_longer(field):
    workload = make_workload(expert_parallel=8, zero_stage=1)
    faster = replace(CLUSTER, **{field: 2 * getattr(CLUSTER, field)})
    assert forecast_step(workload, faster).total <= forecast_step(workload, CLUSTER).total


def test_shared_experts_hide_at_most_all_of_the_exchange():
    slow = replace(CLUSTER, node_bandwidth=1e-3, network_bandwidth=1e-3)
    for cluster in (CLUSTER, slow):
        step = forecast_step(make_workload(expert_parallel=8), cluster)
        assert 0 < step.hidden <= step.all_to_all
    step = forecast_step(make_workload(expert_parallel=8), slow)
    assert step.all_to_all_share == pytest.approx((step.all_to_all - step.hidden) / step.total) and step.hidden < 0.01


def test_the_mean_number_of_passes_is_that_of_all_steps():
    workload = make_workload(unroll=((20, 2), (60, 4)), lead=((40, 7),), num_steps=5000)
    drawn = [workload.objective.draw_passes(step) for step in range(5000)]
    predicted, led = count_passes(workload)
    assert predicted == pytest.approx(sum(passes.num_predicted for passes in drawn) / 5000)
    spread = 7 / 2 / 5000**0.5  # of a mean of 5000 draws from 0 to 7, at most
    assert led == pytest.approx(sum(passes.lead for passes in drawn) / 5000, abs=4 * spread)


def test_operations_of_a_step_follow_what_it_draws():
    workload = make_workload(unroll=((1, 3),))
    of_step = count_drawn(MODEL, workload.objective, workload.grid, num_samples=64)
    operations = count_operations(MODEL, workload.grid)
    assert (of_step(0), of_step(1)) == (64 * operations.train(1.0), 64 * operations.train(3.0))
    plain = make_workload()
    whole = count_drawn(MODEL, plain.objective, plain.grid, 64)(0)
    assert step_operations(plain, CLUSTER) * CLUSTER.num_ranks == whole


def test_a_plan_adds_up():
    workload = make_workload(zero_stage=1, expert_parallel=4)
    plan = forecast(workload, CLUSTER)
    size = count_checkpoint_bytes(workload)
    copying, writing = size / 50e9 + size / 20e9, size / 1e9  # to rank 0 from other nodes, to its host, to disk
    assert writing < 10 * plan.step.total  # so that only the last of ten checkpoints is waited for
    assert plan.checkpoint_seconds == pytest.approx(copying + writing)
    assert plan.checkpoint_waiting == pytest.approx(copying)
    assert plan.hours == pytest.approx((100 * plan.step.total + 10 * copying + writing) / 3600)
    assert plan.gpu_hours == pytest.approx(8 * plan.hours) and plan.cost == pytest.approx(2 * plan.gpu_hours)
    assert plan.memory.total == sum(plan.memory)
    assert plan.utilisation < CLUSTER.utilisation
    assert plan.tokens_per_second == pytest.approx(64 * 8**3 / plan.step.total)


def test_training_waits_for_what_a_slow_disk_has_not_written_when_the_next_checkpoint_is_due():
    workload, slow = make_workload(), replace(CLUSTER, disk_bandwidth=0.01)
    plan, size = forecast(workload, slow), count_checkpoint_bytes(workload)
    late = size / 0.01e9 - 10 * plan.step.total
    assert late > 0
    assert plan.hours == pytest.approx((100 * plan.step.total + 10 * size / 20e9 + 9 * late + size / 0.01e9) / 3600)
    assert plan.checkpoint_waiting == pytest.approx(size / 20e9 + late)


def test_a_checkpoint_comes_over_the_links_of_the_ranks_that_hold_its_parts():
    def copying(cluster, **engine):
        return forecast(make_workload(**engine), cluster).checkpoint_waiting

    node, gpu = replace(CLUSTER, num_nodes=1), replace(CLUSTER, num_nodes=1, gpus_per_node=1)
    to_host = count_checkpoint_bytes(make_workload()) / 20e9
    assert copying(CLUSTER) == copying(gpu) == copying(gpu, zero_stage=1) == pytest.approx(to_host)
    for choice in ({"zero_stage": 1}, {"expert_parallel": 2}):
        assert copying(CLUSTER, **choice) == pytest.approx(to_host * (1 + 20 / 50))
        assert copying(node, **choice) == pytest.approx(to_host * (1 + 20 / 450))


def test_what_will_cost_more_than_it_need_is_named():
    def warnings_of(workload, cluster=CLUSTER):
        return "\n".join(list_warnings(workload, cluster, forecast(workload, cluster)))

    refused = "engine.batch_size={}: 8 ranks with windows={} do not divide it, and training refuses it. Choose a "
    assert refused.format(60, 1) + "multiple of 8." in warnings_of(make_workload(batch_size=60))
    pairs = replace(make_workload(batch_size=8), objective=ForecastConfig(windows=2))
    assert refused.format(8, 2) + "multiple of 16." in warnings_of(pairs)
    assert "tokens travel between nodes" in warnings_of(make_workload(expert_parallel=8))
    assert "tokens travel" not in warnings_of(make_workload(expert_parallel=4))
    assert "rows=64: each expert gets fewer than 512 at once" in warnings_of(make_workload(batch_size=8))
    assert "fewer than 512" not in warnings_of(make_workload(batch_size=64))
    slow = replace(CLUSTER, node_bandwidth=0.1, network_bandwidth=0.1)
    assert "is spent waiting for tokens" in warnings_of(make_workload(expert_parallel=8), slow)
    assert "memory=" in warnings_of(make_workload(), replace(CLUSTER, memory_gigabytes=0.01))
    assert "of the time for checkpoints. Raise it." in warnings_of(
        make_workload(), replace(CLUSTER, disk_bandwidth=1e-3)
    )
    generous = replace(CLUSTER, disk_bandwidth=1e6)
    assert warnings_of(make_workload(batch_size=64), generous) == ""


@pytest.mark.parametrize("size", [3, 16])
def test_experts_that_ranks_cannot_share_out_evenly_are_refused_in_one_line(size):
    with pytest.raises(ConfigError, match=f"engine.expert_parallel={size}: does not divide both 8 ranks") as caught:
        forecast(make_workload(expert_parallel=size), CLUSTER)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["memory_gigabytes", "num_nodes", "peak_teraflops", "disk_bandwidth"])
def test_a_cluster_without_something_is_refused(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        replace(CLUSTER, **{field: type(getattr(CLUSTER, field))(0)})
    with pytest.raises(ValueError, match="utilisation=inf"):
        replace(CLUSTER, utilisation=inf)
