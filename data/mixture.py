"""Batches from several domains: a pure function of (step, micro step), so training resumes anywhere without state.

Samples are drawn without replacement: each domain is gone through in a new random order per epoch. A global batch is
the same whatever the number of ranks; a rank takes its slice of it.
"""

import bisect
import math
import queue
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from data.buffers import Buffers
from data.latents import LatentStore
from data.layout import Split
from data.reader import Store
from data.statistics import FieldStatistics
from shodh.config import ConfigError
from shodh.fields import NUM_GIVEN, FieldBatch, LatentBatch

T = TypeVar("T")
Arrays = tuple[np.ndarray, ...]

CPU = torch.device("cpu")
NUM_STATES = NUM_GIVEN + 1  # the fewest that a forecast is learnt from


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """How batches are drawn."""

    batch_size: int  # samples per micro step over all ranks
    accumulation: int = 1  # micro steps per step
    seed: int = 0
    weights: tuple[float, ...] = ()  # per domain, in the order of the stores; empty means equal
    split: Split = "train"
    augment: bool = False  # random translations along periodic axes (fields only)
    num_states: int = NUM_STATES  # successive states of a sample (latents only)
    windows: int = 1  # samples of each trajectory that is drawn; they stand side by side in a batch (latents only)
    cache_bytes: int = 2**30  # memory for what was read once
    read_threads: int = 2  # samples of a batch of fields that are read at a time

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "num_states", "windows", "read_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1. Raise it.")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"weights={self.weights}: all must be finite. Change them.")
        positive = [weight for weight in self.weights if weight > 0]
        if self.weights and (min(self.weights) < 0 or not positive):
            raise ValueError(f"weights={self.weights}: none may be negative and one must be positive. Change them.")
        if positive and max(positive) > 1000 * min(positive):
            raise ValueError(f"weights={self.weights}: they differ more than 1000-fold. Leave that domain out.")


class FieldMixture:
    """Batches of snapshots of one domain at a time, normalised; domains take turns by weight."""

    def __init__(self, stores: Sequence[Store], statistics: Sequence[FieldStatistics], config: MixtureConfig):
        self.stores, self.statistics, self.config = list(stores), list(statistics), config
        if len(self.stores) != len(self.statistics):
            raise ConfigError(f"statistics: {len(self.statistics)} for {len(self.stores)} stores. Give one per store.")
        self._turns = _Turns(_weights(config.weights, len(self.stores)))
        self._states = [
            [(i, t) for i in _trajectories(store, config.split, 1) for t in range(store.num_snapshots)]
            for store in self.stores
        ]
        self._media = _Cache(config.cache_bytes // 4)  # of their own, as each serves many snapshots
        self._cache = _Cache(config.cache_bytes - config.cache_bytes // 4)
        self._buffers = Buffers()
        self._readers = ThreadPoolExecutor(config.read_threads, "read")

    def batch(
        self, step: int, micro_step: int = 0, rank: int = 0, world: int = 1, device: torch.device = CPU
    ) -> FieldBatch:
        """This rank's part of the batch of a micro step; samples are moved along their axes where they are going."""
        config = self.config
        turn = step * config.accumulation + micro_step
        domain = self._turns.domain(turn)
        first = self._turns.count_before(turn, domain) * config.batch_size
        positions = [first + i for i in rank_slice(config.batch_size, rank, world)]
        store, take = self.stores[domain], self._buffers.take
        velocity, pressure, medium = (take(len(positions), channels, *store.grid.shape) for channels in (3, 1, 1))
        slots = velocity.unbind(), pressure.unbind(), medium.unbind()
        list(self._readers.map(partial(self._read, domain), positions, *slots))  # raises what a reader raised
        batch = FieldBatch(velocity, pressure, medium, store.domain, store.grid).to(device)
        if config.augment:
            for i, position in enumerate(positions):
                _translate(batch, i, _random_shifts(store, (config.seed, domain, 1, position)))
        return batch

    def first(self, num_turns: int) -> Iterator[FieldBatch]:
        """The first batches in order, micro steps and all, so that every domain has its turns."""
        for turn in range(num_turns):
            yield self.batch(*divmod(turn, self.config.accumulation))

    def _read(self, domain: int, position: int, velocity: Tensor, pressure: Tensor, medium: Tensor) -> None:
        """Put the ``position``-th sample there, normalised: velocity (3, x, y, z), pressure and medium (1, x, y, z)."""
        store, states, scale = self.stores[domain], self._states[domain], self.statistics[domain]
        trajectory, time = states[_shuffled(position, len(states), (self.config.seed, domain))]
        slot, scales = (velocity.numpy(), pressure[0].numpy()), (scale.velocity_scale, scale.pressure_scale)
        self._cache.fill((domain, trajectory, time), slot, lambda: store.read_snapshot(trajectory, time, *slot, scales))

        def read_medium() -> None:
            store.read_medium(trajectory, still)
            scale.normalise_medium(still)

        still = medium[0].numpy()
        self._media.fill((domain, trajectory), (still,), read_medium)


class LatentMixture:
    """Batches of successive latent states; every batch holds all domains, in the proportion of their weights.

    A domain's samples and their order depend on the seed and its name, not on which domains stand beside it, so that
    models of one domain and of several can be trained on the same.
    """

    def __init__(self, stores: Sequence[LatentStore], config: MixtureConfig):
        self.stores, self.config = list(stores), config
        shapes = {(s.header.latent_shape[2:], s.header.medium_shape[1:]) for s in self.stores}
        if len(shapes) > 1:
            raise ConfigError(f"latents: shapes differ between domains, {sorted(shapes)}. Use one tokenizer.")
        self._turns = _Turns(_weights(config.weights, len(self.stores)))
        self._trajectories = [_trajectories(store, config.split, config.num_states) for store in self.stores]
        self._cache = _Cache(config.cache_bytes)

    def batch(
        self, step: int, micro_step: int = 0, rank: int = 0, world: int = 1, device: torch.device = CPU
    ) -> LatentBatch:
        """This rank's part of the batch of a micro step."""
        config = self.config
        first = (step * config.accumulation + micro_step) * (config.batch_size // config.windows)
        turns = [first + i for i in rank_slice(config.batch_size, rank, world, config.windows)]
        domains = [self._turns.domain(turn) for turn in turns]
        draws = [self._draw(d, self._turns.count_before(turn, d)) for turn, d in zip(turns, domains, strict=True)]
        samples = [sample for draw in draws for sample in draw]
        states, medium, parameters = (torch.from_numpy(np.stack(parts)) for parts in zip(*samples, strict=True))
        domain = torch.tensor(domains).repeat_interleave(config.windows)
        return LatentBatch(states, medium, parameters, domain).to(device)

    def _draw(self, domain: int, position: int) -> list[Arrays]:
        """The ``windows`` samples of one trajectory that come at a position of the domain's order."""
        config, store = self.config, self.stores[domain]
        trajectories, num_starts = self._trajectories[domain], store.num_snapshots - config.num_states + 1
        key = config.seed, zlib.crc32(store.domain.name.encode())
        draws = max(1, num_starts // config.windows)  # of a trajectory in an epoch
        per_epoch = len(trajectories) * draws
        place, draw = divmod(_shuffled(position, per_epoch, key), draws)
        starts = _permutation(num_starts, (*key, 1, position // per_epoch, place))
        chosen = [starts[(draw * config.windows + i) % num_starts] for i in range(config.windows)]
        return [self._sample(domain, trajectories[place], int(start)) for start in chosen]

    def _sample(self, domain: int, trajectory: int, start: int) -> Arrays:
        store = self.stores[domain]
        states = np.stack([self._latent(domain, trajectory, start + t) for t in range(self.config.num_states)])
        (medium,) = self._cache.get((domain, trajectory), lambda: (store.medium(trajectory),))
        return states, medium, store.parameters(trajectory)

    def _latent(self, domain: int, trajectory: int, time: int) -> np.ndarray:
        store = self.stores[domain]
        return self._cache.get((domain, trajectory, time), lambda: (store.latent(trajectory, time),))[0]


def stream(
    mixture: FieldMixture | LatentMixture, first_step: int, device: torch.device, rank: int = 0, world: int = 1
) -> Generator[FieldBatch | LatentBatch]:
    """This rank's micro-batches on ``device`` in order from ``first_step`` on, made and moved there ahead in a thread.

    On CUDA the thread has a stream of its own, so that copies do not wait for training, nor training for them.
    """
    beside = torch.cuda.Stream(device) if device.type == "cuda" else None

    def produce() -> Iterator[FieldBatch | LatentBatch]:
        for step in count(first_step):
            for micro_step in range(mixture.config.accumulation):
                with torch.cuda.stream(beside):
                    batch = mixture.batch(step, micro_step, rank, world, device)
                if beside is not None:
                    beside.synchronize()
                yield batch

    with closing(prefetch(produce)) as batches:
        for batch in batches:
            if device.type == "cuda":  # its memory is not given to the next one before training has used it
                for values in batch:
                    if isinstance(values, Tensor):
                        values.record_stream(torch.cuda.current_stream(device))
            yield batch


def rank_slice(batch_size: int, rank: int, world: int, windows: int = 1) -> range:
    """Which draws of ``windows`` samples of the global batch a rank takes. ConfigError unless all take equally many."""
    if batch_size % (world * windows):
        apiece = f", each with draws of {windows} windows" if windows > 1 else ""
        raise ConfigError(f"batch_size={batch_size}: not a multiple of the {world} ranks{apiece}. Change it.")
    share = batch_size // (world * windows)
    return range(rank * share, (rank + 1) * share)


def prefetch(produce: Callable[[], Iterable[T]], depth: int = 2) -> Generator[T]:
    """The items of ``produce()``, made ahead in a thread, ``depth`` at most waiting; its errors are raised here.

    To resume, let ``produce`` begin at another step. Closing the iterator ends the thread.
    """
    ready: queue.Queue[T | _Stop] = queue.Queue(depth)
    closed = threading.Event()

    def offer(item: T | _Stop) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in produce():
                offer(item)
                if closed.is_set():
                    return
            offer(_Stop(None))
        except BaseException as error:  # noqa: BLE001  handed over whole and raised by the consumer
            offer(_Stop(error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _Stop):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closed.set()
        thread.join()


class _Stop(NamedTuple):
    """Why the items end."""

    error: BaseException | None


class _Turns:
    """Whose turn it is: each domain in proportion to its weight and as evenly as can be; equal weights take turns."""

    def __init__(self, weights: Sequence[float]):
        smallest = min(w for w in weights if w > 0)
        counts = [round(100 * w / smallest) for w in weights]  # per cycle: weights to half a percent
        due = sorted(((k + 0.5) / n, d) for d, n in enumerate(counts) for k in range(n))
        self._cycle = [d for _, d in due]
        self._places = [[place for place, owner in enumerate(self._cycle) if owner == d] for d in range(len(weights))]

    def domain(self, turn: int) -> int:
        return self._cycle[turn % len(self._cycle)]

    def count_before(self, turn: int, domain: int) -> int:
        """How many turns the domain had before this one."""
        cycles, place = divmod(turn, len(self._cycle))
        return cycles * len(self._places[domain]) + bisect.bisect_left(self._places[domain], place)


class _Cache:
    """Keeps what was read until the memory is full; nothing is evicted, as every item is used equally often.

    Threads may share it: two may read one item at once, but it is kept and counted once.
    """

    def __init__(self, limit: int):
        self._left, self._items, self._keeping = limit, dict[tuple[int, ...], Arrays](), threading.Lock()

    def get(self, key: tuple[int, ...], read: Callable[[], Arrays]) -> Arrays:
        item = self._items.get(key)
        if item is None:
            item = read()
            self._keep(key, item)
        return item

    def fill(self, key: tuple[int, ...], slot: Arrays, read_into_slot: Callable[[], None]) -> None:
        """Copy the item into ``slot``, or have it read there; so what does not fit is never held twice."""
        item = self._items.get(key)
        if item is None:
            read_into_slot()
            if sum(array.nbytes for array in slot) <= self._left:
                self._keep(key, tuple(array.copy() for array in slot))
            return
        for place, values in zip(slot, item, strict=True):
            place[...] = values

    def _keep(self, key: tuple[int, ...], item: Arrays) -> None:
        size = sum(array.nbytes for array in item)
        with self._keeping:
            if size <= self._left and key not in self._items:
                self._items[key] = item
                self._left -= size


def _weights(weights: tuple[float, ...], num_domains: int) -> tuple[float, ...]:
    if num_domains == 0 or len(weights) not in (0, num_domains):
        raise ConfigError(f"weights={weights}: there are {num_domains} domains. Give one weight per domain.")
    return weights or (1.0,) * num_domains


def _trajectories(store: Store | LatentStore, split: Split, num_states: int) -> list[int]:
    """Those of a split. Raises ConfigError unless there are some, of enough snapshots."""
    trajectories = store.trajectories(split)
    if not trajectories or store.num_snapshots < num_states:
        raise ConfigError(
            f"store={store.path}: no {num_states} successive snapshots. Generate more, or forecast fewer in a row."
        )
    return trajectories


def _translate(batch: FieldBatch, sample: int, shifts: list[int]) -> None:
    """Move one sample's fields along x, y, z in place."""
    if any(shifts):
        for fields in (batch.velocity, batch.pressure, batch.medium):
            fields[sample] = torch.roll(fields[sample], shifts, (-3, -2, -1))


def _random_shifts(store: Store, key: tuple[int, ...]) -> list[int]:
    """Cells by which a sample is moved along x, y, z: 0 unless that axis is periodic."""
    draws = np.random.default_rng(key).integers(store.grid.shape)
    return [int(n) if b == "periodic" else 0 for n, b in zip(draws, store.grid.boundary, strict=True)]


def _shuffled(position: int, num: int, key: tuple[int, ...]) -> int:
    """The item at ``position`` of an endless sequence that goes through all ``num`` in a new order per epoch."""
    epoch, place = divmod(position, num)
    return int(_permutation(num, (*key, 0, epoch))[place])


@lru_cache(maxsize=64)
def _permutation(num: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(key).permutation(num)
