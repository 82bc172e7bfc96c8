"""The steps of launch/reproduce.py: which script, with which config, when it is done and how far it has come."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from shodh.config import ConfigError, read_plain

LAUNCH = Path(__file__).resolve().parent
TRAININGS = ("train_tokenizer", "pretrain")
SECTIONS = {"fwi": "acoustics"}  # of configs/generate_data, where it is not named as the domain


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """The config of one launch script, and what is to be different in it beside paths and domains."""

    config: Path
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """launch/reproduce.py"""

    stores: Path
    run: Path  # everything else
    domains: tuple[str, ...]
    generate_data: StepConfig
    train_tokenizer: StepConfig
    cache_latents: StepConfig
    pretrain: StepConfig
    evaluate_model: StepConfig
    fwi: Literal["where_installed", "never"] = "where_installed"  # add it where deepwave, which simulates it, is there
    minutes: float = 9.0  # of a piece, its end included, its export not
    stop_seconds: float = 90.0  # of these, to stop a step in: a checkpoint is written meanwhile
    export: Path | None = None  # folder that each piece leaves its results in; at 6 GB up to a minute more (estimate)

    def __post_init__(self) -> None:
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise ValueError(f"domains={list(self.domains)}: name at least one, and none twice.")
        if not 0 <= self.stop_seconds < 60 * self.minutes:
            raise ValueError(f"stop_seconds={self.stop_seconds}: not within minutes={self.minutes}. Lower it.")


class Step(NamedTuple):
    """One launch script on the way."""

    name: str
    command: list[str]  # after the interpreter
    is_done: Callable[[], bool]
    describe: Callable[[], str]  # how far it has come
    is_training: bool = False  # writes checkpoints


def require_domains(config: Reproduction) -> tuple[str, ...]:
    """The domains of this run, settled by its first piece: what is installed later does not change them.

    Raises ConfigError where the config names others than the run was begun with.
    """
    wanted = config.domains
    if config.fwi == "where_installed" and find_spec("deepwave") is not None and "fwi" not in wanted:
        wanted = (*wanted, "fwi")
    file = config.run / "reproduction.json"
    if not file.is_file():
        config.run.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"domains": wanted}))
    settled = tuple(json.loads(file.read_text())["domains"])
    if set(settled) - {"fwi"} != set(config.domains) - {"fwi"}:
        named, begun = list(config.domains), list(settled)
        raise ConfigError(f"domains={named}: {config.run} was begun with {begun}. Give another run, or those.")
    return settled


def list_steps(config: Reproduction, domains: tuple[str, ...]) -> list[Step]:
    """All steps in order."""
    run, stores, tokenizer = config.run, config.stores, config.run / "tokenizer.safetensors"
    latents = run / "latents"
    named = [f"domains=[{', '.join(domains)}]", f"stores={stores}"]
    read = [*named, f"tokenizer={tokenizer}", f"latents={latents}"]

    def step(name: str, overrides: list[str], is_done: Callable[[], bool], describe: Callable[[], str]) -> Step:
        own: StepConfig = getattr(config, name)
        command = [str(LAUNCH / f"{name}.py"), str(own.config), *overrides, *own.overrides]
        return Step(name, command, is_done, describe, name in TRAININGS)

    def have(folder: Path) -> Callable[[], bool]:
        return lambda: all((folder / name / "zarr.json").is_file() for name in domains)

    tokenizer_steps, steps = (_count_steps(getattr(config, name)) for name in TRAININGS)
    left_out = [f"{section}=null" for name, section in SECTIONS.items() if name not in domains]
    return [
        step("generate_data", [f"folder={stores}", *left_out], have(stores), lambda: _count_trajectories(stores)),
        step(
            "train_tokenizer",
            [*named, f"run={run}"],
            lambda: tokenizer.is_file() and (run / "certificate.json").is_file(),
            lambda: f"step {_newest_step(run, 'tokenizer')} of {tokenizer_steps}",
        ),
        step("cache_latents", read, have(latents), lambda: _count_trajectories(latents)),
        step(
            "pretrain",
            [*read, f"run={run}"],
            lambda: _newest_step(run, "pretrain") >= steps and _is_newest_intact(run, "pretrain"),
            lambda: f"step {_newest_step(run, 'pretrain')} of {steps}",
        ),
        step(
            "evaluate_model",
            [*read, f"run={run}"],
            lambda: _evaluated_step(run) == _newest_step(run, "pretrain"),
            lambda: "its beginning",
        ),
    ]


def select_results(config: Reproduction) -> dict[str, Path]:
    """Files worth carrying away, by their names within the run: results and the newest intact checkpoint.

    Raises ConfigError where there is nothing yet, or where checkpoints are there and none is intact.
    """
    from shodh.training.checkpoint import find_newest

    run = config.run
    names = ["reproduction.json", "certificate.json", "tokenizer.safetensors", "metrics.jsonl", "alarms.jsonl"]
    names += ["evaluation.json", "slices.npz", "report.html", "table.json"]
    files = {name: run / name for name in names if (run / name).is_file()}
    phase = "pretrain" if "certificate.json" in files else "tokenizer"
    newest = find_newest(run / "checkpoints" / phase, lambda message: print(f"warning: {message}", file=sys.stderr))
    if newest is not None:
        files |= {str(path.relative_to(run)): path for path in sorted(newest.glob("*")) if path.is_file()}
    if not files:
        raise ConfigError(f"run={run}: holds nothing to export yet. Run a piece first.")
    return files


def _count_steps(training: StepConfig) -> int:
    """``loop.schedule.num_steps`` of a training's config."""
    node: Any = read_plain(training.config, training.overrides)
    for key in ("loop", "schedule", "num_steps"):
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, int):
        raise ConfigError(f"config={training.config}: has no loop.schedule.num_steps. Give that of a training.")
    return node


def _newest_step(run: Path, phase: str) -> int:
    """Of the committed checkpoints; 0 where there is none."""
    found = [re.fullmatch(r"step-(\d+)", path.name) for path in (run / "checkpoints" / phase).glob("step-*")]
    return max((int(match[1]) for match in found if match), default=0)


def _is_newest_intact(run: Path, phase: str) -> bool:
    """Whether training would go on from the newest checkpoint, and not from an older one."""
    from shodh.training.checkpoint import checkpoint_step, find_newest

    newest = find_newest(run / "checkpoints" / phase, lambda message: print(f"warning: {message}", file=sys.stderr))
    return newest is not None and checkpoint_step(newest) == _newest_step(run, phase)


def _evaluated_step(run: Path) -> int | None:
    """Of the model that ``evaluation.json`` judges; None where there is none."""
    try:
        return json.loads((run / "evaluation.json").read_text())["run"]["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _count_trajectories(folder: Path) -> str:
    """How many trajectories the half-written stores in a folder hold, beside those that are complete."""
    from data.journal import read_records

    partial, complete = sorted(folder.glob("*.partial")), sorted(folder.glob("*/zarr.json"))
    said = [f"{path.name.removesuffix('.partial')}: {len(read_records(path))} trajectories" for path in partial]
    said += [f"{path.parent.name}: complete" for path in complete if path.parent not in partial]
    return ", ".join(said) or "its beginning"
