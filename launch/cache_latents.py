"""Encode stores of fields into latents, bound to store and tokenizer by digest; what is current is left as it is.

python launch/cache_latents.py configs/cache_latents/quickstart.yaml [key=value ...]
"""

from shodh.command_line import run, split_arguments


def main(arguments: list[str]) -> None:
    path, overrides = split_arguments(arguments, "launch/cache_latents.py CONFIG.yaml [key=value ...]")
    import torch
    from parts import normalised_batch, open_stores
    from settings import LatentCaching
    from tqdm import tqdm

    from data.latents import write_latents
    from data.statistics import FieldStatistics
    from shodh.config import load_config
    from tokenizer.export import load_tokenizer

    config = load_config(LatentCaching, path, overrides)
    tokenizer = load_tokenizer(config.tokenizer)
    stores = open_stores(config.stores, config.domains)
    torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = tokenizer.autoencoder.to(device)
    for store in stores:
        name = store.domain.name
        statistics = FieldStatistics(**tokenizer.statistics[name])

        def encode(
            velocity: torch.Tensor, pressure: torch.Tensor, medium: torch.Tensor, store=store, statistics=statistics
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return autoencoder.encode(normalised_batch(velocity, pressure, medium, store, statistics).to(device))

        with tqdm(
            total=store.num_trajectories * store.num_snapshots, desc=f"latents of {name}", unit="snapshot"
        ) as bar:
            digest = write_latents(
                config.latents / name, store, encode, tokenizer.digest, lambda num, bar=bar: bar.update(num)
            )
            bar.update(bar.total - bar.n)
        print(f"{name}: latents {digest[:12]} -> {config.latents / name}")


if __name__ == "__main__":
    run(main)
