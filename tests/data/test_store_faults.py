"""No damage to a store is read silently: hundreds of random mutations of stores of fields and of latents.

    python -m pytest -m faults -s tests/data/test_store_faults.py

Read silently means: opening the store and reading every snapshot, scalar, medium, parameter, time and header raises
nothing and gives something else than was written under the digest that was written. So a mutation may be refused on
opening (ConfigError, one line), raise on reading (StoreError, one line), leave everything that is read as it was, or,
if someone also made every checksum and digest anew, show in the store's digest, which caches, checkpoints and reports
record. Any other outcome, another kind of error included, fails.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import pytest
import zarr

from data.chunks import ArrayLayout, FileDigest, StoreError, write_chunk
from data.digests import read_digests, seal
from data.latents import open_latents, write_latents
from data.layout import check, field_arrays, latent_arrays, parse_header
from data.reader import open_store
from shodh.config import ConfigError, to_plain

pytestmark = pytest.mark.faults

SHAPE = (4, 4, 6)
STATES = {"fields": ("flux", "pressure", "temperature"), "latents": ("latent",)}


class Template(NamedTuple):
    """A sound store to copy, how its arrays are laid out, and all that is read from it."""

    kind: str
    path: Path
    arrays: dict[str, ArrayLayout]
    content: dict[str, Any]


def read_everything(kind: str, path: Path) -> dict[str, Any]:
    """Whatever the interface gives of a store, each value as bytes or plain."""
    read: dict[str, Any] = {}
    if kind == "latents":
        latents = open_latents(path)
        read |= {"header": to_plain(latents.header), "digest": latents.digest}
        num, times = latents.num_trajectories, latents.num_snapshots
        for i in range(num):
            read[f"{i}"] = [latents.medium(i), latents.parameters(i), latents.time(i)]
            read |= {f"{i} {t}": [latents.latent(i, t)] for t in range(times)}
    else:
        store = open_store(path)
        read |= {"header": [to_plain(store.plan), to_plain(store.grid)], "digest": store.digest}
        for i in range(store.num_trajectories):
            read[f"{i}"] = [store.medium(i), store.parameters(i), store.time(i), store.trajectory_array("seed")]
            for t in range(store.num_snapshots):
                read[f"{i} {t}"] = [*store.snapshot(i, t), store.stored_velocity(i, t), store.scalars(i, t)]
    return {key: [a.tobytes() for a in value] if key[0].isdigit() else value for key, value in read.items()}


@pytest.fixture(scope="module")
def faulty_templates(stores, tmp_path_factory) -> list[Template]:
    folder = tmp_path_factory.mktemp("faults")
    changes = {"shape": SHAPE, "num_trajectories": 3, "num_snapshots": 4, "velocity_scale": 0.5}
    store = stores.make(folder / "fields", "plume", **changes)
    write_latents(folder / "latents", store, stores.encode, "abc")
    latents = open_latents(folder / "latents").header
    layouts = {
        "fields": field_arrays(
            parse_header(json.loads((store.path / "zarr.json").read_text())["attributes"], "fields")
        ),
        "latents": latent_arrays(latents.domain, latents.latent_shape, latents.medium_shape),
    }
    return [
        Template(kind, folder / kind, arrays, read_everything(kind, folder / kind)) for kind, arrays in layouts.items()
    ]


Mutate = Callable[[Path, Template, np.random.Generator], None]


def pick(rng: np.random.Generator, items):
    items = list(items)
    return items[rng.integers(len(items))]


def chunk_files(path: Path) -> list[Path]:
    return sorted(path.rglob("c.*"))


def metadata_files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("zarr.json") if p.parent.name != "digests")


def digest_files(path: Path) -> list[Path]:
    return [path / "digests/zarr.json"]


def any_files(path: Path) -> list[Path]:
    return chunk_files(path) + metadata_files(path) + digest_files(path)


def flip(files: Callable[[Path], list[Path]]) -> Mutate:
    def mutate(path: Path, template: Template, rng: np.random.Generator) -> None:
        file = pick(rng, files(path))
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)

    return mutate


def change_bytes(change: Callable[[bytes, np.random.Generator], bytes]) -> Mutate:
    def mutate(path: Path, template: Template, rng: np.random.Generator) -> None:
        file = pick(rng, any_files(path))
        file.write_bytes(change(file.read_bytes(), rng))

    return mutate


def lose_a_sector(content: bytes, rng: np.random.Generator) -> bytes:
    """A run of zeros, as a file system leaves it after a crash."""
    start = int(rng.integers(max(1, len(content) - 64)))
    return content[:start] + bytes(min(512, len(content) - start)) + content[start + 512 :]


def remove_a_file(path: Path, template: Template, rng: np.random.Generator) -> None:
    pick(rng, any_files(path)).unlink()


def remove_a_variable(path: Path, template: Template, rng: np.random.Generator) -> None:
    shutil.rmtree(path / pick(rng, template.arrays))


def rename_a_file(path: Path, template: Template, rng: np.random.Generator) -> None:
    file = pick(rng, any_files(path))
    file.rename(file.with_name(pick(rng, (f"{file.name}.bak", f".{file.name}", file.name.replace("0", "7") + "x"))))


def swap(first: Path, second: Path) -> None:
    spare = first.with_name("spare")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


def swap_two_files(path: Path, template: Template, rng: np.random.Generator) -> None:
    files = sorted((path / pick(rng, [*STATES[template.kind], static_name(template)])).glob("c.*"))
    swap(*(files[i] for i in rng.choice(len(files), 2, replace=False)))


def swap_two_variables(path: Path, template: Template, rng: np.random.Generator) -> None:
    """Data of one variable under the name of another; their files are as long."""
    names = ("pressure", "temperature") if template.kind == "fields" else ("viscosity", "diffusivity")
    first, second = ([f for f in sorted((path / name).iterdir()) if f.name != "zarr.json"] for name in names)
    swap(*pick(rng, zip(first, second, strict=True)))


def static_name(template: Template) -> str:
    return "conductivity" if template.kind == "fields" else "medium"


def inner_chunks(path: Path, template: Template, rng: np.random.Generator) -> tuple[Path, int, np.memmap]:
    """A random file of states, the bytes of an inner chunk with its checksum, and a view (inner chunk, byte)."""
    array = template.arrays[pick(rng, STATES[template.kind])]
    file = path / array.chunk_file(pick(rng, array.chunk_indices()))
    stride = array.inner_bytes + 4
    return file, stride, np.memmap(file, np.uint8, "r+", shape=(array.num_inner, stride))


def swap_inner_chunks(path: Path, template: Template, rng: np.random.Generator) -> None:
    _, _, chunks = inner_chunks(path, template, rng)
    i, k = rng.choice(len(chunks), 2, replace=False)
    chunks[[i, k]] = chunks[[k, i]]


def copy_an_inner_chunk(path: Path, template: Template, rng: np.random.Generator) -> None:
    """A sound chunk of another trajectory, checksum and all."""
    file, _, chunks = inner_chunks(path, template, rng)
    other = pick(rng, [f for f in sorted(file.parent.glob("c.*")) if f != file])
    k = rng.integers(len(chunks))
    chunks[k] = np.memmap(other, np.uint8, "r", shape=chunks.shape)[k]


def write_value(value: float) -> Mutate:
    """Values of a snapshot replaced, and zarr's checksum made anew, as zarr itself would write it."""

    def mutate(path: Path, template: Template, rng: np.random.Generator) -> None:
        _, _, chunks = inner_chunks(path, template, rng)
        k = rng.integers(len(chunks))
        values = chunks[k, :-4].view(np.float32)
        values[rng.random(values.size) < rng.choice([0.02, 1])] = value
        values[0] = value
        chunks[k, -4:] = np.frombuffer(google_crc32c.value(values.tobytes()).to_bytes(4, "little"), np.uint8)

    return mutate


def seal_again(path: Path) -> None:
    chunks = {name: d for name, d in read_digests(path).items() if not name.endswith("zarr.json")}
    seal(path, chunks)


def read_chunk(path: Path, array: ArrayLayout, index: Sequence[int]) -> np.ndarray:
    """One whole chunk as zarr reads it."""
    place = tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, array.chunk, strict=True))
    return np.array(zarr.open_array(path / array.name, mode="r")[place])


def rewrite_consistently(path: Path, template: Template, rng: np.random.Generator) -> None:
    """NaN in one value, and every checksum and digest made anew: only the digest and the deep check can tell."""
    array = template.arrays[pick(rng, STATES[template.kind])]
    index = pick(rng, array.chunk_indices())
    values = read_chunk(path, array, index)
    values.reshape(-1)[rng.integers(values.size)] = np.nan
    digests = dict(read_digests(path))
    digests |= write_chunk(path, array, index, values)
    seal(path, {name: FileDigest(*d) for name, d in digests.items() if not name.endswith("zarr.json")})
    assert any("not finite" in line for line in check(path))


def edit_metadata(edit: Callable[[dict, np.random.Generator], None]) -> Mutate:
    """An array's metadata changed, half of the time under digests made anew."""

    def mutate(path: Path, template: Template, rng: np.random.Generator) -> None:
        file = path / pick(rng, [*STATES[template.kind], static_name(template)]) / "zarr.json"
        node = json.loads(file.read_text())
        edit(node, rng)
        file.write_text(json.dumps(node, indent=2))
        if rng.random() < 0.5:
            seal_again(path)

    return mutate


def wrong_shape(node: dict, rng: np.random.Generator) -> None:
    shapes = node["shape"], node["chunk_grid"]["configuration"]["chunk_shape"]
    shape = pick(rng, (*shapes, node["codecs"][0]["configuration"]["chunk_shape"]))
    shape[rng.integers(len(shape))] += int(rng.choice([-1, 1, 7]))


def swapped_axes(node: dict, rng: np.random.Generator) -> None:
    names = node["dimension_names"]
    i, k = rng.choice(len(names), 2, replace=False)
    names[i], names[k] = names[k], names[i]
    if rng.random() < 0.5:
        node["shape"][i], node["shape"][k] = node["shape"][k], node["shape"][i]


def wrong_units(node: dict, rng: np.random.Generator) -> None:
    key, value = pick(rng, [("units", "furlong"), ("scale_factor", 2.0), ("add_offset", 1.0), ("long_name", "other")])
    node["attributes"][key] = value
    if rng.random() < 0.3:
        del node["attributes"]["units"]


def wrong_codec(node: dict, rng: np.random.Generator) -> None:
    inner = node["codecs"][0]["configuration"]["codecs"]
    change = pick(rng, (lambda: inner.pop(), lambda: inner[0]["configuration"].update(endian="big"),
                        lambda: node.update(data_type="int32"), lambda: node.update(codecs=inner)))  # fmt: skip
    change()


def edit_header(resealed: bool) -> Mutate:
    def mutate(path: Path, template: Template, rng: np.random.Generator) -> None:
        node = json.loads((path / "zarr.json").read_text())
        attributes = node["attributes"]
        edits = [
            lambda: attributes["domain"].update(boundary=["periodic", "periodic", "periodic"]),
            lambda: attributes["domain"].update(velocity_space="full"),
            lambda: attributes["domain"]["velocity"].update(units="1"),
            lambda: attributes["domain"]["scalars"].reverse(),
            lambda: attributes.update(layout_version=1),
            lambda: attributes.update(num_test=2),
            lambda: attributes.pop("domain"),
        ]
        if template.kind == "fields":
            edits += [
                lambda: attributes.update(velocity_scale=2.0),
                lambda: attributes["grid"].update(spacing=[1.0, 1.0, 1.0]),
                lambda: attributes["grid"].update(shape=[6, 4, 4]),
            ]
        else:
            edits += [lambda: attributes.update(tokenizer_hash="abd"), lambda: attributes.update(field_digest="0" * 64)]
        pick(rng, edits)()
        (path / "zarr.json").write_text(json.dumps(node, indent=2))
        if resealed:
            seal_again(path)

    return mutate


FAULTS: dict[str, tuple[int, Mutate]] = {
    "bit flipped in a chunk": (120, flip(chunk_files)),
    "bit flipped in metadata": (60, flip(metadata_files)),
    "bit flipped in the digests": (60, flip(digest_files)),
    "file truncated": (60, change_bytes(lambda content, rng: content[: rng.integers(len(content))])),
    "file emptied": (30, change_bytes(lambda content, rng: b"")),
    "file extended": (30, change_bytes(lambda content, rng: content + rng.bytes(int(rng.integers(1, 600))))),
    "sector zeroed": (40, change_bytes(lose_a_sector)),
    "file missing": (40, remove_a_file),
    "file renamed": (24, rename_a_file),
    "variable missing": (16, remove_a_variable),
    "files swapped": (30, swap_two_files),
    "variables swapped": (16, swap_two_variables),
    "inner chunks swapped": (30, swap_inner_chunks),
    "inner chunk of another trajectory": (30, copy_an_inner_chunk),
    "NaN under a sound checksum": (30, write_value(np.nan)),
    "zeros under a sound checksum": (30, write_value(0.0)),
    "NaN, all digests made anew": (16, rewrite_consistently),
    "wrong shape": (30, edit_metadata(wrong_shape)),
    "axes swapped": (30, edit_metadata(swapped_axes)),
    "wrong units or scale": (30, edit_metadata(wrong_units)),
    "wrong codec or type": (24, edit_metadata(wrong_codec)),
    "header changed": (24, edit_header(resealed=False)),
    "header changed, digests made anew": (24, edit_header(resealed=True)),
}


def outcome(template: Template, path: Path) -> str:
    """Where a mutation was caught; raises AssertionError if it was read silently."""
    try:
        content = read_everything(template.kind, path)
    except (ConfigError, StoreError) as error:
        assert "\n" not in str(error) and len(str(error)) > 40, f"not one line with a remedy: {error}"
        return "refused on opening" if isinstance(error, ConfigError) else "raised on reading"
    if content["digest"] != template.content["digest"]:
        return "another digest"
    assert content == template.content, "read silently"
    return "same values, named by the check" if check(path) else "same values"


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_is_read_silently(fault, faulty_templates, tmp_path):
    count, mutate = FAULTS[fault]
    rng = np.random.default_rng([3, list(FAULTS).index(fault)])
    outcomes = Counter()
    for n in range(count):
        template = faulty_templates[n % 2]
        path = shutil.copytree(template.path, tmp_path / f"{n}" / template.kind)
        mutate(path, template, rng)
        outcomes[outcome(template, path)] += 1
        shutil.rmtree(path)
    print(f"\n{fault}: {count} mutations, none read silently; " + ", ".join(f"{v} {k}" for k, v in outcomes.items()))
    assert outcomes.total() == count


def test_there_are_at_least_500_mutations():
    assert sum(count for count, _ in FAULTS.values()) >= 500


def test_the_reading_that_faults_are_held_against_notices_every_value(faulty_templates, tmp_path):
    """The comparison itself can fail: a store whose values were changed under new digests reads as different."""
    for template in faulty_templates:
        path = shutil.copytree(template.path, tmp_path / template.kind)
        assert read_everything(template.kind, path) == template.content
        rng = np.random.default_rng(0)
        rewrite_consistently(path, template, rng)
        changed = read_everything(template.kind, path)
        assert [key for key in changed if changed[key] != template.content[key] and key != "digest"]
