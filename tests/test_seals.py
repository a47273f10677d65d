import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bvit_jax import seals

FILES = {"record/metadata": b"{}", "state/array/0": b"0123456789", "state/manifest": b"x", "state/array/none": b""}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sealed folder; a file of its own, which others may still write, is not under the seal."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "loose").write_bytes(b"loose")
    seals.seal(tmp_path)
    return tmp_path


def message(folder: Path) -> str:
    with pytest.raises(seals.BrokenSealError) as caught:
        seals.check(folder)
    return str(caught.value)


def test_a_seal_holds_size_and_sha_of_every_file(folder):
    stored = json.loads((folder / "seal.json").read_text())
    assert stored["files"] == {
        name: [len(content), hashlib.sha256(content).hexdigest()] for name, content in FILES.items()
    }
    seals.check(folder)


def test_what_is_sealed_stays_so_elsewhere(folder, tmp_path_factory):
    there = tmp_path_factory.mktemp("other") / "copy"
    shutil.copytree(folder, there)
    seals.check(there)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_named(folder, name):
    for place in range(len(FILES[name])):
        for bit in range(8):
            changed = bytearray(FILES[name])
            changed[place] ^= 1 << bit
            (folder / name).write_bytes(changed)
            assert message(folder) == f"{name} holds other bytes than were written"
    (folder / name).write_bytes(FILES[name])
    seals.check(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_size_is_named_with_both_sizes(folder, name):
    right = len(FILES[name])
    for size in {0, right - 1, right + 1, right + 4096} - {right, -1}:
        (folder / name).write_bytes((FILES[name] + bytes(4096))[:size])
        assert message(folder) == f"{name} has {size} bytes instead of {right}"


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("lose", [Path.unlink, as_folder, as_broken_link])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_gone_is_named(folder, name, lose):
    lose(folder / name)
    assert message(folder) == f"{name} is missing"


def test_a_folder_that_is_gone_is_named_by_what_it_held(folder):
    shutil.rmtree(folder / "state")
    assert message(folder) in {f"{name} is missing" for name in FILES if name.startswith("state")}


def test_an_empty_folder_is_called_so(tmp_path):
    assert message(tmp_path) == "it is empty"


def test_more_files_are_no_damage(folder):
    (folder / "_METADATA").write_bytes(b"written later")
    (folder / "state" / "array" / "1").write_bytes(b"more")
    (folder / "loose").unlink()
    seals.check(folder)


@pytest.mark.parametrize("lose", [Path.unlink, as_folder, as_broken_link])
def test_a_seal_that_is_gone_is_named(folder, lose):
    lose(folder / "seal.json")
    assert message(folder) == "seal.json is missing"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"null", b"3", b'"files"', b'{"files": {}}', b'{"sha256": ""}', b"\xff\xfe"]
)
def test_a_seal_that_cannot_be_read_is_named(folder, content):
    (folder / "seal.json").write_bytes(content)
    assert message(folder).startswith("seal.json cannot be read (")


def change_digest(stored: dict) -> None:
    stored["sha256"] = "0" * 64


def change_size(stored: dict) -> None:
    stored["files"]["state/manifest"][0] += 1


def leave_one_out(stored: dict) -> None:
    del stored["files"]["state/manifest"]


@pytest.mark.parametrize("change", [change_digest, change_size, leave_one_out])
def test_a_seal_that_was_changed_is_told_from_damage_to_the_files(folder, change: Callable[[dict], None]):
    stored = json.loads((folder / "seal.json").read_text())
    change(stored)
    (folder / "seal.json").write_text(json.dumps(stored))
    assert message(folder) == "seal.json differs from its own digest"


def test_no_damage_to_a_seal_lets_damage_to_a_file_pass(folder):
    (folder / "state" / "manifest").write_bytes(b"y")
    whole = (folder / "seal.json").read_bytes()
    for place in range(0, len(whole), 2):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        (folder / "seal.json").write_bytes(changed)
        assert message(folder)
    for length in range(0, len(whole), 5):
        (folder / "seal.json").write_bytes(whole[:length])
        assert message(folder)


def test_a_folder_can_be_sealed_again(folder):
    (folder / "state" / "manifest").write_bytes(b"other")
    seals.seal(folder)
    seals.check(folder)
