"""What the certificate of a tokenizer is measured on: decodes of random latents and of held-out fields."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from parts import normalised_batch
from torch import Tensor
from torch.nn import functional

from data.reader import Store
from data.statistics import FieldStatistics
from shodh.config import ConfigError, parse_config
from shodh.evaluation.certificate import (
    Case,
    CertificateConfig,
    Decode,
    certify,
    format_certificate,
    require_exact,
    write_certificate,
)
from shodh.fields import Boundary, DomainSpec, FieldBatch, Grid, Spacing
from shodh.physics.helmholtz import compose_velocity, snap_potentials
from shodh.physics.masked_projection import find_pores, has_solid
from tokenizer.autoencoder import DOWNSAMPLING, Autoencoder
from tokenizer.export import digest_weights, save_tokenizer
from tokenizer.helmholtz_head import exact_flux, to_grid

CELLS_PER_BATCH = 2**18  # 8 fields of 32^3 at once


def certify_tokenizer(
    autoencoder: Autoencoder,
    domains: dict[str, DomainSpec],
    statistics: dict[str, dict[str, float]],
    grids: dict[str, Grid],
    config: CertificateConfig,
    held_out: Sequence[Store] = (),
) -> dict[str, Any]:
    """The certificate of these weights: random latents of each domain, with mean flow and without, on a small stretched
    grid and on that of ``grids`` where it has one; and the encoded test split of each store in ``held_out``.

    Raises ConfigError for a domain without statistics, and for held-out fields that are none.
    """
    training = autoencoder.training
    autoencoder.eval()
    cases, scales_of = [], parse_statistics(domains, statistics)
    for name, domain in domains.items():
        scales = scales_of[name]
        for grid in [make_small_grid(domain.boundary), *([grids[name]] if name in grids else [])]:
            for mean_flow in (False,) if domain.velocity_space == "irrotational" else (True, False):
                cases.append(decode_random(autoencoder, domain, grid, scales, config, mean_flow))
        cases += [
            decode_held_out(autoencoder, store, scales, config.num_held_out)
            for store in held_out
            if store.domain.name == name and config.num_held_out
        ]
    certificate = certify(cases, digest_weights(autoencoder))
    autoencoder.train(training)
    return certificate


def export_certified(
    run: Path,
    autoencoder: Autoencoder,
    domains: dict[str, DomainSpec],
    statistics: dict[str, dict[str, float]],
    grids: dict[str, Grid],
    config: CertificateConfig,
) -> Path:
    """RUN/tokenizer.safetensors with its certificate, whatever that says, and RUN/certificate.json beside it.

    Saved before it is certified too, so that no training is lost. Raises RuntimeError, with all that there is saved,
    when it does not conserve exactly or cannot be certified.
    """
    path = run / "tokenizer.safetensors"
    digest = save_tokenizer(path, autoencoder, domains, statistics)
    print(f"tokenizer {digest[:12]} -> {path}", flush=True)
    try:
        certificate = certify_tokenizer(autoencoder, domains, statistics, grids, config)
    except (RuntimeError, AssertionError) as error:  # a projection that does not converge, memory that runs out
        raise RuntimeError(
            f"tokenizer={path}: saved, but could not be certified ({str(error) or type(error).__name__}). "
            f"Run the same command again, or launch/evaluate_model.py certificate {path}"
        ) from error
    write_certificate(run, certificate)
    print(format_certificate(certificate))
    save_tokenizer(path, autoencoder, domains, statistics, certificate)
    require_exact(certificate, path)
    return path


def parse_statistics(
    domains: Mapping[str, DomainSpec], statistics: Mapping[str, Mapping[str, float]]
) -> dict[str, FieldStatistics]:
    """The scales of every domain; ConfigError naming the first that has none, or none that can be used."""
    parsed = {}
    for name in domains:
        if name not in statistics:
            raise ConfigError(f"tokenizer: has no statistics of {name}. Export it again.")
        try:
            parsed[name] = parse_config(FieldStatistics, dict(statistics[name]), source=f"those of {name}")
        except ConfigError as error:
            raise ConfigError(f"tokenizer: has no statistics of {name} to use. Export it again. {error}") from None
    return parsed


def make_small_grid(boundary: tuple[Boundary, Boundary, Boundary]) -> Grid:
    """A box of 16 x 24 x 32 cells of unequal sides, its walled and open axes stretched by 2 % a cell."""
    shape = 16, 24, 32

    def spacing(axis: int) -> Spacing:
        size = (1.0, 0.25, 0.5)[axis]
        return size if boundary[axis] == "periodic" else tuple(size * 1.02**k for k in range(shape[axis]))

    return Grid(shape=shape, spacing=(spacing(0), spacing(1), spacing(2)), boundary=boundary)


def decode_random(
    autoencoder: Autoencoder,
    domain: DomainSpec,
    grid: Grid,
    scales: FieldStatistics,
    config: CertificateConfig,
    mean_flow: bool,
) -> Case:
    """Decodes of latents drawn from the distribution that whitening gives them; solids are random too."""

    def batches() -> Iterator[Decode]:
        generator = torch.Generator().manual_seed(config.seed)
        sizes, device = autoencoder.config, autoencoder.latent_mean.device
        coarse = [n // DOWNSAMPLING for n in grid.shape]
        for num in _batch_sizes(config.num_random, grid):
            latent = torch.randn(num, sizes.latent_channels, *coarse, generator=generator).to(device)
            pore = draw_pores(num, grid, generator).to(device) if has_solid(domain) else None
            if pore is None:
                medium = torch.randn(num, sizes.medium_channels, *coarse, generator=generator).to(device)
            else:
                normalised = (pore.unsqueeze(1).float() - scales.medium_mean) / scales.medium_scale
                medium = autoencoder.encode_medium(normalised, domain)
            yield decode_parts(autoencoder, (latent, medium), domain, grid, mean_flow, pore)

    return Case("random latents", domain, grid.relative, mean_flow, scales.velocity_scale, batches)


def decode_held_out(autoencoder: Autoencoder, store: Store, scales: FieldStatistics, most: int) -> Case:
    """Decodes of at most ``most`` encoded snapshots, evenly spread over the test split."""
    domain, grid, device = store.domain, store.grid, autoencoder.latent_mean.device
    states = [(i, t) for i in store.trajectories("test") for t in range(store.num_snapshots)]
    chosen = [states[(2 * k + 1) * len(states) // (2 * min(most, len(states)))] for k in range(min(most, len(states)))]

    def batches() -> Iterator[Decode]:
        for part in torch.arange(len(chosen)).split(_batch_sizes(len(chosen), grid)):
            batch, pore = read_held_out(store, [chosen[int(k)] for k in part], scales)
            latents = autoencoder.encode(batch.to(device))
            yield decode_parts(autoencoder, latents, domain, grid, True, None if pore is None else pore.to(device))

    mean_flow = domain.velocity_space != "irrotational"
    return Case("held-out fields", domain, grid.relative, mean_flow, scales.velocity_scale, batches)


def read_held_out(
    store: Store, states: Sequence[tuple[int, int]], scales: FieldStatistics
) -> tuple[FieldBatch, Tensor | None]:
    """Snapshots (trajectory, time) as the tokenizer takes them, and their pores (b, x, y, z) where there is solid.

    Raises ConfigError naming the first snapshot with NaN or infinity, or with a medium that is no pore space: that is
    the store's fault, not the tokenizer's.
    """
    fields = [store.snapshot(*state) for state in states]
    velocity, pressure = (_stack(arrays) for arrays in zip(*fields, strict=True))
    medium = _stack([store.medium(i) for i, _ in states]).unsqueeze(1)
    batch = normalised_batch(velocity, pressure.unsqueeze(1), medium, store, scales)
    places = [f"store={store.path}: trajectory {i}, snapshot {t}" for i, t in states]
    for name, values in (("velocity", batch.velocity), ("pressure", batch.pressure), ("medium", batch.medium)):
        for place, field in zip(places, values, strict=True):
            if not bool(field.isfinite().all()):
                raise ConfigError(f"{place}: {name} holds NaN or infinity. Write the store again, without it.")
    if not has_solid(store.domain):
        return batch, None
    return batch, torch.cat([_find_pores(m, place) for m, place in zip(medium.split(1), places, strict=True)])


def decode_parts(
    autoencoder: Autoencoder,
    latents: tuple[Tensor, Tensor],
    domain: DomainSpec,
    grid: Grid,
    mean_flow: bool,
    pore: Tensor | None = None,
) -> Decode:
    """What of a decode must conserve, as ``decode_fields`` stores it; of a full velocity its two parts apart."""
    if domain.velocity_space == "irrotational":
        return Decode(None, autoencoder.decode_fields(*latents, domain, grid).flux)
    if domain.velocity_space == "solenoidal" and mean_flow:
        return Decode(autoencoder.decode_fields(*latents, domain, grid).flux, None, pore)
    potentials, _ = autoencoder.decode_potentials(*latents, domain)
    if not mean_flow:
        potentials = potentials._replace(mean_flow=torch.zeros_like(potentials.mean_flow))
    if domain.velocity_space == "solenoidal":
        return Decode(exact_flux(potentials, domain, grid), None, pore)
    snapped = snap_potentials(to_grid(potentials, grid))
    solenoidal, irrotational = (
        compose_velocity(snapped, domain.boundary, part) for part in ("solenoidal", "irrotational")
    )
    return Decode(solenoidal, irrotational, pore)


def draw_pores(num: int, grid: Grid, generator: torch.Generator) -> Tensor:
    """Random pore spaces (num, x, y, z), half of the cells pore: noise smoothed over 5 cells, cut at its median."""
    noise = torch.randn(num, 1, *grid.shape, generator=generator)
    smooth = functional.avg_pool3d(functional.pad(noise, [2] * 6, mode="circular"), 5, stride=1).squeeze(1)
    return smooth < smooth.flatten(1).median(1).values.reshape(-1, 1, 1, 1)


def _batch_sizes(num: int, grid: Grid) -> list[int]:
    most = max(1, CELLS_PER_BATCH // torch.Size(grid.shape).numel())
    return [min(most, num - start) for start in range(0, num, most)]


def _find_pores(medium: Tensor, place: str) -> Tensor:
    try:
        return find_pores(medium)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


def _stack(arrays: Iterable[Any]) -> Tensor:
    return torch.stack([torch.from_numpy(array) for array in arrays])
