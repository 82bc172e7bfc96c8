"""A pretraining step with everything telemetry measures over the same step without, at the quickstart's size.

    python benchmarks/telemetry.py [--quick]

One run of the real loop (engine, objective, metrics.jsonl) in one process, one thread, on batches in memory. Steps take
turns, with telemetry, without and without again, so that whatever slows the machine slows all three. Telemetry is what
pretraining measures every step, loads to alarms and their longer lines of metrics.jsonl, and the flip rate, whose probe
runs every ``FLIP_INTERVAL`` steps: a step is charged its share.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import ROOT, Figure, at_most, control, report, stated
from random_latents import make_latents

sys.path.append(str(ROOT / "launch"))

from settings import Pretraining  # noqa: E402 - beside the launch scripts

from shodh.config import load_config  # noqa: E402
from shodh.evaluation.alarm_hook import RaiseAlarms  # noqa: E402
from shodh.evaluation.telemetry import FLIP_INTERVAL, MeasureFlips, MeasureRouting  # noqa: E402
from shodh.fields import NUM_GIVEN, LatentBatch  # noqa: E402
from shodh.model.transformer import LatentTransformer  # noqa: E402
from shodh.training.alarm_log import AlarmLog  # noqa: E402
from shodh.training.engine import build_engine, distributed  # noqa: E402
from shodh.training.loop import Hook, LoopConfig, StepRecord, train  # noqa: E402
from shodh.training.objectives import ForecastObjective  # noqa: E402
from shodh.training.schedule import ScheduleConfig  # noqa: E402
from shodh.training.tracking import StepSize, Track, TrackingConfig  # noqa: E402

MOST = 1.01
NOISE = 0.005  # half of what telemetry may cost
TURNS = ("on", "off", "again")
LATENT_CELLS = 4, 4, 4  # of a latent: 32 / 8 along each axis


class TakeTurns:
    """Hook that lets the others work in every third step and times whole steps, hooks and log line included."""

    def __init__(self, measuring: Sequence[Hook], track: Track) -> None:
        self.measuring, self.track = measuring, track
        self.seconds: dict[str, list[tuple[float, float]]] = {turn: [] for turn in TURNS}  # a step: elapsed, of the CPU
        self.own: dict[str, list[float]] = {turn: [] for turn in TURNS}  # of the CPU, for hooks and log line alone
        self.ended = read_clocks()

    def after_step(self, record: StepRecord) -> None:
        round_, place = divmod(record.step - 1, len(TURNS))
        turn = TURNS[(place + round_) % len(TURNS)]  # in another order every round
        started = time.process_time()
        if turn == "on":
            for hook in self.measuring:
                hook.after_step(record)
        self.track.after_step(record)
        now = read_clocks()
        self.own[turn].append(now[1] - started)
        self.seconds[turn].append((now[0] - self.ended[0], now[1] - self.ended[1]))
        self.ended = now


def read_clocks() -> tuple[float, float]:
    """Seconds elapsed, and seconds that the CPU gave this process: all but the same on a machine of one's own."""
    return time.perf_counter(), time.process_time()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    return report("telemetry", compare_steps(20 if parser.parse_args(arguments).quick else 200))


def compare_steps(num_rounds: int) -> list[Figure]:
    """The ratio over so many rounds of three steps each."""
    config = load_config(Pretraining, ROOT / "configs/pretrain/quickstart.yaml", ["objective.unroll=[]"])
    with tempfile.TemporaryDirectory(prefix="shodh-telemetry-") as folder, distributed(threads_per_rank=1) as group:
        torch.manual_seed(0)
        batches = [make_batch(config).to(group.device) for _ in range(8)]
        model = LatentTransformer(config.model)
        engine = build_engine(model, config.engine, group.device)
        routing = MeasureRouting(config.domains, interval=1)
        alarms = RaiseAlarms(routing, engine, AlarmLog(Path(folder), "pretrain"), config.model.top_k, settle=0)
        num_steps = len(TURNS) * (num_rounds + 2)
        track = Track(Path(folder), "pretrain", TrackingConfig(wandb="disabled"), 0, num_steps, StepSize(1))
        turns = TakeTurns([routing, alarms], track)
        schedule = ScheduleConfig(num_steps=num_steps, learning_rate=1e-4, num_warmup_steps=0)

        def from_memory(step: int) -> Generator[LatentBatch, None, None]:
            yield from itertools.cycle(batches)

        train(engine, ForecastObjective(config.objective), from_memory, LoopConfig(schedule=schedule), [turns])
        track.close()
        flips = time_flips(model, batches[0], config.domains)
    return compare(turns, flips, num_rounds)


def compare(turns: TakeTurns, flips: float, num_rounds: int) -> list[Figure]:
    """Figures from the steps' seconds by turn; the first rounds, which warm caches, are left out.

    Telemetry's own seconds of the CPU say what it costs where a busy machine blurs the difference of whole steps.
    """
    times = {turn: np.array(values[-num_rounds:]) for turn, values in turns.seconds.items()}
    on, off, again = (times[turn][:, 0] for turn in TURNS)
    cpu = times["off"][:, 1]
    share = flips / FLIP_INTERVAL
    own = np.array(turns.own["on"][-num_rounds:]) - np.median(turns.own["off"][-num_rounds:]) + share
    return [
        stated("step without telemetry", off, "s"),
        stated("of the CPU", cpu, "s"),
        stated(f"flip probe, every {FLIP_INTERVAL} steps, of the CPU", 1e3 * flips, "ms"),
        stated("telemetry itself, of the CPU", 1e3 * own, "ms"),
        at_most("1 + telemetry itself over a step, of the CPU", 1 + own / np.median(cpu), MOST),
        at_most("step with telemetry over step without", (on + share) / off, MOST),
        control("step without telemetry over itself", again / off, NOISE),
    ]


def make_batch(config: Pretraining) -> LatentBatch:
    """Random latents of the quickstart's shapes; what they hold costs nothing."""
    num_predicted = config.objective.num_states - NUM_GIVEN
    return make_latents(config.model, config.engine.batch_size, num_predicted, LATENT_CELLS)


def time_flips(model: LatentTransformer, batch: LatentBatch, domains: Sequence[str]) -> float:
    """Median seconds, of the CPU, of the flip rate on a probe of one sample per domain."""
    probe = LatentBatch(*(values[: len(domains)] for values in batch))
    hook, seconds = MeasureFlips(model, probe, domains, interval=1), []
    for step in range(1, 32):
        started = time.process_time()
        hook.after_step(StepRecord(step, {}, 1.0, list[Any]()))
        seconds.append(time.process_time() - started)
    return float(np.median(seconds[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
