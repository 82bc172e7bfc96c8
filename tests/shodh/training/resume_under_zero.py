"""Run by test_engine.py under the DeepSpeed launcher: train 6 steps at once, and 3 + 3 through a state; compare."""

import sys

import torch

from shodh.training.checkpoint import collect_state, restore_state
from shodh.training.engine import EngineConfig, build_engine, distributed
from shodh.training.loop import LoopConfig, train
from shodh.training.schedule import ScheduleConfig

LOOP = {"learning_rate": 0.01, "num_warmup_steps": 2}


class SquareOutput:
    def begin_step(self):
        pass

    def __call__(self, engine, batch):
        output = engine(batch)
        return {"total": output.square().mean(), "mean": output.mean()}, None


class Record:
    def __init__(self):
        self.losses = []

    def after_step(self, record):
        self.losses.append(record.scalars["loss"])


def make_engine(stage, group):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4))
    return build_engine(model, EngineConfig(batch_size=4, accumulation=2, zero_stage=stage), group.device)


def batches_from(step, rank):
    for micro_step in range(2 * step, 1000):
        yield torch.randn(2, 8, generator=torch.Generator().manual_seed(2 * micro_step + rank))


def run(engine, group, last_step, first_step=0):
    record = Record()
    loop = LoopConfig(schedule=ScheduleConfig(num_steps=6, **LOOP))
    stop = StopAfter(last_step)
    try:
        train(engine, SquareOutput(), lambda s: batches_from(s, group.rank), loop, [record, stop], first_step)
    except StopIteration:
        pass
    return record.losses


class StopAfter:
    def __init__(self, step):
        self.step = step

    def after_step(self, record):
        if record.step == self.step:
            raise StopIteration


def main():
    with distributed(threads_per_rank=1) as group:
        states = {}
        for stage in (0, 1, 2):
            whole = run(make_engine(stage, group), group, 6)
            engine = make_engine(stage, group)
            first = run(engine, group, 3)
            states[stage] = collect_state(engine)
            engine = make_engine(stage, group)
            restore_state(engine, states[stage])
            resumed = first + run(engine, group, 6, first_step=3)
            assert resumed == whole, (stage, resumed, whole)
            assert len(set(whole)) == 6, whole
        engine = make_engine(2, group)
        restore_state(engine, states[0])  # another ZeRO stage reads the same state
        crossed = run(engine, group, 6, first_step=3)
        assert all(abs(a - b) < 1e-5 * abs(b) for a, b in zip(crossed, whole[3:], strict=True)), (crossed, whole)
        if group.rank == 0:
            print("all stages resume bit for bit", file=sys.stdout)


if __name__ == "__main__":
    main()
