"""Encode stores of fields into latents, bound to store and tokenizer by digest; what is current is left as it is.

python launch/cache_latents.py configs/cache_latents/quickstart.yaml [key=value ...]

Says first how much memory each store takes. Where it takes more than there is (``max_gigabytes`` sets another limit),
fewer snapshots are encoded at a time, and one alone in slabs, with the same latents.
"""

from shodh.command_line import run, split_arguments


def main(arguments: list[str]) -> None:
    path, overrides = split_arguments(arguments, "launch/cache_latents.py CONFIG.yaml [key=value ...]")
    import torch
    from memory import memory_to_use
    from parts import normalised_batch, open_stores, plan_encoding, require_tokenizer
    from settings import LatentCaching
    from tqdm import tqdm

    from data.latents import write_latents
    from shodh.config import load_config
    from shodh.device import find_device
    from tokenizer.budget import describe_plan, encode_within
    from tokenizer.export import load_tokenizer

    config = load_config(LatentCaching, path, overrides)
    tokenizer = load_tokenizer(config.tokenizer)
    stores = open_stores(config.stores, config.domains)
    torch.set_num_threads(config.threads)
    device = find_device()
    autoencoder = tokenizer.autoencoder.to(device)
    scales = [require_tokenizer(tokenizer, store) for store in stores]
    max_bytes = memory_to_use(device, config.max_gigabytes)
    plans = [plan_encoding(autoencoder.config, store, max_bytes) for store in stores]
    for store, (num, limit, plan) in zip(stores, plans, strict=True):
        print(f"{store.domain.name}: {describe_plan(plan, 'encode', num, store.grid, limit)}", flush=True)
    for store, statistics, (num, limit, _) in zip(stores, scales, plans, strict=True):
        name = store.domain.name

        def encode(
            velocity: torch.Tensor,
            pressure: torch.Tensor,
            medium: torch.Tensor,
            store=store,
            statistics=statistics,
            limit=limit,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            batch = normalised_batch(velocity, pressure, medium, store, statistics).to(device)
            return encode_within(autoencoder, batch, limit)

        with tqdm(
            total=store.num_trajectories * store.num_snapshots, desc=f"latents of {name}", unit="snapshot"
        ) as bar:
            digest = write_latents(
                config.latents / name, store, encode, tokenizer.digest, lambda done, bar=bar: bar.update(done), num
            )
            bar.update(bar.total - bar.n)
        print(f"{name}: latents {digest[:12]} -> {config.latents / name}")


if __name__ == "__main__":
    run(main)
