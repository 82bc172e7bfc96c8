"""The weights that benchmarks/exactness.py decodes with, and the random flows that they are trained on."""

from pathlib import Path
from typing import NamedTuple

import figures  # noqa: F401 - lets `tokenizer` be the package, not the benchmark beside this file
import torch
from torch import Tensor
from torch.nn import functional

from shodh.fields import Boundary, DomainSpec, FieldBatch, FieldSpec, Grid, VelocitySpace
from shodh.physics.helmholtz import Potentials, compose_velocity
from shodh.training.checkpoint import load_parameters, read_newest, write_checkpoint
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig, measure_latents
from tokenizer.export import load_tokenizer, save_tokenizer
from tokenizer.helmholtz_head import face_measure

SMALL = AutoencoderConfig(latent_channels=8, medium_channels=4, widths=(8, 16, 32))


class Weights(NamedTuple):
    """A model, and whether it was trained under bfloat16 autocast and so shall decode under it too."""

    model: Autoencoder
    low_precision: bool = False


def make_weights(folder: Path, num_steps: int) -> dict[str, Weights]:
    """Models by how their weights came to be; the files that some of them went through are left in ``folder``."""
    trained, low = Autoencoder(SMALL), Autoencoder(SMALL)
    train(trained, num_steps, low_precision=False)
    train(low, num_steps, low_precision=True)
    models = {
        "random weights": Weights(randomise(Autoencoder(SMALL))),
        "trained": Weights(trained),
        "trained in bf16": Weights(low, low_precision=True),
        "reloaded from a checkpoint": Weights(reload_from_checkpoint(trained, folder)),
        "exported and loaded": Weights(export_and_load(low, folder), low_precision=True),
    }
    for weights in models.values():
        weights.model.eval().requires_grad_(False)
    return models


@torch.no_grad()
def randomise(model: Autoencoder) -> Autoencoder:
    """A head strong enough for every term of the flux to matter."""
    for parameter in model.head.parameters():
        parameter.normal_()
    return model


def train(model: Autoencoder, num_steps: int, low_precision: bool) -> None:
    """Some steps on random flows of two kinds in turn, then the latent statistics."""
    domains = make_domain("solenoidal", ("periodic", "wall", "periodic")), make_domain("irrotational", ("open",) * 3)
    grids = [Grid(shape=(16, 16, 16), spacing=(1.0, 0.5, 0.7), boundary=domain.boundary) for domain in domains]
    batches = [draw_flow(2, domain, grid) for domain, grid in zip(domains, grids, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(num_steps):
        batch = batches[step % 2]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low_precision):
            decoded = model.decode(*model.encode(batch), batch.domain, batch.grid)
        loss = functional.mse_loss(decoded.velocity, batch.velocity)
        optimizer.zero_grad()
        (loss + functional.mse_loss(decoded.pressure, batch.pressure)).backward()
        optimizer.step()
    measure_latents(model, batches, torch.device("cpu"))


def reload_from_checkpoint(model: Autoencoder, folder: Path) -> Autoencoder:
    state = {f"parameter/{name}": value.detach().clone() for name, value in model.named_parameters()}
    state |= {f"buffer/{name}": value.clone() for name, value in model.named_buffers()}
    write_checkpoint(folder / "checkpoints", 1, state, {"record": {"config": {}}})
    reloaded = Autoencoder(SMALL)
    load_parameters(reloaded, read_newest(folder / "checkpoints")[0])
    return reloaded


def export_and_load(model: Autoencoder, folder: Path) -> Autoencoder:
    save_tokenizer(folder / "tokenizer.safetensors", model, {}, {})
    return load_tokenizer(folder / "tokenizer.safetensors").autoencoder


def make_domain(space: VelocitySpace, boundary: tuple[Boundary, ...]) -> DomainSpec:
    """A domain of these boundaries; what else it says changes nothing that is decoded."""
    x, y, z = boundary
    cell, face = (FieldSpec(name=where, units="1", location=where, long_name=where) for where in ("cell", "face"))
    return DomainSpec(
        name="any",
        velocity_space=space,
        boundary=(x, y, z),
        velocity=face,
        pressure=cell,
        medium=cell,
        parameters=(),
    )


def draw_flow(num: int, domain: DomainSpec, grid: Grid) -> FieldBatch:
    """Random flow with a mean, of unit rms, and random pressure and medium, all some cells wide."""
    potentials = Potentials(draw_smooth(num, 3, grid), draw_smooth(num, 1, grid)[:, 0], 0.3 * torch.randn(num, 3))
    stored = compose_velocity(potentials, domain.boundary, domain.velocity_space)
    velocity = stored / face_measure(domain, grid, stored.device)
    velocity = velocity / velocity.square().mean().sqrt()
    return FieldBatch(velocity, draw_smooth(num, 1, grid), draw_smooth(num, 1, grid), domain, grid)


def draw_smooth(num: int, channels: int, grid: Grid) -> Tensor:
    """Noise averaged over 5 cells along each axis, of about unit variance."""
    noise = functional.pad(torch.randn(num, channels, *grid.shape), [2] * 6, mode="circular")
    return functional.avg_pool3d(noise, 5, stride=1) * 5**1.5
