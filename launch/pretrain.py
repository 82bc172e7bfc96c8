"""Pretrain the mixture-of-experts latent transformer on all domains; killed at any time, the same command continues.

deepspeed --num_accelerators 2 launch/pretrain.py configs/pretrain/quickstart.yaml [key=value ...]
"""

from typing import Any

from shodh.command_line import run, split_arguments


def main(arguments: list[str]) -> None:
    path, overrides = split_arguments(arguments, "launch/pretrain.py CONFIG.yaml [key=value ...]")
    import torch
    from parts import hold_out, open_tokenized, require_channels
    from settings import Pretraining, identity_of, mixture_config

    from data.mixture import LatentMixture, stream
    from shodh.config import load_config, to_plain
    from shodh.device import find_peak
    from shodh.evaluation.alarm_hook import RaiseAlarms
    from shodh.evaluation.hooks import MeasureForecast, MeasureRollout, take_probe
    from shodh.evaluation.telemetry import FLIP_INTERVAL, MeasureFlips, MeasureRouting
    from shodh.model.cost import measure_sizes
    from shodh.model.router import find_routers
    from shodh.model.transformer import LatentTransformer, find_stacks
    from shodh.planning.step_time import count_drawn
    from shodh.training.alarm_log import AlarmLog
    from shodh.training.balance import AdjustBias
    from shodh.training.engine import build_engine, create_expert_group, distributed
    from shodh.training.linear_start import SolveLinearExperts
    from shodh.training.objectives import ForecastObjective
    from shodh.training.run import train_resumably
    from shodh.training.tracking import StepSize
    from shodh.training.upcycling import TrainAsOne

    config = load_config(Pretraining, path, overrides)
    tokenizer, stores, latents = open_tokenized(config.stores, config.latents, config.tokenizer, config.domains)
    require_channels(config.model, tokenizer)
    grid = latents[0].header.latent_shape[3:]
    with distributed(config.engine.threads_per_rank) as group:
        mixture = LatentMixture(latents, mixture_config(config))
        torch.manual_seed(config.loop.seed)
        experts = create_expert_group(config.engine.expert_parallel)
        model = LatentTransformer(config.model, experts).to(group.device)
        as_one = TrainAsOne(find_stacks(model), config.objective.as_one)
        engine = build_engine(model, config.engine, group.device)
        measures = group.rank < config.engine.expert_parallel  # rank 0, and those that hold the rest of its experts
        measured = zip(stores, latents, strict=True) if measures else ()
        probes = [hold_out(tokenizer, store, cache, group.device, num_trajectories=1) for store, cache in measured]
        routing = MeasureRouting(config.domains, config.tracking.interval)

        def batches_from(step: int) -> Any:
            return stream(mixture, step, group.device, group.rank, group.size)

        num_samples, peak = config.engine.batch_size * config.engine.accumulation, find_peak(group.device)
        size = StepSize(
            tokens=num_samples * measure_sizes(config.model, grid).tokens,
            operations=count_drawn(config.model, config.objective, grid, num_samples),
            peak=None if peak is None else peak * group.size,
        )
        log, settle = AlarmLog(config.run, "pretrain"), config.loop.schedule.num_warmup_steps
        train_resumably(
            engine,
            ForecastObjective(config.objective),
            batches_from,
            config.loop,
            hooks=[
                as_one,
                SolveLinearExperts(engine, batches_from, config.objective),
                AdjustBias(find_routers(model), config.objective.bias_rate),
                routing,
                RaiseAlarms(routing, engine, log, config.model.top_k, settle),
                MeasureFlips(model, take_probe(probes), config.domains, FLIP_INTERVAL),
                MeasureForecast(model, probes, config.measure_interval),
                MeasureRollout(model, probes, config.measure_interval),
            ],
            folder=config.run,
            phase="pretrain",
            identity=identity_of(config)
            | {"data": {s.domain.name: s.digest for s in latents}, "tokenizer": tokenizer.digest},
            record={"config": to_plain(config)},
            checkpoint_interval=config.checkpoint_interval,
            tracking=config.tracking,
            step_size=size,
        )


if __name__ == "__main__":
    run(main)
