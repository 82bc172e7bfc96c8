"""Run by test_engine.py under the DeepSpeed launcher: train 6 steps at once, and 3 + 3 through a state; compare.

resume_under_zero.py FOLDER writes the states into FOLDER; on a single rank it reads what two ranks wrote there.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from shodh.training.checkpoint import CheckpointError, collect_state, restore_state
from shodh.training.engine import EngineConfig, build_engine, distributed
from shodh.training.loop import LoopConfig, train
from shodh.training.schedule import ScheduleConfig

LOW_AND_FULL = ("bf16", "fp32")
LOOP = {"learning_rate": 0.01, "num_warmup_steps": 2}


class SquareOutput:
    def begin_step(self, step):
        pass

    def __call__(self, engine, batch):
        output = engine(batch)
        return {"total": output.square().mean(), "mean": output.mean()}, None


class Record:
    def __init__(self):
        self.losses = []

    def after_step(self, record):
        self.losses.append(record.scalars["loss"])


def make_engine(stage, group, optimizer="adamw", precision="fp32", clipping=0.1):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4))
    choices = {"zero_stage": stage, "optimizer": optimizer, "precision": precision, "gradient_clipping": clipping}
    return build_engine(model, EngineConfig(batch_size=4, accumulation=2, **choices), group.device)


def batches_from(step, group):
    """Two shares of two samples a micro-step, one to each of two ranks or both to one."""
    for micro_step in range(2 * step, 1000):
        shares = [torch.randn(2, 8, generator=torch.Generator().manual_seed(2 * micro_step + i)) for i in range(2)]
        yield torch.cat(shares) if group.size == 1 else shares[group.rank]


def run(engine, group, last_step, first_step=0):
    record = Record()
    loop = LoopConfig(schedule=ScheduleConfig(num_steps=6, **LOOP))
    stop = StopAfter(last_step)
    try:
        train(engine, SquareOutput(), lambda s: batches_from(s, group), loop, [record, stop], first_step)
    except StopIteration:
        pass
    return record.losses


class StopAfter:
    def __init__(self, step):
        self.step = step

    def after_step(self, record):
        if record.step == self.step:
            raise StopIteration


def resume_is_bitwise(stage, group, **choices):
    whole = run(make_engine(stage, group, **choices), group, 6)
    engine = make_engine(stage, group, **choices)
    first = run(engine, group, 3)
    state = share_state(engine)
    engine = make_engine(stage, group, **choices)
    restore_state(engine, state)
    resumed = first + run(engine, group, 6, first_step=3)
    assert resumed == whole, (stage, choices, resumed, whole)
    assert len(set(whole)) == 6, whole
    all_ranks_agree(engine, group)
    return whole, state


def share_state(engine):
    """What a checkpoint holds, for all ranks, which would read it from the file that rank 0 writes."""
    shared = [collect_state(engine)]
    assert bool(shared[0]) == (torch.distributed.get_rank() == 0)
    torch.distributed.broadcast_object_list(shared, 0)
    return shared[0]


def all_ranks_agree(engine, group):
    for name, tensor in [*engine.module.named_parameters(), *engine.module.named_buffers()]:
        copies = [torch.empty_like(tensor) for _ in range(group.size)]
        torch.distributed.all_gather(copies, tensor.detach())
        assert all(torch.equal(copy, tensor) for copy in copies), name


def two_ranks(group, folder):
    runs = {stage: resume_is_bitwise(stage, group) for stage in (0, 1, 2)}
    engine = make_engine(2, group)
    restore_state(engine, runs[0][1])  # another ZeRO stage reads the same state
    crossed, whole = run(engine, group, 6, first_step=3), runs[2][0]
    assert all(abs(a - b) < 1e-5 * abs(b) for a, b in zip(crossed, whole[3:], strict=True)), (crossed, whole)
    muon = {precision: resume_is_bitwise(0, group, optimizer="muon", precision=precision) for precision in LOW_AND_FULL}
    whole, state = muon["fp32"]
    others = [run(make_engine(0, group, optimizer="muon", clipping=0.0), group, 6), muon["bf16"][0], runs[0][0]]
    assert whole not in others, "a choice changed nothing"
    moments = {key for key in state if key.endswith("2.weight") or key.endswith("0.weight")}
    assert moments == {"parameter/0.weight", "momentum_buffer/0.weight"} | {
        f"{kind}/2.weight" for kind in ("parameter", "exp_avg", "exp_avg_sq")
    }
    one_line_refusal(make_engine(0, group), state, "exp_avg/0.weight")
    one_line_refusal(make_engine(0, group, optimizer="muon"), runs[0][1], "momentum_buffer/0.weight")
    if group.rank == 0:
        save_file(state | {"losses": torch.tensor(whole, dtype=torch.float64)}, folder / "two_ranks.safetensors")
        print("all stages resume bit for bit")


def one_rank(group, folder):
    state = load_file(folder / "two_ranks.safetensors")
    whole = state.pop("losses").tolist()
    engine = make_engine(0, group, optimizer="muon")
    restore_state(engine, state)
    found = collect_state(engine)
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    loss = run(engine, group, 4, first_step=3)[0]  # a mean over the same samples, added up in another order
    assert abs(loss - whole[3]) < 16 * torch.finfo(torch.float32).eps * whole[3], (loss, whole)
    print("one rank goes on where two ranks stopped")


def one_line_refusal(engine, state, missing):
    try:
        restore_state(engine, state)
    except CheckpointError as error:
        assert missing in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError(f"a state without {missing} was accepted")


def main(folder):
    with distributed(threads_per_rank=1) as group:
        (one_rank if group.size == 1 else two_ranks)(group, folder)


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
