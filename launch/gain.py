"""How much memory the search for a decoder's worst direction takes, found before it is taken."""

import functools

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shodh.evaluation.latent_quality import LatentSample, measure_largest_gain, without_mean
from shodh.fields import DomainSpec, Grid
from shodh.units import format_bytes
from tokenizer.autoencoder import DOWNSAMPLING, Autoencoder, AutoencoderConfig
from tokenizer.helmholtz_head import face_measure
from tokenizer.memory import HEAP_BYTES, OPERATORS, PeakMemory

ITERATIONS = 2  # of the dry run; later ones take no more


def require_room(config: AutoencoderConfig, domain: DomainSpec, grid: Grid, max_bytes: int) -> None:
    """MemoryError, saying what is needed, unless ``measure_largest_gain`` of one state stays within so many bytes."""
    needed = forecast_largest_gain(config, domain, grid)
    if needed > max_bytes:
        shape = "x".join(str(n) for n in grid.shape)
        raise MemoryError(
            f"to differentiate the decoder of {shape} twice takes {format_bytes(needed)} of memory, "
            f"{format_bytes(max_bytes)} may be used."
        )


@functools.lru_cache(maxsize=256)
def forecast_largest_gain(config: AutoencoderConfig, domain: DomainSpec, grid: Grid) -> int:
    """Bytes that a CPU process grows by at most, in FP32, on top of the weights.

    By a dry run, as ``forecast_memory`` makes one. Training is no bound: it keeps the activations of one pass, this
    also those of the pass back.
    """
    face_measure(domain, grid, torch.device("cpu"))  # which is kept for later callers, who need its values
    coarse = [n // DOWNSAMPLING for n in grid.shape]
    with FakeTensorMode(allow_non_fake_inputs=True):
        autoencoder = Autoencoder(config).eval().requires_grad_(False)
        latent, still = (torch.zeros(1, c, *coarse) for c in (config.latent_channels, config.medium_channels))
        with PeakMemory() as memory:
            measure_largest_gain(
                without_mean(lambda z, m: autoencoder.decode(z, m, domain, grid).velocity),
                LatentSample(latent, still, still[0, 0]),
                num_iterations=ITERATIONS,
            )
    return int(OPERATORS * memory.peak) + HEAP_BYTES
