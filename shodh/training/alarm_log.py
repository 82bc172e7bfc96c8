"""``alarms.jsonl``: what a running training found wrong, a line when it begins and one when it ends. Without torch."""

import json
import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from shodh.training.line_log import open_for_appending

FILE = "alarms.jsonl"


class Alarm(NamedTuple):
    """Something that a person should look at; the message says what it is and what to do."""

    kind: str
    message: str
    layer: int | None = None
    experts: tuple[int, ...] = ()


class AlarmLog:
    """Appends to a run's alarms.jsonl; a line holds step, phase, unix time, event and the alarm."""

    def __init__(self, folder: Path, phase: str) -> None:
        self.folder, self.phase = folder, phase

    def write(self, event: Literal["raised", "cleared"], step: int, alarm: Alarm) -> None:
        """Append one line, on disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {"step": step, "phase": self.phase, "time": time.time(), "event": event, **alarm._asdict()}
        with open_for_appending(self.folder / FILE) as file:
            file.write(json.dumps(line) + "\n")

    def raise_alarm(self, step: int, alarm: Alarm) -> None:
        """Append the alarm, say it on stderr in one line, and send it to W&B if a run is open there."""
        self.write("raised", step, alarm)
        tqdm.write(f"ALARM, {self.phase} step {step}: {alarm.message}", file=sys.stderr)
        sys.stderr.flush()
        _alert_wandb(f"{self.phase}: {alarm.kind}", f"Step {step}: {alarm.message}")


def _alert_wandb(title: str, text: str) -> None:
    wandb: Any = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    if run is not None:
        try:
            run.alert(title=title, text=text)
        except Exception as error:  # W&B is a view: whatever it does, training goes on
            print(f"wandb: {type(error).__name__}: {error}. alarms.jsonl holds the alarm.", file=sys.stderr)
