"""Expert parallelism changes where experts stand, not what they learn; checkpoints fit any number of ranks.

    python benchmarks/expert_parallel.py [--quick]

Real engines under DeepSpeed's launcher, on gloo, with a small mixture on random latents. Losses of two ranks that share
out the experts over those of one rank with the same global batch; bytes of every all-to-all against the formula; states
saved with 2 ranks, 2 ranks to a set of experts, ZeRO 2, restored on other ranks, ZeRO stages and shares, trained on and
restored in the first way again.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from expert_parallel_ranks import NUM_STEPS, Task
from figures import ROOT, Figure, at_most, report, stated
from random_store import write_random_store
from ranks import run_ranks
from safetensors.torch import load_file

from data.latents import write_latents
from data.simulate import open_channel

SAVED, RESUMED = 4, 6  # steps
# Losses agree to rounding where they differ by no more than this many units of FP32 per step, relative to the loss.
UNITS_PER_STEP = 2
MUON_OFF = 3  # times as far as ranks with all experts, which is chance


class Way(NamedTuple):
    """How a state is spread: ranks, ranks that share out the experts, ZeRO stage."""

    world: int
    expert_parallel: int
    zero_stage: int


FIRST = Way(2, 2, 2)
OTHERS = (Way(1, 1, 0), Way(2, 1, 1), Way(4, 4, 2), Way(4, 2, 1))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer steps")
    quick = parser.parse_args(arguments).quick
    with tempfile.TemporaryDirectory(prefix="shodh-experts-") as scratch:
        folder = Path(scratch)
        write_random_latents(folder / "latents")
        figures = measure(folder, (0,) if quick else (0, 1, 2), 10 if quick else NUM_STEPS)
    return report("expert_parallel", figures)


def measure(folder: Path, seeds: Sequence[int], num_steps: int) -> list[Figure]:
    """All figures; each start of a launcher carries out whatever so many ranks can do by then."""

    def train_all(expert_parallel: int, zero_stage: int, **choices: Any) -> list[Task]:
        way: dict[str, Any] = {"expert_parallel": expert_parallel, "zero_stage": zero_stage} | choices
        return [Task(seed=seed, first=0, last=num_steps, **way) for seed in seeds]

    shared = {f"ZeRO {stage}": train_all(2, stage) for stage in (0, 1, 2)}
    shared["ZeRO 2, recomputed"] = train_all(2, 2, recompute=True)
    saved = [move(folder, seed, FIRST, "start", "saved", (0, SAVED)) for seed in seeds]
    muon: dict[str, Any] = {"optimizer": "muon"}
    as_one = {"as_one": num_steps // 2}
    plain = {"plain": train_all(1, 0), "muon plain": train_all(1, 0, **muon), "muon": train_all(2, 0, **muon)}
    two = run_tasks(folder, 2, shared | plain | {"as one": train_all(2, 1, **as_one), "saved": saved})
    alone = {"alone": train_all(1, 0), "muon alone": train_all(1, 0, **muon), "as one": train_all(1, 0, **as_one)}
    one = run_tasks(folder, 1, alone | leave(folder, seeds, 1))
    four = run_tasks(folder, 4, leave(folder, seeds, 4))
    last = run_tasks(folder, 2, leave(folder, seeds, 2) | come_back(folder, seeds))
    outcomes = one | four | last
    return [
        stated("2 ranks, all experts on each: loss off one rank's", furthest(two["plain"], one["alone"]), "of it"),
        *judge_losses({name: two[name] for name in shared}, one["alone"]),
        judge_loss("ZeRO 1, begun as one", two["as one"], one["as one"]),
        *judge_muon(two["muon"], two["muon plain"], one["muon alone"]),
        *judge_moves(folder, seeds, {way: outcomes[name_of(way)] for way in OTHERS}, two["ZeRO 2"]),
    ]


def leave(folder: Path, seeds: Sequence[int], world: int) -> dict[str, list[Task]]:
    """Tasks that take up the saved states in every other way with so many ranks."""
    return {
        name_of(way): [move(folder, seed, way, "saved", f"on-{name_of(way)}", (SAVED, RESUMED)) for seed in seeds]
        for way in OTHERS
        if way.world == world
    }


def come_back(folder: Path, seeds: Sequence[int]) -> dict[str, list[Task]]:
    """Tasks that take up in the first way what every other way made."""
    steps = RESUMED, RESUMED + 1
    return {
        f"back-{name_of(way)}": [
            move(folder, seed, FIRST, f"on-{name_of(way)}", f"back-{name_of(way)}", steps) for seed in seeds
        ]
        for way in OTHERS
    }


def move(folder: Path, seed: int, way: Way, source: str, target: str, steps: tuple[int, int]) -> Task:
    """Train in a way from one named state on to another; what was restored is kept too."""
    first, last = steps
    return Task(
        seed=seed,
        first=first,
        last=last,
        expert_parallel=way.expert_parallel,
        zero_stage=way.zero_stage,
        read=str(folder / f"{source}-{seed}" / f"step-{first}") if first else "",
        restored=str(folder / f"{target}-restored-{seed}") if first else "",
        write=str(folder / f"{target}-{seed}"),
    )


def name_of(way: Way) -> str:
    """Of a way, in names of states and tasks."""
    return "-".join(map(str, way))


def judge_losses(shared: dict[str, list[Any]], alone: Sequence[dict[str, Any]]) -> list[Figure]:
    """Of two ranks that share out experts against one rank, and their bytes."""
    figures = [judge_loss(name, outcomes, alone) for name, outcomes in shared.items()]
    plain = [outcome for name, outcomes in shared.items() if "recomputed" not in name for outcome in outcomes]
    wrong = sum(outcome["bytes_sent"] != outcome["bytes_by_formula"] for outcome in plain)
    figures.append(stated("bytes sent to the other rank", [outcome["bytes_sent"] for outcome in plain], "B"))
    figures.append(at_most(f"runs of {len(plain)} whose bytes differ from the formula's", wrong, 0))
    return figures


def judge_muon(shared: Sequence[Any], plain: Sequence[Any], alone: Sequence[Any]) -> list[Figure]:
    """Muon rounds to bfloat16 on its way, so two ranks differ from one by more, however experts are spread."""
    off, of_plain = furthest(shared, alone), max(furthest(plain, alone), torch.finfo(torch.float32).eps)
    return [
        stated("2 ranks, all experts on each, Muon: loss off one rank's", of_plain, "of it"),
        at_most(
            "2 ranks share out experts, Muon: loss off one rank's, over that",
            off / max(of_plain, torch.finfo(torch.float32).eps),
            MUON_OFF,
        ),
    ]


def judge_loss(name: str, outcomes: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]]) -> Figure:
    """How far any loss of two ranks is off one rank's."""
    bound = UNITS_PER_STEP * len(alone[0]["losses"]) * torch.finfo(torch.float32).eps
    return at_most(f"2 ranks share out experts, {name}: loss off one rank's", furthest(outcomes, alone), bound)


def furthest(outcomes: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]]) -> float:
    """The largest relative difference of a loss at any step of any seed."""
    ours, theirs = (np.array([outcome["losses"] for outcome in several]) for several in (outcomes, alone))
    return float(np.abs(ours / theirs - 1).max())


def judge_moves(
    folder: Path, seeds: Sequence[int], moved: dict[Way, list[Any]], whole: Sequence[dict[str, Any]]
) -> list[Figure]:
    """What differs anywhere on the way there and back, and whether samples came as in a run without a stop."""
    differing, disordered = 0, 0
    for way, outcomes in moved.items():
        name = name_of(way)
        for seed, outcome, uninterrupted in zip(seeds, outcomes, whole, strict=True):
            differing += count_differing(folder, f"saved-{seed}", f"on-{name}-restored-{seed}")
            differing += count_differing(folder, f"on-{name}-{seed}", f"back-{name}-restored-{seed}")
            micro_steps = len(outcome["samples"]) // (RESUMED - SAVED)
            disordered += outcome["samples"] != uninterrupted["samples"][micro_steps * SAVED : micro_steps * RESUMED]
    pairs = f"{len(moved)} pairs of ways, {len(seeds)} seeds, there and back"
    return [
        at_most(f"parameters and moments that differ after a move ({pairs})", differing, 0),
        at_most("resumed runs that see other samples, or in another order", disordered, 0),
    ]


def count_differing(folder: Path, before: str, after: str) -> int:
    """Tensors of two states that are not the same to the last bit."""
    old, new = (load_file(next((folder / name).glob("step-*")) / "state.safetensors") for name in (before, after))
    return sum(key not in old or key not in new or not torch.equal(old[key], new[key]) for key in old.keys() | new)


def run_tasks(folder: Path, world: int, tasks: dict[str, list[Task]]) -> dict[str, list[Any]]:
    """Carry named tasks out one after another on so many ranks; their outcomes."""
    path, outcomes = folder / "tasks.json", folder / "outcomes.json"
    every = [asdict(task) for several in tasks.values() for task in several]
    description = {"latents": str(folder / "latents"), "outcomes": str(outcomes), "tasks": every}
    path.write_text(json.dumps(description))
    run_ranks(ROOT / "benchmarks" / "expert_parallel_ranks.py", [str(path)], world)
    seen = iter(json.loads(outcomes.read_text()))
    return {name: list(islice(seen, len(several))) for name, several in tasks.items()}


def write_random_latents(path: Path) -> None:
    """Latents of 4^3 cells of a store of random fields."""
    store = write_random_store(path.parent / "store", open_channel.DOMAIN, 16, 8, 12)

    def encode(velocity: torch.Tensor, pressure: torch.Tensor, medium: torch.Tensor) -> tuple[torch.Tensor, ...]:
        draw = torch.Generator().manual_seed(int(velocity.double().sum().item() * 1e6) % 2**31)
        return torch.randn(len(velocity), 16, 4, 4, 4, generator=draw), torch.zeros(len(velocity), 4, 4, 4, 4)

    write_latents(path, store, encode, "random")  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
