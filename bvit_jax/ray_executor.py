"""Runs the trials of a sweep on a Ray cluster, as many at a time as it has room for.

All there is to know of a sweep lies in its directory, which all nodes share. A trial whose machine is lost is started
again, and goes on from its newest checkpoint; a sweep that is killed and started again goes on likewise.
"""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bvit_jax import (
    checkpoints,
    failures,
    preemption,
    ray_cluster,
    ray_trial,
    sweep_progress,
    trial_job,
    trial_process,
)
from bvit_jax import workdir as workdirs
from bvit_jax.failures import Failures
from bvit_jax.ray_cluster import Need
from bvit_jax.ray_trial import Outcome
from bvit_jax.sweep import Trial
from bvit_jax.sweep_progress import Running

POLL_SECONDS = 1.0
STOP_SECONDS = trial_job.STOP_SECONDS + 30.0
"""For trials to stop and to say so; then they are ended."""
SHOW_SECONDS = 60.0
"""For a file written on another machine to be seen on this one."""
_COLOURS = re.compile(r"\x1b\[[\d;]*m")


@dataclasses.dataclass
class _Task:
    """A trial in Ray's hands; `steps` is what it had done when it was handed over."""

    trial: Trial
    steps: int


@dataclasses.dataclass(frozen=True)
class _Losses:
    """How often in succession a trial was lost whose newest checkpoint was of one and the same step."""

    step: int
    count: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the trials of a sweep are run.

    Attributes:
        need: what each takes.
        jobs: trials at a time; 0: as many as there is room for.
        max_retries: times that a trial is started again whose machine was lost, counted anew after a new checkpoint.
        retry_failed: whether to run those again that failed in an earlier call.
        compilation_cache: directory for compiled programs.
    """

    need: Need
    jobs: int
    max_retries: int
    retry_failed: bool
    compilation_cache: Path


def run_trials(
    trials: Sequence[Trial],
    failed: Failures,
    plan: Plan,
    on_end: Callable[[Trial], None],
    on_loss: Callable[[Trial, str], None],
    notice: preemption.Notice,
) -> None:
    """Runs what is unfinished, as `executor.run_trials` does, on the cluster that this process is connected to.

    Args:
        trials: of one sweep; their directories must be absolute.
        failed: those that failed in an earlier call; new ones are added.
        plan: how.
        on_end: called with each trial when it has ended, however it did.
        on_loss: called with each trial that is lost and is to be started again, and why.
        notice: once it is reached, no more trials are started, and those that run save and stop.

    Raises:
        preemption.Preempted: if told to stop, when all trials have ended.
    """
    waiting = failed.waiting(trials, plan.retry_failed)
    with (
        sweep_progress.Progress(trials, waiting, failed) as progress,
        _board() as board,
        contextlib.closing(_Runner(waiting, failed, plan, board, progress, on_end, on_loss)) as runner,
    ):
        while not notice.reached() and runner.goes_on():
            runner.turn()
        if notice.reached():
            runner.close()
            raise preemption.Preempted("told to stop; the trials that ran have saved and stopped")


class _Runner:
    """Hands trials to Ray, and takes them back; when it is closed, those that still run are stopped."""

    def __init__(
        self,
        waiting: list[Trial],
        failed: Failures,
        plan: Plan,
        board: Any,
        progress: sweep_progress.Progress,
        on_end: Callable[[Trial], None],
        on_loss: Callable[[Trial, str], None],
    ) -> None:
        self._waiting = waiting
        self._failed = failed
        self._plan = plan
        self._board = board
        self._progress = progress
        self._on_end = on_end
        self._on_loss = on_loss
        self._jobs = plan.jobs or _room(plan.need, len(waiting))
        self._tasks: dict[Any, _Task] = {}
        self._losses: dict[Path, _Losses] = {}
        self._places: dict[str, str] = {}
        self._stopping = False

    def goes_on(self) -> bool:
        """Says whether any trial waits or runs."""
        return bool(self._waiting or self._tasks)

    def turn(self) -> None:
        """Hands over what there is room for, then waits a moment for a trial to end."""
        for trial in list(self._waiting):
            if len(self._tasks) >= self._jobs:
                break
            if workdirs.holder(trial.directory) is None:  # its process, cut off from the sweep, may still run
                self._waiting.remove(trial)
                self._submit(trial)
        self._collect(POLL_SECONDS)

    def close(self) -> None:
        """Has the running trials save and stop, and waits for them; those that do not are ended."""
        if self._stopping or not self._tasks:
            return
        self._stopping = True
        ray.get(self._board.stop.remote())
        places = ray.get(self._board.places.remote())
        for ref, task in self._tasks.items():
            if task.trial.directory.name not in places:
                ray.cancel(ref)
        deadline = time.monotonic() + STOP_SECONDS
        while self._tasks and time.monotonic() < deadline:
            self._collect(POLL_SECONDS)
        for ref in self._tasks:
            ray.cancel(ref, force=True)

    def _submit(self, trial: Trial) -> None:
        self._failed.forget(trial)
        order = trial_process.order(trial, self._plan.compilation_cache, ())
        need = self._plan.need
        if need.slice:
            # The trainer is minded on this node, which outlives slices.
            options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": _this_node()}
            arguments: tuple[Any, ...] = (order, need, self._board)
            function: Any = ray_trial.run_on_slice
        else:
            options, arguments, function = need.options, (order, need.threads, self._board), ray_trial.run
        ref = ray.remote(function).options(**options, max_retries=0, name=trial.label).remote(*arguments)
        self._tasks[ref] = _Task(trial, trial.steps_done)

    def _collect(self, timeout_seconds: float) -> None:
        """Waits until a trial ends, but not for long, and settles those that have."""
        refs = list(self._tasks)
        if refs:
            ended, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_seconds)
        else:  # those that wait are not free yet
            ended = []
            time.sleep(timeout_seconds)
        self._places = ray.get(self._board.places.remote())
        for ref in ended:
            self._settle(self._tasks.pop(ref), _outcome(ref))
        self._progress.show(
            [
                Running(task.trial, task.steps, self._places[task.trial.directory.name])
                for task in self._tasks.values()
                if task.trial.directory.name in self._places
            ]
        )

    def _settle(self, task: _Task, outcome: Outcome) -> None:
        trial = task.trial
        has_run = trial.directory.name in self._places
        ray.get(self._board.forget.remote(trial.directory.name))
        if outcome == Outcome() and not self._stopping:
            _wait_until(lambda: trial.is_done)
        if not trial.is_done and outcome.cause is not None:
            self._failed.record(trial, outcome.cause)
        elif not trial.is_done and not self._stopping:
            lost = outcome.lost or "its process was told to stop, by others than the sweep"
            if self._may_be_retried(trial):
                self._progress.set_back(trial, task.steps)
                self._waiting.append(trial)
                self._on_loss(trial, lost)
                return
            self._failed.record(trial, f"{lost}\n{_given_up(self._losses[trial.directory])}")
        if has_run or not self._stopping:
            self._progress.ended(trial, task.steps)
            self._on_end(trial)

    def _may_be_retried(self, trial: Trial) -> bool:
        """Counts a loss; says whether the trial may be started again."""
        step = max(checkpoints.steps_in(trial.directory / checkpoints.DIRECTORY), default=0)
        before = self._losses.get(trial.directory)
        count = before.count + 1 if before is not None and before.step == step else 1
        self._losses[trial.directory] = _Losses(step, count)
        return count <= self._plan.max_retries


def _given_up(losses: _Losses) -> str:
    return f"lost {losses.count} times in succession, each time at the checkpoint of step {losses.step}"


def _outcome(ref: Any) -> Outcome:
    """Returns how a task ended; what is Ray's own trouble is a loss."""
    try:
        found: Outcome = ray.get(ref)
        return found
    except ray.exceptions.RuntimeEnvSetupError as error:
        return Outcome(cause=failures.describe(error))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ray.exceptions.RayError):
            return Outcome(lost=_gist(error.cause))
        return Outcome(cause=f"{_COLOURS.sub('', str(error))}\n\n{type(error.cause).__name__}: {error.cause}")
    except ray.exceptions.RayError as error:
        return Outcome(lost=_gist(error))


def _gist(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _wait_until(holds: Callable[[], bool]) -> None:
    """Waits for what another machine wrote to be seen here."""
    deadline = time.monotonic() + SHOW_SECONDS
    while not holds() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _room(need: Need, trials: int) -> int:
    """Returns how many trials to hand over at a time: Ray keeps tasks until there is room, but slices have no queue."""
    if not need.slice:
        return max(trials, 1)
    return max(ray_cluster.count_slices(need, [node for node in ray.nodes() if node["Alive"]]), 1)


@contextlib.contextmanager
def _board() -> Iterator[Any]:
    board = ray.remote(ray_trial.Board).options(num_cpus=0, scheduling_strategy=_this_node()).remote()
    try:
        yield board
    finally:
        ray.kill(board)


def _this_node() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
