"""Training steps of the tokenizer and of a variant that convolves at full resolution, and what they learn from them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from figures import Figure, at_most, control, stated, time_interleaved
from torch import Tensor, nn
from torch.nn import functional
from tqdm import trange

from data.mixture import FieldMixture, MixtureConfig
from data.reader import open_store
from data.simulate import acoustics, open_channel, porous_media
from data.statistics import measure_statistics
from shodh.fields import DomainSpec, FieldBatch, Grid
from shodh.physics.helmholtz import Potentials
from shodh.physics.spectra import vrmse
from shodh.training.optimizers import build_optimizer
from shodh.training.schedule import ScheduleConfig, learning_rate_at
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.encoder import Encoder
from tokenizer.helmholtz_head import OUTPUTS, HelmholtzHead, as_potentials, upsample_smoothly, velocity_from_potentials
from tokenizer.layers import BlockStack, Convolution, Downsample, Upsample, depth_to_space, pad_one
from tokenizer.objective import ReconstructionConfig, reconstruction_loss

DOMAINS = (acoustics.DOMAIN, open_channel.DOMAIN, porous_media.DOMAIN)
NUM_CELLS = 32
HELD_OUT_BATCHES = 6
MOST_TIME, MOST_ERROR = 0.5, 1.05

Batches = Callable[[int], FieldBatch]


@dataclass(frozen=True, kw_only=True)
class StemTraining:
    """How both networks are trained."""

    num_steps: int = 400
    batch_size: int = 4
    learning_rate: float = 2e-3


class FullResolutionStem(nn.Module):
    """A convolution at full resolution, then a learned mix of each 2x2x2 cube; takes what a folded stem takes."""

    def __init__(self, in_channels: int, fine: int) -> None:
        super().__init__()
        self.mix = Convolution(in_channels, fine)
        self.down = Downsample(fine, fine)

    def forward(self, folded: Tensor, boundary: tuple) -> Tensor:
        return self.down(self.mix(depth_to_space(folded), boundary), boundary)


class FullResolutionHead(nn.Module):
    """The Helmholtz head, its finest convolution at full resolution, after blocks there: the stem's mirror image."""

    def __init__(self, widths: tuple[int, int, int], num_blocks: int) -> None:
        super().__init__()
        self.inner = HelmholtzHead(widths)
        self.up = Upsample(widths[0], widths[0])
        self.blocks = BlockStack(widths[0], num_blocks, recompute=False)
        self.inner.fine = Convolution(widths[0], 5)

    def forward(
        self, features: tuple[Tensor, Tensor, Tensor], mean_flow: Tensor, domain: DomainSpec
    ) -> tuple[Potentials, Tensor]:
        coarse, middle, fine = features
        boundary = domain.boundary
        outputs = list(OUTPUTS[domain.velocity_space])
        values = upsample_smoothly(self.inner.begin(coarse, middle, boundary, outputs), boundary)
        detail = functional.silu(self.inner.norms[2](self.blocks(self.up(fine, boundary), boundary)))
        kernel = self.inner.fine.weight.reshape(self.inner.fine.shape)[outputs]
        detail = functional.conv3d(pad_one(detail, boundary), kernel, self.inner.fine.bias[outputs])
        values = upsample_smoothly(values, boundary) + detail
        return as_potentials(values[:, :-1], mean_flow, domain), values[:, -1:]


def convolve_at_full_resolution(model: Autoencoder, with_blocks: bool = False) -> Autoencoder:
    """The same network with its first and last convolutions at full resolution instead of at half.

    ``with_blocks`` also moves the decoder's blocks at half resolution there: no level of its own lies below then.
    """
    sizes = model.config
    encoders: tuple[tuple[Encoder, int, int], ...] = (
        (model.encoder, 5, sizes.widths[0]),
        (model.medium_encoder, 1, max(8, sizes.widths[0] // 3)),
    )
    for encoder, in_channels, fine in encoders:
        encoder.stem = FullResolutionStem(in_channels, fine)  # type: ignore[assignment]
    num_blocks = sizes.decoder_depths[0] if with_blocks else 0
    model.head = FullResolutionHead(sizes.widths, num_blocks)  # type: ignore[assignment]
    if with_blocks:
        model.decoder.fine = BlockStack(sizes.widths[0], 0, recompute=False)
    return model


def compare_stems(training: StemTraining, stores: Path | None) -> list[Figure]:
    """The step with the folded stem over that at full resolution, and both held-out errors after training."""
    train_on, held_out = read_fields(stores, training) if stores else draw_fields(training)
    stemmed, full = (Trainer(training, change) for change in (lambda model: model, convolve_at_full_resolution))
    ratios = []
    for step in trange(training.num_steps, desc="stems", unit="step", mininterval=1.0):
        batch = train_on(step)
        pair = (stemmed, full) if step % 2 == 0 else (full, stemmed)
        seconds = {trainer: trainer.step(batch, step) for trainer in pair}
        ratios.append(seconds[stemmed] / seconds[full])
    batch, last = train_on(0), training.num_steps - 1
    wholly = Trainer(training, lambda model: convolve_at_full_resolution(model, with_blocks=True))
    trainers = {"step": stemmed, "again": stemmed, "wholly": wholly}
    errors = {trainer: trainer.measure_error(held_out) for trainer in (stemmed, full)}
    times = time_interleaved({name: partial(trainer.step, batch, last) for name, trainer in trainers.items()}, 11)
    data = "stores" if stores else "random turbulence"
    return [
        stated(f"stemmed: held-out velocity VRMSE on {data} after {training.num_steps} steps", errors[stemmed]),
        stated(f"full resolution: held-out velocity VRMSE on {data}", errors[full]),
        at_most("stemmed held-out error over full resolution", errors[stemmed] / errors[full], MOST_ERROR),
        stated("stemmed training step", times["step"], "s"),
        at_most("stemmed step over full resolution", ratios[1:], MOST_TIME),  # the first warms caches
        control("stemmed step over itself", times["again"] / times["step"]),
        stated("stemmed step over full resolution with blocks there", times["step"] / times["wholly"]),
    ]


class Trainer:
    """One network, trained as the project does but for the engine."""

    def __init__(self, training: StemTraining, change: Callable[[Autoencoder], Autoencoder]) -> None:
        torch.manual_seed(0)
        self.model = change(Autoencoder(AutoencoderConfig()))
        self.optimizer = build_optimizer(self.model, "muon", 0.01, (0.9, 0.95))
        self.schedule = ScheduleConfig(
            num_steps=training.num_steps,
            learning_rate=training.learning_rate,
            num_warmup_steps=training.num_steps // 10,
        )

    def step(self, batch: FieldBatch, step: int) -> float:
        """Seconds of one optimizer step."""
        start = perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.schedule)
        reconstruction_loss(self.model(batch), batch, ReconstructionConfig())["total"].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return perf_counter() - start

    @torch.no_grad()
    def measure_error(self, held_out: list[FieldBatch]) -> float:
        """Mean VRMSE of velocity."""
        self.model.eval()
        return float(torch.cat([vrmse(self.model(batch).velocity, batch.velocity) for batch in held_out]).mean())


def read_fields(folder: Path, training: StemTraining) -> tuple[Batches, list[FieldBatch]]:
    """Normalised batches of the three domains in turn, by step, and some of their held-out trajectories."""
    stores = [open_store(folder / domain.name) for domain in DOMAINS]
    statistics = [measure_statistics(store) for store in stores]
    config = MixtureConfig(batch_size=training.batch_size, augment=True)
    held_out = FieldMixture(stores, statistics, replace(config, split="test", augment=False))
    return FieldMixture(stores, statistics, config).batch, list(held_out.first(HELD_OUT_BATCHES))


def draw_fields(training: StemTraining) -> tuple[Batches, list[FieldBatch]]:
    """Random turbulence for the three domains in turn, by step, never the same twice; and some that is held out."""

    def batch(step: int) -> FieldBatch:
        return draw_turbulence(DOMAINS[step % len(DOMAINS)], training.batch_size, seed=step)

    return batch, [
        draw_turbulence(DOMAINS[i % len(DOMAINS)], training.batch_size, -1 - i) for i in range(HELD_OUT_BATCHES)
    ]


def draw_turbulence(domain: DomainSpec, num: int, seed: int) -> FieldBatch:
    """Conservative velocity of unit rms with a k^-5/3 spectrum, pressure with k^-7/3 and a smooth medium."""
    n, generator = NUM_CELLS, torch.Generator().manual_seed(seed)
    grid = Grid(shape=(n, n, n), spacing=(1 / n, 1 / n, 1 / n), boundary=domain.boundary)
    noise = torch.randn(num, 6, n, n, n, generator=generator)
    # energy k^-p in a shell is an amplitude k^-(p + 2)/2 of a mode; a potential has a power of k less than its velocity
    potentials = Potentials(filter_noise(noise[:, :3], 17 / 6), filter_noise(noise[:, 3], 17 / 6), torch.zeros(num, 3))
    velocity = velocity_from_potentials(potentials, domain, grid)
    velocity = velocity / velocity.square().mean((1, 2, 3, 4), keepdim=True).sqrt()
    pressure, medium = filter_noise(noise[:, 4:5], 13 / 6), filter_noise(noise[:, 5:], 4.0)
    return FieldBatch(velocity, pressure, medium, domain, grid)


def filter_noise(noise: Tensor, power: float) -> Tensor:
    """Noise whose modes are damped by wavenumber^-power, without a mean, of unit rms."""
    n = noise.shape[-1]
    k = torch.from_numpy(np.fft.fftfreq(n, 1 / n)).float()
    wavenumber = (k[:, None, None] ** 2 + k[:, None] ** 2 + k**2).sqrt()
    damping = torch.where(wavenumber > 0, wavenumber.clamp_min(1) ** -power, 0.0)
    values = torch.fft.ifftn(torch.fft.fftn(noise, dim=(-3, -2, -1)) * damping, dim=(-3, -2, -1)).real
    return values / values.square().mean((-3, -2, -1), keepdim=True).sqrt()
