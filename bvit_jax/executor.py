"""Runs the trials of a sweep on this machine, each in a process of its own, some at a time.

On CPUs small models leave most cores idle, so several trials run side by side, each with its own share of the cores. An
accelerator belongs to one process at a time, so there trials run one by one.
"""

import dataclasses
import multiprocessing
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from bvit_jax import config, files, metrics, train
from bvit_jax.model_config import ConfigError
from bvit_jax.sweep import ERROR_FILE, Trial, record_failure

POLL_SECONDS = 1.0
OUTPUT_FILE = "output.txt"


@dataclasses.dataclass(frozen=True)
class _Running:
    trial: Trial
    process: BaseProcess
    steps_at_start: int


@dataclasses.dataclass(frozen=True)
class Platform:
    """What the trials will find: JAX's default backend and its number of devices."""

    backend: str
    devices: int

    @property
    def default_jobs(self) -> int:
        """Trials to run at a time: one per core on CPUs, up to 8; one on accelerators."""
        return min(len(_cores()), 8) if self.backend == "cpu" else 1


def probe_platform() -> Platform:
    """Asks JAX in another process: asking here would take an accelerator away from the trials.

    Raises:
        ConfigError: if JAX finds no device to run on.
    """
    program = "import jax; print(jax.default_backend(), jax.device_count())"
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ConfigError(f"JAX does not start: {(asked.stderr.strip() or 'no message').splitlines()[-1]}")
    backend, devices = asked.stdout.split()[-2:]
    return Platform(backend, int(devices))


def run_trials(
    trials: Sequence[Trial], jobs: int, retry_failed: bool, compilation_cache: Path, on_end: Callable[[Trial], None]
) -> None:
    """Runs what is unfinished; a trial that fails is recorded and the others go on.

    Args:
        trials: of one sweep.
        jobs: trials at a time, at least 1.
        retry_failed: run those again that failed in an earlier call; otherwise they are left as they are.
        compilation_cache: directory for compiled programs, which trials of the same shape share.
        on_end: called with each trial when it has ended, well or not.
    """
    waiting = [trial for trial in trials if trial.status == "unfinished" or (retry_failed and trial.status == "failed")]
    free_slots = list(range(jobs))
    running: dict[int, _Running] = {}
    remaining = sum(trial.config.total_steps - trial.steps_done for trial in waiting)
    ended_steps = 0
    bar = tqdm(total=remaining, unit="step", disable=None, leave=False)
    try:
        while waiting or running:
            while waiting and free_slots:
                slot = free_slots.pop(0)
                running[slot] = _start(waiting.pop(0), slot, jobs, compilation_cache)
            wait([job.process.sentinel for job in running.values()], timeout=POLL_SECONDS)
            for slot, job in list(running.items()):
                if job.process.exitcode is not None:
                    _settle(job)
                    ended_steps += job.trial.config.total_steps - job.steps_at_start
                    del running[slot]
                    free_slots.append(slot)
                    on_end(job.trial)
            _show(bar, ended_steps, list(running.values()))
    finally:
        for job in running.values():
            job.process.terminate()
        for job in running.values():
            job.process.join()
        bar.close()


def _start(trial: Trial, slot: int, jobs: int, compilation_cache: Path) -> _Running:
    trial.directory.mkdir(parents=True, exist_ok=True)
    (trial.directory / ERROR_FILE).unlink(missing_ok=True)
    cores = _cores()
    share = cores[slot::jobs] or cores
    process = multiprocessing.get_context("spawn").Process(
        target=_trial_process, args=(trial.config.to_dict(), trial.directory, share, compilation_cache)
    )
    process.start()
    return _Running(trial, process, trial.steps_done)


def _settle(job: _Running) -> None:
    """Sees to it that a trial that ended without a result says why."""
    job.process.join()
    if job.trial.status == "unfinished":
        code = job.process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        record_failure(job.trial, f"the trial's process ended early: {how}; its output is in {OUTPUT_FILE}")


def _show(bar: tqdm, ended_steps: int, running: list[_Running]) -> None:
    """Brings the progress bar up to date from the metrics that the trials write."""
    steps = ended_steps
    shown: dict[str, str] = {}
    for job in running:
        rows = [row for row in metrics.read_rows(job.trial.directory / "metrics.jsonl") if row["split"] == "train"]
        if rows:
            steps += max(rows[-1]["step"] - job.steps_at_start, 0)
            shown = {name: f"{rows[-1][name]:.3f}" for name in ("loss", "accuracy")}
    bar.update(steps - bar.n)
    bar.set_postfix(running=len(running), images_s=f"{_images_per_second(running):.0f}", **shown)


def _images_per_second(running: list[_Running]) -> float:
    """Adds up the newest throughputs of the trials that have one."""
    newest = (metrics.read_rows(job.trial.directory / "timing.jsonl")[-1:] for job in running)
    return sum(row.get("images_per_second", 0.0) for rows in newest for row in rows)


def _trial_process(stored: dict[str, Any], directory: Path, cores: list[int], compilation_cache: Path) -> None:
    """Runs one trial to its end in the process that calls it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with (directory / OUTPUT_FILE).open("a") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # before JAX counts its threads
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache))
    try:
        train.run(config.from_dict(stored), directory, show_progress=False)
    except Exception:
        files.write_text(directory / ERROR_FILE, traceback.format_exc())
        sys.exit(1)


def _end_with_parent() -> None:
    """Ends this process as soon as the sweep is gone, however it went: no trial may outlive its sweep."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
