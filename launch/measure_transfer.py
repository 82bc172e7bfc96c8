"""Measure negative transfer: train Shodh and its controls at equal data, steps and tokens over seeds, and compare them.

python launch/measure_transfer.py configs/measure_transfer/quickstart.yaml [key=value ...]

Killed at any time, the same command continues. Writes RUN/transfer.json, transfer.md (printed too) and transfer.png,
and RUN/VARIANT-SEED/result.json of every model; launch/variants.py says what each variant is. Exit code 0 when all
is measured, whatever the verdicts.
"""

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from shodh.command_line import run, split_arguments


class Parts(NamedTuple):
    """What all jobs share, by domain."""

    tokenizer: Any
    stores: dict[str, Any]
    latents: dict[str, Any]


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["work"]:
        return work(arguments[1:])
    path, overrides = split_arguments(arguments, "launch/measure_transfer.py CONFIG.yaml [key=value ...]")
    from tqdm import tqdm
    from variants import estimate_cost, list_jobs
    from workers import run_jobs

    config, parts = read_parts(path, overrides)
    jobs = {job.name: job for job in list_jobs(config)}
    waiting = [name for name, job in jobs.items() if read_result(config, job, parts) is None]
    print(
        f"transfer: {len(jobs) - len(waiting)} of {len(jobs)} models are measured; to do: {', '.join(waiting) or '-'}"
    )
    config.run.mkdir(parents=True, exist_ok=True)
    costs = {name: estimate_cost(config, jobs[name]) for name in waiting}
    logs = {name: config.run / name / "job.log" for name in waiting}
    failures: dict[str, str] = {}
    layout = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=sum(costs.values()), desc="transfer", bar_format=layout, dynamic_ncols=True) as bar:

        def on_end(name: str, failure: str | None) -> None:
            if failure is not None:
                failures[name] = failure
                tqdm.write(f"{name}: {failure} (see {logs[name]})", file=sys.stderr)
            bar.set_postfix_str(f"{name} {'failed' if failure else 'measured'}", refresh=False)
            bar.update(costs[name])

        run_jobs([sys.executable, __file__, "work", path, *overrides], logs, config.jobs, config.run, on_end)
    write_comparison(config.run, [found for job in jobs.values() if (found := read_result(config, job, parts))])
    if failures:
        told = "; ".join(f"{name}: {failure}" for name, failure in failures.items())
        raise RuntimeError(f"{len(failures)} of {len(jobs)} models failed ({told}). The same command tries them again.")


def write_comparison(folder: Path, results: list[dict[str, Any]]) -> None:
    """The table, printed too, the plot and the figures behind them; nothing where there is no result."""
    from shodh.evaluation.transfer import summarise_transfer
    from shodh.evaluation.transfer_plot import plot_transfer
    from shodh.evaluation.transfer_table import format_transfer

    if not results:
        return
    summary = summarise_transfer(results)
    table = format_transfer(summary)
    write_text(folder / "transfer.json", json.dumps(summary, indent=1))
    write_text(folder / "transfer.md", table)
    plot_transfer(summary, folder / "transfer.png")
    print(f"{table}\ntable -> {folder / 'transfer.md'}, plot -> {folder / 'transfer.png'}")


def work(arguments: list[str]) -> None:
    """Do the jobs whose names the parent sends, one after another."""
    from workers import keep_answers, serve

    answers = keep_answers()
    from parts import hold_out
    from variants import list_jobs

    from shodh.training.engine import distributed

    config, parts = read_parts(arguments[0], arguments[1:])
    jobs = {job.name: job for job in list_jobs(config)}
    with distributed(config.engine.threads_per_rank) as group:

        @functools.cache
        def held_out(domain: str) -> Any:
            return hold_out(parts.tokenizer, parts.stores[domain], parts.latents[domain], group.device)

        def do(name: str) -> None:
            train_and_measure(config, jobs[name], parts, group, held_out)

        serve(answers, do, lambda name: config.run / name / "job.log")


def train_and_measure(config: Any, job: Any, parts: Parts, group: Any, held_out: Any) -> None:
    """One model, trained to the end or continued, and what was measured of it in ``result.json``."""
    from variants import MEASUREMENT, identify, set_job

    from shodh.evaluation.skill import measure_skill
    from shodh.model.transformer import count_parameters

    training = set_job(config, job)
    begun, whole = time.process_time(), not (training.run / "checkpoints").exists()
    model = train_job(training, job, parts, group)
    seconds = time.process_time() - begun
    total, active = count_parameters(model)
    result = {
        "job": job._asdict(),
        "identity": identify(training, job, parts.latents, parts.tokenizer.digest),
        "measurement": MEASUREMENT,
        "num_steps": training.loop.schedule.num_steps,
        "samples_per_step": training.engine.batch_size * training.engine.accumulation,
        "parameters_total": total,
        "parameters_active": active,
        "cpu_seconds": seconds if whole else None,  # of a training that was interrupted nobody knows
        **measure_skill(model.eval(), [held_out(name) for name in training.domains]),
        "measuring_cpu_seconds": time.process_time() - begun - seconds,
    }
    write_text(training.run / "result.json", json.dumps(result, indent=1))


def train_job(training: Any, job: Any, parts: Parts, group: Any) -> Any:
    """The trained model of a job."""
    import torch
    from settings import mixture_config
    from variants import control_routers, identify

    from data.mixture import LatentMixture, stream
    from shodh.config import to_plain
    from shodh.evaluation.telemetry import MeasureRouting
    from shodh.model.router import find_routers
    from shodh.model.transformer import LatentTransformer, find_stacks
    from shodh.training.balance import AdjustBias
    from shodh.training.engine import build_engine
    from shodh.training.linear_start import SolveLinearExperts
    from shodh.training.objectives import ForecastObjective
    from shodh.training.run import train_resumably
    from shodh.training.tracking import StepSize
    from shodh.training.upcycling import TrainAsOne

    latents = [parts.latents[name] for name in training.domains]
    mixture = LatentMixture(latents, mixture_config(training))
    torch.manual_seed(job.seed)
    model = LatentTransformer(training.model)
    control_routers(model, job, [store.domain for store in latents])
    as_one = TrainAsOne(find_stacks(model), training.objective.as_one)
    tokens_per_sample = latents[0].cells_per_state // training.model.patch**3
    engine = build_engine(model, training.engine, group.device)

    def batches_from(step: int) -> Any:
        return stream(mixture, step, group.device, group.rank, group.size)

    train_resumably(
        engine,
        ForecastObjective(training.objective),
        batches_from,
        training.loop,
        hooks=[
            as_one,
            SolveLinearExperts(engine, batches_from, training.objective),
            *([AdjustBias(routers, training.objective.bias_rate)] if (routers := find_routers(model)) else []),
            MeasureRouting(training.domains, training.tracking.interval),
        ],
        folder=training.run,
        phase="pretrain",
        identity=identify(training, job, parts.latents, parts.tokenizer.digest),
        record={"config": to_plain(training)},
        checkpoint_interval=training.checkpoint_interval,
        tracking=training.tracking,
        step_size=StepSize(training.engine.batch_size * training.engine.accumulation * tokens_per_sample),
    )
    return model


def read_parts(path: str, overrides: list[str]) -> tuple[Any, Parts]:
    """The config, and what it names; ConfigError unless all fits together."""
    from parts import open_tokenized, require_channels
    from settings import TransferMeasurement

    from shodh.config import load_config

    config = load_config(TransferMeasurement, path, overrides)
    tokenizer, *both = open_tokenized(config.stores, config.latents, config.tokenizer, config.domains)
    require_channels(config.model, tokenizer)
    return config, Parts(tokenizer, *(dict(zip(config.domains, part, strict=True)) for part in both))


def read_result(config: Any, job: Any, parts: Parts) -> dict[str, Any] | None:
    """What was measured of a job as it is asked for now; None if nothing was, or of another configuration."""
    from variants import MEASUREMENT, identify, set_job

    training = set_job(config, job)
    path = training.run / "result.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    asked = json.loads(json.dumps(identify(training, job, parts.latents, parts.tokenizer.digest)))
    return result if (result.get("identity"), result.get("measurement")) == (asked, MEASUREMENT) else None


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".tmp")
    partial.write_text(text + "\n")
    os.replace(partial, path)


if __name__ == "__main__":
    run(main)
