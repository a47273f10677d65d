"""Whole sweeps in processes of their own: killed, told to stop, started twice, on a disk that cannot be written to."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bvit_jax import compressed, executor, files, grid, preemption, rivals, sweep, train
from bvit_jax.failures import Failures
from configs import sweep_digits
from tests.conftest import ROOT, call, environment

TIMING = ("images_per_second", "wall_seconds")
ENDLESS = 1_000_000
PROGRAM = """
from experiments import entry, sweep
sweep.MEMORY_EXPERTS = (32, 64)  # most of a short sweep's time is the memory report
entry.run(sweep.main, resumes=True)
"""


def base_of(steps: int, every: int = 20) -> dict[str, Any]:
    base = sweep_digits.get_config().base.to_dict()
    base |= {"total_steps": steps, "batch_size": 16, "log_every": 2, "eval_every": every}
    base["optimizer"]["warmup_steps"] = 2
    base["model"]["num_layers"] = 1
    return base


def trials_of(workdir: Path, steps: int, seeds: tuple[int, ...], every: int = 20) -> list[sweep.Trial]:
    """The trials of the sweep that `command` starts."""
    return grid.expand(base_of(steps, every), {"seed": seeds, "model": {"family": ("dense",)}}, workdir)


def command(workdir: Path, steps: int, seeds: tuple[int, ...], *flags: str, every: int = 20) -> list[str]:
    base = {"total_steps": steps, "batch_size": 16, "log_every": 2, "eval_every": every, "optimizer.warmup_steps": 2}
    base["model.num_layers"] = 1
    grid = {"seed": seeds, "model.family": ("dense",), "model.form": ("separate",), "model.num_experts": (2,)}
    return [
        *(sys.executable, "-c", PROGRAM, f"--workdir={workdir}", *flags),
        *(f"--config.base.{name}={value!r}" for name, value in base.items()),
        *(f"--config.grid.{name}={value!r}" for name, value in grid.items()),
    ]


def run(workdir: Path, steps: int, seeds: tuple[int, ...], *flags: str) -> subprocess.CompletedProcess[str]:
    arguments = command(workdir, steps, seeds, *flags)
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=500)


@contextlib.contextmanager
def started(workdir: Path, steps: int, seeds: tuple[int, ...], *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A sweep that runs, in a process group of its own."""
    arguments = command(workdir, steps, seeds, *flags)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def rows(workdir: Path, name: str = "results.csv") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((workdir / name).read_text())))


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in listed.split()]


def is_running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_a_sweep_killed_in_the_middle_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
    steps, seeds = 300, (0, 1)
    first, second = trials_of(tmp_path / "killed", steps, seeds)
    with started(tmp_path / "killed", steps, seeds, "--jobs=1") as process:
        wait_until(lambda: second.steps_done > 20)
        os.killpg(process.pid, signal.SIGSTOP)
        refused = run(tmp_path / "killed", steps, seeds)
        trials = children_of(process.pid)
        process.kill()
        os.killpg(process.pid, signal.SIGCONT)  # for the trial to see that its sweep is gone
    wait_until(lambda: not any(map(is_running, trials)))
    assert trials
    assert (first.status(None), second.status(None)) == ("ok", "unfinished")
    name = f"host {socket.gethostname()}, process {process.pid}"
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1] == (
        f"error: workdir = {str(tmp_path / 'killed')!r}: in use by another process ({name})"
    )
    written = (first.directory / "result.json").stat().st_mtime_ns
    again = run(tmp_path / "killed", steps, seeds, "--jobs=1")
    assert again.returncode == 0, again.stderr
    assert f"taking over from {name}, which ended without letting go" in again.stdout
    assert "2 trials, 1 finished, 0 failed" in again.stdout
    assert (first.directory / "result.json").stat().st_mtime_ns == written
    train.run(second.config, tmp_path / "undisturbed", show_progress=False)
    undisturbed = dataclasses.replace(second, directory=tmp_path / "undisturbed")
    files.write_rows(tmp_path / "undisturbed.csv", [dataclasses.asdict(sweep.result_row(undisturbed, None))])
    [ok, found], [wanted] = rows(tmp_path / "killed"), rows(tmp_path, "undisturbed.csv")
    assert ok["status"] == "ok"
    for row in (found, wanted):
        assert all(row.pop(name) for name in TIMING)
    assert found == wanted


@pytest.mark.parametrize("whom", ["the sweep", pytest.param("its trials too", marks=pytest.mark.long)])
def test_a_sweep_that_is_told_to_stop_saves_its_trials(tmp_path, whom):
    seeds = (0, 1)
    first, second = trials_of(tmp_path, ENDLESS, seeds)
    with started(tmp_path, ENDLESS, seeds, "--jobs=1") as process:
        wait_until(lambda: first.steps_done > 0)
        if whom == "the sweep":
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGTERM)
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert f"{first.label:<40} unfinished" in output
    assert second.label not in output  # no trial is started any more
    assert [row["status"] for row in rows(tmp_path)] == ["unfinished", "unfinished"]
    assert not (tmp_path / "errors").exists()
    assert "told to stop; step" in (first.directory / "incidents.jsonl").read_text()
    assert (tmp_path / ".lock").read_bytes() == b""


@pytest.mark.long
def test_a_sweep_that_is_told_to_stop_before_it_starts_trials_lets_go(tmp_path):
    with started(tmp_path, ENDLESS, (0,)) as process:
        wait_until(lambda: (tmp_path / ".lock").exists() and (tmp_path / ".lock").read_bytes() != b"")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1].startswith("told to stop")
    assert (tmp_path / ".lock").read_bytes() == b""


def show_a_trial_with_warnings(workdir: str) -> None:
    from experiments.sweep import _Report  # its flags are those of a process of its own

    [trial] = trials_of(Path(workdir), 6, (0,))
    trial.directory.mkdir(parents=True)
    result = {"test_accuracy": 0.5, "warnings": ["layer 1: expert 3 is dead", "layer 2: expert 0 is dead"]}
    (trial.directory / "result.json").write_text(json.dumps(result))
    _Report([trial], Failures(Path(workdir) / "errors"), Path(workdir), {}, {}, None).show_ended(trial)


@pytest.mark.long
def test_warnings_of_a_finished_trial_are_shown_below_it(tmp_path):
    program = call(show_a_trial_with_warnings, str(tmp_path))
    found = subprocess.run(program, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=300)
    assert found.stdout.splitlines() == [
        "dense seed 0                             ok         test accuracy 0.5000",
        "    layer 1: expert 3 is dead",
        "    layer 2: expert 0 is dead",
    ], found.stderr


def test_failures_and_tables_that_cannot_be_written_do_not_end_a_sweep(tmp_path):
    seeds = (0, 1)
    bad, good = trials_of(tmp_path, 6, seeds)
    (tmp_path / "sweep.json").write_text(json.dumps({"base": base_of(6)}))
    bad.directory.parent.mkdir()
    bad.directory.write_text("a file")
    (tmp_path / "errors").write_text("a file")
    (tmp_path / "results.csv.partial").symlink_to("/dev/full")  # as on a disk without space
    found = run(tmp_path, 6, seeds, "--jobs=1")
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert (bad.status(None), good.status(None)) == ("unfinished", "ok")
    lines = found.stdout.splitlines()
    cause = f"FileExistsError: [Errno 17] File exists: '{bad.directory}'"
    assert f"{bad.label:<40} failed     {cause}" in lines
    assert f"failed: {bad.label}: {cause}" in lines
    assert lines.count("Traceback (most recent call last):") == 1  # the whole cause, as no file has it
    full = "[Errno 28] No space left on device"
    assert lines.count(f"tables could not be written, the sweep goes on: {full}") == 1
    assert f"tables could not be written: {full}" in lines
    assert not (tmp_path / "results.csv").exists()

    bad.directory.unlink()
    (tmp_path / "errors").unlink()
    (tmp_path / "results.csv.partial").unlink()
    mended = run(tmp_path, 6, seeds)
    assert mended.returncode == 0, mended.stdout
    assert [row["status"] for row in rows(tmp_path)] == ["ok", "ok"]


COMPRESSING = """
from configs import studies


def get_config():
    cases = studies.cases(kind={"dense": {"model": {"family": "dense"}}})
    requests = ({"method": "rounding", "calibration_images": 8}, {"method": "prune", "keep": 0.5})
    config = studies.sweep(cases, (0,), compress={"label": "kind", "of": (("dense", requests),)})
    config.base.update({"total_steps": 6, "batch_size": 16, "log_every": 2, "eval_every": 3})
    config.base.optimizer.warmup_steps = 2
    return config
"""


def times(directory: Path) -> dict[str, int]:
    """When the files of a trial's training were written."""
    return {name: (directory / name).stat().st_mtime_ns for name in ("result.json", "metrics.jsonl", "checkpoints")}


@pytest.mark.long
def test_compressions_are_made_after_training_each_once(tmp_path, monkeypatch):
    for name, value in environment(1).items():
        monkeypatch.setenv(name, value)
    workdir, config = tmp_path / "rivals", tmp_path / "config.py"
    config.write_text(COMPRESSING)
    raw = runpy.run_path(str(config))["get_config"]().to_dict()
    trials = grid.expand(raw["base"], raw["grid"], workdir, raw["cases"])
    [trial] = rivals.requested(trials, **raw["compress"])
    rounded, pruned = (compressed.directory_of(trial.directory, request) for request in trial.compressions)
    (pruned / compressed.MODEL_FILE).mkdir(parents=True)  # in the way
    (workdir / "sweep.json").write_text(json.dumps({"base": raw["base"]}))

    program = [*(sys.executable, "-m", "experiments.sweep"), f"--config={config}", f"--workdir={workdir}"]
    found = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert found.returncode == 1, found.stderr
    assert "Traceback" not in found.stderr
    cause = f"bvit_jax.model_config.ConfigError: out = {str(pruned)!r}: it cannot be written to ([Errno 21] Is a dir"
    assert f"{trial.label:<40} failed     {cause}" in found.stdout
    assert f"failed: {trial.label}: {cause}" in found.stdout
    [row] = rows(workdir)
    assert (row["status"], row["test_accuracy"]) == ("failed", str(trial.result["test_accuracy"]))
    assert [trial.compressed(request) is not None for request in trial.compressions] == [True, False]
    made = rows(workdir, "rivals.csv")
    assert [row["compression"] for row in made] == ["as trained", "rounding_8bit", "prune_0.5"]
    assert int(made[1]["bytes_full"]) == (rounded / compressed.MODEL_FILE).stat().st_size
    assert made[1]["accuracy_before"] == made[0]["test_accuracy"]
    assert made[2]["test_accuracy"] == ""
    summary = (workdir / "summary.md").read_text()
    assert "| dense, rounding_8bit |" in summary
    assert "| dense, prune_0.5 |" not in summary
    assert (workdir / "plots" / "rivals.png").stat().st_size > 0

    failed, ended = Failures(workdir / "errors"), list[sweep.Trial]()

    def go_on(retry_failed: bool) -> None:
        cache, notice = workdir / "compilation_cache", preemption.Notice(joined=False)
        executor.run_trials([trial], failed, 1, retry_failed, cache, ended.append, notice)

    go_on(retry_failed=False)
    assert ended == []
    (pruned / compressed.MODEL_FILE).rmdir()
    (rounded / compressed.RESULT_FILE).unlink()
    before = times(trial.directory)
    go_on(retry_failed=True)
    assert (ended, failed.status(trial)) == ([trial], "ok")
    assert times(trial.directory) == before  # not trained again
    go_on(retry_failed=True)
    assert ended == [trial]
