"""What DeepSpeed's engine costs over a bare PyTorch loop, and what a checkpoint costs a training that goes on.

    python benchmarks/engine.py [--quick]

The quickstart's model and objective on batches in memory; one process, one thread. Steps are optimizer steps of
100 ms or more: forward, backward, clipping, AdamW. Engine and bare loop take turns on the same batches and begin alike.
Each checkpoint is written to the end before the next.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import ROOT, Figure, at_least, at_most, control, report, stated, time_interleaved
from telemetry import make_batch
from torch import nn

sys.path.append(str(ROOT / "launch"))

from settings import Pretraining  # noqa: E402 - beside the launch scripts

from shodh.config import load_config  # noqa: E402
from shodh.fields import LatentBatch  # noqa: E402
from shodh.model.attention import Attention  # noqa: E402
from shodh.model.router import SemanticRouter  # noqa: E402
from shodh.model.transformer import LatentTransformer  # noqa: E402
from shodh.training.checkpoint import SaveCheckpoint, collect_state, write_checkpoint  # noqa: E402
from shodh.training.engine import build_engine, distributed, set_learning_rate  # noqa: E402
from shodh.training.objectives import ForecastObjective  # noqa: E402
from shodh.training.optimizers import build_optimizer  # noqa: E402

RATE = 1e-4
SHORTEST = 0.1  # s, of a step
FIRST = 10  # steps in which losses agree to 2 units of FP32 a step; later a token between two experts goes another way


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and nothing compiled")
    quick = parser.parse_args(arguments).quick
    num_rounds = 5 if quick else 61
    config = load_config(Pretraining, ROOT / "configs/pretrain/quickstart.yaml", ["objective.unroll=[]"])
    with distributed(threads_per_rank=1):
        torch.manual_seed(0)
        batches = [make_batch(config) for _ in range(8)]
        figures = [*compare_steps(config, batches, num_rounds), *compare_saves(config, batches, min(num_rounds, 21))]
        return report("engine", figures if quick else [*figures, *compare_compiled(config, batches, 21)])


def compare_steps(config: Pretraining, batches: Sequence[LatentBatch], num_rounds: int) -> list[Figure]:
    """An engine's step, ZeRO 0 and 1, over a bare loop's."""
    losses: dict[str, list[float]] = {}
    works = {"bare": step_bare(config, batches, losses.setdefault("bare", []))}
    for stage in (0, 1):
        name = f"ZeRO {stage}"
        works[name], _ = step_engine(config, batches, stage, losses.setdefault(name, []))
    works["again"] = step_bare(config, batches, losses.setdefault("again", []))
    seconds = time_interleaved(works, num_rounds, time.process_time)
    off = max(abs(a / b - 1) for name in works for a, b in zip(losses[name][:FIRST], losses["bare"], strict=False))
    return [
        at_least("bare step", seconds["bare"], SHORTEST, "s"),
        *(at_most(f"engine at ZeRO {i} over bare loop", seconds[f"ZeRO {i}"] / seconds["bare"], 1.10) for i in (0, 1)),
        control("bare loop over itself", seconds["again"] / seconds["bare"]),
        at_most(f"first {FIRST} losses off the bare loop's", off, 2 * FIRST * torch.finfo(torch.float32).eps),
    ]


def compare_compiled(config: Pretraining, batches: Sequence[LatentBatch], num_rounds: int) -> list[Figure]:
    """A bare step with attention, norms and routers compiled over one without; needs a C++ compiler."""
    started = time.process_time()
    works = {"compiled": step_bare(config, batches, [], compiled=True), "eager": step_bare(config, batches, [])}
    works["compiled"]()
    seconds_to_compile = time.process_time() - started
    seconds = time_interleaved(works, num_rounds, time.process_time)
    return [
        stated("compiling attention, norms and routers", seconds_to_compile, "s"),
        stated("compiled step over eager", seconds["compiled"] / seconds["eager"]),
    ]


def step_bare(
    config: Pretraining, batches: Sequence[LatentBatch], losses: list[float], compiled: bool = False
) -> Callable[[], None]:
    """An optimizer step as one writes it without a framework."""
    torch.manual_seed(0)
    model, engine = LatentTransformer(config.model), config.engine
    if compiled:
        for part in model.modules():
            if isinstance(part, Attention | SemanticRouter | nn.RMSNorm):
                part.compile()
    optimizer = build_optimizer(model, "adamw", engine.weight_decay, engine.betas)
    objective, turn = ForecastObjective(config.objective), cycle(batches)
    for group in optimizer.param_groups:
        group["lr"] = RATE

    def step() -> None:
        objective.begin_step(0)
        loss = objective(model, next(turn))[0]["total"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), engine.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    return step


def step_engine(
    config: Pretraining, batches: Sequence[LatentBatch], stage: int, losses: list[float]
) -> tuple[Callable[[], None], Any]:
    """The same by an engine, as shodh/training/loop.py calls it, and the engine."""
    torch.manual_seed(0)
    chosen = replace(config.engine, zero_stage=stage, optimizer="adamw", precision="fp32")  # pyright: ignore
    engine = build_engine(LatentTransformer(config.model), chosen, torch.device("cpu"))
    objective, turn = ForecastObjective(config.objective), cycle(batches)

    def step() -> None:
        set_learning_rate(engine, RATE)
        objective.begin_step(0)
        loss = objective(engine, next(turn))[0]["total"]
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())

    return step, engine


def compare_saves(config: Pretraining, batches: Sequence[LatentBatch], num_rounds: int) -> list[Figure]:
    """What a training that goes on loses by a checkpoint, over what it loses by one that it waits for.

    Steps are timed by the clock, as the thread that writes takes its share of disk, memory and Python; what they take
    longer than steps beside which nothing is written counts as lost.
    """
    model = replace(config.model, width=384, num_heads=6, hidden=768)
    step, engine = step_engine(replace(config, model=model), batches, 0, [])
    lost, whole, blocked, calm = [], [], [], [time_of(step) for _ in range(6)][1:]
    with tempfile.TemporaryDirectory(prefix="shodh-engine-") as folder:
        save = SaveCheckpoint(engine, Path(folder), 1, 1, {"record": {"config": {}}})
        save.save(0)  # maps memory
        for number in range(1, num_rounds + 1):
            save.wait()
            started = time.perf_counter()
            write_checkpoint(Path(folder), 2 * number, collect_state(engine, save.memory), save.run)
            whole.append(time.perf_counter() - started)
            calm.append(time_of(step))
            blocked.append(time_of(lambda number=number: save.save(2 * number + 1)))
            started, num_steps = time.perf_counter(), 0
            while save.is_writing:
                step()
                num_steps += 1
            lost.append(blocked[-1] + time.perf_counter() - started - num_steps * float(np.median(calm)))
        save.close()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 2  # two are kept
    return [
        stated("checkpoint", size / 1e6, "MB"),
        stated("step beside which nothing is written", calm, "s"),
        stated("save that training waits for", whole, "s"),
        at_most("training waits for a save by a thread, over that", np.array(blocked) / np.array(whole), 0.2),
        stated("training loses by it, slower steps included, over that", np.array(lost) / np.array(whole)),
    ]


def time_of(work: Callable[[], object]) -> float:
    """Seconds by the clock."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
