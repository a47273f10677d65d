"""Runs the trials of a sweep on a Ray cluster, as many at a time as it has room for.

All there is to know of a sweep lies in its directory, which all nodes share. A trial whose machine is lost is started
again, and goes on from its newest checkpoint; a sweep that is killed and started again goes on likewise.
"""

import contextlib
import dataclasses
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bvit_jax import (
    checkpoints,
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
from bvit_jax.ray_trial import Errand, Outcome
from bvit_jax.sweep import Trial
from bvit_jax.sweep_progress import Running

POLL_SECONDS = 1.0
STOP_SECONDS = trial_job.STOP_SECONDS + 30.0
"""For trials to stop and to say so; then they are ended."""
SHOW_SECONDS = 60.0
"""For a file written on another machine to be seen on this one."""
_UNTOLD = {
    "stopped": "its process was told to stop, by others than the sweep",
    "done": f"it ended well, but its result has not been seen here for {SHOW_SECONDS:.0f} s",
}
_COLOURS = re.compile(r"\x1b\[[\d;]*m")


@dataclasses.dataclass
class _Task:
    """A trial in Ray's hands.

    Attributes:
        trial: of the sweep.
        key: of this attempt, on the board.
        steps: that the trial had done when it was handed over.
        place: where a node began with it, once one has.
        outcome: once Ray has it back.
        patience_ends: for its result to be seen here, on the clock of `time.monotonic`.
    """

    trial: Trial
    key: str
    steps: int
    place: str | None = None
    outcome: Outcome | None = None
    patience_ends: float = 0.0


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
        identity: a file of the sweep's directory, by which nodes are known to see it.
    """

    need: Need
    jobs: int
    max_retries: int
    retry_failed: bool
    compilation_cache: Path
    identity: Path


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
        self._shared = ray_trial.shared(plan.identity)
        self._attempts = itertools.count()
        self._tasks: dict[Any, _Task] = {}
        self._unseen: list[_Task] = []
        self._losses: dict[Path, _Losses] = {}
        self._stopping = False

    def goes_on(self) -> bool:
        """Says whether any trial waits or runs."""
        return bool(self._waiting or self._tasks or self._unseen)

    def turn(self) -> None:
        """Hands over what there is room for, then waits a moment for a trial to end."""
        room = self._room()
        for trial in list(self._waiting):
            if len(self._tasks) >= room:
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
        for ref, task in self._tasks.items():
            if task.place is None:
                ray.cancel(ref)
        deadline = time.monotonic() + STOP_SECONDS
        while self._tasks and time.monotonic() < deadline:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._board.stop.remote())  # again and again: a board that was started anew has not heard it
            self._collect(POLL_SECONDS)
        for ref in self._tasks:
            ray.cancel(ref, force=True)

    def _room(self) -> int:
        """Returns how many trials may be in Ray's hands: it keeps tasks until there is room, but not for slices."""
        need = self._plan.need
        of_slices = ray_cluster.count_slices(need, ray_cluster.alive()) if need.slice and self._waiting else math.inf
        return int(min(of_slices, self._plan.jobs or math.inf, len(self._tasks) + len(self._waiting)))

    def _submit(self, trial: Trial) -> None:
        need, key = self._plan.need, f"{trial.directory.name}/{next(self._attempts)}"
        order = trial_process.order(trial, self._plan.compilation_cache, ())
        errand = Errand(key, order, need.threads, self._shared)
        if need.slice:
            # The trainer is minded on this node, which outlives slices.
            options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": _this_node()}
            function: Any = ray_trial.run_on_slice
            arguments: tuple[Any, ...] = (errand, need, self._board)
        else:
            options, function, arguments = need.options, ray_trial.run, (errand, self._board)
        ref = ray.remote(function).options(**options, max_retries=0, name=trial.label).remote(*arguments)
        self._tasks[ref] = _Task(trial, key, trial.steps_done)

    def _collect(self, timeout_seconds: float) -> None:
        """Waits until a trial ends, but not for long, and settles those that have."""
        refs = list(self._tasks)
        ended: list[Any] = []
        if refs:
            ended, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_seconds)
        else:  # those that wait are not free yet, or have no room
            time.sleep(timeout_seconds)
        self._note_places()
        for ref in ended:
            task = self._tasks.pop(ref)
            task.outcome = _outcome(ref)
            task.patience_ends = time.monotonic() + SHOW_SECONDS
            self._unseen.append(task)
        late = [task for task in self._unseen if _is_late(task)]
        for task in self._unseen:
            if task not in late:
                self._settle(task)
        self._unseen = late
        self._progress.show(
            [Running(task.trial, task.steps, task.place) for task in self._tasks.values() if task.place is not None]
        )

    def _note_places(self) -> None:
        """Takes note of the trials that a node has begun with."""
        places: dict[str, str] = {}
        with contextlib.suppress(ray.exceptions.RayError):  # a board that is lost is started anew, and begins empty
            places = ray.get(self._board.places.remote())
        for task in self._tasks.values():
            if task.place is None and task.key in places:
                task.place = places[task.key]
                self._failed.forget(task.trial)

    def _settle(self, task: _Task) -> None:
        trial, outcome = task.trial, task.outcome
        assert outcome is not None
        if not trial.is_done and outcome.kind == "failed":
            self._failed.record(trial, outcome.why)
        elif not trial.is_done and not self._stopping:
            lost = outcome.why or _UNTOLD[outcome.kind]
            if self._may_be_retried(trial):
                self._progress.set_back(trial, task.steps)
                self._waiting.append(trial)
                self._on_loss(trial, lost)
                return
            self._failed.record(trial, f"{lost}\n{_given_up(self._losses[trial.directory])}")
        if task.place is not None or not self._stopping:
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


def _is_late(task: _Task) -> bool:
    """Says whether a trial is done whose result, written on another machine, is not seen here yet."""
    done = task.outcome is not None and task.outcome.kind == "done"
    return done and not task.trial.is_done and time.monotonic() < task.patience_ends


def _outcome(ref: Any) -> Outcome:
    """Returns how a task ended; what is Ray's own trouble, or a node's, is a loss."""
    try:
        found: Outcome = ray.get(ref)
        return found
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ray.exceptions.RayError):
            return Outcome("lost", _gist(error.cause))
        text = _COLOURS.sub("", str(error))
        return Outcome("failed", f"{text}\n\n{type(error.cause).__name__}: {error.cause}")
    except ray.exceptions.RayError as error:
        return Outcome("lost", _gist(error))


def _gist(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


@contextlib.contextmanager
def _board() -> Iterator[Any]:
    board = (
        ray.remote(ray_trial.Board)
        .options(num_cpus=0, scheduling_strategy=_this_node(), max_restarts=-1, max_task_retries=-1)
        .remote()
    )
    try:
        yield board
    finally:
        ray.kill(board)


def _this_node() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
