"""Is what a tokenizer decodes conserved exactly, whatever the weights, boundaries, boxes and ways it was stored?

    python benchmarks/exactness.py [--quick] [--tokenizer TOKENIZER.safetensors]

Stored FP32 arrays are evaluated in FP64; every target of 0 is exact. Small networks with random weights, the same after
some steps of training on random flows in FP32 and in bfloat16 (autocast), after reload from a checkpoint and after
export; every mixture of periodic, walled and open axes of every velocity space, in boxes of unequal sides, uniform and
stretched, with mean flow and without; latents of scale 1e-6 to 1e6; the default network from 16^3 to 128^3. Fluxes of
closed mixtures are also projected into random pores. A tokenizer file adds its own weights to the sweep.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from exactness_weights import Weights, draw_flow, draw_smooth, make_domain, make_weights, randomise
from figures import Figure, at_least, at_most, report, stated
from torch import Tensor
from tqdm import tqdm

from shodh.fields import Boundary, DomainSpec, Grid, Spacing, VelocitySpace
from shodh.physics.exterior import curl_of_faces, divergence_of_faces
from shodh.physics.helmholtz import Potentials, compose_velocity, snap_potentials
from shodh.physics.masked_projection import (
    balance,
    connect_pores,
    lattice_step,
    open_faces,
    project_into_pores,
    remove_divergence_in_pores,
)
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.export import load_tokenizer
from tokenizer.helmholtz_head import exact_flux, to_grid

SHAPES = (16, 16, 16), (16, 24, 32), (32, 8, 16)
MIXTURES = list(itertools.product(("periodic", "wall", "open"), repeat=3))
PERIODIC: tuple[Boundary, Boundary, Boundary] = ("periodic", "periodic", "periodic")
SPACES: tuple[VelocitySpace, ...] = ("solenoidal", "irrotational", "full")
PLAIN = torch.finfo(torch.float32).eps / 2  # of its rms, a flux in plain FP32 leaves at least this divergence


class Claims(NamedTuple):
    """The largest errors of one batch of decodes; None for what it does not claim."""

    num: int
    divergence: float | None = None
    curl: float | None = None
    wall_flux: float | None = None
    solid_flux: float | None = None
    divergence_in_pores: float | None = None


class Mixture(NamedTuple):
    """What is decoded, apart from weights and latents."""

    domain: DomainSpec
    grid: Grid
    mean_flow: bool


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every eighth mixture, up to 32^3")
    parser.add_argument("--tokenizer", type=Path, help="a trained tokenizer to add to the sweep")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    thin = 8 if options.quick else 1
    with tempfile.TemporaryDirectory(prefix="shodh-exactness-") as scratch:
        weights = make_weights(Path(scratch), num_steps=6 if options.quick else 40)
    if options.tokenizer:
        weights[f"file {options.tokenizer.name}"] = Weights(load_tokenizer(options.tokenizer).autoencoder)
    figures, num = [], 0
    with torch.no_grad():
        sizes = (16, 32) if options.quick else (16, 32, 64, 128)
        for name, batches in name_groups(weights, thin, sizes):
            claims = list(tqdm(batches, desc=name, unit="batch", mininterval=1.0))
            figures += summarise(name, claims)
            num += sum(claim.num for claim in claims)
        figures += summarise("potentials of scale 1e-45 to 1e36", list(sweep_potentials(thin)))
        figures += [figure for n in sizes for figure in time_projection(n)]
        figures.append(at_least("control: divergence in plain FP32, over rms flux", plain_leak(), PLAIN))
    figures.append(at_least("decodes", num, 100 if options.quick else 1000))
    return report("exactness_quick" if options.quick else "exactness", figures)


def name_groups(weights: dict[str, Weights], thin: int, sizes: Sequence[int]) -> Iterator[tuple[str, Iterator[Claims]]]:
    """Batches of decodes by what they show."""
    for name, (model, low_precision) in weights.items():
        yield name, sweep(model, list_mixtures()[::thin], low_precision=low_precision)
    yield "latents of scale 1e-6 to 1e6", sweep_scales(weights["random weights"].model, thin)
    default = randomise(Autoencoder(AutoencoderConfig())).eval().requires_grad_(False)
    for n in sizes:
        yield f"default network, {n}^3", sweep(default, list_large(n), num=2 if n < 64 else 1)


def summarise(group: str, claims: Sequence[Claims]) -> list[Figure]:
    """The largest error of each claim; its target is exactly 0."""
    figures = []
    for claim in Claims._fields[1:]:
        found = [(c.num, value) for c in claims if (value := getattr(c, claim)) is not None]
        if found:
            num, largest = sum(n for n, _ in found), max(value for _, value in found)
            figures.append(at_most(f"{group}: {claim.replace('_', ' ')}, largest of {num} fields", largest, 0.0))
    return figures


def list_mixtures() -> list[Mixture]:
    """Every mixture of boundaries of every velocity space, uniform and stretched, with mean flow and without."""
    mixtures = []
    for space, boundary, stretched in itertools.product(SPACES, MIXTURES, (False, True)):
        if space == "full" and "open" in boundary:
            continue
        domain = make_domain(space, boundary)
        grid = make_grid(SHAPES[len(mixtures) % len(SHAPES)], domain.boundary, stretched)
        flows = (True,) if space == "irrotational" else (True, False)
        mixtures += [Mixture(domain, grid, mean_flow) for mean_flow in flows]
    return mixtures


def list_large(n: int) -> list[Mixture]:
    """A stretched channel, an open box of sound, a periodic box and a sum of both parts, n^3 cells."""
    kinds: list[tuple[VelocitySpace, tuple[Boundary, ...], bool]] = [
        ("solenoidal", ("periodic", "wall", "periodic"), True),
        ("irrotational", ("open", "open", "open"), True),
        ("solenoidal", PERIODIC, False),
        ("full", ("wall", "periodic", "wall"), False),
    ]
    domains = [make_domain(space, boundary) for space, boundary, _ in kinds]
    grids = [make_grid((n, n, n), d.boundary, kind[2]) for d, kind in zip(domains, kinds, strict=True)]
    return [Mixture(domain, grid, True) for domain, grid in zip(domains, grids, strict=True)]


def make_grid(shape: tuple[int, int, int], boundary: tuple[Boundary, Boundary, Boundary], stretched: bool) -> Grid:
    """A box of unequal sides; walled and open axes stretched in all by a factor of 5."""

    def spacing(axis: int) -> Spacing:
        size, n = (1.0, 0.25, 0.5)[axis], shape[axis]
        is_uniform = boundary[axis] == "periodic" or not stretched
        return size if is_uniform else tuple(size * 5 ** (k / n) for k in range(n))

    return Grid(shape=shape, spacing=(spacing(0), spacing(1), spacing(2)), boundary=boundary)


def sweep(
    model: Autoencoder, mixtures: Sequence[Mixture], num: int = 2, low_precision: bool = False, scale: float = 1.0
) -> Iterator[Claims]:
    """Decodes of each mixture: ``num`` encoded random flows, and as many random latents."""
    for mixture in mixtures:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low_precision):
            latent, medium = (scale * torch.cat([z, torch.randn_like(z)]) for z in encode(model, mixture, num))
            potentials = model.decode(latent, medium, mixture.domain, mixture.grid).potentials
            if not mixture.mean_flow:
                potentials = potentials._replace(mean_flow=torch.zeros_like(potentials.mean_flow))
            flux = exact_flux(potentials, mixture.domain, mixture.grid)
            if mixture.mean_flow:  # the same through the method that everyone calls
                assert torch.equal(flux, model.decode_fields(latent, medium, mixture.domain, mixture.grid).flux)
        yield judge(flux, to_grid(potentials, mixture.grid), mixture)


def encode(model: Autoencoder, mixture: Mixture, num: int) -> tuple[Tensor, Tensor]:
    return model.encode(draw_flow(num, mixture.domain, mixture.grid))


def judge(flux: Tensor, potentials: Potentials, mixture: Mixture) -> Claims:
    """The errors of what was decoded; of a full velocity those of its two parts, which are on one lattice."""
    boundary, space = mixture.domain.boundary, mixture.domain.velocity_space
    assert flux.dtype == torch.float32 and bool(flux.any())
    walls = [flux[:, i].select(i + 1, 0).abs().max().item() for i in range(3) if boundary[i] == "wall"]
    claims = Claims(len(flux), wall_flux=max(walls, default=None))
    solenoidal, irrotational = flux, flux
    if space == "full":
        snapped = snap_potentials(potentials)
        solenoidal, irrotational = (
            compose_velocity(snapped, boundary, part) for part in ("solenoidal", "irrotational")
        )
        assert torch.equal(solenoidal + irrotational, flux)
    if space != "irrotational":
        claims = claims._replace(divergence=largest_divergence(solenoidal, boundary))
    if space != "solenoidal":
        claims = claims._replace(curl=curl_of_faces(irrotational.double(), boundary).abs().max().item())
    if space == "solenoidal" and "open" not in boundary and mixture.mean_flow:
        claims = claims._replace(**project(solenoidal, mixture.grid)._asdict())
    return claims


class InPores(NamedTuple):
    """Errors after the masked projection."""

    solid_flux: float
    divergence_in_pores: float


def project(flux: Tensor, grid: Grid) -> InPores:
    """Errors of the flux through random pores, half of the box."""
    pore = draw_smooth(len(flux), 1, grid)[:, 0] < 0
    projected = project_into_pores(flux, pore, grid)
    assert bool(projected.any())
    solid = projected[~open_faces(pore, grid.boundary)]
    return InPores(solid.abs().max().item(), largest_divergence(projected, grid.boundary))


def largest_divergence(flux: Tensor, boundary: Sequence[Boundary]) -> float:
    return divergence_of_faces(flux.double(), boundary).abs().max().item()


def sweep_scales(model: Autoencoder, thin: int) -> Iterator[Claims]:
    """Latents far outside of what an encoder gives."""
    for scale in (1e-6, 1e-4, 1e-2, 1e2, 1e4, 1e6):
        yield from sweep(model, list_mixtures()[:: 8 * thin], scale=scale)


def sweep_potentials(thin: int) -> Iterator[Claims]:
    """Potentials down to where FP32 loses digits, and up to where it ends."""
    for scale, mixture in itertools.product((1e-45, 1e-40, 1e-36, 1e-20, 1e20, 1e36), list_mixtures()[:: 4 * thin]):
        shape = mixture.grid.shape
        parts = torch.randn(1, 3, *shape), torch.randn(1, *shape), torch.randn(1, 3)
        potentials = Potentials(*(scale * part for part in parts))
        snapped = snap_potentials(potentials)
        flux = compose_velocity(snapped, mixture.domain.boundary, mixture.domain.velocity_space)
        if bool(flux.any()):  # below the lattice's least step there is nothing left
            yield judge(flux, potentials, mixture._replace(mean_flow=False))


def time_projection(n: int) -> list[Figure]:
    """Seconds of the masked projection of one flux, and how far its last part, onto the lattice, moves the flux."""
    grid = make_grid((n, n, n), PERIODIC, stretched=False)
    potentials = Potentials(draw_smooth(1, 3, grid), draw_smooth(1, 1, grid)[:, 0], torch.randn(1, 3))
    flux = compose_velocity(potentials, PERIODIC, "solenoidal")
    pore = draw_smooth(1, 1, grid)[:, 0] < 0
    start = time.process_time()
    project_into_pores(flux, pore, grid)
    seconds = time.process_time() - start
    network = connect_pores(pore[0], PERIODIC)
    nearest = remove_divergence_in_pores(flux.double().numpy().ravel()[network.face], network, grid)
    change = np.abs(balance(nearest, network, lattice_step(np.abs(nearest).max())) - nearest)
    name = f"masked projection, {n}^3"
    return [
        stated(f"{name}: one field", seconds, "s of one core"),
        stated(f"{name}: rms change by the lattice over rms", np.sqrt(np.mean(change**2) / np.mean(nearest**2))),
        stated(f"{name}: largest change by the lattice over largest", change.max() / np.abs(nearest).max()),
    ]


def plain_leak() -> float:
    """Largest divergence over the rms flux of random potentials that are on no lattice."""
    potentials = Potentials(torch.randn(1, 3, 16, 16, 16), torch.randn(1, 16, 16, 16), torch.randn(1, 3))
    flux = compose_velocity(potentials, PERIODIC, "solenoidal")
    return largest_divergence(flux, PERIODIC) / float(flux.square().mean().sqrt())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
