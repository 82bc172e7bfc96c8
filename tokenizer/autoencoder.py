"""The tokenizer: fields of any domain to whitened latents and back, one network for all."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from shodh.fields import DecodedFields, DomainSpec, FieldBatch, Grid
from shodh.physics.helmholtz import Potentials
from tokenizer.decoder import Decoder
from tokenizer.encoder import Encoder
from tokenizer.helmholtz_head import HelmholtzHead, exact_flux, face_measure, velocity_from_potentials

DOWNSAMPLING = 8


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes of the tokenizer; ``latent_channels`` is the rate."""

    latent_channels: int = 16
    medium_channels: int = 8
    widths: tuple[int, int, int] = (24, 96, 192)  # at 1/2, 1/4 and 1/8 of the field's resolution
    encoder_depths: tuple[int, int, int] = (1, 1, 1)
    decoder_depths: tuple[int, int, int] = (1, 2, 1)

    def __post_init__(self) -> None:
        if self.latent_channels < 3:
            raise ValueError(f"latent_channels={self.latent_channels}: the mean flow needs 3. Raise it.")
        if self.medium_channels < 1 or min(self.widths) < 8 or min(*self.encoder_depths, *self.decoder_depths) < 0:
            raise ValueError("autoencoder: medium_channels from 1, widths from 8 and depths from 0 make a network.")
        fine, middle, coarse = self.widths
        for name, inner, outer in (("middle", fine, middle), ("coarse", middle, coarse)):
            if inner % 8 or outer % 8 or 8 * inner % outer:
                raise ValueError(f"widths={self.widths}: multiples of 8 that divide 8x the next finer one ({name}).")


class Decoded(NamedTuple):
    """What the decoder says, differentiable; ``decode_fields`` is for storage and evaluation."""

    potentials: Potentials
    velocity: Float[Tensor, "b 3 x y z"]  # normalised, on lower faces
    pressure: Float[Tensor, "b 1 x y z"]  # normalised


class Autoencoder(nn.Module):
    """Encoder, medium encoder, decoder and Helmholtz head, with the latent statistics as buffers."""

    latent_mean: Tensor
    latent_std: Tensor
    medium_mean: Tensor
    medium_std: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        c, m = config.latent_channels, config.medium_channels
        self.encoder = Encoder(5, c, config.widths, config.encoder_depths)
        half = tuple(max(8, width // 2) for width in config.widths)
        self.medium_encoder = Encoder(1, m, half, (0, 1, 0))
        self.decoder = Decoder(c + m, config.widths, config.decoder_depths)
        self.head = HelmholtzHead(config.widths)
        for name, channels in (("latent", c), ("medium", m)):
            self.register_buffer(f"{name}_mean", torch.zeros(channels))
            self.register_buffer(f"{name}_std", torch.ones(channels))

    def forward(self, batch: FieldBatch) -> Decoded:
        """Reconstruction of the batch, differentiable."""
        latent, medium = self.encode(batch)
        return self.decode(latent, medium, batch.domain, batch.grid)

    def encode(self, batch: FieldBatch) -> tuple[Float[Tensor, "b c i j k"], Float[Tensor, "b m i j k"]]:
        """Whitened latents of the state and of the medium.

        Raises ValueError for grids that 8 does not divide and for values that are not finite.
        """
        if any(n % DOWNSAMPLING for n in batch.grid.shape):
            raise ValueError(
                f"grid.shape={batch.grid.shape}: not divisible by {DOWNSAMPLING}. Crop or regrid the field."
            )
        fields = torch.cat([batch.velocity, batch.pressure, batch.medium], 1)
        if not bool(torch.isfinite(fields).all()):
            raise ValueError(f"{batch.domain.name}: field holds NaN or infinity. Run `python -m data.layout STORE`.")
        latent = set_mean_flow(self.encoder(fields, batch.domain.boundary), mean_flow(batch.velocity, batch.grid))
        return _whiten(latent, self.latent_mean, self.latent_std), self.encode_medium(batch.medium, batch.domain)

    def encode_medium(self, medium: Float[Tensor, "b 1 x y z"], domain: DomainSpec) -> Float[Tensor, "b m i j k"]:
        """Whitened latents of the static medium."""
        return _whiten(self.medium_encoder(medium, domain.boundary), self.medium_mean, self.medium_std)

    def decode(
        self,
        latent: Float[Tensor, "b c i j k"],
        medium: Float[Tensor, "b m i j k"],
        domain: DomainSpec,
        grid: Grid,
    ) -> Decoded:
        """Potentials, normalised velocity and pressure of whitened latents."""
        state = _colour(latent, self.latent_mean, self.latent_std)
        still = _colour(medium, self.medium_mean, self.medium_std)
        features = self.decoder(torch.cat([state, still], 1), domain.boundary)
        potentials, pressure = self.head(features, read_mean_flow(state), domain)
        return Decoded(potentials, velocity_from_potentials(potentials, domain, grid), pressure)

    def decode_fields(
        self,
        latent: Float[Tensor, "b c i j k"],
        medium: Float[Tensor, "b m i j k"],
        domain: DomainSpec,
        grid: Grid,
    ) -> DecodedFields:
        """Fields for storage and evaluation; the flux is exactly conservative."""
        decoded = self.decode(latent, medium, domain, grid)
        flux = exact_flux(decoded.potentials, domain, grid)
        return DecodedFields(flux, flux / face_measure(domain, grid, flux.device), decoded.pressure)


def mean_flow(velocity: Float[Tensor, "b 3 x y z"], grid: Grid) -> Float[Tensor, "b 3"]:
    """The velocity of the flux through the box along each axis: mean over the faces, weighted by their areas."""
    area = grid.face_area
    weight = torch.from_numpy(area / area.mean((1, 2, 3), keepdims=True)).to(velocity)
    return reduce(velocity * weight, "b f x y z -> b f", "mean")


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
    """Set the latent statistics so that latents have mean 0 and variance 1 per channel over all ``batches`` together.

    Global, not per domain: what tells domains apart stays visible to the router.
    """
    for name in ("latent", "medium"):
        getattr(model, f"{name}_mean").zero_()
        getattr(model, f"{name}_std").fill_(1.0)
    pairs = [model.encode(batch.to(device)) for batch in batches]
    for name, latents in zip(("latent", "medium"), zip(*pairs, strict=True), strict=True):
        rows = torch.cat([rearrange(latent, "b c i j k -> (b i j k) c") for latent in latents]).double()
        getattr(model, f"{name}_mean").copy_(rows.mean(0))
        getattr(model, f"{name}_std").copy_(rows.std(0).clamp_min(1e-6))


def _whiten(raw: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (raw - mean.reshape(-1, 1, 1, 1)) / std.reshape(-1, 1, 1, 1)


def _colour(white: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return white * std.reshape(-1, 1, 1, 1) + mean.reshape(-1, 1, 1, 1)
