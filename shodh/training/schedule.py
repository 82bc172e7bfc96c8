"""Learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then down to ``final_fraction`` of the peak: on a cosine, or late, after a stable stretch.

    "stable" holds the peak until the last ``decay_fraction`` of all steps and goes down like 1 - sqrt of its share
    (Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations, 2024).
    """

    num_steps: int
    learning_rate: float
    num_warmup_steps: int = 50
    final_fraction: float = 0.02
    shape: Literal["cosine", "stable"] = "cosine"
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps}: must be at least 1.")
        if self.num_warmup_steps < 0:
            raise ValueError(f"num_warmup_steps={self.num_warmup_steps}: must not be negative.")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate={self.learning_rate}: must lie between 0 and 1.")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction={self.decay_fraction}: must lie above 0 and at most be 1.")


def learning_rate_at(step: int, config: ScheduleConfig) -> float:
    """Learning rate used in step ``step`` (counted from 0)."""
    if step < config.num_warmup_steps:
        return config.learning_rate * (step + 1) / config.num_warmup_steps
    num_falling = max(1, config.num_steps - config.num_warmup_steps)
    first = config.num_warmup_steps
    if config.shape == "stable":
        num_falling = min(num_falling, max(1, round(config.decay_fraction * config.num_steps)))
        first = config.num_steps - num_falling
    progress = min(1.0, max(0.0, (step - first) / num_falling))
    height = 1 - math.sqrt(progress) if config.shape == "stable" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * height)
