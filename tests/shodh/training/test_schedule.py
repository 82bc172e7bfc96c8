"""The learning rate is a function of the step: warm-up, peak, cosine, floor."""

import pytest

from shodh.training.schedule import ScheduleConfig, learning_rate_at

CONFIG = ScheduleConfig(num_steps=100, learning_rate=0.1, num_warmup_steps=10, final_fraction=0.1)


def test_rate_rises_linearly_to_the_peak_and_falls_to_the_floor():
    rates = [learning_rate_at(step, CONFIG) for step in range(101)]
    assert rates[0] == pytest.approx(0.01) and rates[9] == rates[10] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.1 * 0.55)  # halfway down the cosine
    assert rates[100] == pytest.approx(0.01)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


@pytest.mark.parametrize(("key", "value"), [("num_steps", 0), ("learning_rate", 0.0), ("learning_rate", 2.0)])
def test_impossible_schedules_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        ScheduleConfig(**({"num_steps": 10, "learning_rate": 0.1} | {key: value}))
