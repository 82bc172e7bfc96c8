"""Decodes of one batch with and without what makes them conservative, exact or tiled."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from figures import Figure, at_most, control, stated, time_interleaved
from torch import Tensor, nn
from torch.nn import functional

from data.simulate import acoustics, open_channel, porous_media
from shodh.fields import DomainSpec, Grid
from shodh.physics.helmholtz import snap_potentials
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.budget import plan_memory
from tokenizer.helmholtz_head import to_grid, velocity_from_potentials
from tokenizer.layers import Convolution, depth_to_space
from tokenizer.tiling import decode_fields_tiled

DOMAINS = (acoustics.DOMAIN, open_channel.DOMAIN, porous_media.DOMAIN)
BATCH = 4  # of the quickstart's config
ROUNDS = 11

Fields = tuple[Tensor, Tensor]  # velocity (b, 3, x, y, z) and pressure (b, 1, x, y, z)


class Latents(NamedTuple):
    """What is decoded, and onto what."""

    latent: Tensor
    medium: Tensor
    domain: DomainSpec
    grid: Grid


def draw_latents(model: Autoencoder, domain: DomainSpec, num_cells: int, batch: int) -> Latents:
    """White latents of a cube."""
    n, sizes = num_cells, model.config
    grid = Grid(shape=(n, n, n), spacing=(1 / n, 1 / n, 1 / n), boundary=domain.boundary)
    latent, medium = (
        torch.randn(batch, channels, n // 8, n // 8, n // 8)
        for channels in (sizes.latent_channels, sizes.medium_channels)
    )
    return Latents(latent, medium, domain, grid)


class PlainOutput(nn.Module):
    """Velocity and pressure straight from the fine features, by the convolution that the head has for its details."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.norm = model.head.norms[-1]
        self.out = Convolution(model.config.widths[0], 8 * 4)

    def forward(self, fine: Tensor, domain: DomainSpec) -> Fields:
        values = depth_to_space(self.out(functional.silu(self.norm(fine.float())), domain.boundary))
        return values[:, :3], values[:, 3:]


def compare_heads(num_cells: int) -> list[Figure]:
    """A decode with the Helmholtz head over one with a plain output, per domain and over the three in turn."""
    model = Autoencoder(AutoencoderConfig())
    plain = PlainOutput(model)
    found: list[Figure] = []
    sums: dict[str, dict[str, np.ndarray]] = {}
    for domain in DOMAINS:
        latents = draw_latents(model, domain, num_cells, BATCH)
        decodes = {"head": decode_with_head(model, latents), "plain": decode_plainly(model, plain, latents)}
        decodes["again"] = decodes["plain"]
        for kind, as_work in (("forward + backward", with_gradients), ("forward", without_gradients)):
            times = time_interleaved({name: as_work(decode) for name, decode in decodes.items()}, ROUNDS)
            found.append(stated(f"head over plain output, {domain.name}, {kind}", times["head"] / times["plain"]))
            total = sums.setdefault(kind, {name: np.zeros(ROUNDS) for name in times})
            sums[kind] = {name: total[name] + seconds for name, seconds in times.items()}
    for kind, times in sums.items():
        found.append(stated(f"plain output, three domains, {kind}", times["plain"], "s"))
        found.append(at_most(f"head over plain output, three domains, {kind}", times["head"] / times["plain"], 1.05))
        found.append(control(f"plain output over itself, {kind}", times["again"] / times["plain"]))
    return found


def decode_with_head(model: Autoencoder, latents: Latents) -> Callable[[], Fields]:
    def decode() -> Fields:
        decoded = model.decode(*latents)
        return decoded.velocity, decoded.pressure

    return decode


def decode_plainly(model: Autoencoder, plain: PlainOutput, latents: Latents) -> Callable[[], Fields]:
    def decode() -> Fields:
        state, _ = model.colour(latents.latent, latents.medium)
        return plain(model.decoder(state, latents.domain.boundary)[-1], latents.domain)

    return decode


def with_gradients(decode: Callable[[], Fields]) -> Callable[[], None]:
    """The decode and its backward pass, of a gradient that is not constant; weights' gradients add up."""

    def work() -> None:
        velocity, pressure = decode()
        ((velocity * velocity).sum() + (pressure * pressure).sum()).backward()

    return work


def without_gradients(decode: Callable[[], object]) -> Callable[[], None]:
    def work() -> None:
        with torch.no_grad():
            decode()

    return work


def compare_snapping(num_cells: int) -> list[Figure]:
    """The time of snapping over that of a whole decode for storage, of one field of a domain that snaps the most."""
    model = Autoencoder(AutoencoderConfig()).eval()
    latents = draw_latents(model, open_channel.DOMAIN, num_cells, 1)
    with torch.no_grad():
        potentials, _ = model.decode_potentials(latents.latent, latents.medium, latents.domain)
        stored = to_grid(potentials, latents.grid)
    works = {
        "decode": without_gradients(lambda: model.decode_fields(*latents)),
        "snapping": without_gradients(lambda: snap_potentials(stored, latents.domain.velocity_space)),
        "unsnapped": without_gradients(lambda: velocity_from_potentials(potentials, latents.domain, latents.grid)),
    }
    times = time_interleaved(works, ROUNDS)
    return [
        at_most(f"lattice snapping over a decode, {num_cells}^3", times["snapping"] / times["decode"], 0.01),
        stated(f"velocity from potentials over a decode, {num_cells}^3", times["unsnapped"] / times["decode"]),
    ]


def compare_tiling(num_cells: int, share: float, num_rounds: int) -> list[Figure]:
    """A decode in the slabs that a share of its memory allows over the same decode untiled."""
    model = Autoencoder(AutoencoderConfig()).eval()
    latents = draw_latents(model, open_channel.DOMAIN, num_cells, 1)
    plan_within = partial(plan_memory, model.config, latents.domain, latents.grid, 1, "decode")
    untiled_bytes = plan_within(2**62).untiled_bytes
    plan = plan_within(int(share * untiled_bytes))
    tiles = plan.tiles
    assert tiles is not None  # as the whole takes more
    works = {
        "untiled": without_gradients(lambda: model.decode_fields(*latents)),
        "tiled": without_gradients(lambda: decode_fields_tiled(model, *latents, tiles)),
    }
    works["again"] = works["untiled"]
    times = time_interleaved(works, num_rounds)
    return [
        stated(f"tiling: forecast memory over untiled, {num_cells}^3", plan.num_bytes / untiled_bytes),
        stated(f"tiling: untiled decode, {num_cells}^3", times["untiled"], "s"),
        at_most(f"tiled over untiled decode, {num_cells}^3", times["tiled"] / times["untiled"], 1.15),
        control("untiled decode over itself", times["again"] / times["untiled"]),
    ]
