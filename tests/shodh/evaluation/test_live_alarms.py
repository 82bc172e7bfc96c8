"""Alarms of running trainings: raised in time, said once, cleared when over, and naming what can be done."""

import re
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import numpy as np
import pytest
from live_training import LiveRun, press, router_of, spoil, train_live

from shodh.evaluation import alarms as rules
from shodh.evaluation.alarm_hook import SKIPPED, WINDOW
from shodh.evaluation.alarms import find_collapse, find_rank_alarms, find_starvation, most_lopsided
from shodh.evaluation.report_alarms import read_alarms
from shodh.model.transformer import TransformerConfig
from shodh.training.alarm_log import Alarm, AlarmLog
from shodh.training.engine import EngineConfig, distributed
from shodh.training.loop import LoopConfig
from shodh.training.objectives import ForecastConfig
from shodh.training.tracking import TrackingConfig


@pytest.fixture(scope="module")
def alone():
    """A process group of one."""
    with distributed(threads_per_rank=1) as group:
        yield group


def test_collapse_provoked_in_a_live_training_is_named_with_its_remedy_within_50_steps_and_once(
    alone, tmp_path, capsys
):
    objective = ForecastConfig(balance_weight=0.0)
    lines, kept = train_live(LiveRun(seed=1, num_steps=90, objective=objective), tmp_path, press(1, 2, first=40))
    (raised,) = [line for line in lines if (line["kind"], line["layer"]) == ("collapse", 1)]
    assert 40 < raised["step"] <= 40 + 50
    assert (raised["experts"], raised["event"]) == ([2], "raised")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ALARM") and "Layer 1" in line]
    assert said == [f"ALARM, pretrain step {raised['step']}: {raised['message']}"]
    assert "Layer 1: collapse, expert 2 takes" in said[0] and "objective.balance_weight" in said[0]
    standing = [scalars["alarms"] for scalars in kept.scalars]
    assert standing[raised["step"] - 2] == 0 and min(standing[raised["step"] - 1 :]) >= 1


def test_collapse_that_ends_is_cleared(alone, tmp_path):
    def press_for_a_while(model, step):
        for layer in (0, 1):
            router_of(model, layer).bias[0] = 100.0 if 20 <= step < 50 else 0.0

    lines, _ = train_live(LiveRun(seed=2, num_steps=110), tmp_path, press_for_a_while)
    events = {(line["event"], line["layer"]): line["step"] for line in lines if line["kind"] == "collapse"}
    assert set(events) == {("raised", 0), ("raised", 1), ("cleared", 0), ("cleared", 1)}
    assert all(50 + WINDOW <= events["cleared", layer] <= 50 + 2 * WINDOW for layer in (0, 1))
    problems: list[str] = []
    shown = read_alarms(tmp_path / "alarms.jsonl", problems)
    assert [alarm.until is not None for alarm in shown] == [True, True] and problems == []


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # DeepSpeed, on importing its own Muon
def test_step_that_the_engine_skips_is_named(alone, tmp_path):
    lines, _ = train_live(LiveRun(seed=3, num_steps=8, zero_stage=1), tmp_path, spoil(first=4))
    assert [(line["kind"], line["event"], line["step"]) for line in lines] == [("skipped step", "raised", 5)]


def test_remedies_name_options_that_there_are():
    roots = {"objective": ForecastConfig, "model": TransformerConfig, "loop": LoopConfig, "engine": EngineConfig}
    roots["tracking"] = TrackingConfig
    texts = [rules.COLLAPSE_REMEDY, rules.STARVATION_REMEDY, rules.NOT_FINITE_REMEDY, SKIPPED]
    texts += [alarm.message for alarm in find_rank_alarms(np.ones((2, 1, 1, 2)), np.ones((2, 1)), np.array([1.0, 9.0]))]
    named = [name for text in texts for name in re.findall(rf"\b(?:{'|'.join(roots)})(?:\.\w+)+", text)]
    assert len(named) >= 12
    for name in named:
        first, *rest = name.split(".")
        owner = roots[first]
        for part in rest:
            assert is_dataclass(owner) and part in {field.name for field in fields(owner)}, name
            owner = get_type_hints(owner)[part]


@pytest.mark.parametrize(("num_domains", "top_k"), [(1, 1), (2, 1), (3, 1), (4, 1), (3, 2)])
def test_limit_of_collapse_lies_between_the_most_lopsided_separation_and_full_collapse(num_domains, top_k):
    num_experts = top_k + 1
    load = np.zeros((num_domains, 1, num_experts))
    load[:, 0, :top_k] = 1 / top_k
    assert [alarm.experts for alarm in find_collapse(load, top_k)] == [tuple(range(top_k))]
    load[-1, 0, [0, -1]] = [0, 1 / top_k]  # the last domain sends one choice elsewhere
    if num_domains > 1:
        assert find_collapse(load, top_k) == []
    assert most_lopsided(num_domains, top_k) < 1


def test_specialised_and_unequal_but_sound_loads_raise_nothing():
    one_expert_a_domain = np.eye(3, 4)[:, None] * 1.0
    one_expert_a_domain[2, 0] = [0, 0, 0.5, 0.5]
    assert rules.find_routing_alarms(one_expert_a_domain) == []
    two_experts = np.array([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    assert rules.find_routing_alarms(two_experts) == []
    every_expert = np.full((3, 2, 2), 0.5)
    assert find_collapse(every_expert, top_k=2) == find_starvation(every_expert, top_k=2) == []


def test_rank_that_routes_a_domain_otherwise_or_starts_late_is_named_and_ranks_of_other_domains_are_not():
    choices, samples, even = np.zeros((4, 2, 2, 4)), np.full((4, 2), 100.0), np.ones(4)
    choices[:, :, 0, 1], choices[:, :, 1, 2] = 800, 800
    assert find_rank_alarms(choices, samples, even) == []
    by_rank, seen = choices.copy(), samples.copy()
    by_rank[:2, :, 0], by_rank[2:, :, 1], seen[:2, 0], seen[2:, 1] = 0, 0, 0, 0  # each rank holds one domain
    assert find_rank_alarms(by_rank, seen, even) == []
    choices[3, 1, 0] = [800, 0, 0, 0]
    (alarm,) = find_rank_alarms(choices, samples, even)
    assert (alarm.kind, alarm.layer) == ("rank load", 1) and alarm.message.startswith("Rank 3, layer 1")
    (alarm,) = find_rank_alarms(choices[:3], samples[:3], np.array([1.0, 0.5, 1.0]))
    assert alarm.message.startswith("Rank 1 begins its steps late: the others wait for 50%")


def test_log_that_went_back_replaces_its_later_alarms_and_names_broken_lines(tmp_path):
    log = AlarmLog(tmp_path, "pretrain")
    for step in (30, 80, 60):
        log.write("raised", step, Alarm("collapse", f"at {step}", 0, (1,)))
    log.write("cleared", 90, Alarm("collapse", "at 60", 0, (1,)))
    with (tmp_path / "alarms.jsonl").open("a") as file:
        file.write('{"step": 95, "ph')
    problems: list[str] = []
    shown = read_alarms(tmp_path / "alarms.jsonl", problems)
    assert [(alarm.step, alarm.until) for alarm in shown] == [(30, 60), (60, 90)]
    assert problems == ["alarms.jsonl: 1 broken line skipped."]
