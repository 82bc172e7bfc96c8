"""Damaged sources: with a manifest beside them none is read, without one none but by the user's explicit acceptance.

What is accepted is still refused where structure or physics tell. A flipped bit of a value that stays plausible cannot
be told from the file alone (.npy and HDF5 have no checksum): those are counted and printed (pytest -s), no more.
Specimens are cubes where the published data are, so that lengths do not give swapped axes away.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest

from data.digests import read_digests
from data.ingest import digital_rocks, jhtdb, openfwi, pdebench, the_well
from shodh.config import ConfigError

pytestmark = pytest.mark.faults

NUM_VERIFIED = 70  # mutations per format with a manifest: 350
NUM_FLIPS = 24  # flipped bits per format without one
SPECIMEN = {
    "openfwi": {"num": 2, "files": 1},
    "jhtdb": {"shape": (16, 16, 16), "spacing": 2 * np.pi / 16, "start": 0.0},
}


class Format(NamedTuple):
    """How one format is ingested, and which changes of its variables it must refuse by itself."""

    ingest: Callable
    config: Any
    write: str  # of the fixture ``published``
    changes: dict[str, list[tuple[str, Callable]]]  # kind of fault -> (variable or file, change of its values)


def with_nan(values):
    changed = values.copy()
    changed.reshape(-1)[changed.size // 3] = np.nan
    return changed


def swapped(first, second):
    return lambda values: np.ascontiguousarray(values.swapaxes(first, second))


def reversed_along(axis):
    return lambda values: np.ascontiguousarray(np.flip(values, axis))


def times(factor):
    return lambda values: values * np.float32(factor)


def shorter(values):
    return values[..., :-1].copy()


def changes_of(names, *, swap=None, unit=None) -> dict[str, list[tuple[str, Callable]]]:
    kinds = {"NaN": with_nan, "wrong shape": shorter, "wrong type": lambda v: v.astype(np.float16)}
    kinds |= {"swapped axes": swap} if swap else {}
    faults = {kind: [(name, change) for name in names] for kind, change in kinds.items()}
    return faults | ({"wrong unit": unit} if unit else {})


CFD = ("density", "pressure", "Vx", "Vy", "Vz")
STATES = ("Velocity_0001", "Pressure_0002")
FORMATS = {
    "openfwi": Format(
        openfwi.ingest, openfwi.OpenFWIConfig(times=240, receivers=24, depth=24, unverified="accept"), "openfwi",
        changes_of(("data/data1.npy", "model/model1.npy"), swap=swapped(2, 3), unit=[
            ("model/model1.npy", times(1e-3)), ("model/model1.npy", times(1 / 0.3048)),
            ("data/data1.npy", times(-1)), ("data/data1.npy", times(1 / 60)),
        ]) | {"reversed axis": [("data/data1.npy", reversed_along(2)), ("data/data1.npy", reversed_along(1)),
                                ("model/model1.npy", reversed_along(2))],
              "wrong pair": [("data/data1.npy", reversed_along(0))]},
    ),
    "jhtdb": Format(
        jhtdb.ingest, jhtdb.JHTDBConfig(dataset="isotropic1024coarse", unverified="accept"), "jhtdb",
        changes_of(STATES, unit=[("Velocity_0001", times(100))])
        | {"swapped axes": [("Velocity_0002", swapped(0, 2)), ("Velocity_0002", swapped(0, 1))],
           "swapped components": [("Velocity_0001", lambda v: v[..., ::-1].copy())]},
    ),
    "digital_rocks": Format(
        digital_rocks.ingest, digital_rocks.DigitalRocksConfig(unverified="accept"), "rock",
        {"NaN": [("pore", lambda v: with_nan(v.astype(np.float32)))], "wrong shape": [("pore", lambda v: v[0])],
         "third value": [("pore", lambda v: np.where(np.arange(v.size).reshape(v.shape) == 99, 7, v))]},
    ),
    "the_well": Format(
        the_well.ingest, the_well.TheWellConfig(unverified="accept"), "the_well",
        changes_of(("t0_fields/density", "t1_fields/velocity"), swap=swapped(2, 4),
                   unit=[("t0_fields/density", times(-1))])
        | {"reversed axis": [("t1_fields/velocity", times(-1))]},
    ),
    "pdebench": Format(
        pdebench.ingest, pdebench.PDEBenchConfig(unverified="accept"), "pdebench",
        changes_of(CFD, unit=[("Vx", times(1e3)), ("pressure", times(1e6)), ("density", times(-1))])
        | {"swapped axes": [(name, swapped(2, 4)) for name in CFD if name != "pressure"],  # no law read here binds it
           "reversed axis": [("Vz", times(-1))]},
    ),
}  # fmt: skip


@pytest.fixture(params=FORMATS)
def name(request) -> str:
    return request.param


@pytest.fixture
def specimen(name, published, tmp_path) -> Path:
    """A sound source of the format."""
    return getattr(published, FORMATS[name].write)(tmp_path / "sound", **SPECIMEN.get(name, {}))


def source_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS")


def attempt(name: str, folder: Path, store: Path, *, strict: bool = False) -> tuple[str, list[str]]:
    """``refused`` in one line, or ``read``; and what the user was told. Anything but a ConfigError is a failure.

    ``strict``: as the user gets it who has not accepted an unverified source.
    """
    said: list[str] = []
    config = replace(FORMATS[name].config, unverified="refuse") if strict else FORMATS[name].config
    shutil.rmtree(store, ignore_errors=True)
    shutil.rmtree(store.with_name(store.name + ".partial"), ignore_errors=True)
    try:
        FORMATS[name].ingest(folder, store, config, said.append)
    except ConfigError as error:
        assert "\n" not in str(error)
        return "refused", said
    return "read", said


def flip_bit(path: Path, random: np.random.Generator, header: bool = False) -> None:
    content = bytearray(path.read_bytes())
    position = int(random.integers(min(len(content), 2048) if header else len(content)))
    content[position] ^= 1 << int(random.integers(8))
    path.write_bytes(content)


def truncate(path: Path, random: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes()[: int(random.integers(1, path.stat().st_size))])


BYTES: dict[str, Callable[[Path, np.random.Generator], None]] = {
    "bit in header": lambda path, random: flip_bit(path, random, header=True),
    "bit anywhere": flip_bit,
    "truncated": truncate,
    "empty": lambda path, random: path.write_bytes(b""),
    "missing": lambda path, random: path.unlink(),
}


def change_variable(folder: Path, variable: str, change: Callable | None) -> None:
    """Rewrite a variable as a sound file would hold it; ``None`` removes it."""
    if variable.endswith(".npy"):
        np.save(folder / variable, change(np.load(folder / variable)))
        return
    path = source_files(folder)[0]
    if path.suffix == ".npz":
        with np.load(path) as archive:
            values = archive[variable]
        np.savez_compressed(path, **({variable: change(values)} if change else {}))
        return
    with h5py.File(path, "r+") as file:
        values, attributes = file[variable][...], dict(file[variable].attrs)
        del file[variable]
        if change:
            file[variable] = change(values)
            file[variable].attrs.update(attributes)


def all_changes(name: str) -> list[tuple[str, str, Callable | None]]:
    faults = [(kind, *change) for kind, changes in FORMATS[name].changes.items() for change in changes]
    variables = {variable for _, variable, _ in faults if not variable.endswith(".npy")}
    return faults + [("missing variable", variable, None) for variable in sorted(variables)]


def test_no_damaged_source_with_a_manifest_is_read(name, specimen, published, tmp_path):
    """350 mutations over five formats: bits, truncation, NaN, shapes, axes, units, types, variables, files."""
    published.manifest(specimen)
    assert attempt(name, specimen, tmp_path / "store", strict=True)[0] == "read"
    random, outcomes = np.random.default_rng([1, list(FORMATS).index(name)]), Counter()
    kinds = [*BYTES, *all_changes(name)]
    for number in range(NUM_VERIFIED):
        folder = shutil.copytree(specimen, tmp_path / "damaged")
        kind = kinds[int(random.integers(len(kinds)))]
        if isinstance(kind, str):
            files = source_files(folder)
            file = files[int(random.integers(len(files)))]
            BYTES[kind](file, random)
        else:
            change_variable(folder, *kind[1:])
        outcome = attempt(name, folder, tmp_path / "store", strict=True)[0]
        assert outcome == "refused", f"mutation {number}: {kind}"
        outcomes[kind if isinstance(kind, str) else kind[0]] += 1
        shutil.rmtree(folder)
    print(f"\n{name}, with a manifest: {NUM_VERIFIED} of {NUM_VERIFIED} refused: {dict(outcomes)}")


def test_a_sound_source_without_a_manifest_is_read_only_by_an_explicit_act(name, specimen, tmp_path):
    assert attempt(name, specimen, tmp_path / "store", strict=True)[0] == "refused"
    outcome, said = attempt(name, specimen, tmp_path / "store")
    assert outcome == "read" and "accepted as they are" in said[0]


def test_without_a_manifest_all_but_plausible_values_are_refused(name, specimen, tmp_path):
    """Every fault but a flipped bit is told by structure or physics."""
    random = np.random.default_rng([2, list(FORMATS).index(name)])
    for kind, variable, change in all_changes(name):
        folder = shutil.copytree(specimen, tmp_path / "damaged")
        change_variable(folder, variable, change)
        assert attempt(name, folder, tmp_path / "store")[0] == "refused", (kind, variable)
        shutil.rmtree(folder)
    for kind in ("truncated", "truncated", "empty", "missing"):
        for index in range(len(source_files(specimen))):
            folder = shutil.copytree(specimen, tmp_path / "damaged")
            BYTES[kind](source_files(folder)[index], random)
            assert attempt(name, folder, tmp_path / "store")[0] == "refused", (kind, index)
            shutil.rmtree(folder)


def test_how_many_flipped_bits_plausibility_tells_in_a_source_accepted_without_a_manifest(name, specimen, tmp_path):
    attempt(name, specimen, tmp_path / "sound_store")
    expected = chunk_hashes(tmp_path / "sound_store")
    random, outcomes = np.random.default_rng([3, list(FORMATS).index(name)]), Counter()
    for _ in range(NUM_FLIPS):
        folder = shutil.copytree(specimen, tmp_path / "damaged")
        files = source_files(folder)
        BYTES["bit anywhere"](files[int(random.integers(len(files)))], random)
        outcome, said = attempt(name, folder, tmp_path / "store")
        if outcome == "read":
            assert "accepted as they are" in said[0]
            outcome = "harmless" if chunk_hashes(tmp_path / "store") == expected else "read by acceptance"
        outcomes[outcome] += 1
        shutil.rmtree(folder)
    print(f"\n{name}, of {NUM_FLIPS} bits flipped without a manifest: {dict(outcomes)}")
    assert name != "digital_rocks" or not outcomes["read by acceptance"]  # .npz has a checksum of its own


def chunk_hashes(store: Path) -> dict[str, str]:
    return {file: digest.inner for file, digest in read_digests(store).items() if not file.endswith("zarr.json")}
