"""Where scalars go: an append-only ``metrics.jsonl`` is the truth; the progress bar and W&B are views of it."""

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm

from shodh.training.line_log import open_for_appending
from shodh.training.loop import StepRecord

OVERALL_LOAD = re.compile(r"load/layer\d+/expert\d+")  # of all domains together


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where a run is watched. W&B is best effort: whatever it does, training goes on."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "shodh"
    interval: int = 1  # steps between lines of metrics.jsonl

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval={self.interval}: must be at least 1. Raise it.")


class StepSize(NamedTuple):
    """What an optimizer step handles, over all ranks."""

    tokens: int
    operations: Callable[[int], float] | None = None  # of the model's products in a step, counted from 0
    peak: float | None = None  # operations a second that all devices together can reach


class Track:
    """Hook that appends scalars to ``metrics.jsonl``, feeds W&B and moves the progress bar; works on rank 0 only.

    Hooks before it may add to ``record.scalars``. A line holds step, phase, unix time and the scalars. After a resume
    steps may appear twice, bit-identical; readers take the last.
    """

    def __init__(
        self, folder: Path, phase: str, config: TrackingConfig, first_step: int, num_steps: int, size: StepSize
    ) -> None:
        self.phase, self.config, self.num_steps, self.size = phase, config, num_steps, size
        self.active = torch.distributed.get_rank() == 0
        self.step = first_step  # the last one that was completed
        if not self.active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open_for_appending(folder / "metrics.jsonl")
        self.bar = tqdm(
            total=num_steps, initial=first_step, desc=phase, unit="step", mininterval=1.0, dynamic_ncols=True
        )
        self.run = _start_wandb(folder, phase, config)

    def after_step(self, record: StepRecord) -> None:
        self.step = record.step
        if not self.active:
            return
        scalars = record.scalars | measure_speed(self.size, record)
        if record.step % self.config.interval == 0 or record.step == self.num_steps:
            line = {"step": record.step, "phase": self.phase, "time": time.time(), **scalars}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            self.run = _log_wandb(
                self.run, {f"{self.phase}/{key}": value for key, value in scalars.items()}, record.step
            )
        shown = {"loss": f"{scalars['loss']:.4f}", "tok/s": f"{scalars['tokens_per_second']:.0f}"}
        if "teraflops_per_second" in scalars:
            shown["TFLOP/s"] = f"{scalars['teraflops_per_second']:.3g}"
        if "mfu" in scalars:
            shown["MFU"] = f"{scalars['mfu']:.1%}"
        loads = [value for key, value in scalars.items() if OVERALL_LOAD.fullmatch(key)]
        if loads:
            shown["load max/ideal"] = f"{max(loads):.1f}"
        if scalars.get("alarms"):
            shown["alarms"] = f"{scalars['alarms']:.0f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(record.step - self.bar.n)

    def close(self) -> None:
        """Flush everything; call once after training."""
        if self.active:
            self.bar.close()
            self.file.close()
            if self.run is not None:
                try:
                    self.run.finish()
                except Exception as error:  # W&B must never end a finished run
                    _warn_wandb(error)


def measure_speed(size: StepSize, record: StepRecord) -> dict[str, float]:
    """Tokens a second, and where the model's operations are known 10^12 of them, and their share of the peak (MFU).

    Chowdhery et al., PaLM (2022), appendix B: what recomputation repeats does not count.
    """
    speed = {"tokens_per_second": size.tokens / record.seconds}
    if size.operations is not None:
        per_second = size.operations(record.step - 1) / record.seconds
        speed["teraflops_per_second"] = per_second / 1e12
        if size.peak is not None:
            speed["mfu"] = per_second / size.peak
    return speed


def _start_wandb(folder: Path, phase: str, config: TrackingConfig) -> Any:
    if config.wandb == "disabled":
        return None
    try:
        import wandb

        settings = wandb.Settings(silent=True, init_timeout=10, console="off")
        return wandb.init(
            project=config.project, dir=folder, mode=config.wandb, name=f"{folder.name}-{phase}", settings=settings
        )
    except Exception as error:  # a refused port, no login, not installed: none may stop training
        _warn_wandb(error)
        return None


def _log_wandb(run: Any, scalars: dict[str, float], step: int) -> Any:
    if run is not None:
        try:
            run.log(scalars, step=step)
        except Exception as error:
            _warn_wandb(error)
            return None
    return run


def _warn_wandb(error: Exception) -> None:
    print(f"wandb: {type(error).__name__}: {error}. Training goes on; metrics.jsonl holds everything.", file=sys.stderr)
