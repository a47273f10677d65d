"""Runs the trials of a sweep on this machine, each in a process of its own, some at a time.

On CPUs small models leave most cores idle, so several trials run side by side, each with its own share of the cores. An
accelerator belongs to one process at a time, so there trials run one by one.
"""

import contextlib
import dataclasses
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from bvit_jax import cores, failures, preemption, trial_process
from bvit_jax.failures import Failures
from bvit_jax.model_config import ConfigError
from bvit_jax.sweep import Trial

POLL_SECONDS = 1.0
STOP_SECONDS = 60.0
"""How long trials that are told to stop have to save; then they are killed."""


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
    with _Runner(failed.waiting(trials, retry_failed), failed, jobs, compilation_cache, on_end) as runner:
        while not notice.reached() and runner.goes_on():
            runner.turn()
        if notice.reached():
            runner.stop()
            raise preemption.Preempted("told to stop; the trials that ran have saved and stopped")


@dataclasses.dataclass
class _Job:
    """A trial that runs; `cause` is why it failed, once its process has said so."""

    trial: Trial
    process: BaseProcess
    pipe: Connection
    steps_at_start: int
    cause: str | None = None

    def listen(self) -> None:
        """Takes what the process has sent so far."""
        with contextlib.suppress(OSError, EOFError):
            while self.pipe.poll():
                self.cause = self.pipe.recv_bytes().decode(errors="replace")

    def tell_to_stop(self) -> None:
        """Has the process save and stop; one that has had SIGTERM itself hears no second one."""
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(trial_process.STOP)


class _Runner:
    """Runs trials in slots; when it is closed, those that still run are stopped."""

    def __init__(
        self,
        waiting: list[Trial],
        failed: Failures,
        jobs: int,
        compilation_cache: Path,
        on_end: Callable[[Trial], None],
    ) -> None:
        self._waiting = waiting
        self._failed = failed
        self._jobs = jobs
        self._compilation_cache = compilation_cache
        self._on_end = on_end
        self._running: dict[int, _Job] = {}
        self._stopping = False
        self._ended_steps = 0
        remaining = sum(trial.config.total_steps - trial.steps_done for trial in waiting)
        self._bar = tqdm(total=remaining, unit="step", disable=None, leave=False)

    def __enter__(self) -> "_Runner":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._tell_all_to_stop()
            deadline = time.monotonic() + STOP_SECONDS
            for job in self._running.values():
                job.process.join(max(deadline - time.monotonic(), 0.0))
        finally:
            self._kill()
            self._bar.close()

    def goes_on(self) -> bool:
        """Says whether any trial waits or runs."""
        return bool(self._waiting or self._running)

    def turn(self) -> None:
        """Fills the free slots, then waits a moment for a trial to end."""
        for slot in range(self._jobs):
            if self._waiting and slot not in self._running:
                self._start(self._waiting.pop(0), slot)
        self._collect(POLL_SECONDS)

    def stop(self) -> None:
        """Has the running trials save and stop, and waits for them; those that do not are killed."""
        self._tell_all_to_stop()
        deadline = time.monotonic() + STOP_SECONDS
        while self._running and time.monotonic() < deadline:
            self._collect(min(POLL_SECONDS, STOP_SECONDS))
        self._kill()
        self._collect(0.0)

    def _start(self, trial: Trial, slot: int) -> None:
        self._failed.forget(trial)
        every = cores.available()
        share = every[slot :: self._jobs] or every
        requests = [dataclasses.asdict(request) for request in trial.compressions]
        context = multiprocessing.get_context("spawn")
        try:
            here, there = context.Pipe()
            with there:
                process = context.Process(
                    target=trial_process.run,
                    args=(trial.config.to_dict(), trial.directory, requests, share, self._compilation_cache, there),
                )
                process.start()
        except OSError as error:  # no memory or no number left for a process
            self._failed.record(trial, failures.describe(error))
            self._end(trial, trial.steps_done)
            return
        self._running[slot] = _Job(trial, process, here, trial.steps_done)

    def _collect(self, timeout_seconds: float) -> None:
        """Waits until a trial ends, but not for long, and settles those that have."""
        wait([job.process.sentinel for job in self._running.values()], timeout_seconds)
        for slot, job in list(self._running.items()):
            ended = job.process.exitcode is not None  # before listening: what it said last is in the pipe by then
            job.listen()
            if ended:
                del self._running[slot]
                job.pipe.close()
                self._settle(job)
                self._end(job.trial, job.steps_at_start)
        self._show()

    def _settle(self, job: _Job) -> None:
        """Records why a trial failed that ended without a result and was not told to stop."""
        code = job.process.exitcode
        told_to_stop = self._stopping or code in (preemption.EXIT_STATUS, -signal.SIGTERM)
        if not job.trial.is_done and (job.cause is not None or not told_to_stop):
            cause = job.cause or failures.describe_end(code, job.trial.directory / trial_process.OUTPUT_FILE)
            self._failed.record(job.trial, cause)

    def _end(self, trial: Trial, steps_at_start: int) -> None:
        self._ended_steps += trial.config.total_steps - steps_at_start
        self._on_end(trial)

    def _tell_all_to_stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            for job in self._running.values():
                job.tell_to_stop()

    def _kill(self) -> None:
        for job in self._running.values():
            job.process.kill()
        for job in self._running.values():
            job.process.join()

    def _show(self) -> None:
        """Brings the progress bar up to date from the metrics that the trials write."""
        steps = self._ended_steps
        shown: dict[str, str] = {}
        for job in self._running.values():
            rows = [row for row in job.trial.rows("metrics.jsonl") if row.get("split") == "train"]
            if rows:
                steps += max(rows[-1].get("step", 0) - job.steps_at_start, 0)
                shown = {name: f"{rows[-1].get(name, float('nan')):.3f}" for name in ("loss", "accuracy")}
        self._bar.update(steps - self._bar.n)
        self._bar.set_postfix(running=len(self._running), images_s=f"{self._images_per_second():.0f}", **shown)

    def _images_per_second(self) -> float:
        """Adds up the newest throughputs of the trials that have one."""
        newest = (job.trial.rows("timing.jsonl")[-1:] for job in self._running.values())
        return sum(row.get("images_per_second", 0.0) for rows in newest for row in rows)
