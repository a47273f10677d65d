import json
import os
from pathlib import Path

import pytest

from bvit_jax import files


def test_text_is_written_whole(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "first")
    files.write_text(path, "é")
    assert path.read_bytes() == "é".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk full"):
            files.write_text(path, "new and longer")
    assert path.read_text() == "old"
    files.write_text(path, "newer")
    assert path.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    path, order = tmp_path / "a.txt", []
    true_fsync, true_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        order.append(("on disk", os.fstat(descriptor).st_size))
        true_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        order.append(("named", self.stat().st_size))
        return true_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    files.write_text(path, "twelve bytes")
    assert order == [("on disk", 12), ("named", 12)]


def test_json_comes_back(tmp_path):
    content = {"a": [1, 2.5, None], "b": {"c": "é"}}
    files.write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_text()) == content
    assert (tmp_path / "a.json").read_text().endswith("}\n")


def test_what_is_no_json_leaves_the_old_file(tmp_path):
    files.write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", [object()])
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
