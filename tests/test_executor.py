import dataclasses
import errno
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from bvit_jax import cores, executor, preemption, sweep, sweep_progress, train, trial_job
from bvit_jax.failures import Failures
from bvit_jax.model_config import ConfigError
from tests.conftest import make_config


def make_trial(workdir: Path, **changes: object) -> sweep.Trial:
    config = make_config("dense", **changes)
    return sweep.Trial(config, workdir / "trials" / config.digest())


def failures_of(workdir: Path) -> Failures:
    return Failures(workdir / "errors")


def run(trials: list[sweep.Trial], workdir: Path, jobs: int = 2, retry_failed: bool = False) -> list[sweep.Trial]:
    ended: list[sweep.Trial] = []
    told = preemption.Notice(joined=False)
    executor.run_trials(trials, failures_of(workdir), jobs, retry_failed, workdir / "cache", ended.append, told)
    return ended


def row(trial: sweep.Trial, workdir: Path) -> sweep.ResultRow:
    return sweep.result_row(trial, failures_of(workdir).cause(trial))


def broken(trial: sweep.Trial) -> sweep.Trial:
    """The trial with a configuration that passes the checks and fails when the data are loaded."""
    config = dataclasses.replace(trial.config, data=dataclasses.replace(trial.config.data, num_train=5))
    return dataclasses.replace(trial, config=config)


def out_of_memory(workdir: Path) -> sweep.Trial:
    """A trial with more images than there are addresses."""
    data = {"name": "procedural", "image_size": 8, "channels": 1, "num_classes": 10, "num_train": 10**15}
    data |= {"num_validation": 16, "num_test": 16, "seed": 0}
    return make_trial(workdir, **{f"data__{name}": value for name, value in data.items()})


def test_trials_that_fail_in_any_way_are_recorded_and_the_others_go_on(tmp_path):
    good, split, memory = make_trial(tmp_path), broken(make_trial(tmp_path, seed=1)), out_of_memory(tmp_path)
    in_the_way, read_only, full = (make_trial(tmp_path, seed=seed) for seed in (2, 3, 4))
    (tmp_path / "trials").mkdir()
    in_the_way.directory.write_text("a file")
    read_only.directory.symlink_to("/sys/kernel")  # where not even root can write
    full.directory.mkdir()
    (full.directory / "result.json.partial").symlink_to("/dev/full")
    bad = [split, memory, in_the_way, read_only, full]
    ended = run([*bad, good], tmp_path)
    assert {trial.label for trial in ended} == {trial.label for trial in (*bad, good)}
    assert len(ended) == 6
    rows = [row(trial, tmp_path) for trial in bad]
    assert {(row.status, row.test_accuracy) for row in rows} == {("failed", None)}
    assert rows[0].error.startswith("ValueError: splits of (5, 197, 400) images do not add up to the 1797")
    assert "MemoryError: Unable to allocate 7.11 PiB" in rows[1].error
    assert rows[2].error.startswith("FileExistsError: [Errno 17] File exists")
    assert rows[3].error.startswith("PermissionError: [Errno 13] Permission denied")
    assert rows[4].error.startswith("OSError: [Errno 28] No space left on device")
    assert all(failures_of(tmp_path).cause(trial).startswith("Traceback") for trial in bad)
    # A trial in a process of its own gives what the same run gives here.
    assert good.status(None) == "ok"
    here = train.run(good.config, tmp_path / "here", show_progress=False)
    assert good.result["test_nll"] == pytest.approx(here["test_nll"], rel=1e-6)

    assert run([*bad, good], tmp_path) == []


def test_a_failed_trial_is_left_alone_until_a_retry_is_asked_for(tmp_path):
    trial = make_trial(tmp_path)
    failures_of(tmp_path).record(trial, "out of luck\n")
    assert row(trial, tmp_path).error == "out of luck"
    assert run([trial], tmp_path) == []
    assert run([trial], tmp_path, retry_failed=True) == [trial]
    assert row(trial, tmp_path).status == "ok"
    assert failures_of(tmp_path).cause(trial) is None


def endless(workdir: Path, seed: int = 0) -> sweep.Trial:
    return make_trial(workdir, total_steps=1_000_000, seed=seed)


def child_in_training(trial: sweep.Trial) -> BaseProcess:
    """Waits until a trial trains; returns the one process there is."""
    deadline = time.monotonic() + 120
    while not trial.rows("metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.05)
    (child,) = multiprocessing.active_children()
    return child


def test_a_killed_trial_is_recorded_and_one_that_was_told_to_stop_is_not(tmp_path):
    killed, told, good = endless(tmp_path), endless(tmp_path, seed=1), make_trial(tmp_path)
    ended: list[sweep.Trial] = []
    failed = failures_of(tmp_path)
    arguments = (
        [killed, told, good],
        failed,
        1,
        False,
        tmp_path / "cache",
        ended.append,
        preemption.Notice(joined=False),
    )
    thread = threading.Thread(target=executor.run_trials, args=arguments)
    thread.start()
    os.kill(child_in_training(killed).pid, signal.SIGKILL)
    os.kill(child_in_training(told).pid, signal.SIGTERM)
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert ended == [killed, told, good]
    assert [failed.status(trial) for trial in ended] == ["failed", "unfinished", "ok"]
    assert row(killed, tmp_path).error == (
        "the trial's process ended early: killed by signal 9 (kill -9, or the kernel when memory ran out); "
        f"its output is in {killed.directory / 'output.txt'}"
    )


def test_a_trial_that_does_not_stop_in_time_is_killed_and_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(trial_job, "STOP_SECONDS", 0.5)
    trial, failed, ended = endless(tmp_path), failures_of(tmp_path), []
    with (
        sweep_progress.Progress([trial], [trial], failed) as progress,
        executor._Runner([trial], failed, 1, tmp_path / "cache", ended.append, progress) as runner,
    ):
        runner.turn()
        (child,) = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGSTOP)
        runner.stop()
    assert child.exitcode == -signal.SIGKILL
    assert ended == [trial]
    assert failed.status(trial) == "unfinished"


def test_a_process_that_cannot_start_is_a_failure(tmp_path, monkeypatch):
    def refuse(process: BaseProcess) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", refuse)
    trials = [make_trial(tmp_path, seed=seed) for seed in range(2)]
    assert run(trials, tmp_path) == trials
    assert row(trials[1], tmp_path).error == "BlockingIOError: [Errno 11] Resource temporarily unavailable"


def test_default_jobs_depend_on_the_backend(monkeypatch):
    monkeypatch.setattr(cores, "available", lambda: list(range(64)))
    for backend, jobs in (("cpu", 8), ("tpu", 1), ("gpu", 1)):
        assert executor.Platform(backend, 4).default_jobs == jobs


def test_the_platform_is_asked_for_in_another_process(monkeypatch):
    assert executor.probe_platform() == executor.Platform("cpu", 1)
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    with pytest.raises(ConfigError, match="JAX does not start: .*abacus"):
        executor.probe_platform()
