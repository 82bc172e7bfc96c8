"""Encodes and decodes within the memory that there is: whole where that fits, else sample by sample or in slabs."""

import functools
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from shodh.config import ConfigError
from shodh.fields import DecodedFields, DomainSpec, FieldBatch, Grid
from shodh.units import format_bytes
from tokenizer.autoencoder import DOWNSAMPLING, Autoencoder, AutoencoderConfig
from tokenizer.memory import Task, forecast_memory
from tokenizer.tiling import Tiles, decode_fields_tiled, encode_tiled


class Plan(NamedTuple):
    """How a batch will be encoded or decoded, and the bytes that takes; without tiles it is done whole."""

    tiles: Tiles | None
    num_bytes: int
    untiled_bytes: int


@functools.lru_cache(maxsize=256)
def plan_memory(
    config: AutoencoderConfig, domain: DomainSpec, grid: Grid, num_samples: int, task: Task, max_bytes: int
) -> Plan:
    """The plan with the thickest slabs that stays within ``max_bytes``; fewer samples at a time before slabs.

    Raises ConfigError, naming what is needed, when the thinnest slabs do not stay within it.
    """

    def forecast(tiles: Tiles) -> Plan:
        return Plan(tiles, forecast_memory(config, domain, grid, num_samples, task, tiles), untiled)

    untiled = forecast_memory(config, domain, grid, num_samples, task)
    if untiled <= max_bytes:
        return Plan(None, untiled, untiled)
    of_middle, of_fine = (max(grid.shape) // size for size in (DOWNSAMPLING, DOWNSAMPLING // 2))
    tried = [untiled]
    for parts in _numbers_of_parts(num_samples):
        plan = forecast(Tiles(-(-num_samples // parts), of_middle, of_fine))
        if plan.num_bytes <= max_bytes:
            return plan
    for parts in _numbers_of_parts(of_fine)[1:]:
        fine = -(-of_fine // parts)
        plan = forecast(Tiles(1, -(-of_middle // parts), fine))
        if plan.num_bytes <= max_bytes:  # stages at 1/4 may do with fewer cuts
            fewer = (forecast(Tiles(1, -(-of_middle // num), fine)) for num in _numbers_of_parts(parts))
            return next((thicker for thicker in fewer if thicker.num_bytes <= max_bytes), plan)
        tried.append(plan.num_bytes)
    raise ConfigError(
        f"{domain.name}: to {task} {num_samples} of {grid.shape} takes {format_bytes(min(tried))} even in slabs, "
        f"{format_bytes(max_bytes)} may be used. Free memory, or crop the field."
    )


def encode_within(
    autoencoder: Autoencoder, batch: FieldBatch, max_bytes: int
) -> tuple[Float[Tensor, "b c i j k"], Float[Tensor, "b m i j k"]]:
    """``autoencoder.encode(batch)`` within so many bytes, the batch itself among them."""
    plan = plan_memory(autoencoder.config, batch.domain, batch.grid, len(batch.velocity), "encode", max_bytes)
    return autoencoder.encode(batch) if plan.tiles is None else encode_tiled(autoencoder, batch, plan.tiles)


def decode_fields_within(
    autoencoder: Autoencoder,
    latent: Float[Tensor, "b c i j k"],
    medium: Float[Tensor, "b m i j k"],
    domain: DomainSpec,
    grid: Grid,
    max_bytes: int,
) -> DecodedFields:
    """``autoencoder.decode_fields(...)`` within so many bytes."""
    plan = plan_memory(autoencoder.config, domain, grid, len(latent), "decode", max_bytes)
    if plan.tiles is None:
        return autoencoder.decode_fields(latent, medium, domain, grid)
    return decode_fields_tiled(autoencoder, latent, medium, domain, grid, plan.tiles)


def describe_plan(plan: Plan, task: Task, num_samples: int, grid: Grid, max_bytes: int) -> str:
    """One line: what the whole batch would take, what there is, and how it is cut."""
    shape = "x".join(str(n) for n in grid.shape)
    needed = f"to {task} {num_samples} of {shape} at once takes {format_bytes(plan.untiled_bytes)} of memory"
    there = f"{format_bytes(max_bytes)} may be used"
    if plan.tiles is None:
        return f"{needed}, {there}: not tiled"
    cells = min(plan.tiles.fine * DOWNSAMPLING // 2, max(grid.shape))
    return (
        f"{needed}, {there}: {plan.tiles.num_samples} at a time in slabs of {cells} cells, which takes "
        f"{format_bytes(plan.num_bytes)}"
    )


def _numbers_of_parts(length: int) -> list[int]:
    """1, 2, 4, 8, ... up to the length."""
    return sorted({2**k for k in range(length.bit_length())} | {length})
