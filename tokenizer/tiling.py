"""Encodes and decodes boxes that do not fit into memory, stage by stage in slabs, with the values of the whole box.

Nothing in the network looks at more than its neighbours, so a slab with a margin as wide as the rest of a stage reaches
gives what the whole box gives. Each stage is cut by itself and its results are put together before the next begins:
margins stay as wide as one stage reaches, and the coarsest stages, which look furthest, are small enough to be whole.
Potentials are snapped to one lattice after they are put together, so the flux is exact across slabs too.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from shodh.fields import Boundary, DecodedFields, DomainSpec, FieldBatch, Grid
from shodh.physics.helmholtz import Potentials, compose_velocity, snap_potentials
from tokenizer.autoencoder import Autoencoder, as_fast, check_fields, check_finite, mean_flow
from tokenizer.encoder import Encoder
from tokenizer.helmholtz_head import OUTPUTS, as_potentials, face_measure, to_grid

Run = Callable[..., Tensor | tuple[Tensor, ...]]


class Tiles(NamedTuple):
    """How a batch is cut: into so many samples at a time, and each stage into slabs across the longest axis.

    Thickness counts the cells of the coarsest features that a stage takes or gives; one of the box's own is the whole.
    """

    num_samples: int
    middle: int  # cells of 8 of the field's: stages at 1/4 of the resolution
    fine: int  # cells of 4 of the field's: stages at 1/2 and the full resolution


class Cut(NamedTuple):
    """Where one stage is cut: an axis of so many units into slabs of ``thickness``, each seen ``margin`` wider."""

    axis: int
    num_units: int
    thickness: int
    margin: int
    periodic: bool


@torch.no_grad()
def encode_tiled(
    autoencoder: Autoencoder, batch: FieldBatch, tiles: Tiles
) -> tuple[Float[Tensor, "b c i j k"], Float[Tensor, "b m i j k"]]:
    """``autoencoder.encode(batch)`` in slabs. Raises ValueError as it does."""
    check_fields(batch)
    parts = []
    for start in range(0, len(batch.velocity), tiles.num_samples):
        velocity, pressure, medium = (part[start : start + tiles.num_samples] for part in batch[:3])
        boundary = batch.domain.boundary

        def join(*slabs: Tensor) -> Tensor:
            fields = torch.cat(slabs, 1)
            check_finite(fields, batch.domain)
            return as_fast(fields)

        fields = (velocity, pressure, medium)
        raw = _encode(autoencoder.encoder, join, fields, boundary, tiles)
        latent = autoencoder.whiten(raw, mean_flow(velocity, batch.grid))
        still = _encode(autoencoder.medium_encoder, as_fast, (medium,), boundary, tiles)
        parts.append((latent, autoencoder.whiten_medium(still)))
    latents, media = zip(*parts, strict=True)
    return _join(latents), _join(media)


@torch.no_grad()
def decode_fields_tiled(
    autoencoder: Autoencoder,
    latent: Float[Tensor, "b c i j k"],
    medium: Float[Tensor, "b m i j k"],
    domain: DomainSpec,
    grid: Grid,
    tiles: Tiles,
) -> DecodedFields:
    """``autoencoder.decode_fields(...)`` in slabs; the divergence of its flux is 0.0 across slabs too."""
    parts = []
    for pair in zip(latent.split(tiles.num_samples), medium.split(tiles.num_samples), strict=True):
        potentials, pressure = decode_potentials_tiled(autoencoder, *pair, domain, tiles)
        flux = _compose(snap_potentials(to_grid(potentials, grid), domain.velocity_space), domain, tiles)
        del potentials
        parts.append(DecodedFields(flux, flux / face_measure(domain, grid, flux.device), pressure))
        del flux, pressure
    return DecodedFields(*(_join(fields) for fields in zip(*parts, strict=True)))


@torch.no_grad()
def decode_potentials_tiled(
    autoencoder: Autoencoder,
    latent: Float[Tensor, "b c i j k"],
    medium: Float[Tensor, "b m i j k"],
    domain: DomainSpec,
    tiles: Tiles,
) -> tuple[Potentials, Float[Tensor, "b 1 x y z"]]:
    """``autoencoder.decode_potentials(...)`` in slabs."""
    boundary, outputs = domain.boundary, OUTPUTS[domain.velocity_space]
    decoder, head = autoencoder.decoder, autoencoder.head

    def refine_to_middle(coarse: Tensor) -> tuple[Tensor, ...]:
        middle = decoder.refine_to_middle(coarse, boundary)
        return middle, head.begin(coarse, middle, boundary, outputs)

    def refine_to_full(middle: Tensor, begun: Tensor) -> tuple[Tensor, ...]:
        values = head.refine(begun, decoder.refine_to_fine(middle, boundary), boundary, outputs)
        return values[:, :-1], values[:, -1:]

    state, flow = autoencoder.colour(latent, medium)
    coarse = decoder.begin(state, boundary)
    _, middle_depth, _ = autoencoder.config.decoder_depths
    margin = max(-(-(middle_depth + 1) // 2), 2)  # blocks and head look so far; its coarse part and upsampling 2
    middle, begun = run_in_slabs(refine_to_middle, (coarse,), _cut(coarse, boundary, tiles.middle, margin))
    del coarse
    fine_depth = autoencoder.config.decoder_depths[0]
    margin = -(-(fine_depth + 1) // 2)  # blocks and head; upsampling twice looks 1 far
    cut = _cut(begun, boundary, tiles.fine, margin)
    potentials, pressure = run_in_slabs(refine_to_full, (middle, begun), cut)
    return as_potentials(potentials, flow, domain), pressure


def run_in_slabs(run: Run, inputs: Sequence[Tensor], cut: Cut) -> tuple[Tensor, ...]:
    """What ``run`` gives for the whole inputs, from one slab after another.

    Layers pad each slab as they pad the box: right at the box's own ends, and wrong at a cut, where the margin that
    the padding reaches is thrown away. Periodic margins are taken from the other end.
    """
    if cut.thickness >= cut.num_units:
        return _as_tuple(run(*inputs))
    dim, whole = cut.axis - 3, []
    for start in range(0, cut.num_units, cut.thickness):
        stop = min(start + cut.thickness, cut.num_units)
        low, high = start - cut.margin, stop + cut.margin
        if not cut.periodic:
            low, high = max(low, 0), min(high, cut.num_units)
        results = _as_tuple(run(*(_take(values, cut, low, high) for values in inputs)))
        for i, result in enumerate(results):
            size = result.shape[dim] // (high - low)  # cells per unit
            if start == 0:
                shape = list(result.shape)
                shape[dim] = size * cut.num_units
                whole.append(result.new_empty(shape))
            kept = result.narrow(dim, size * (start - low), size * (stop - start))
            whole[i].narrow(dim, size * start, size * (stop - start)).copy_(kept)
        del results, result, kept  # before the next slab is made
    return tuple(whole)


def _encode(
    encoder: Encoder,
    prepare: Callable[..., Tensor],
    fields: Sequence[Tensor],
    boundary: Sequence[Boundary],
    tiles: Tiles,
) -> Tensor:
    """What the encoder writes of fields that ``prepare`` makes one of, slab by slab."""
    cut = _cut(fields[0], boundary, tiles.fine, -(-(len(encoder.fine.blocks) + 1) // 2), 4)
    (values,) = run_in_slabs(lambda *slabs: encoder.reduce_to_middle(prepare(*slabs), boundary), fields, cut)
    cut = _cut(values, boundary, tiles.middle, -(-len(encoder.middle.blocks) // 2), 2)
    (values,) = run_in_slabs(lambda slab: encoder.reduce_to_coarse(slab, boundary), (values,), cut)
    return encoder.finish(values, boundary)


def _compose(potentials: Potentials, domain: DomainSpec, tiles: Tiles) -> Tensor:
    """``compose_velocity`` in slabs; differences look one cell far."""

    def run(circulation: Tensor, scalar: Tensor) -> Tensor:
        parts = Potentials(circulation, scalar, potentials.mean_flow)
        return compose_velocity(parts, domain.boundary, domain.velocity_space)

    cut = _cut(potentials.scalar, domain.boundary, 4 * tiles.fine, 1)
    (flux,) = run_in_slabs(run, (potentials.circulation, potentials.scalar), cut)
    return flux


def _cut(values: Tensor, boundary: Sequence[Boundary], thickness: int, margin: int, unit: int = 1) -> Cut:
    """Across the longest axis of ``values``, of which ``unit`` cells are one."""
    shape = values.shape[-3:]
    axis = max(range(3), key=lambda a: shape[a])
    return Cut(axis, shape[axis] // unit, thickness, margin, boundary[axis] == "periodic")


def _take(values: Tensor, cut: Cut, low: int, high: int) -> Tensor:
    """The slab from unit ``low`` to before ``high``, which at a periodic axis may lie beyond the ends."""
    dim = cut.axis - 3
    cells = values.shape[dim] // cut.num_units
    low, high = low * cells, high * cells
    if low >= 0 and high <= values.shape[dim]:
        return values.narrow(dim, low, high - low)
    return values.index_select(dim, torch.arange(low, high, device=values.device) % values.shape[dim])


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result
