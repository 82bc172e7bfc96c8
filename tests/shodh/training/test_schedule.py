"""The learning rate is a function of the step: warm-up, peak, cosine, floor."""

from dataclasses import replace

import pytest

from shodh.training.schedule import ScheduleConfig, learning_rate_at

CONFIG = ScheduleConfig(num_steps=100, learning_rate=0.1, num_warmup_steps=10, final_fraction=0.1)


def test_rate_rises_linearly_to_the_peak_and_falls_to_the_floor():
    rates = [learning_rate_at(step, CONFIG) for step in range(101)]
    assert rates[0] == pytest.approx(0.01) and rates[9] == rates[10] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.1 * 0.55)  # halfway down the cosine
    assert rates[100] == pytest.approx(0.01)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_a_stable_schedule_holds_the_peak_until_its_last_steps():
    stable = replace(CONFIG, shape="stable", decay_fraction=0.2)
    rates = [learning_rate_at(step, stable) for step in range(101)]
    assert rates[:10] == [learning_rate_at(step, CONFIG) for step in range(10)]
    assert rates[9:81] == [pytest.approx(0.1)] * 72 and rates[81] < 0.1
    assert rates[85] == pytest.approx(0.1 * (0.1 + 0.9 * 0.5))  # a quarter of the way: 1 - sqrt(1/4)
    assert rates[100] == pytest.approx(0.01)


def test_a_stable_schedule_decays_after_its_warm_up_at_the_earliest():
    short = ScheduleConfig(num_steps=10, learning_rate=0.1, num_warmup_steps=8, shape="stable", decay_fraction=1.0)
    assert learning_rate_at(7, short) == learning_rate_at(8, short) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", 2.0),
        ("decay_fraction", 0.0),
        ("decay_fraction", 2.0),
    ],
)
def test_impossible_schedules_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        ScheduleConfig(**({"num_steps": 10, "learning_rate": 0.1} | {key: value}))
