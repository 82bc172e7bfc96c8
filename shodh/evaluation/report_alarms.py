"""The report's alarms: those that stand in the measurements, and those that were raised while the run trained."""

import json
from pathlib import Path
from typing import NamedTuple

from shodh.evaluation import report_page as html
from shodh.evaluation.alarms import find_evaluation_alarms, find_metric_alarms
from shodh.evaluation.report_run import Run
from shodh.training.alarm_log import FILE


class Raised(NamedTuple):
    """An alarm of a running training; ``until`` is the step that cleared it, None while it stands."""

    phase: str
    step: int
    until: int | None
    kind: str
    layer: int | None
    message: str

    def __str__(self) -> str:
        span = f"from step {self.step} on" if self.until is None else f"steps {self.step} to {self.until}, since over"
        return f"{self.phase}, {span}: {self.message}"


def show_alarms(run: Run) -> str:
    problems = list(run.problems)
    raised = read_alarms(run.folder / FILE, problems)
    measured = find_evaluation_alarms(run.evaluation) + find_metric_alarms(run.metrics)
    alarms = [*map(str, raised), *measured, *problems]
    return "".join(map(html.alarm, alarms)) or html.paragraph("None: nothing here needs your attention.")


def read_alarms(path: Path, problems: list[str]) -> list[Raised]:
    """The alarms of a run's log, oldest first; ``problems`` gains a sentence if lines are broken.

    A resumed run goes through the steps after its checkpoint again: its lines replace those logged for later steps.
    """
    raised: list[Raised] = []
    for event, alarm in _read_events(path, problems):
        raised = [r._replace(until=alarm.step) if r.until is None and _same(r, alarm) else r for r in raised]
        raised += [alarm] if event == "raised" else []
    return raised


def _read_events(path: Path, problems: list[str]) -> list[tuple[str, Raised]]:
    """What was raised and cleared, by the last run that passed that step."""
    events: list[tuple[str, Raised]] = []
    num_broken = 0
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            alarm = Raised(entry["phase"], int(entry["step"]), None, entry["kind"], entry["layer"], entry["message"])
            event = str(entry["event"])
        except (ValueError, TypeError, KeyError):
            num_broken += bool(line.strip())
            continue
        events = [e for e in events if e[1].phase != alarm.phase or e[1].step <= alarm.step]
        events.append((event, alarm))
    if num_broken:
        problems.append(f"{FILE}: {num_broken} broken {'line' if num_broken == 1 else 'lines'} skipped.")
    return events


def _same(one: Raised, other: Raised) -> bool:
    return (one.phase, one.kind, one.layer) == (other.phase, other.kind, other.layer)
