"""The cost of checkpoints: the arithmetic on timings made by hand, and one small measurement."""

import csv
import dataclasses
import io
import json
import subprocess
from pathlib import Path
from unittest import mock

import jax
import pytest

from bvit_jax import bench_checkpoints, files, train_step
from bvit_jax.bench_checkpoints import COLUMNS, added
from bvit_jax.checkpoints import Checkpoints
from bvit_jax.stepping import Stepper
from tests.commands import start_here
from tests.conftest import make_config

TINY = make_config("dense", model__d_model=16, model__d_ff=32, model__num_layers=1)


def start(*flags: str) -> subprocess.CompletedProcess[str]:
    return start_here("experiments.bench_checkpoints", "--config=configs/digits.py:dense", *flags)


def test_the_per_cent_is_the_added_seconds_over_those_of_an_interval():
    # The middle one of 2, 2 and 4 s for 4 steps is 0.5 s a step: 50 s an interval. Added: 1, 0.5 and 3 s.
    found = added(plain=[2.0, 4.0, 2.0], saving=[3.0, 4.5, 5.0], steps=4, interval=100)
    assert found == {
        "repeats": 3,
        "window_steps": 4,
        "step_ms": 500.0,
        "interval_steps": 100,
        "interval_seconds": 50.0,
        "added_seconds": 1.0,
        "added_seconds_lower": 0.75,
        "added_seconds_upper": 2.0,
        "added_percent": 2.0,
    }


def test_differences_are_taken_turn_by_turn():
    # Each turn is slower than the one before; in the second something else runs beside the save. The differences are
    # 0.1, 4 and 0.1 s; the medians of either kind, 5 and 9 s, are 4 s apart.
    found = added(plain=[1.0, 5.0, 9.0], saving=[1.1, 9.0, 9.1], steps=1, interval=1)
    assert found["added_seconds"] == pytest.approx(0.1)


@dataclasses.dataclass(frozen=True)
class Measured:
    figures: dict[str, float]
    left: list[Path]
    turns: int
    saves: int
    waits: int
    steps: int


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Measured:
    """A measurement of two repeats on a tiny run, and what was called and left behind."""
    out = tmp_path_factory.mktemp("out")
    turns: list[int] = []
    with (
        mock.patch.object(Checkpoints, "save", autospec=True, side_effect=Checkpoints.save) as save,
        mock.patch.object(Checkpoints, "wait", autospec=True, side_effect=Checkpoints.wait) as wait,
        mock.patch.object(Stepper, "take", autospec=True, side_effect=Stepper.take) as take,
    ):
        figures = bench_checkpoints.measure(TINY, out, 2, lambda: turns.append(1))
    return Measured(figures, list(out.iterdir()), len(turns), save.call_count, wait.call_count, take.call_count)


def test_every_column_is_measured(measured):
    figures = measured.figures
    assert list(figures) == list(COLUMNS)
    assert all(figures[name] > 0 for name in COLUMNS if not name.startswith(("added", "load")))
    assert figures["repeats"] == 2
    assert figures["interval_steps"] == TINY.eval_every == 3


def test_figures_follow_from_each_other(measured):
    figures = measured.figures
    assert figures["interval_seconds"] == pytest.approx(3e-3 * figures["step_ms"])
    assert figures["added_percent"] == pytest.approx(100 * figures["added_seconds"] / figures["interval_seconds"])
    whole = figures["blocking_seconds"] + figures["background_seconds"]
    assert figures["added_percent_at_most"] == pytest.approx(100 * whole / figures["interval_seconds"])
    assert figures["added_seconds_lower"] <= figures["added_seconds"] <= figures["added_seconds_upper"]
    assert figures["seal_seconds"] < figures["restore_seconds"]  # which checks the seal
    state = jax.eval_shape(lambda: train_step.init_state(TINY))
    assert figures["arrays"] == len(jax.tree.leaves(state))
    assert figures["state_bytes"] == sum(4 * leaf.size for leaf in jax.tree.leaves(state))
    assert figures["disk_bytes"] > figures["state_bytes"]


def test_every_other_window_holds_a_save(measured):
    # One save to compile, two alone, two in windows.
    assert measured.saves == 5
    # Within each save, after each, and when the writer is closed.
    assert measured.waits == 5 + 5 + 1
    # One step to compile, three to warm up, one after each save alone, and two windows of either kind.
    assert measured.steps == 1 + 3 + 3 + 4 * measured.figures["window_steps"]
    assert measured.turns == 4


def test_no_checkpoint_is_left(measured):
    assert measured.left == []


def test_rows_can_be_written(measured, tmp_path):
    files.write_rows(tmp_path / "checkpoint_cost.csv", [measured.figures])
    (row,) = csv.DictReader(io.StringIO((tmp_path / "checkpoint_cost.csv").read_text()))
    assert list(row) == list(COLUMNS)


def test_the_command_writes_a_row_and_shows_it(tmp_path):
    small = ["--config.model.d_model=16", "--config.model.d_ff=32", "--config.model.num_layers=1"]
    run = start(f"--out={tmp_path}", "--repeats=1", *small)
    assert run.returncode == 0, run.stderr
    (row,) = json.loads((tmp_path / "checkpoint_cost.json").read_text())
    assert set(COLUMNS) < row.keys()
    assert all(name in run.stdout for name in COLUMNS)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint_cost.csv", "checkpoint_cost.json"}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--out=/proc/nowhere", "out = '/proc/nowhere': it must be a directory that can be written to"),
        ("--repeats=0", "repeats = 0: it must be at least 1"),
    ],
)
def test_bad_flags_are_one_clear_error_and_leave_nothing_behind(tmp_path, flag, message):
    run = start(f"--out={tmp_path / 'out'}", flag)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_help_tells_every_column():
    run = start("--help")
    told = " ".join(run.stdout.split())
    for name, meaning in COLUMNS.items():
        assert f"{name}: {meaning}" in told
