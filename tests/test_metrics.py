import json
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from bvit_jax import metrics


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


def test_a_damaged_row_ends_what_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\xffp": 2}\n{"step": \xff}\n{"step": 4}\n')
    assert metrics.read_rows(path)[0] == {"step": 1}
    assert {"step": 4} not in metrics.read_rows(path)
    assert metrics.parse('{"step": 1}\n\n{"step": 3}\n') == [{"step": 1}]


def test_a_line_separator_within_a_row_does_not_end_it():
    assert metrics.parse('{"name": "a\u2028b\x85c"}\n') == [{"name": "a\u2028b\x85c"}]


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({}, None),
        ({3: (0.0, 9.0)}, 3),
        ({1: (0.2, 2.0), 2: (0.9, 1.0), 3: (0.3, 0.5)}, 2),  # by accuracy first
        ({1: (0.5, 2.0), 2: (0.5, 1.0), 3: (0.5, 3.0)}, 2),  # then by likelihood
        ({1: (0.5, 1.0), 2: (0.5, 1.0), 3: (0.4, 1.0)}, 2),  # then the later
        ({2: (0.5, 1.0), 1: (0.5, 1.0)}, 2),
    ],
)
def test_the_best_row_is_of_the_validation_split(scores, best):
    rows = [
        {"step": step, "split": "validation", "accuracy": accuracy, "nll": nll}
        for step, (accuracy, nll) in scores.items()
    ]
    others = [{"step": 4, "split": split, "accuracy": 1.0, "nll": 0.0} for split in ("train", "test")]
    text = "".join(json.dumps(row) + "\n" for row in [others[0], *rows, others[1], {"step": 5}])
    found = metrics.best_row(text)
    assert (found and found["step"]) == best
    assert metrics.best_row(text, steps=[4, 5]) is None
    second = metrics.best_row(text, steps=scores.keys() - {best})
    assert (second is None) == (len(scores) < 2)


def test_rows_can_be_read_while_the_file_is_open(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = metrics.JsonLines(path, "")
    assert path.read_text() == ""
    for step in (1, 2):
        lines.write({"step": step, "loss": step / 3})
        assert metrics.read_rows(path)[-1] == {"step": step, "loss": step / 3}
    lines.close()
    assert len(metrics.read_rows(path)) == 2


@pytest.mark.parametrize("before", [None, "", '{"step": 1}\n{"step": 2}\n{"st', "rubbish"])
@pytest.mark.parametrize("text", ["", '{"step": 1}\n', '{"step":1}\n{"step":  7}\n'])
def test_lines_begin_with_the_text_given_whatever_the_file_held(tmp_path, before, text):
    path = tmp_path / "rows.jsonl"
    if before is not None:
        path.write_text(before)
    lines = metrics.JsonLines(path, text)
    assert path.read_text() == text
    lines.write({"step": 10})
    lines.close()
    assert path.read_text() == text + '{"step": 10}\n'


def test_a_run_log_writes_rows_and_scalars(tmp_path):
    log = metrics.RunLog(tmp_path, 0, "")
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
    log = metrics.RunLog(tmp_path, 2, '{"step": 2}\n', active=False)
    log.metrics(3, "train", {"loss": 1.5})
    log.timing(3, {"seconds": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 4, "loss": 1.0}\n'
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("active", [True, False])
def test_the_text_of_a_run_log_is_that_of_its_file_wherever_it_is_written(tmp_path, active):
    known = '{"step": 2, "split": "train", "loss": 0.1}\n'
    log = metrics.RunLog(tmp_path, 2, known, active)
    assert log.text == known
    log.metrics(3, "train", {"loss": 1 / 3})
    log.timing(3, {"seconds": 1.0})
    log.close()
    assert log.text == known + json.dumps({"step": 3, "split": "train", "loss": 1 / 3}) + "\n"
    assert (tmp_path / "metrics.jsonl").exists() == active
    if active:
        assert (tmp_path / "metrics.jsonl").read_text() == log.text


def test_a_run_log_goes_on_where_the_run_does(tmp_path):
    log, known = metrics.RunLog(tmp_path, 0, ""), ""
    for step in (1, 2, 3):
        log.metrics(step, "train", {"loss": 1.0})
        log.timing(step, {"wall_seconds": 1.0})
        known = log.text if step == 2 else known
    log.close()
    with (tmp_path / "timing.jsonl").open("a") as file:
        file.write('{"step": 4, "sec')
    log = metrics.RunLog(tmp_path, 2, known)
    log.metrics(3, "train", {"loss": 2.0})
    log.timing(3, {"wall_seconds": 2.0})
    log.close()
    losses = [(row["step"], row["loss"]) for row in metrics.read_rows(tmp_path / "metrics.jsonl")]
    assert losses == [(1, 1), (2, 1), (3, 2)]
    seconds = [(row["step"], row["wall_seconds"]) for row in metrics.read_rows(tmp_path / "timing.jsonl")]
    assert seconds == [(1, 1), (2, 1), (3, 2)]
    # TensorBoard is told to forget what came after the last step.
    assert max(event.step for event in events(tmp_path / "tensorboard") if event.HasField("session_log")) == 3


def test_a_log_that_was_lost_is_made_good_from_what_is_known(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("rubbish")
    (tmp_path / "timing.jsonl").write_text("rubbish\n")
    known = '{"step": 1, "split": "train"}\n'
    metrics.RunLog(tmp_path, 1, known).close()
    assert (tmp_path / "metrics.jsonl").read_text() == known
    assert (tmp_path / "timing.jsonl").read_text() == ""
