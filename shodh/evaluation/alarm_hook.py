"""Alarms raised while a model trains, from the last steps together: one step's loads jitter."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from shodh.evaluation.alarms import find_collapse, find_rank_alarms, find_starvation, leave_out_collapsed
from shodh.evaluation.telemetry import MeasureRouting, StepRouting
from shodh.training.alarm_log import Alarm, AlarmLog
from shodh.training.loop import StepRecord

WINDOW = 20  # steps judged together: a lasting collapse fills it well within 50 steps
NUM_WINDOWS = 5  # judged together for starvation: the balance loss takes tens of steps to bring an expert back

SKIPPED = (
    "The engine skipped an optimizer step ({} in all): its gradients were not finite. Lower "
    "loop.schedule.learning_rate or engine.gradient_clipping, or train with engine.precision=fp32."
)


class Standing(NamedTuple):
    """An alarm that was raised and has not been cleared."""

    alarm: Alarm
    last_seen: int  # step


class RaiseAlarms:
    """Hook after ``MeasureRouting``: says once, on rank 0, that a layer collapses, experts starve or ranks differ.

    A collapse is looked for in the mean of the last ``WINDOW`` steps, starvation after every ``WINDOW`` steps
    in the last ``NUM_WINDOWS`` of them, since experts come and go for tens of steps in sound runs. An alarm is cleared
    when it has not been found for ``WINDOW`` steps. The first ``settle`` steps are not judged: while the learning rate
    warms up, loads are what random weights make them. Adds the scalar ``alarms``, the number that stand.
    """

    def __init__(self, routing: MeasureRouting, engine: Any, log: AlarmLog, top_k: int, settle: int) -> None:
        self.routing, self.engine, self.log, self.top_k, self.settle = routing, engine, log, top_k, settle
        self.active = torch.distributed.get_rank() == 0
        self.steps: deque[StepRouting] = deque(maxlen=WINDOW)
        self.windows: deque[np.ndarray] = deque(maxlen=NUM_WINDOWS)  # choices (layer, domain, expert) of each
        self.num_judged = 0
        self.standing: dict[tuple[str, int | None], Standing] = {}
        self.num_skipped = int(getattr(engine, "skipped_steps", 0))

    def after_step(self, record: StepRecord) -> None:
        if not self.active:
            return
        found = self._find_skipped()
        if self.routing.measured is not None and record.step > self.settle:
            found += self._judge(self.routing.measured)
        self._raise_new(found, record.step)
        self._clear_old(found, record.step)
        record.scalars["alarms"] = float(len(self.standing))

    def _judge(self, step: StepRouting) -> list[Alarm]:
        self.steps.append(step)
        self.num_judged += 1
        if len(self.steps) < WINDOW:
            return []
        choices = np.sum([step.choices.numpy() for step in self.steps], axis=0)
        whole = choices.sum(0)
        alarms = collapsed = find_collapse(domain_loads(whole), self.top_k)
        if len(choices) > 1:
            num_samples = np.sum([step.num_samples.numpy() for step in self.steps], axis=0)
            seconds = np.median([step.seconds.numpy() for step in self.steps], axis=0)  # one slow step is no slow rank
            alarms = alarms + find_rank_alarms(choices, num_samples, seconds)
        if self.num_judged % WINDOW == 0:
            self.windows.append(whole)
            if len(self.windows) == NUM_WINDOWS:
                starving = find_starvation(domain_loads(np.sum(self.windows, axis=0)), self.top_k)
                alarms = alarms + leave_out_collapsed(starving, collapsed)
        return alarms

    def _find_skipped(self) -> list[Alarm]:
        before, self.num_skipped = self.num_skipped, int(getattr(self.engine, "skipped_steps", 0))
        return [Alarm("skipped step", SKIPPED.format(self.num_skipped))] if self.num_skipped > before else []

    def _raise_new(self, found: Sequence[Alarm], step: int) -> None:
        for alarm in found:
            stands = self.standing.get((alarm.kind, alarm.layer))
            if stands is None or not set(alarm.experts) <= set(stands.alarm.experts):
                self.log.raise_alarm(step, alarm)
                stands = Standing(alarm, step)
            self.standing[alarm.kind, alarm.layer] = stands._replace(last_seen=step)

    def _clear_old(self, found: Sequence[Alarm], step: int) -> None:
        collapsed = {alarm.layer for alarm in found if alarm.kind == "collapse"}  # its starved experts are not named
        for key, stands in list(self.standing.items()):
            if key[1] not in collapsed and step - stands.last_seen >= WINDOW:
                self.log.write("cleared", step, stands.alarm)
                del self.standing[key]


def domain_loads(choices: np.ndarray) -> np.ndarray:
    """Loads (domain, layer, expert), summing to 1, from choices (layer, domain, expert); without unseen domains."""
    total = choices.sum(-1, keepdims=True)
    seen = total[0, :, 0] > 0
    return (choices[:, seen] / total[:, seen]).swapaxes(0, 1)
