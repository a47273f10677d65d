"""Runs the trials of a sweep on this machine, each in a process of its own, some at a time.

On CPUs small models leave most cores idle, so several trials run side by side, each with its own share of the cores. An
accelerator belongs to one process at a time, so there trials run one by one.
"""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path

from bvit_jax import cores, failures, preemption, sweep_progress, trial_job, trial_process
from bvit_jax.failures import Failures
from bvit_jax.model_config import ConfigError
from bvit_jax.sweep import Trial
from bvit_jax.sweep_progress import Running
from bvit_jax.trial_job import Job

POLL_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Platform:
    """What the trials will find: JAX's default backend and its number of devices."""

    backend: str
    devices: int

    @property
    def default_jobs(self) -> int:
        """Trials to run at a time: one per core on CPUs, up to 8; one on accelerators."""
        return min(len(cores.available()), 8) if self.backend == "cpu" else 1


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
    trials: Sequence[Trial],
    failed: Failures,
    jobs: int,
    retry_failed: bool,
    compilation_cache: Path,
    on_end: Callable[[Trial], None],
    notice: preemption.Notice,
) -> None:
    """Runs what is unfinished; a trial that fails, however it does, is recorded and the others go on.

    Args:
        trials: of one sweep.
        failed: those that failed in an earlier call; new ones are added.
        jobs: trials at a time, at least 1.
        retry_failed: run those again that failed in an earlier call; otherwise they are left as they are.
        compilation_cache: directory for compiled programs, which trials of the same shape share.
        on_end: called with each trial when it has ended: well, failed, or unfinished as it was told to stop.
        notice: once it is reached, no more trials are started, and those that run save and stop.

    Raises:
        preemption.Preempted: if told to stop, when all trials have ended.
    """
    waiting = failed.waiting(trials, retry_failed)
    with (
        sweep_progress.Progress(trials, waiting, failed) as progress,
        _Runner(waiting, failed, jobs, compilation_cache, on_end, progress) as runner,
    ):
        while not notice.reached() and runner.goes_on():
            runner.turn()
        if notice.reached():
            runner.stop()
            raise preemption.Preempted("told to stop; the trials that ran have saved and stopped")


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A trial that runs."""

    trial: Trial
    job: Job
    steps_at_start: int


class _Runner:
    """Runs trials in slots; when it is closed, those that still run are stopped."""

    def __init__(
        self,
        waiting: list[Trial],
        failed: Failures,
        jobs: int,
        compilation_cache: Path,
        on_end: Callable[[Trial], None],
        progress: sweep_progress.Progress,
    ) -> None:
        self._waiting = waiting
        self._failed = failed
        self._jobs = jobs
        self._compilation_cache = compilation_cache
        self._on_end = on_end
        self._progress = progress
        self._running: dict[int, _Slot] = {}
        self._stopping = False

    def __enter__(self) -> "_Runner":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._tell_all_to_stop()
            deadline = time.monotonic() + trial_job.STOP_SECONDS
            for slot in self._running.values():
                slot.job.process.join(max(deadline - time.monotonic(), 0.0))
        finally:
            self._kill()

    def goes_on(self) -> bool:
        """Says whether any trial waits or runs."""
        return bool(self._waiting or self._running)

    def turn(self) -> None:
        """Fills the free slots, then waits a moment for a trial to end."""
        for number in range(self._jobs):
            if self._waiting and number not in self._running:
                self._start(self._waiting.pop(0), number)
        self._collect(POLL_SECONDS)

    def stop(self) -> None:
        """Has the running trials save and stop, and waits for them; those that do not are killed."""
        self._tell_all_to_stop()
        deadline = time.monotonic() + trial_job.STOP_SECONDS
        while self._running and time.monotonic() < deadline:
            self._collect(min(POLL_SECONDS, trial_job.STOP_SECONDS))
        self._kill()
        self._collect(0.0)

    def _start(self, trial: Trial, number: int) -> None:
        self._failed.forget(trial)
        every = cores.available()
        steps = trial.steps_done
        try:
            job = trial_job.start(
                trial_process.order(trial, self._compilation_cache, every[number :: self._jobs] or every)
            )
        except OSError as error:  # no memory or no number left for a process
            self._failed.record(trial, failures.describe(error))
            self._end(trial, steps)
            return
        self._running[number] = _Slot(trial, job, steps)

    def _collect(self, timeout_seconds: float) -> None:
        """Waits until a trial ends, but not for long, and settles those that have."""
        wait([slot.job.process.sentinel for slot in self._running.values()], timeout_seconds)
        for number, slot in list(self._running.items()):
            if slot.job.ended():
                del self._running[number]
                self._settle(slot)
                self._end(slot.trial, slot.steps_at_start)
        running = [
            Running(slot.trial, slot.steps_at_start, f"process {slot.job.process.pid}")
            for slot in self._running.values()
        ]
        self._progress.show(running)

    def _settle(self, slot: _Slot) -> None:
        """Records why a trial failed that ended without a result and was not told to stop."""
        told_to_stop = slot.job.cause is None and (self._stopping or slot.job.was_stopped)
        if not slot.trial.is_done and not told_to_stop:
            self._failed.record(slot.trial, slot.job.described)

    def _end(self, trial: Trial, steps_at_start: int) -> None:
        self._progress.ended(trial, steps_at_start)
        self._on_end(trial)

    def _tell_all_to_stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            for slot in self._running.values():
                slot.job.tell_to_stop()

    def _kill(self) -> None:
        for slot in self._running.values():
            slot.job.process.kill()
        for slot in self._running.values():
            slot.job.process.join()
