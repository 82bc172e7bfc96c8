"""Parcels give back what was put in, in parts no larger than allowed, or name the part that is not what it was."""

import hashlib
import json
from pathlib import Path

import pytest

from shodh.config import ConfigError
from shodh.parcel import CONTENTS, pack, unpack


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """Files around the size of a part, which is 100 bytes here."""
    sizes = {"empty": 0, "small.json": 99, "whole": 100, "deep/er/split": 101, "deep/many": 1234}
    made = {}
    for seed, (name, size) in enumerate(sizes.items()):
        made[name] = tmp_path / "source" / name
        made[name].parent.mkdir(parents=True, exist_ok=True)
        made[name].write_bytes(bytes((seed + 7 * k) % 251 for k in range(size)))
    return made


def test_unpacked_files_are_those_packed_and_no_part_is_larger_than_allowed(files, tmp_path):
    num = pack(files, tmp_path / "parcel", 100)
    parts = [path for path in (tmp_path / "parcel").rglob("*") if path.is_file() and path.name != CONTENTS]
    assert num == len(parts) == 1 + 1 + 1 + 2 + 13 and max(path.stat().st_size for path in parts) == 100
    assert (tmp_path / "parcel" / "small.json").read_bytes() == files["small.json"].read_bytes()
    assert unpack(tmp_path / "parcel", tmp_path / "there") == list(files)
    for name, file in files.items():
        assert (tmp_path / "there" / name).read_bytes() == file.read_bytes()
    assert sorted(p for p in (tmp_path / "there").rglob("*") if p.is_file()) == sorted(
        tmp_path / "there" / n for n in files
    )


def test_contents_state_the_digest_of_every_part_and_the_size_of_every_file(files, tmp_path):
    pack(files, tmp_path / "parcel", 100)
    contents = json.loads((tmp_path / "parcel" / CONTENTS).read_text())["files"]
    for name, file in files.items():
        content, parts = file.read_bytes(), contents[name]["parts"]
        pieces = [content[100 * k : 100 * (k + 1)] for k in range(len(parts))]
        assert [part["sha256"] for part in parts] == [hashlib.sha256(piece).hexdigest() for piece in pieces]
        assert b"".join(pieces) == content and contents[name]["size"] == len(content)


@pytest.mark.parametrize("part", ["small.json", "deep/many.part-007", "deep/er/split.part-001"])
@pytest.mark.parametrize("harm", ["flip", "cut", "lose", "swap"])
def test_a_damaged_part_is_named_in_one_line_and_nothing_is_unpacked(files, tmp_path, part, harm):
    pack(files, tmp_path / "parcel", 100)
    path = tmp_path / "parcel" / part
    content = path.read_bytes()
    changed = {
        "flip": bytes([content[0] ^ 1]) + content[1:],
        "cut": content[:-1],
        "lose": b"",
        "swap": b"x" * len(content),
    }
    path.unlink() if harm == "lose" else path.write_bytes(changed[harm])
    said = "is missing" if harm == "lose" else "is damaged"
    with pytest.raises(ConfigError, match=rf"^part=.*{part}: {said}") as caught:
        unpack(tmp_path / "parcel", tmp_path / "there")
    assert "\n" not in str(caught.value) and not (tmp_path / "there").exists()


@pytest.mark.parametrize("name", ["../outside", "/outside", "deep/../../outside"])
def test_a_parcel_that_names_files_outside_is_refused(files, tmp_path, name):
    pack(files, tmp_path / "parcel", 100)
    contents = tmp_path / "parcel" / CONTENTS
    contents.write_text(contents.read_text().replace('"whole"', f'"{name}"'))
    with pytest.raises(ConfigError, match="outside the folder"):
        unpack(tmp_path / "parcel", tmp_path / "there")


UNREADABLE = (
    "",
    "{",
    "[]",
    '{"files": 3}',
    '{"files": {"a": {}}}',
    '{"files": {"small.json": {"size": 99, "parts": [{"name": "small.json", "size": 99}]}}}',
    '{"files": {"small.json": {"size": 99, "parts": []}}}',
)


@pytest.mark.parametrize("text", UNREADABLE)
def test_unreadable_contents_are_one_line(files, tmp_path, text):
    pack(files, tmp_path / "parcel", 100)
    (tmp_path / "parcel" / CONTENTS).write_text(text)
    with pytest.raises(ConfigError, match=r"^import=.*parcel.json cannot be read") as caught:
        unpack(tmp_path / "parcel", tmp_path / "there")
    assert "\n" not in str(caught.value)


def test_parts_that_did_not_change_stay_the_files_they_were_and_damaged_ones_are_written_again(files, tmp_path):
    parcel = tmp_path / "parcel"
    pack(files, parcel, 100)
    content = files["deep/many"].read_bytes()
    files["deep/many"].write_bytes(content[:-1] + b"!")  # in the last of 13 parts
    (parcel / "whole").write_bytes(b"x" * 100)
    before = {path: path.stat().st_ino for path in parcel.rglob("*") if path.is_file()}
    pack(files, parcel, 100)
    written = {str(path.relative_to(parcel)) for path in before if path.stat().st_ino != before[path]}
    assert written == {"deep/many.part-012", "whole", CONTENTS}
    unpack(parcel, tmp_path / "there")
    assert all((tmp_path / "there" / name).read_bytes() == file.read_bytes() for name, file in files.items())


def test_a_new_parcel_replaces_the_old_one_whole_and_nothing_else(files, tmp_path):
    pack(files, tmp_path / "parcel", 100)
    pack({"whole": files["whole"]}, tmp_path / "parcel", 100)
    assert sorted(path.name for path in (tmp_path / "parcel").iterdir()) == [CONTENTS, "whole"]
    with pytest.raises(ConfigError, match="something that is no export"):
        pack(files, tmp_path / "source", 100)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    with pytest.raises(ConfigError, match="is there already"):
        unpack(tmp_path / "parcel", tmp_path / "mine")
