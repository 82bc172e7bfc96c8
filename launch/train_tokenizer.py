"""Train the tokenizer on stores of fields; killed at any time, the same command continues.

deepspeed --num_accelerators 2 launch/train_tokenizer.py configs/train_tokenizer/quickstart.yaml [key=value ...]

Writes checkpoints and metrics into the run folder and, at the end, RUN/tokenizer.safetensors and RUN/certificate.json,
what it conserves (exit code 1 if that is not exact).
"""

from shodh.command_line import run, split_arguments


def main(arguments: list[str]) -> None:
    path, overrides = split_arguments(arguments, "launch/train_tokenizer.py CONFIG.yaml [key=value ...]")
    import torch
    from certification import export_certified
    from parts import open_stores
    from settings import TokenizerTraining, identity_of, mixture_config

    from data.mixture import FieldMixture, stream
    from data.statistics import measure_statistics
    from shodh.config import load_config, to_plain
    from shodh.evaluation.certificate import CertificateConfig
    from shodh.training.engine import build_engine, distributed
    from shodh.training.run import train_resumably
    from shodh.training.tracking import StepSize
    from tokenizer.autoencoder import Autoencoder, measure_latents
    from tokenizer.objective import ReconstructionObjective

    config = load_config(TokenizerTraining, path, overrides)
    stores = open_stores(config.stores, config.domains)
    with distributed(config.engine.threads_per_rank) as group:
        statistics = [measure_statistics(store) for store in stores]
        mixture = FieldMixture(stores, statistics, mixture_config(config))
        torch.manual_seed(config.loop.seed)
        engine = build_engine(Autoencoder(config.autoencoder), config.engine, group.device)
        cells = sum(torch.Size(store.grid.shape).numel() for store in stores) // len(stores)
        train_resumably(
            engine,
            ReconstructionObjective(config.objective),
            lambda step: stream(mixture, step, group.device, group.rank, group.size),
            config.loop,
            hooks=[],
            folder=config.run,
            phase="tokenizer",
            identity=identity_of(config) | {"data": {s.domain.name: s.digest for s in stores}},
            record={"config": to_plain(config)},
            checkpoint_interval=config.checkpoint_interval,
            tracking=config.tracking,
            step_size=StepSize(config.engine.batch_size * config.engine.accumulation * cells // 8**3),
        )
        if group.rank == 0:
            measure_latents(engine.module, mixture.first(12 * len(stores)), group.device)
            scales = {s.domain.name: to_plain(scale) for s, scale in zip(stores, statistics, strict=True)}
            domains = {store.domain.name: store.domain for store in stores}
            grids = {store.domain.name: store.grid for store in stores}
            export_certified(config.run, engine.module, domains, scales, grids, CertificateConfig())


if __name__ == "__main__":
    run(main)
