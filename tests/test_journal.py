import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from bvit_jax import journal, processes
from bvit_jax.journal import Journal


def rows(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / journal.FILE).read_text().splitlines()]


def tell_everything(teller: Journal) -> None:
    teller.say("a line")
    teller.incident("resumed", 3, "going on from step 3")
    teller.warn("damaged", 5, "a file is “damaged”\nand more")


@pytest.mark.parametrize("shows", [True, False])
def test_incidents_are_written_down_and_shown(tmp_path, capsys, shows):
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    teller = Journal(tmp_path, shows)
    assert teller.shows == shows
    tell_everything(teller)
    shown = capsys.readouterr()
    assert shown.out == ("a line\ngoing on from step 3\n" if shows else "")
    assert shown.err == "warning: a file is “damaged”\nand more\n"
    found = rows(tmp_path)
    assert [(row["kind"], row["step"], row["text"]) for row in found] == [
        ("resumed", 3, "going on from step 3"),
        ("damaged", 5, "a file is “damaged”\nand more"),
    ]
    for row in found:
        assert row.keys() == {"utc", "kind", "step", "text"}
        assert before <= datetime.datetime.fromisoformat(row["utc"]) <= datetime.datetime.now(datetime.UTC)


def test_the_story_goes_on_over_restarts(tmp_path):
    for step in (3, 6):
        Journal(tmp_path, False).incident("preempted", step, f"step {step} is saved")
    assert [row["step"] for row in rows(tmp_path)] == [3, 6]


def test_a_story_cut_short_goes_on_in_a_line_of_its_own(tmp_path):
    (tmp_path / journal.FILE).write_text('{"utc": "2026')
    Journal(tmp_path, False).incident("resumed", 1, "going on from step 1")
    last = (tmp_path / journal.FILE).read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 1


def test_of_several_processes_the_others_keep_quiet(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    teller = Journal(tmp_path, True)
    assert not teller.shows
    tell_everything(teller)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_nothing_told_writes_nothing(tmp_path):
    Journal(tmp_path, True)
    assert list(tmp_path.iterdir()) == []
