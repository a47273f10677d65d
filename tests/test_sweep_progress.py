import errno
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from bvit_jax import sweep, sweep_progress
from bvit_jax.failures import Failures
from bvit_jax.sweep_progress import Progress, Running, State
from tests.conftest import make_config


def make_trial(workdir: Path, seed: int, steps_done: int = 0) -> sweep.Trial:
    config = make_config("dense", seed=seed, total_steps=100)
    trial = sweep.Trial(config, workdir / str(seed))
    trial.directory.mkdir()
    write(trial, [{"step": steps_done, "split": "train", "loss": 2.0, "accuracy": 0.25}] if steps_done else [])
    return trial


def write(trial: sweep.Trial, rows: list[dict[str, object]], name: str = "metrics.jsonl") -> None:
    (trial.directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(sweep_progress.time, "monotonic", lambda: now[0])
    return now


def terminal(width: int = 110, height: int = 20, is_terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=is_terminal, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_newest_rows_are_a_trials_state(tmp_path):
    trial = make_trial(tmp_path, 0, 40)
    assert sweep_progress.state_of(trial) == State(40, 2.0, 0.25, None, None)
    validation = {"step": 42, "split": "validation", "accuracy": 0.5, "nll": 1.0}
    write(trial, [*trial.rows("metrics.jsonl"), validation])
    write(trial, [{"step": 20, "images_per_second": 1.0}, {"step": 40, "images_per_second": 1234.5}], "timing.jsonl")
    assert sweep_progress.state_of(trial) == State(42, 2.0, 0.25, 0.5, 1234.5)
    assert sweep_progress.state_of(make_trial(tmp_path, 1)) == State(0, None, None, None, None)


def test_trials_and_steps_are_counted_and_the_time_left_follows(tmp_path, clock):
    done, failing, halfway, waits = (make_trial(tmp_path, seed, steps) for seed, steps in enumerate((100, 0, 50, 0)))
    (done.directory / "result.json").write_text("{}")
    failed = Failures(tmp_path / "errors")
    console = terminal(is_terminal=False)
    # To be done: 100 steps of one, 50 of the other that has done as many, 100 of the third: 250.
    waiting = [failing, halfway, waits]
    with Progress([done, *waiting], waiting, failed, console) as progress:
        progress.show([])
        clock[0] = 59.0
        progress.show([])
        assert text_of(console) == ""
        failed.record(failing, "out of luck")
        progress.ended(failing, 0)
        write(halfway, [{"step": 75, "split": "train", "loss": 1.0, "accuracy": 0.5}])
        clock[0] = 100.0
        progress.show([Running(halfway, 50, "here")])
        # 100 + 25 of 250 steps in 100 s, so that another 100 s are left.
        assert text_of(console) == (
            "1 of 4 trials done, 1 failed, 1 running, 1 waiting, 50 % of the steps, about 2 min left\n"
        )
        clock[0] = 159.0
        progress.show([Running(halfway, 50, "here")])
        assert len(text_of(console).splitlines()) == 1  # a line a minute
        (halfway.directory / "result.json").write_text("{}")
        progress.ended(halfway, 50)
        clock[0] = 160.0
        progress.show([])
        assert len(text_of(console).splitlines()) == 1  # looked a second ago
        clock[0] = 162.0
        progress.show([])
    # 150 of 250 steps in 162 s: 108 s left.
    assert text_of(console).splitlines()[1] == (
        "2 of 4 trials done, 1 failed, 0 running, 1 waiting, 60 % of the steps, about 2 min left"
    )


def test_a_trial_that_waits_again_keeps_what_it_has_done(tmp_path, clock):
    trial = make_trial(tmp_path, 0)
    console = terminal(is_terminal=False)
    with Progress([trial], [trial], Failures(tmp_path / "errors"), console) as progress:
        write(trial, [{"step": 30, "split": "train"}])
        progress.set_back(trial, 0)
        write(trial, [{"step": 40, "split": "train"}])
        clock[0] = 60.0
        progress.show([Running(trial, 30, "elsewhere")])
    assert "1 running, 0 waiting, 40 % of the steps, about 2 min left" in text_of(console)  # 60 / 40 * 60 s


def test_a_terminal_has_a_row_for_each_running_trial_as_far_as_there_is_room(tmp_path, clock):
    trials = [make_trial(tmp_path, seed, 10 * (seed + 1)) for seed in range(4)]
    write(trials[0], [{"step": 10, "images_per_second": 1234.5}], "timing.jsonl")
    running = [Running(trial, 0, f"host-{number}") for number, trial in enumerate(trials)]
    console = terminal(height=6)
    with Progress(trials, trials, Failures(tmp_path / "errors"), console) as progress:
        clock[0] = 30.0
        progress.show(running)
        shown = [line.split() for line in text_of(console).splitlines()]
    assert ["dense", "seed", "0", "host-0", "10", "100", "2.000", "0.250", "1,234"] in shown  # 1234.5 to even
    assert ["dense", "seed", "2", "host-2", "30", "100", "2.000", "0.250"] in shown
    assert not any("host-3" in line for line in shown)
    assert ["and", "1", "more"] in shown
    assert text_of(console).startswith(("\x1b", "0 of 4 trials done"))


class Full(io.StringIO):
    """A file on a disk without space."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_output_that_cannot_be_written_ends_nothing(tmp_path, clock, is_terminal):
    trial = make_trial(tmp_path, 0)
    console = Console(file=Full(), force_terminal=is_terminal)
    with Progress([trial], [trial], Failures(tmp_path / "errors"), console) as progress:
        clock[0] = 100.0
        progress.show([Running(trial, 0, "")])
    assert not sweep_progress._Console(file=io.StringIO()).on_broken_pipe()


def test_slow_storage_is_looked_at_less_often(tmp_path, clock, monkeypatch):
    trial = make_trial(tmp_path, 0)
    looks = []

    def slow(of: sweep.Trial) -> State:
        looks.append(of)
        clock[0] += 3.0
        return State(0, None, None, None, None)

    monkeypatch.setattr(sweep_progress, "state_of", slow)
    with Progress([trial], [trial], Failures(tmp_path / "errors"), terminal()) as progress:
        for clock[0] in (10.0, 13.0, 69.0, 71.0):  # 3 s are 5 % of 60 s
            progress.show([Running(trial, 0, "")])
    assert len(looks) == 2


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        *((0.4, "0 s"), (29, "29 s"), (31, "1 min"), (3540, "59 min")),
        *((3600, "1 h 0 min"), (5000, "1 h 23 min"), (86399, "1.0 days"), (200000, "2.3 days")),
    ],
)
def test_durations_in_words(seconds, words):
    assert sweep_progress._duration(seconds) == words
