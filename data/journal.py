"""Who writes which trajectories of a folder, and what is on disk already: several processes fill one folder at once.

Each process takes every n-th trajectory (its share) and keeps a journal of its own, locked while it lives: one line per
finished trajectory, with its checksum and the digests of the trajectory's files. No process waits for another but for
moments. Locks are flock(2): processes on several machines need a file system that carries them (NFS and Lustre do,
unless mounted with local locks).
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import xxhash

from data.chunks import LAYOUT_VERSION, Digests, FileDigest, StoreError, read_json
from data.digests import is_intact
from shodh.config import ConfigError

LOCK, PLAN = ".lock", ".plan.json"


class Share(NamedTuple):
    """Of ``count`` processes that fill one folder, the one that takes trajectories ``index, index + count, ...``."""

    index: int = 0
    count: int = 1

    def holds(self, trajectory: int) -> bool:
        return trajectory % self.count == self.index

    def __str__(self) -> str:
        return f"shard={self.index}/{self.count}"


WHOLE = Share()  # of the only process


class Record(NamedTuple):
    """A trajectory that is on disk."""

    trajectory: int
    notes: dict[str, Any]  # what goes into the small arrays
    digests: Digests


def parse_share(text: str) -> Share:
    """``i/n`` as a Share. Raises ConfigError unless 0 <= i < n."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    share = Share(*map(int, found.groups())) if found else Share(1, 0)
    if share.index >= share.count:
        raise ConfigError(f"shard={text}: not i/n with 0 <= i < n. Write shard=0/4 for the first of four processes.")
    return share


class Journal:
    """This process's list of finished trajectories; get one from ``claim``."""

    def __init__(self, folder: Path, stream: IO[bytes]):
        self._folder, self._stream = folder, stream

    def intact(self, share: Share) -> dict[int, Record]:
        """The share's finished trajectories, by any process, every byte of which is still as it was written."""
        found = {i: first_intact(self._folder, r) for i, r in read_records(self._folder).items() if share.holds(i)}
        return {i: record for i, record in found.items() if record is not None}

    def append(self, record: Record) -> None:
        line = json.dumps(record._asdict()).encode()
        self._stream.write(b"\n" + xxhash.xxh3_64_hexdigest(line).encode() + b" " + line)  # a torn line stays alone
        self._stream.flush()

    def restart(self, plan: dict[str, Any]) -> None:
        """Forget and remove what was written for another plan."""
        self._stream.truncate(0)
        for entry in self._folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif not entry.name.startswith("."):
                entry.unlink()
        _write_plan(self._folder, plan)


@contextmanager
def claim(folder: Path, share: Share, plan: dict[str, Any]) -> Iterator[Journal]:
    """The share's journal, for this process alone; ``plan`` is left in the folder for all others to be compared with.

    A folder that another process publishes meanwhile is made anew and stays empty: look for the complete store first.
    Raises ConfigError when another process holds the share, or others divide the folder differently just now.
    """
    own = folder / f".journal-{share.index}-of-{share.count}.jsonl"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stream = open(own, "a+b")
        except FileNotFoundError:  # published since mkdir
            continue
        with stream:
            with lock(folder) as is_there:
                is_claimed = is_there and _is_at(stream, own)
                if is_claimed:
                    _take(stream, own, share, plan)
            if is_claimed:
                yield Journal(folder, stream)
                return


@contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Waits until no other process is in this section; False if the folder is gone, as another published it."""
    try:
        stream = open(folder / LOCK, "a+b")
    except FileNotFoundError:
        yield False
        return
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield _is_at(stream, folder / LOCK)


def read_plan(folder: Path) -> dict[str, Any] | None:
    """What the folder is meant to hold; None if no process of this version has begun it or what it left is torn."""
    try:
        node = read_json(folder / PLAN)
    except StoreError:
        return None
    return node["plan"] if node.get("layout_version") == LAYOUT_VERSION else None


def read_records(folder: Path) -> dict[int, list[Record]]:
    """What all journals say of each trajectory, whoever wrote them; torn and damaged lines are passed over."""
    records: dict[int, list[Record]] = {}
    for journal in folder.glob(".journal-*.jsonl"):
        try:
            lines = journal.read_bytes().split(b"\n")
        except FileNotFoundError:  # published meanwhile
            continue
        for line in lines:
            checksum, _, content = line.partition(b" ")
            if content and xxhash.xxh3_64_hexdigest(content).encode() == checksum:
                fields = json.loads(content)
                digests = {name: FileDigest(*entry) for name, entry in fields["digests"].items()}
                records.setdefault(fields["trajectory"], []).append(Record(**fields | {"digests": digests}))
    return records


def count_missing(folder: Path, num_trajectories: int, share: Share) -> int:
    """How many of the share's trajectories no journal holds yet; what is damaged on disk is not looked for."""
    return len({i for i in range(num_trajectories) if share.holds(i)} - read_records(folder).keys())


def first_intact(folder: Path, records: list[Record]) -> Record | None:
    """The record every byte of which is on disk as it was written, if there is one."""
    for record in records:
        if all(is_intact(folder / name, digest) for name, digest in record.digests.items()):
            return record
    return None


def remove_journals(folder: Path) -> None:
    """Remove what only served the writing."""
    for file in (folder / LOCK, folder / PLAN, *folder.glob(".journal-*.jsonl")):
        file.unlink(missing_ok=True)


def _write_plan(folder: Path, plan: dict[str, Any]) -> None:
    (folder / PLAN).write_text(json.dumps({"layout_version": LAYOUT_VERSION, "plan": plan}))


def _take(stream: IO[bytes], own: Path, share: Share, plan: dict[str, Any]) -> None:
    """Lock this process's journal, and leave the plan if nobody has."""
    folder = own.parent
    for other in folder.glob(".journal-*.jsonl"):
        if other != own and not other.name.endswith(f"-of-{share.count}.jsonl") and _is_held(other):
            divided = other.stem.removeprefix(".journal-").replace("-of-", "/")
            raise ConfigError(
                f"{share}: another process is writing {folder} as shard={divided}. "
                "Wait for it, or give all processes the same number of shards."
            )
    if not _lock_now(stream):
        raise ConfigError(f"store={folder}: another process is writing it ({share}). Wait for it or stop it.")
    if read_plan(folder) is None:
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise ConfigError(f"store={folder}: begun by another version of Shodh. Remove it and start again.")
        _write_plan(folder, plan)


def _is_at(stream: IO[bytes], file: Path) -> bool:
    """Whether an open file still has this name: its folder may have been moved and made anew."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(file))
    except FileNotFoundError:
        return False


def _is_held(journal: Path) -> bool:
    with open(journal, "a+b") as stream:
        return not _lock_now(stream)


def _lock_now(stream: IO[bytes]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
