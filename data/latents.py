"""Caches what the tokenizer makes of a store: its latents, in the same layout, bound to store and tokenizer by digest.

A cache written by another tokenizer or from another store is stale and refused.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.chunks import ArrayLayout, ArrayReader, Digests, StoreError, create_group, read_attributes, write_chunk
from data.digests import check_files, publish, read_digest, read_digests, seal
from data.journal import WHOLE, Record, claim, read_plan, remove_journals
from data.layout import (
    LAYOUT_VERSION,
    Split,
    check_finite,
    latent_arrays,
    partial_folder,
    require_kind,
    split_trajectories,
)
from data.reader import Store, open_arrays, read_parameters, require_index, with_count
from shodh.config import ConfigError, parse_config, to_plain
from shodh.fields import DomainSpec

# (velocity (b 3 x y z), pressure (b 1 x y z), medium (b 1 x y z)), in the store's units, to the whitened latents
# (latent (b c x y z), medium (b m x y z)).
Encode = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

BATCH_SIZE = 8  # snapshots per call of ``encode``, at most


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
        self._readers = open_arrays(path, _arrays(header))
        self._latent, self._medium = self._readers["latent"], self._readers["medium"]
        self._time = self._readers["time"].read()
        self._parameters = read_parameters(self._readers, self.num_trajectories, header.domain)

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
        """float32 in the order of ``shodh.fields.CONDITIONS``."""
        return self._parameters[trajectory]

    def time(self, trajectory: int) -> np.ndarray:
        """float64 (t,): when the snapshots were taken."""
        return self._time[trajectory]

    def latent(self, trajectory: int, time: int) -> np.ndarray:
        """The whitened latent state (c, x, y, z). Raises StoreError for damaged or missing data."""
        require_index(self.path, trajectory, time, (self.num_trajectories, self.num_snapshots))
        return self._latent.read(trajectory, time)[0, 0]

    def medium(self, trajectory: int) -> np.ndarray:
        """The whitened latent (m, x, y, z) of the static medium."""
        require_index(self.path, trajectory, 0, (self.num_trajectories, self.num_snapshots))
        return self._medium.read(trajectory)[0]


def write_latents(
    path: str | Path,
    store: Store,
    encode: Encode,
    tokenizer_hash: str,
    progress: Callable[[int], object] = lambda num_snapshots: None,
    batch_size: int = BATCH_SIZE,
) -> str:
    """Encode what is missing of a store and return the cache's digest; a current cache is left as it is.

    Written beside, trajectory by trajectory, and renamed: a cache that can be opened is complete, and killed half way
    the next call continues. Raises ConfigError when something else stands at ``path``, RuntimeError when a latent is
    not finite or changes shape.
    """
    path = Path(path)
    source = {"tokenizer_hash": tokenizer_hash, "field_digest": store.digest}
    if current := _current_digest(path, source):
        return current
    _require_own(path)
    partial = partial_folder(path)
    with claim(partial, WHOLE, source) as journal:
        if current := _current_digest(path, source):  # published by another process since this one looked
            shutil.rmtree(partial, ignore_errors=True)
            return current
        if read_plan(partial) != source:
            journal.restart(source)
        records = journal.intact(WHOLE)
        for trajectory in range(store.num_trajectories):
            if trajectory in records:
                progress(store.num_snapshots)
                continue
            latent, medium = _encode_trajectory(store, trajectory, encode, progress, batch_size)
            record = _write_trajectory(
                partial,
                _header(store, tokenizer_hash, latent.shape, medium.shape),
                trajectory,
                {"latent": latent, "medium": medium},
            )
            records[trajectory] = record
            journal.append(record)
        digest = _finish(partial, store, tokenizer_hash, records)
        publish(partial, path)
    remove_journals(path)
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
        problems = check_files(path, list(_arrays(header).values()), deep=False)
        if problems:
            raise ConfigError(with_count(problems, again))
        return LatentStore(path, header, read_digest(path))
    except StoreError as error:
        raise ConfigError(str(error)) from None


def check_latents(path: Path, deep: bool) -> list[str]:
    """What is wrong with a cache of latents, one line each; ``data.layout.check`` calls this."""
    header = _parse_header(path)
    arrays = _arrays(header)
    problems = check_files(path, list(arrays.values()), deep=deep)
    if problems or not deep:
        return problems
    digests = read_digests(path)
    return [line for array in arrays.values() for line in check_finite(path, array, ArrayReader(path, array, digests))]


def _current_digest(path: Path, source: Mapping[str, str]) -> str:
    """The digest of the cache made from this source; empty if there is none or it is stale or damaged."""
    try:
        return open_latents(path, **source).digest
    except ConfigError:
        return ""


def _require_own(path: Path) -> None:
    """Raise ConfigError if what stands at ``path``, or half written beside it, is no cache of latents to replace."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        kind = _kind(path)
        if kind != "latents":
            found = f"a store of {kind}" if kind else "something that is no cache of latents"
            raise ConfigError(f"latents={path}: {found} stands there. Choose another folder, or remove it yourself.")
    partial = partial_folder(path)
    if "tokenizer_hash" not in (read_plan(partial) or {"tokenizer_hash": ""}):
        raise ConfigError(f"latents={path}: {partial.name} is a store half written. Choose another folder.")


def _kind(path: Path) -> str:
    """What the root attributes of a group say it holds; empty if there is no group."""
    try:
        return str(read_attributes(path).get("kind", ""))
    except StoreError:
        return ""


def _encode_trajectory(
    store: Store, trajectory: int, encode: Encode, progress: Callable[[int], object], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Latent (t, c, x, y, z) and medium (m, x, y, z) of one trajectory."""
    still = torch.from_numpy(store.medium(trajectory))
    latents, media = [], []
    for start in range(0, store.num_snapshots, batch_size):
        states = range(start, min(start + batch_size, store.num_snapshots))
        velocity, pressure = (torch.empty(len(states), f, *store.grid.shape) for f in (3, 1))
        for place, t in enumerate(states):
            store.read_snapshot(trajectory, t, velocity[place].numpy(), pressure[place, 0].numpy())
            _require_finite(store, trajectory, t, velocity[place], pressure[place])
        latent, medium = encode(velocity, pressure, still.expand(len(states), 1, *still.shape))
        latents.append(latent.detach().float().cpu().numpy())
        media.append(medium[0].detach().float().cpu().numpy())
        progress(len(states))
    whole = np.concatenate(latents)
    if not (np.isfinite(whole).all() and np.isfinite(media[0]).all()):
        raise RuntimeError(f"latents of {store.path}, trajectory {trajectory}: not finite. Check the tokenizer.")
    return whole, media[0]


def _require_finite(store: Store, trajectory: int, time: int, *fields: Tensor) -> None:
    if not all(bool(torch.isfinite(field).all()) for field in fields):
        raise ValueError(
            f"store={store.path}: trajectory {trajectory}, snapshot {time} holds NaN or infinity. "
            f"See all with `python -m data.layout {store.path}`, and write the store again."
        )


def _write_trajectory(partial: Path, header: LatentHeader, trajectory: int, values: Mapping[str, np.ndarray]) -> Record:
    digests: Digests = {}
    for name, array in _arrays(header).items():
        if name in values:
            digests |= write_chunk(partial, array, (trajectory, *(0,) * (len(array.shape) - 1)), values[name])
    return Record(trajectory, {name: list(value.shape) for name, value in values.items()}, digests)


def _finish(partial: Path, store: Store, tokenizer_hash: str, records: dict[int, Record]) -> str:
    """Write the metadata, the small arrays and the digests; return the cache's digest."""
    first = records[0].notes
    if other := [i for i, record in records.items() if record.notes != first]:
        raise RuntimeError(f"latents of {store.path}: shapes of trajectories 0 and {other[0]} differ. Use one grid.")
    header = _header(store, tokenizer_hash, first["latent"], first["medium"])
    arrays = _arrays(header)
    create_group(partial, list(arrays.values()), _attributes(header))
    digests = {name: digest for record in records.values() for name, digest in record.digests.items()}
    for name in ("time", "seed", *store.domain.parameters):
        values = store.trajectory_array(name)
        digests |= write_chunk(partial, arrays[name], (0,) * values.ndim, values)
    return seal(partial, digests)


def _header(store: Store, tokenizer_hash: str, latent: Sequence[int], medium: Sequence[int]) -> LatentHeader:
    """Of the cache whose trajectories have latents and medium of these shapes."""
    num, (t, c, x, y, z), (m, mx, my, mz) = store.num_trajectories, latent, medium
    return LatentHeader(
        domain=store.domain,
        field_digest=store.digest,
        tokenizer_hash=tokenizer_hash,
        num_test=store.plan.num_test,
        latent_shape=(num, t, c, x, y, z),
        medium_shape=(num, m, mx, my, mz),
    )


def _arrays(header: LatentHeader) -> dict[str, ArrayLayout]:
    return latent_arrays(header.domain, header.latent_shape, header.medium_shape)


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
