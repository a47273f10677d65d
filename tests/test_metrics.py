import json
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from bvit_jax import files, metrics


def events(directory: Path) -> list[Event]:
    """Reads all TensorBoard events: records of length, its checksum, content, its checksum."""
    found = []
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def scalars(directory: Path) -> list[tuple[str, int, float]]:
    return [(value.tag, event.step, value.simple_value) for event in events(directory) for value in event.summary.value]


def test_text_is_written_whole(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "first")
    files.write_text(path, "second")
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def torn(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", torn)
        with pytest.raises(OSError, match="disk full"):
            files.write_text(path, "new and longer")
    assert path.read_text() == "old"
    files.write_text(path, "newer")
    assert path.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [path]


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ('{"step": 1}\n', [1]),
        ('{"step": 1}\n{"step": 2}\n', [1, 2]),
        ('{"step": 1}\n{"st', [1]),
        ('{"step": 1}\n{"st\n', [1]),
        ('{"step": 1}\n{"step": 2}', [1]),  # without its newline a row may be cut: {"step": 20} would read as well
        ('{"st', []),
    ],
)
def test_a_torn_last_line_is_left_out(tmp_path, text, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert [row["step"] for row in metrics.read_rows(path)] == expected


def test_an_absent_file_has_no_rows(tmp_path):
    assert metrics.read_rows(tmp_path / "rows.jsonl") == []


def test_rows_can_be_read_while_the_file_is_open(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = metrics.JsonLines(path, 0)
    for step in (1, 2):
        lines.write({"step": step, "loss": step / 3})
        assert metrics.read_rows(path)[-1] == {"step": step, "loss": step / 3}
    lines.close()
    assert len(metrics.read_rows(path)) == 2


@pytest.mark.parametrize(("last_step", "kept"), [(0, []), (2, [1, 2, 2]), (3, [1, 2, 2, 3]), (9, [1, 2, 2, 3])])
def test_reopening_drops_what_came_after_the_last_step(tmp_path, last_step, kept):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 2, 3)) + '{"step": 4, "lo')
    lines = metrics.JsonLines(path, last_step)
    assert [row["step"] for row in metrics.read_rows(path)] == kept
    lines.write({"step": 10})
    lines.close()
    assert [row["step"] for row in metrics.read_rows(path)] == [*kept, 10]
    assert path.read_text().count("\n") == len(kept) + 1


def test_reopening_drops_the_test_split_which_is_reported_last(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"step": 4, "split": split} for split in ("train", "validation", "test")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics.JsonLines(path, 4).close()
    assert metrics.read_rows(path) == rows[:2]


def test_a_run_log_writes_rows_and_scalars(tmp_path):
    log = metrics.RunLog(tmp_path, 0)
    log.metrics(3, "train", {"loss": 1.5, "count": 7, "load": [0.5, 0.5], "name": "a"})
    log.metrics(4, "validation", {"accuracy": 0.25})
    log.timing(4, {"images_per_second": 80.0})
    log.close()
    assert metrics.read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 3, "split": "train", "loss": 1.5, "count": 7, "load": [0.5, 0.5], "name": "a"},
        {"step": 4, "split": "validation", "accuracy": 0.25},
    ]
    assert metrics.read_rows(tmp_path / "timing.jsonl") == [{"step": 4, "images_per_second": 80.0}]
    assert sorted(scalars(tmp_path / "tensorboard")) == [
        ("timing/images_per_second", 4, 80.0),
        ("train/count", 3, 7.0),
        ("train/loss", 3, 1.5),
        ("validation/accuracy", 4, 0.25),
    ]


def test_a_run_log_that_is_not_active_touches_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n')
    before = (tmp_path / "metrics.jsonl").stat()
    log = metrics.RunLog(tmp_path, 2, active=False)
    log.metrics(3, "train", {"loss": 1.5})
    log.timing(3, {"seconds": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 4, "loss": 1.0}\n'
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before.st_mtime_ns


def test_a_run_log_goes_on_where_the_run_does(tmp_path):
    log = metrics.RunLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.metrics(step, "train", {"loss": 1.0})
        log.timing(step, {"seconds": 1.0})
    log.close()
    log = metrics.RunLog(tmp_path, 2)
    log.metrics(3, "train", {"loss": 2.0})
    log.timing(3, {"seconds": 2.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in metrics.read_rows(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 1),
        (3, 2),
    ]
    assert [(row["step"], row["seconds"]) for row in metrics.read_rows(tmp_path / "timing.jsonl")] == [
        (1, 1),
        (2, 1),
        (3, 2),
    ]
    # TensorBoard is told to forget what came after the last step.
    assert max(event.step for event in events(tmp_path / "tensorboard") if event.HasField("session_log")) == 3
