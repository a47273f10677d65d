import dataclasses
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from bvit_jax import executor, metrics, sweep, train
from bvit_jax.model_config import ConfigError
from tests.conftest import make_config


def make_trial(workdir: Path, **changes: object) -> sweep.Trial:
    config = make_config("dense", **changes)
    return sweep.Trial(config, workdir / "trials" / config.digest())


def run(trials: list[sweep.Trial], workdir: Path, jobs: int = 2, retry_failed: bool = False) -> list[sweep.Trial]:
    ended: list[sweep.Trial] = []
    executor.run_trials(trials, jobs, retry_failed, workdir / "cache", ended.append)
    return ended


def broken(trial: sweep.Trial) -> sweep.Trial:
    """The trial with a configuration that passes the checks and fails when the data are loaded."""
    config = dataclasses.replace(trial.config, data=dataclasses.replace(trial.config.data, num_train=5))
    return dataclasses.replace(trial, config=config)


def test_a_failing_trial_is_recorded_and_the_others_go_on(tmp_path):
    good, other = make_trial(tmp_path), make_trial(tmp_path, seed=1)
    bad = broken(make_trial(tmp_path, seed=2))
    ended = run([bad, good, other], tmp_path)
    assert sorted(trial.config.seed for trial in ended) == [0, 1, 2]
    assert [trial.status for trial in (bad, good, other)] == ["failed", "ok", "ok"]
    row = sweep.result_row(bad)
    assert (row.status, row.test_accuracy) == ("failed", None)
    assert row.error.startswith("ValueError: splits of (5, 197, 400) images do not add up to the 1797")
    assert "Traceback" in (bad.directory / sweep.ERROR_FILE).read_text()
    # A trial in a process of its own gives what the same run gives here.
    here = train.run(good.config, tmp_path / "here", show_progress=False)
    there = json.loads((good.directory / "result.json").read_text())
    assert there["test_nll"] == pytest.approx(here["test_nll"], rel=1e-6)

    assert run([bad, good, other], tmp_path) == []


def test_a_failed_trial_is_left_alone_until_a_retry_is_asked_for(tmp_path):
    trial = make_trial(tmp_path)
    sweep.record_failure(trial, "out of luck\n")
    assert sweep.result_row(trial).error == "out of luck"
    assert run([trial], tmp_path) == []
    assert run([trial], tmp_path, retry_failed=True) == [trial]
    assert trial.status == "ok"
    assert not (trial.directory / sweep.ERROR_FILE).exists()


def test_a_killed_trial_is_recorded_with_its_signal(tmp_path):
    trial = make_trial(tmp_path, total_steps=100_000)
    thread = threading.Thread(target=run, args=([trial], tmp_path))
    thread.start()
    deadline = time.monotonic() + 120
    while not metrics.read_rows(trial.directory / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.1)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, 9)
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert sweep.result_row(trial).error.startswith("the trial's process ended early: killed by signal 9")


def test_default_jobs_depend_on_the_backend(monkeypatch):
    monkeypatch.setattr(executor, "_cores", lambda: list(range(64)))
    for backend, jobs in (("cpu", 8), ("tpu", 1), ("gpu", 1)):
        assert executor.Platform(backend, 4).default_jobs == jobs


def test_the_platform_is_asked_for_in_another_process(monkeypatch):
    assert executor.probe_platform() == executor.Platform("cpu", 1)
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    with pytest.raises(ConfigError, match="JAX does not start: .*abacus"):
        executor.probe_platform()
