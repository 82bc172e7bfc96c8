"""What is recommended fits, allows what the engine and the loss allow, and nothing that fits is faster."""

import math
from dataclasses import replace
from itertools import product

import pytest
from planned_training import CLUSTER, MODEL, make_workload

from shodh.config import ConfigError
from shodh.planning.arrangement import Arrangement, apply_arrangement, arrange
from shodh.planning.plan import fits, forecast
from shodh.planning.recommendation import list_arrangements, recommend
from shodh.training.objectives import ForecastConfig

WIDE = replace(MODEL, width=512, depth=4, num_heads=8, hidden=1024)


def every_plan(workload, cluster):
    """By brute force, over more than the engine allows where that is harmless."""
    share = workload.num_samples // cluster.num_ranks
    for stage, size, at_once, recompute in product((0, 1, 2), range(1, 9), range(1, share + 1), (False, True)):
        if cluster.num_ranks % size or workload.model.num_experts % size or share % at_once:
            continue
        arrangement = Arrangement(stage, size, at_once, share // at_once, recompute)
        arranged = apply_arrangement(workload, arrangement, cluster.num_ranks)
        yield forecast(arranged, cluster)


@pytest.mark.parametrize("gigabytes", [1000.0, 6.0, 2.0, 1.0])
def test_the_recommendation_fits_and_nothing_that_fits_is_faster(gigabytes):
    workload, cluster = make_workload(WIDE, batch_size=64, accumulation=2), replace(CLUSTER, memory_gigabytes=gigabytes)
    arranged, best = recommend(workload, cluster)
    fitting = [plan for plan in every_plan(workload, cluster) if fits(plan, cluster)]
    assert fits(best, cluster) and best == forecast(arranged, cluster)
    assert best.step.total == min(plan.step.total for plan in fitting)
    assert arrange(arranged, cluster.num_ranks) == best.arrangement
    assert arranged.num_samples == workload.num_samples


def test_less_memory_never_makes_a_training_faster_and_is_met_by_smaller_parts():
    workload = make_workload(WIDE, batch_size=64, accumulation=2)
    plans = [recommend(workload, replace(CLUSTER, memory_gigabytes=size))[1] for size in (1000.0, 6.0, 2.0, 1.0)]
    seconds = [plan.step.total for plan in plans]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1]
    assert [plan.arrangement.recompute for plan in plans] == [False, False, True, True]
    assert [plan.arrangement.micro_batch for plan in plans] == [16, 16, 16, 8]  # of a rank's 16


def test_muon_is_never_given_zero_and_experts_only_to_ranks_that_share_them_out_evenly():
    muon = make_workload(replace(MODEL, num_experts=6), optimizer="muon")
    arrangements = list(list_arrangements(muon, CLUSTER))
    assert {arrangement.zero_stage for arrangement in arrangements} == {0}
    assert {arrangement.expert_parallel for arrangement in arrangements} == {1, 2}  # of 8 ranks and 6 experts


def test_windows_of_a_trajectory_stay_on_one_rank():
    workload = replace(make_workload(batch_size=48), objective=ForecastConfig(windows=2))
    arrangements = list(list_arrangements(workload, CLUSTER))
    assert {arrangement.micro_batch for arrangement in arrangements} == {2, 6}
    assert all(a.micro_batch * a.accumulation == 6 for a in arrangements)


def test_a_batch_that_ranks_do_not_divide_becomes_the_next_that_they_do():
    arranged, _ = recommend(make_workload(batch_size=60), CLUSTER)
    assert arranged.num_samples == math.ceil(60 / 8) * 8


def test_where_nothing_fits_one_line_says_what_is_missing_and_what_to_change():
    workload = make_workload(WIDE, batch_size=8)
    with pytest.raises(ConfigError) as caught:
        recommend(workload, replace(CLUSTER, memory_gigabytes=0.25))
    message = str(caught.value)
    assert message.startswith("cluster.memory_gigabytes=0.25: no arrangement fits; the smallest (ZeRO 2")
    assert "more than can be used" in message and "larger GPUs" in message and "\n" not in message
