"""The tokenizer: fields of any domain to bounded, whitened latents and back, one network for all."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from shodh.config import to_plain
from shodh.fields import DecodedFields, DomainSpec, FieldBatch, Grid
from shodh.physics.helmholtz import Potentials
from tokenizer.decoder import Decoder
from tokenizer.encoder import Encoder
from tokenizer.helmholtz_head import HelmholtzHead, exact_flux, face_area, face_measure, velocity_from_potentials

DOWNSAMPLING = 8
BOUND = 10.0  # of what the encoder writes, apart from the mean flow; some 10 times what it usually is


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes of the tokenizer; ``latent_channels`` is the rate."""

    latent_channels: int = 16
    medium_channels: int = 8
    widths: tuple[int, int, int] = (24, 96, 192)  # at 1/2, 1/4 and 1/8 of the field's resolution
    encoder_depths: tuple[int, int, int] = (0, 1, 1)
    decoder_depths: tuple[int, int, int] = (1, 2, 1)
    recompute: bool = False  # make activations again in the backward pass: less memory, a third more time

    def __post_init__(self) -> None:
        if self.latent_channels < 3:
            raise ValueError(f"latent_channels={self.latent_channels}: the mean flow needs 3. Raise it.")
        if self.medium_channels < 1 or min(self.widths) < 8 or min(*self.encoder_depths, *self.decoder_depths) < 0:
            raise ValueError("autoencoder: medium_channels from 1, widths from 8 and depths from 0 make a network.")


def describe_network(config: AutoencoderConfig) -> dict[str, Any]:
    """The config as YAML would hold it but ``recompute``: that changes what training costs, not what comes of it."""
    return {name: value for name, value in to_plain(config).items() if name != "recompute"}


class Decoded(NamedTuple):
    """What the decoder says, differentiable; ``decode_fields`` is for storage and evaluation."""

    potentials: Potentials
    velocity: Float[Tensor, "b 3 x y z"]  # normalised, on lower faces
    pressure: Float[Tensor, "b 1 x y z"]  # normalised


class Autoencoder(nn.Module):
    """Encoder, medium encoder, decoder and Helmholtz head, with the latent statistics as buffers."""

    latent_mean: Tensor
    latent_whitening: Tensor
    latent_colouring: Tensor
    medium_mean: Tensor
    medium_whitening: Tensor
    medium_colouring: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        c, m = config.latent_channels, config.medium_channels
        self.encoder = Encoder(5, c, config.widths, config.encoder_depths, config.recompute)
        third = tuple(max(8, width // 3) for width in config.widths)
        self.medium_encoder = Encoder(1, m, third, (0, 1, 0), config.recompute)
        self.decoder = Decoder(c + m, config.widths, config.decoder_depths, config.recompute)
        self.head = HelmholtzHead(config.widths)
        for name, channels in (("latent", c), ("medium", m)):
            self.register_buffer(f"{name}_mean", torch.zeros(channels))
            self.register_buffer(f"{name}_whitening", torch.eye(channels))
            self.register_buffer(f"{name}_colouring", torch.eye(channels))

    def forward(self, batch: FieldBatch) -> Decoded:
        """Reconstruction of the batch, differentiable."""
        latent, medium = self.encode(batch)
        return self.decode(latent, medium, batch.domain, batch.grid)

    def encode(self, batch: FieldBatch) -> tuple[Float[Tensor, "b c i j k"], Float[Tensor, "b m i j k"]]:
        """Whitened latents of the state and of the medium.

        Raises ValueError for grids that 8 does not divide and for values that are not finite.
        """
        check_fields(batch)
        fields = torch.cat([batch.velocity, batch.pressure, batch.medium], 1)
        if not self.training:  # in training the loop looks at the loss
            check_finite(fields, batch.domain)
        raw = self.encoder(as_fast(fields), batch.domain.boundary)
        latent = self.whiten(raw, mean_flow(batch.velocity, batch.grid))
        return latent, self.encode_medium(batch.medium, batch.domain)

    def encode_medium(self, medium: Float[Tensor, "b 1 x y z"], domain: DomainSpec) -> Float[Tensor, "b m i j k"]:
        """Whitened latents of the static medium."""
        return self.whiten_medium(self.medium_encoder(as_fast(medium), domain.boundary))

    def whiten(self, raw: Float[Tensor, "b c i j k"], flow: Float[Tensor, "b 3"]) -> Float[Tensor, "b c i j k"]:
        """Whitened latents of what the encoder wrote, with the mean flow put in."""
        latent = set_mean_flow(_bounded(raw), flow)
        return _transform(latent - self.latent_mean.reshape(-1, 1, 1, 1), self.latent_whitening)

    def whiten_medium(self, raw: Float[Tensor, "b m i j k"]) -> Float[Tensor, "b m i j k"]:
        """Whitened latents of what the medium encoder wrote."""
        return _transform(_bounded(raw) - self.medium_mean.reshape(-1, 1, 1, 1), self.medium_whitening)

    def colour(
        self, latent: Float[Tensor, "b c i j k"], medium: Float[Tensor, "b m i j k"]
    ) -> tuple[Float[Tensor, "b n i j k"], Float[Tensor, "b 3"]]:
        """What the decoder takes, and the mean flow, of whitened latents."""
        state = _transform(latent.float(), self.latent_colouring) + self.latent_mean.reshape(-1, 1, 1, 1)
        still = _transform(medium.float(), self.medium_colouring) + self.medium_mean.reshape(-1, 1, 1, 1)
        return as_fast(torch.cat([state, still], 1)), read_mean_flow(state)

    def decode(
        self,
        latent: Float[Tensor, "b c i j k"],
        medium: Float[Tensor, "b m i j k"],
        domain: DomainSpec,
        grid: Grid,
    ) -> Decoded:
        """Potentials, normalised velocity and pressure of whitened latents."""
        potentials, pressure = self.decode_potentials(latent, medium, domain)
        return Decoded(potentials, velocity_from_potentials(potentials, domain, grid), pressure)

    def decode_potentials(
        self, latent: Float[Tensor, "b c i j k"], medium: Float[Tensor, "b m i j k"], domain: DomainSpec
    ) -> tuple[Potentials, Float[Tensor, "b 1 x y z"]]:
        """Potentials, from which a velocity follows, and normalised pressure."""
        state, flow = self.colour(latent, medium)
        return self.head(self.decoder(state, domain.boundary), flow, domain)

    def decode_fields(
        self,
        latent: Float[Tensor, "b c i j k"],
        medium: Float[Tensor, "b m i j k"],
        domain: DomainSpec,
        grid: Grid,
    ) -> DecodedFields:
        """Fields for storage and evaluation; the flux is exactly conservative."""
        potentials, pressure = self.decode_potentials(latent, medium, domain)
        flux = exact_flux(potentials, domain, grid)
        return DecodedFields(flux, flux / face_measure(domain, grid, flux.device), pressure)


def mean_flow(velocity: Float[Tensor, "b 3 x y z"], grid: Grid) -> Float[Tensor, "b 3"]:
    """The velocity of the flux through the box along each axis: mean over the faces, weighted by their areas."""
    area = face_area(grid, velocity.device)
    return reduce(velocity * (area / area.mean((1, 2, 3), keepdim=True)), "b f x y z -> b f", "mean")


def set_mean_flow(latent: Float[Tensor, "b c i j k"], flow: Float[Tensor, "b 3"]) -> Float[Tensor, "b c i j k"]:
    """The latent with the box means of its first three channels replaced by the mean flow.

    So the harmonic part of the flow, which no potential can carry, passes the bottleneck exactly and costs 3 numbers.
    """
    latent = latent.float()  # bf16 would round the mean flow by a percent
    flow = rearrange(flow, "b f -> b f 1 1 1")
    first = latent[:, :3] - reduce(latent[:, :3], "b f i j k -> b f 1 1 1", "mean") + flow
    return torch.cat([first, latent[:, 3:]], 1)


def read_mean_flow(latent: Float[Tensor, "b c i j k"]) -> Float[Tensor, "b 3"]:
    """The mean velocity that ``set_mean_flow`` wrote."""
    return reduce(latent[:, :3].float(), "b f i j k -> b f", "mean")


@torch.no_grad()
def measure_latents(model: Autoencoder, batches: Iterable[FieldBatch], device: torch.device) -> None:
    """Set the latent statistics so that latents have mean 0 and covariance 1 over all ``batches`` together.

    Global, not per domain: what tells domains apart stays visible to the router. Of all whitenings the one that moves
    latents least (symmetric, ZCA); a direction with less than 1e-6 of the largest variance is not blown up to 1.
    """
    for name in ("latent", "medium"):
        getattr(model, f"{name}_mean").zero_()
        for part in ("whitening", "colouring"):
            matrix = getattr(model, f"{name}_{part}")
            matrix.copy_(torch.eye(len(matrix)))
    pairs = [model.encode(batch.to(device)) for batch in batches]
    for name, latents in zip(("latent", "medium"), zip(*pairs, strict=True), strict=True):
        rows = torch.cat([rearrange(latent, "b c i j k -> (b i j k) c") for latent in latents]).double()
        variance, directions = torch.linalg.eigh(torch.cov(rows.T, correction=0).reshape(rows.shape[1], -1))
        deviation = variance.clamp_min(1e-6 * float(variance[-1]) + 1e-12).sqrt()
        getattr(model, f"{name}_mean").copy_(rows.mean(0))
        getattr(model, f"{name}_whitening").copy_(directions / deviation @ directions.T)
        getattr(model, f"{name}_colouring").copy_(directions * deviation @ directions.T)


def check_fields(batch: FieldBatch) -> None:
    """ValueError, in one line, for fields that no tokenizer takes."""
    for name, channels in (("velocity", 3), ("pressure", 1), ("medium", 1)):
        shape, wanted = tuple(getattr(batch, name).shape), (channels, *batch.grid.shape)
        if shape[1:] != wanted:
            raise ValueError(f"{batch.domain.name}: {name} has shape {shape}, not (samples, {wanted}). Give that.")
    if any(n % DOWNSAMPLING for n in batch.grid.shape):
        raise ValueError(f"grid.shape={batch.grid.shape}: not divisible by {DOWNSAMPLING}. Crop or regrid the field.")


def check_finite(fields: Tensor, domain: DomainSpec) -> None:
    """ValueError, in one line, for NaN or infinity."""
    if not bool(torch.isfinite(fields).all()):
        raise ValueError(f"{domain.name}: field holds NaN or infinity. Run `python -m data.layout STORE`.")


def _bounded(raw: Tensor) -> Tensor:
    """FP32 values that stay within the bound; nearly themselves where they are small."""
    return BOUND * torch.tanh(raw.float() / BOUND)


def _transform(latent: Float[Tensor, "b c i j k"], matrix: Float[Tensor, "c c"]) -> Float[Tensor, "b c i j k"]:
    with torch.autocast(latent.device.type, enabled=False):
        return torch.einsum("dc,bcijk->bdijk", matrix, latent)


def as_fast(values: Tensor) -> Tensor:
    """In the memory layout that CUDA's bf16 convolutions are fastest in."""
    return values.contiguous(memory_format=torch.channels_last_3d) if values.is_cuda else values
