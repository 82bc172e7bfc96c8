"""Caches what the tokenizer makes of a store: its latents, in the same layout, bound to store and tokenizer by digest.

A cache written by another tokenizer or from another store is stale and refused.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.chunks import (
    ArrayLayout,
    Digests,
    StoreError,
    check_files,
    create_group,
    publish,
    read_attributes,
    read_chunk,
    read_digest,
    seal,
    write_chunk,
)
from data.layout import (
    LAYOUT_VERSION,
    Split,
    latent_arrays,
    partial_folder,
    require_kind,
    split_trajectories,
)
from data.reader import Store, read_parameters, with_count
from shodh.config import ConfigError, parse_config, to_plain
from shodh.fields import DomainSpec

# (velocity (b 3 x y z), pressure (b 1 x y z), medium (b 1 x y z)), in the store's units, to the whitened latents
# (latent (b c x y z), medium (b m x y z)).
Encode = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

BATCH_SIZE = 8  # snapshots per call of ``encode``


@dataclass(frozen=True, kw_only=True)
class LatentHeader:
    """What a cache says of itself in its root attributes."""

    domain: DomainSpec
    field_digest: str
    tokenizer_hash: str
    num_test: int
    latent_shape: tuple[int, int, int, int, int, int]  # (trajectory, time, c, x, y, z)
    medium_shape: tuple[int, int, int, int, int]  # (trajectory, m, x, y, z)


class LatentStore:
    """A complete, current cache of latents, open for reading; get one from ``open_latents``."""

    def __init__(self, path: Path, header: LatentHeader, digest: str):
        self.path, self.header, self.digest = path, header, digest
        self._folder = str(path)
        self._arrays = latent_arrays(header.domain, header.latent_shape, header.medium_shape)
        self._latent, self._medium = self._arrays["latent"], self._arrays["medium"]
        self._parameters = read_parameters(path, self._arrays, header.domain)

    @property
    def domain(self) -> DomainSpec:
        return self.header.domain

    @property
    def num_trajectories(self) -> int:
        return self.header.latent_shape[0]

    @property
    def num_snapshots(self) -> int:
        return self.header.latent_shape[1]

    @property
    def cells_per_state(self) -> int:
        """Latent cells of one state."""
        return math.prod(self.header.latent_shape[3:])

    def trajectories(self, split: Split) -> list[int]:
        """Indices of the trajectories of ``train`` or ``test``: those of the store it was made from."""
        return split_trajectories(self.num_trajectories, self.header.num_test)[split]

    def parameters(self, trajectory: int) -> np.ndarray:
        """float32 in the order of ``shodh.fields.PARAMETERS``."""
        return self._parameters[trajectory]

    def latent(self, trajectory: int, time: int) -> np.ndarray:
        """The whitened latent state (c, x, y, z). Raises StoreError for a damaged or missing chunk."""
        return read_chunk(self._folder, self._latent, (trajectory, time, 0, 0, 0, 0))[0, 0].copy()

    def medium(self, trajectory: int) -> np.ndarray:
        """The whitened latent (m, x, y, z) of the static medium."""
        return read_chunk(self._folder, self._medium, (trajectory, 0, 0, 0, 0))[0].copy()


def write_latents(
    path: str | Path,
    store: Store,
    encode: Encode,
    tokenizer_hash: str,
    progress: Callable[[int], object] = lambda num_snapshots: None,
) -> str:
    """Encode a whole store and return the cache's digest; a cache that is current already is left as it is.

    Written beside and renamed, so a cache that can be opened is complete. Raises RuntimeError when a latent is not
    finite or changes shape.
    """
    path = Path(path)
    try:
        return open_latents(path, tokenizer_hash, store.digest).digest
    except ConfigError:
        pass  # missing, stale or damaged: encode again
    partial = partial_folder(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    header: LatentHeader | None = None
    arrays: dict[str, ArrayLayout] = {}
    digests: Digests = {}
    for trajectory in range(store.num_trajectories):
        latent, medium = _encode_trajectory(store, trajectory, encode, progress)
        if header is None:
            header = _header(store, tokenizer_hash, latent, medium)
            arrays = latent_arrays(header.domain, header.latent_shape, header.medium_shape)
            create_group(partial, list(arrays.values()), _attributes(header))
        if (latent.shape, medium.shape) != (header.latent_shape[1:], header.medium_shape[1:]):
            raise RuntimeError(f"latents of {store.path}: shapes differ from trajectory {trajectory} on. Use one grid.")
        digests |= write_chunk(partial, arrays["medium"], (trajectory, 0, 0, 0, 0), medium)
        for t, state in enumerate(latent):
            digests |= write_chunk(partial, arrays["latent"], (trajectory, t, 0, 0, 0, 0), state)
    digests |= _write_small(partial, store, arrays)
    digest = seal(partial, digests)
    publish(partial, path)
    return digest


def open_latents(path: str | Path, tokenizer_hash: str | None = None, field_digest: str | None = None) -> LatentStore:
    """The cache at ``path``. Raises ConfigError in one line when it is missing, incomplete, damaged or stale.

    Stale means: made by a tokenizer other than ``tokenizer_hash`` or from a store other than ``field_digest``.
    """
    path = Path(path)
    again = "Run launch/cache_latents.py again."
    if not path.is_dir():
        raise ConfigError(f"latents={path}: no such folder. Run launch/cache_latents.py first.")
    try:
        header = _parse_header(path)
        for name, found, wanted in (
            ("tokenizer", header.tokenizer_hash, tokenizer_hash),
            ("store", header.field_digest, field_digest),
        ):
            if wanted is not None and found != wanted:
                raise ConfigError(f"latents={path}: stale, made with {name} {found[:12]}, not {wanted[:12]}. {again}")
        arrays = latent_arrays(header.domain, header.latent_shape, header.medium_shape)
        problems = check_files(path, list(arrays.values()), deep=False)
        if problems:
            raise ConfigError(with_count(problems, again))
        return LatentStore(path, header, read_digest(path))
    except StoreError as error:
        raise ConfigError(str(error)) from None


def _encode_trajectory(
    store: Store, trajectory: int, encode: Encode, progress: Callable[[int], object]
) -> tuple[np.ndarray, np.ndarray]:
    """Latent (t, c, x, y, z) and medium (m, x, y, z) of one trajectory."""
    still = torch.from_numpy(store.medium(trajectory))
    latents, media = [], []
    for start in range(0, store.num_snapshots, BATCH_SIZE):
        states = [store.snapshot(trajectory, t) for t in range(start, min(start + BATCH_SIZE, store.num_snapshots))]
        velocity = torch.from_numpy(np.stack([u for u, _ in states]))
        pressure = torch.from_numpy(np.stack([p[None] for _, p in states]))
        latent, medium = encode(velocity, pressure, still.expand(len(states), 1, *still.shape))
        latents.append(latent.detach().float().cpu().numpy())
        media.append(medium[0].detach().float().cpu().numpy())
        progress(len(states))
    whole = np.concatenate(latents)
    if not (np.isfinite(whole).all() and np.isfinite(media[0]).all()):
        raise RuntimeError(f"latents of {store.path}, trajectory {trajectory}: not finite. Check the tokenizer.")
    return whole, media[0]


def _header(store: Store, tokenizer_hash: str, latent: np.ndarray, medium: np.ndarray) -> LatentHeader:
    """Of the cache whose first trajectory these are."""
    num, (t, c, x, y, z), (m, mx, my, mz) = store.num_trajectories, latent.shape, medium.shape
    return LatentHeader(
        domain=store.domain,
        field_digest=store.digest,
        tokenizer_hash=tokenizer_hash,
        num_test=store.plan.num_test,
        latent_shape=(num, t, c, x, y, z),
        medium_shape=(num, m, mx, my, mz),
    )


def _attributes(header: LatentHeader) -> dict:
    return {
        "kind": "latents",
        "layout_version": LAYOUT_VERSION,
        "title": f"{header.domain.name}: latents of tokenizer {header.tokenizer_hash[:12]}",
        **to_plain(header),
        "split": split_trajectories(header.latent_shape[0], header.num_test),
    }


def _parse_header(path: Path) -> LatentHeader:
    attributes = read_attributes(path)
    require_kind(attributes, "latents", str(path))
    known = {field.name for field in fields(LatentHeader)}
    return parse_config(LatentHeader, {k: v for k, v in attributes.items() if k in known}, source=str(path))


def _write_small(partial: Path, store: Store, arrays: dict[str, ArrayLayout]) -> Digests:
    """Time, seed and parameters, as the store has them."""
    digests: Digests = {}
    for name in ("time", "seed", *store.domain.parameters):
        values = store.trajectory_array(name)
        digests |= write_chunk(partial, arrays[name], (0,) * values.ndim, values)
    return digests
