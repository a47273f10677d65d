import csv
import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_run
import pytest
from conftest import ROOT

from bvit_jax import checkpoints, damage, faults, seals
from bvit_jax.faults import KINDS, TrialRow, Undisturbed, differences
from tests.commands import start, start_here

PASSED = TrialRow(1, "SIGKILL", 2, 1, 3, 3, 10, True, True, 0, 0, "-9 -9 0", "SIGKILL at step 3")


# Plans and verdicts


def test_kinds_are_gone_through_in_turn():
    kinds = ["SIGTERM", "metrics.jsonl cut"]
    assert [kind.name for kind in faults.plan(3, kinds)] == ["SIGTERM", "metrics.jsonl cut", "SIGTERM"]
    assert faults.plan(len(KINDS), list(KINDS)) == list(KINDS.values())


def test_every_damage_is_a_kind_and_every_kind_is_complete():
    assert {kind.damage for kind in KINDS.values()} == {"", *damage.KINDS}
    for name, kind in KINDS.items():
        assert kind.name == name
        assert bool(kind.damage) == (kind.target in ("newest", "best", "all"))
        assert kind.signal in (signal.SIGKILL, signal.SIGTERM)


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"kills": 1, "kills_in_a_save": 0, "damages": 0, "damages_found": 0, "steps_repeated": 0}, True),
        ({"kills": 0}, False),
        ({"survived": False}, False),
        ({"exact": False}, False),
        ({"damages_found": 2}, False),
        ({"good_lost": 1}, False),
        ({"wrong_exits": 1}, False),
    ],
)
def test_a_trial_passes_if_nothing_is_lost_and_everything_found(changes, passed):
    assert dataclasses.replace(PASSED, **changes).passed == passed


# What two finished runs differ in


def finished(workdir: Path, **changes: Any) -> Path:
    """Makes a finished run's directory by hand."""
    result = {"steps": 8, "test_accuracy": 0.5, "test": {"load": [0.25, 0.75]}, "warnings": []} | changes
    log = '{"step": 8, "split": "train", "loss": 0.5}\n'
    for step in (4, 8):
        folder = workdir / "checkpoints" / str(step)
        (folder / "record").mkdir(parents=True)
        (folder / "state").mkdir()
        record = {"config": {}, "metrics": log, "layout": [], "digests": {"float32": f"{step}a", "int32": f"{step}b"}}
        (folder / "record" / "metadata").write_text(json.dumps(record))
        (folder / "state" / "x").write_text("content")
        seals.seal(folder)
    (workdir / "metrics.jsonl").write_text(log)
    (workdir / "result.json").write_text(json.dumps(result))
    return workdir


def change_digest(folder: Path) -> None:
    path = folder / "record" / "metadata"
    record = json.loads(path.read_text())
    record["digests"]["int32"] = "other"
    path.write_text(json.dumps(record))
    seals.seal(folder)


def test_runs_that_are_equal_but_for_timing_do_not_differ(tmp_path):
    ours = finished(tmp_path / "ours", timing={"wall_seconds": 1.0})
    theirs = finished(tmp_path / "theirs", timing={"wall_seconds": 2.0})
    (ours / "timing.jsonl").write_text("{}\n")
    (ours / "incidents.jsonl").write_text("{}\n")
    change_digest(ours / "checkpoints" / "4")
    assert differences(ours, theirs) == []


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"steps": 9}, ["steps"]),
        ({"test": {"load": [0.25, 0.74]}}, ["test"]),
        ({"test_accuracy": 0.5000001, "warnings": ["dead"]}, ["test_accuracy", "warnings"]),
        ({"more": 1}, ["more"]),
    ],
)
def test_every_result_that_differs_is_named_whichever_run_has_it(tmp_path, changes, names):
    ours, theirs = finished(tmp_path / "ours", **changes), finished(tmp_path / "theirs")
    expected = [f"result.json: {name}" for name in names]
    assert differences(ours, theirs) == differences(theirs, ours) == expected


def test_metrics_are_compared_byte_for_byte(tmp_path):
    ours, theirs = finished(tmp_path / "ours"), finished(tmp_path / "theirs")
    (ours / "metrics.jsonl").write_text((ours / "metrics.jsonl").read_text() + "\n")
    assert differences(ours, theirs) == ["metrics.jsonl"]


def test_arrays_of_the_last_checkpoint_are_compared(tmp_path):
    ours, theirs = finished(tmp_path / "ours"), finished(tmp_path / "theirs")
    change_digest(ours / "checkpoints" / "8")
    assert differences(ours, theirs) == ["arrays of the last checkpoint"]


def test_a_last_checkpoint_that_is_damaged_is_named(tmp_path):
    ours, theirs = finished(tmp_path / "ours"), finished(tmp_path / "theirs")
    (ours / "checkpoints" / "8" / "state" / "x").write_text("CONTENT")
    gist = "the checkpoint of step 8 is damaged: state/x holds other bytes than were written"
    assert differences(ours, theirs) == [gist]


def test_everything_that_differs_is_listed(tmp_path):
    ours, theirs = finished(tmp_path / "ours", steps=9), finished(tmp_path / "theirs")
    (ours / "metrics.jsonl").write_text("")
    change_digest(ours / "checkpoints" / "8")
    assert differences(ours, theirs) == ["metrics.jsonl", "result.json: steps", "arrays of the last checkpoint"]


# Trials of a process that only looks like a run


class Fake:
    """The command of a fake run whose first start holds somewhere until it is killed; the others may do wrong."""

    def __init__(self, hold: str = "end", mistake: str = "") -> None:
        self._hold = hold
        self._mistake = mistake
        self._starts = 0

    def __call__(self, workdir: Path) -> list[str]:
        self._starts += 1
        return [sys.executable, fake_run.__file__, str(workdir), self._hold if self._starts == 1 else "", self._mistake]


@pytest.fixture(autouse=True)
def children_find_the_library(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Undisturbed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        return faults.run_undisturbed(Fake(hold=""), tmp_path_factory.mktemp("runs") / "undisturbed")


def trial(undisturbed: Undisturbed, workdir: Path, kind: str, fake: Fake | None = None, number: int = 1) -> TrialRow:
    row = faults.run_trial(number, KINDS[kind], 0, fake or Fake(), workdir, undisturbed)
    assert (row.trial, row.kind) == (number, kind)
    assert row.kills == row.story.count(" at step ") >= 1
    return row


def test_an_undisturbed_run_is_what_trials_are_measured_by(undisturbed):
    assert (undisturbed.steps, undisturbed.best_step) == (fake_run.STEPS, fake_run.BEST_STEP)
    assert undisturbed.seconds_to_start > 0
    assert (undisturbed.workdir / "result.json").exists()
    assert not (undisturbed.workdir / "incidents.jsonl").exists()
    assert differences(undisturbed.workdir, undisturbed.workdir) == []


def test_an_undisturbed_run_that_fails_says_why(tmp_path):
    code = "import sys; print('begun', flush=True); sys.exit('no such thing')"
    with pytest.raises(RuntimeError, match=r"^the undisturbed run failed: begun\nno such thing\n$"):
        faults.run_undisturbed(lambda workdir: [sys.executable, "-c", code], tmp_path / "run")


@pytest.mark.parametrize("number", range(1, 5))
@pytest.mark.parametrize("kind", ["SIGKILL", "SIGTERM"])
def test_a_killed_run_that_goes_on_exactly_passes(undisturbed, tmp_path, kind, number):
    row = trial(undisturbed, tmp_path / "run", kind, number=number)
    assert row.passed
    assert (row.damages, row.good_lost) == (0, 0)
    *before, last = row.exits.split()
    assert last == "0"
    assert 1 <= len(before) <= 3
    # A signal may come before the process listens, and others after its end.
    assert before[0] in (["-9"] if kind == "SIGKILL" else ["75", "-15"])
    assert row.kills <= len(before)


@pytest.mark.parametrize("number", range(1, 4))
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.target != "none"])
def test_a_run_that_finds_its_damage_and_goes_on_exactly_passes(undisturbed, tmp_path, kind, number):
    workdir = tmp_path / "run"
    row = trial(undisturbed, workdir, kind, number=number)
    assert row.passed
    assert (row.kills, row.exits) == (1, "-9 0")
    killed_at = int(row.story.split("; ")[0].removeprefix("SIGKILL at step "))
    assert fake_run.STEPS / 2 <= killed_at <= fake_run.HOLD_AT
    checkpoints_then = killed_at // fake_run.EVAL_EVERY  # one more or less if it was killed right there
    aside = workdir / "damaged"
    moved = sorted(int(path.name) for path in aside.iterdir()) if aside.is_dir() else []
    if kind.startswith("newest"):
        assert len(moved) == row.damages == 1
        assert abs(moved[0] - fake_run.EVAL_EVERY * checkpoints_then) <= fake_run.EVAL_EVERY
        assert row.steps_repeated > 0
    elif kind.startswith("best"):
        assert moved == [fake_run.BEST_STEP]
    elif kind.startswith("all"):
        assert moved == [fake_run.EVAL_EVERY * n for n in range(1, len(moved) + 1)]
        assert abs(len(moved) - checkpoints_then) <= 1
        assert row.damages == len(moved)
        assert row.steps_repeated >= killed_at
    else:
        assert (moved, row.damages) == ([], 1)
        assert "metrics.jsonl cut to " in row.story


def test_what_is_damaged_is_told_and_drawn_by_the_seed_alone(undisturbed, tmp_path):
    stories = []
    for attempt, (seed, number) in enumerate([(0, 1), (0, 1), (1, 1), (0, 2)]):
        kind = KINDS["newest: truncated file"]
        row = faults.run_trial(number, kind, seed, Fake(), tmp_path / str(attempt), undisturbed)
        stories.append(row.story.split(": ")[1])
    assert stories[0] == stories[1]
    assert len(set(stories)) == 3
    assert all(story.startswith(("state/x cut to ", "state/y cut to ")) for story in stories)


@pytest.mark.parametrize("kind", ["SIGKILL in a save", "SIGTERM in a save"])
def test_a_kill_in_a_save_is_counted(undisturbed, tmp_path, kind):
    row = trial(undisturbed, tmp_path / "run", kind, Fake("save"))
    assert row.passed
    assert row.story.startswith(f"{KINDS[kind].signal.name} at step {fake_run.STEPS}")
    assert 1 <= row.kills_in_a_save <= row.kills


def test_a_kill_in_a_save_is_never_one_during_the_start(undisturbed, tmp_path, monkeypatch):
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        time.sleep(min(seconds, 0.1))

    monkeypatch.setattr(faults, "START_SHARE", 1.0)
    monkeypatch.setattr(faults, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    slow = dataclasses.replace(undisturbed, seconds_to_start=1e6)
    assert trial(slow, tmp_path / "run", "SIGKILL in a save", Fake("save")).kills_in_a_save >= 1
    assert max(slept) < 1  # a save is long over by then


def test_kills_during_the_start_come_before_the_first_row(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "START_SHARE", 1.0)
    monkeypatch.setattr(faults, "PATIENCE_SECONDS", 30.0)
    row = trial(undisturbed, tmp_path / "run", "SIGKILL", Fake("start"))
    assert row.passed
    assert row.story.startswith("SIGKILL at step 0")
    assert row.kills_in_a_save == 0


# Its mistakes


def test_a_run_that_does_not_go_on_exactly_fails(undisturbed, tmp_path):
    row = trial(undisturbed, tmp_path / "run", "newest: missing file", Fake(mistake="is not exact"))
    assert (row.passed, row.survived, row.exact, row.good_lost) == (False, True, False, 0)
    assert row.damages_found == row.damages == 1


def test_a_run_that_leaves_a_damaged_checkpoint_last_is_not_exact(undisturbed, tmp_path):
    row = trial(undisturbed, tmp_path / "run", "metrics.jsonl cut", Fake(mistake="leaves the last one damaged"))
    assert (row.passed, row.survived, row.exact, row.good_lost) == (False, True, False, 0)


@pytest.mark.parametrize("mistake", ["goes on from an older one", "starts over", "moves a good one"])
def test_a_good_checkpoint_not_used_or_moved_away_is_lost(undisturbed, tmp_path, mistake):
    row = trial(undisturbed, tmp_path / "run", "metrics.jsonl cut", Fake(mistake=mistake))
    assert (row.passed, row.survived, row.exact) == (False, True, True)
    assert row.good_lost == 1


def test_steps_taken_again_are_counted(undisturbed, tmp_path):
    row = trial(undisturbed, tmp_path / "run", "metrics.jsonl cut", Fake(mistake="starts over"))
    assert row.story.startswith("SIGKILL at step ")
    assert fake_run.STEPS / 2 <= row.steps_repeated <= fake_run.HOLD_AT


@pytest.mark.parametrize("kind", ["newest: flipped byte", "best: flipped byte", "metrics.jsonl cut"])
def test_damage_that_is_not_told_of_is_not_found(undisturbed, tmp_path, kind):
    row = trial(undisturbed, tmp_path / "run", kind, Fake(mistake="keeps quiet"))
    assert (row.passed, row.survived, row.exact, row.good_lost) == (False, True, True, 0)
    assert (row.damages, row.damages_found) == (1, 0)


def test_a_run_that_cannot_go_on_does_not_survive(undisturbed, tmp_path):
    row = trial(undisturbed, tmp_path / "run", "newest: empty step", Fake(mistake="crashes"))
    assert (row.passed, row.survived, row.exact, row.exits) == (False, False, False, "-9 1")
    assert "no way to go on" in (tmp_path / "run" / faults.OUTPUT).read_text()


def test_a_run_that_hangs_is_killed_and_does_not_survive(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "PATIENCE_SECONDS", 3.0)
    row = trial(undisturbed, tmp_path / "run", "newest: empty step", Fake(mistake="hangs"))
    assert (row.passed, row.survived, row.exact, row.exits) == (False, False, False, "-9 -9")
    assert row.story.endswith("hung for 3 s")


@pytest.mark.parametrize(("mistake", "status"), [("wrong status", "1"), ("deaf", "-15")])
def test_a_run_told_to_stop_must_say_that_it_can_go_on(undisturbed, tmp_path, monkeypatch, mistake, status):
    monkeypatch.setattr(faults, "START_SHARE", 0.0)
    row = trial(undisturbed, tmp_path / "run", "SIGTERM", Fake(mistake=mistake))
    assert (row.passed, row.survived, row.exact) == (False, True, True)
    assert row.wrong_exits >= 1
    assert row.exits.startswith(f"{status} ")
    assert f"exit status {status}" in row.story


def test_a_run_that_ends_without_a_result_does_not_survive(undisturbed, tmp_path):
    row = trial(undisturbed, tmp_path / "run", "metrics.jsonl cut", Fake(mistake="leaves no result"))
    assert (row.passed, row.survived, row.exact) == (False, False, False)
    assert row.exits == "-9 0"


# The moment may come too late


def wait_for_the_end(process: subprocess.Popen[bytes], holds: object) -> None:
    process.wait(60)


def wait_for_the_result(process: subprocess.Popen[bytes], holds: object) -> None:
    result = Path(str(process.args[2])) / "result.json"  # type: ignore[index]
    while process.poll() is None and not result.exists():
        time.sleep(0.001)


def test_a_run_that_ended_before_it_could_be_killed_lost_nothing_but_shows_nothing(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "_wait_until", wait_for_the_end)
    row = faults.run_trial(1, KINDS["SIGTERM in a save"], 0, Fake(hold=""), tmp_path / "run", undisturbed)
    assert (row.survived, row.exact, row.good_lost, row.steps_repeated) == (True, True, 0, 0)
    assert (row.kills, row.story, row.passed) == (0, "", False)


@pytest.mark.parametrize("kind", ["SIGKILL in a save", "SIGTERM in a save"])
def test_a_run_that_is_killed_with_its_result_written_lost_nothing(undisturbed, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(faults, "_wait_until", wait_for_the_result)
    row = faults.run_trial(1, KINDS[kind], 0, Fake("exit"), tmp_path / "run", undisturbed)
    assert row.exits.split()[0] == str(-KINDS[kind].signal)
    assert (row.survived, row.exact, row.good_lost) == (True, True, 0)


# The bench


@pytest.mark.long
def test_real_runs_come_through(tmp_path):
    out = tmp_path / "out"
    run = start("experiments.faults", f"--out={out}", "--trials=1", "--kinds=newest: flipped byte")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    assert "in 1 runs of 400 steps; 1 of 1 survived, 1 bit-exact; 1 of 1 damages found; good checkpoints lost: 0\n" in (
        run.stdout
    )
    assert f"report: {out / 'faults.csv'}, with every trial's story and exit statuses\n" in run.stdout
    assert "failed" not in run.stdout
    with (out / "faults.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in dataclasses.fields(TrialRow)]
    assert [(row["trial"], row["kind"], row["damages"], row["damages_found"]) for row in rows] == [
        ("1", "newest: flipped byte", "1", "1"),
    ]
    for row in rows:
        assert (row["survived"], row["exact"], row["good_lost"]) == ("True", "True", "0")
    stored = json.loads((out / "faults.json").read_text())
    assert [TrialRow(**row).passed for row in stored] == [True]
    for name in ("undisturbed", "trial_1"):
        assert (out / name / "result.json").exists()
        assert checkpoints.steps_in(out / name / checkpoints.DIRECTORY)[-1] == 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials=0"], "trials = 0: it must be at least 1"),
        (["--jobs=-1"], "jobs = -1: it must be 0 or more"),
        (["--kinds=SIGTERM,nonsense"], "kinds = 'nonsense': it must be SIGKILL or SIGKILL in a save or SIGTERM or "),
        (["--out=/proc/nowhere"], "out = '/proc/nowhere': it must be a directory that can be written to"),
    ],
)
def test_bad_flags_are_one_clear_error_and_leave_nothing_behind(tmp_path, arguments, message):
    run = start_here("experiments.faults", f"--out={tmp_path / 'out'}", *arguments)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: {message}")
    assert len(run.stderr.splitlines()) == 1
    assert run.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_directory_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine").write_text("")
    run = start_here("experiments.faults", f"--out={tmp_path}")
    assert run.returncode == 2
    message = f"out = {str(tmp_path)!r}: it must be empty, so that no trial finds an earlier one's files"
    assert run.stderr == f"error: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
