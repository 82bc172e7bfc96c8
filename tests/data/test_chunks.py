"""Reading chunks: short reads are continued, and what is no fault of a file is not told as damage."""

import errno
import gc
import os
import resource

import numpy as np
import pytest

from data import chunks
from data.chunks import ArrayLayout, ArrayReader, StoreError, write_chunk

NUM_FILES = 6
LAYOUT = ArrayLayout("speed", ("trajectory", "x"), (NUM_FILES, 8), (1, 8), "float64", {})


@pytest.fixture
def reader(tmp_path):
    digests = {}
    for i in range(NUM_FILES):
        digests |= write_chunk(tmp_path, LAYOUT, (i, 0), np.arange(8.0) + i)
    return ArrayReader(tmp_path, LAYOUT, digests)


@pytest.fixture
def few_descriptors():
    """Lets this process open so many files more."""
    gc.collect()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(num: int) -> None:
        free = [number for number in range(limits[0]) if not os.path.exists(f"/proc/self/fd/{number}")]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[num - 1] + 1, limits[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def _count_open(folder) -> int:
    links = (f"/proc/self/fd/{number}" for number in range(1024))  # listing them would open one more
    return sum(os.path.exists(link) and os.readlink(link).startswith(str(folder)) for link in links)


def test_short_reads_are_continued(reader, monkeypatch):
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, out, offset: whole(file, [out[0][:5]], offset))
    np.testing.assert_array_equal(reader.read(3)[0], np.arange(8.0) + 3)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts open files in /proc")
def test_files_kept_open_are_let_go_when_there_are_too_many(reader, tmp_path, few_descriptors):
    few_descriptors(3)
    for i in range(NUM_FILES):
        np.testing.assert_array_equal(reader.read(i)[0], np.arange(8.0) + i)
    assert 0 < _count_open(tmp_path) <= 3


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts open files in /proc")
def test_all_readers_together_keep_few_files_open(reader, tmp_path, monkeypatch):
    gc.collect()
    kept_by_others = sum(len(other._open) for other in chunks._readers)
    monkeypatch.setattr(chunks, "MOST_OPEN", kept_by_others + 2)
    for i in range(NUM_FILES):
        reader.read(i)
    assert _count_open(tmp_path) == 2


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EMFILE, "Raise `ulimit"), (errno.EACCES, "Mend its permissions"), (errno.EIO, "Restore it from a copy")],
)
def test_the_remedy_is_that_of_the_error(reader, number, remedy, monkeypatch):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match=remedy) as caught:
        reader.read(0)
    assert ("Restore" in str(caught.value)) == (number == errno.EIO)


def test_a_short_file_is_damage(reader, tmp_path):
    file = tmp_path / LAYOUT.chunk_file((2, 0))
    os.truncate(file, 40)
    with pytest.raises(StoreError, match=r"truncated\)\. Restore it from a copy"):
        reader.read(2)
