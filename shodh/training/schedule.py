"""Learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine down to ``final_fraction`` of the peak."""

    num_steps: int
    learning_rate: float
    num_warmup_steps: int = 50
    final_fraction: float = 0.02

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps}: must be at least 1.")
        if self.num_warmup_steps < 0:
            raise ValueError(f"num_warmup_steps={self.num_warmup_steps}: must not be negative.")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate={self.learning_rate}: must lie between 0 and 1.")


def learning_rate_at(step: int, config: ScheduleConfig) -> float:
    """Learning rate used in step ``step`` (counted from 0)."""
    if step < config.num_warmup_steps:
        return config.learning_rate * (step + 1) / config.num_warmup_steps
    progress = (step - config.num_warmup_steps) / max(1, config.num_steps - config.num_warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * cosine)
