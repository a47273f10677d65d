"""The sweep's side of a cluster that loses what it is told to; a real cluster has its own module."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from bvit_jax import preemption, ray_executor, ray_trial, sweep
from bvit_jax.failures import Failures
from bvit_jax.ray_cluster import Need
from bvit_jax.ray_executor import Plan
from bvit_jax.ray_trial import Board, Outcome
from bvit_jax.trial_process import Order
from tests.conftest import make_config

TRACEBACK = """Traceback (most recent call last):
  File "/somewhere/else.py", line 7, in compute
    1 / 0
ZeroDivisionError: by zero
"""
Work = Callable[[Order], Outcome]


class DrawnRay:
    """As much of Ray as a sweep uses: a task is done when it is waited for, an actor is an object."""

    exceptions = ray.exceptions

    def __init__(self, work: Work) -> None:
        self._work = work
        self.options: list[dict[str, Any]] = []
        self.killed: list[object] = []

    def remote(self, target: Any) -> Any:
        def options(**given: Any) -> Any:
            self.options.append(given)
            return SimpleNamespace(remote=lambda *arguments: self._started(target, arguments))

        return SimpleNamespace(options=options)

    def _started(self, target: Any, arguments: tuple[Any, ...]) -> Any:
        if target is Board:
            return _Actor(Board())
        errand, *_, board = arguments
        assert target is (ray_trial.run_on_slice if len(arguments) == 3 else ray_trial.run)
        assert errand.shared.path.read_text() == "{}"
        board.check_in.remote(errand.key, "a host")
        return _Ref(errand.order)

    def get(self, ref: Any) -> Any:
        return self._work(ref.order) if isinstance(ref, _Ref) else ref

    def wait(self, refs: Sequence[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        assert num_returns == len(refs)
        return list(refs[:1]), list(refs[1:])

    def kill(self, actor: object) -> None:
        self.killed.append(actor)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "0" * 56)


class _Actor:
    def __init__(self, inner: object) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._inner, name))


@dataclasses.dataclass(frozen=True, eq=False)
class _Ref:
    order: Order


def make_trials(workdir: Path, count: int) -> list[sweep.Trial]:
    configs = [make_config("dense", seed=seed) for seed in range(count)]
    return [sweep.Trial(config, workdir / "trials" / config.digest()) for config in configs]


def finish(order: Order) -> Outcome:
    order.directory.mkdir(parents=True, exist_ok=True)
    (order.directory / "result.json").write_text(json.dumps({"test_accuracy": 0.5}))
    return Outcome("done")


@dataclasses.dataclass
class Run:
    """What a sweep by `run` told, and its failures."""

    ended: list[sweep.Trial]
    losses: list[tuple[sweep.Trial, str]]
    failed: Failures
    drawn: DrawnRay


def run(trials: list[sweep.Trial], workdir: Path, work: Work, monkeypatch: pytest.MonkeyPatch, **plan: Any) -> Run:
    drawn = DrawnRay(work)
    monkeypatch.setattr(ray_executor, "ray", drawn)
    monkeypatch.setattr(ray_executor, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(ray_executor, "SHOW_SECONDS", 0.0)
    found = Run([], [], Failures(workdir / "errors"), drawn)
    given = {"need": Need({"CPU": 1.0}), "jobs": 0, "max_retries": 3, "retry_failed": False}
    (workdir / "sweep.json").write_text("{}")
    of = Plan(**(given | plan), compilation_cache=workdir / "cache", identity=workdir / "sweep.json")
    told = preemption.Notice(joined=False)
    ray_executor.run_trials(trials, found.failed, of, found.ended.append, lambda *loss: found.losses.append(loss), told)
    assert len(drawn.killed) == 1  # the board
    return found


def save(order: Order, step: int) -> None:
    (order.directory / "checkpoints" / str(step)).mkdir(parents=True)


def node_died() -> BaseException:
    return ray.exceptions.NodeDiedError("the node is gone\nand more")


def test_trials_are_run_once_with_what_they_need(tmp_path, monkeypatch):
    trials = make_trials(tmp_path, 3)
    need = Need({"CPU": 2.0, "GPU": 1.0, "memory": 1e9, "special": 0.5})
    found = run(trials, tmp_path, finish, monkeypatch, need=need)
    assert found.ended == trials
    assert found.losses == []
    board, *tasks = found.drawn.options
    assert board["num_cpus"] == 0
    assert [task.pop("name") for task in tasks] == [trial.label for trial in trials]
    wanted = {"num_cpus": 2.0, "num_gpus": 1.0, "memory": 1e9, "resources": {"special": 0.5}, "max_retries": 0}
    assert tasks == [wanted] * 3
    assert run(trials, tmp_path, finish, monkeypatch).ended == []


def test_a_trial_that_is_lost_again_and_again_at_the_same_step_has_failed(tmp_path, monkeypatch):
    lost, good = make_trials(tmp_path, 2)

    def work(order: Order) -> Outcome:
        if order.directory == lost.directory:
            raise node_died()
        return finish(order)

    found = run([lost, good], tmp_path, work, monkeypatch, max_retries=2)
    assert [trial for trial, _ in found.losses] == [lost, lost]
    assert {why for _, why in found.losses} == {"NodeDiedError: the node is gone"}
    assert found.ended == [good, lost]
    assert sweep.result_row(lost, found.failed.cause(lost)).error == (
        "lost 3 times in succession, each time at the checkpoint of step 0"
    )
    assert found.failed.cause(lost).startswith("NodeDiedError: the node is gone\n")
    again = run([lost, good], tmp_path, finish, monkeypatch, retry_failed=True)
    assert again.ended == [lost]
    assert again.failed.status(lost) == "ok"


def test_losses_are_counted_anew_after_a_checkpoint(tmp_path, monkeypatch):
    [trial] = make_trials(tmp_path, 1)
    steps = iter([None, 2, None, 4, None])  # what it saves before it is lost

    def work(order: Order) -> Outcome:
        step = next(steps, "end")
        if step == "end":
            return finish(order)
        if step is not None:
            save(order, step)
        raise node_died()

    found = run([trial], tmp_path, work, monkeypatch, max_retries=2)
    assert len(found.losses) == 5
    assert found.failed.status(trial) == "ok"


@pytest.mark.parametrize(
    ("ends", "why"),
    [
        (Outcome("lost", "process 1 of 2 is gone"), "process 1 of 2 is gone"),
        (Outcome("stopped"), "its process was told to stop, by others than the sweep"),
        (ray.exceptions.WorkerCrashedError(), "WorkerCrashedError: The worker died unexpectedly while executing"),
        (ray.exceptions.OutOfMemoryError("full"), "OutOfMemoryError: full"),
        (ray.exceptions.RuntimeEnvSetupError("no room"), "RuntimeEnvSetupError: Failed to set up runtime environment"),
        (Outcome("done"), "it ended well, but its result has not been seen here for 60 s"),
    ],
)
def test_all_ways_of_being_lost(tmp_path, monkeypatch, ends, why):
    [trial] = make_trials(tmp_path, 1)
    first = iter([ends])

    def work(order: Order) -> Outcome:
        end = next(first, None)
        if isinstance(end, BaseException):
            raise end
        return end or finish(order)

    found = run([trial], tmp_path, work, monkeypatch)
    [(_, told)] = found.losses
    assert told.startswith(why)
    assert found.failed.status(trial) == "ok"


def test_what_fails_is_not_run_again(tmp_path, monkeypatch):
    said, raised, _ = trials = make_trials(tmp_path, 3)

    def work(order: Order) -> Outcome:
        if order.directory == said.directory:
            return Outcome("failed", "Traceback\nValueError: too few images")
        if order.directory == raised.directory:
            error = ZeroDivisionError("by zero")
            task_error = ray.exceptions.RayTaskError("run", TRACEBACK, error)
            raise task_error.as_instanceof_cause()
        return finish(order)

    found = run(trials, tmp_path, work, monkeypatch)
    assert (found.ended, found.losses) == (trials, [])
    errors = [sweep.result_row(trial, found.failed.cause(trial)).error for trial in trials]
    assert errors == ["ValueError: too few images", "ZeroDivisionError: by zero", ""]
    assert "line 7, in compute" in found.failed.cause(raised)
    assert "\x1b" not in found.failed.cause(raised)  # Ray colours it
    assert run(trials, tmp_path, finish, monkeypatch).ended == []


def test_at_most_so_many_run_at_a_time(tmp_path, monkeypatch):
    trials = make_trials(tmp_path, 5)
    waited: list[int] = []
    monkeypatch.setattr(DrawnRay, "wait", lambda self, refs, **_: (waited.append(len(refs)), (refs[:1], refs[1:]))[1])
    run(trials, tmp_path, finish, monkeypatch, jobs=2)
    assert waited == [2, 2, 2, 2, 1]


def test_trials_on_slices_are_as_many_as_there_are_slices_now(tmp_path, monkeypatch):
    trials = make_trials(tmp_path, 4)
    waited: list[int] = []
    slices = iter([1, 0, 3])
    monkeypatch.setattr(DrawnRay, "wait", lambda self, refs, **_: (waited.append(len(refs)), (refs[:1], refs[1:]))[1])
    monkeypatch.setattr(ray_executor.ray_cluster, "alive", list)
    monkeypatch.setattr(ray_executor.ray_cluster, "count_slices", lambda *_: next(slices, 3))
    found = run(trials, tmp_path, finish, monkeypatch, need=Need({}, "v6e:4x4"))
    assert found.ended == trials
    assert waited == [1, 3, 2, 1]  # and none while there was no slice
    _, *tasks = found.drawn.options
    assert [task["num_cpus"] for task in tasks] == [0] * 4


def test_what_failed_before_stays_so_until_a_node_begins_with_it(tmp_path, monkeypatch):
    first, second = trials = make_trials(tmp_path, 2)
    failed = Failures(tmp_path / "errors")
    for trial in trials:
        failed.record(trial, "out of luck")
    monkeypatch.setattr(
        Board,
        "check_in",
        lambda self, key, place: self._places.update({key: place}) if (key.startswith(first.directory.name)) else None,
    )
    monkeypatch.setattr(DrawnRay, "cancel", lambda self, ref, force=False: None, raising=False)
    monkeypatch.setattr(ray_executor, "STOP_SECONDS", 0.0)

    def stop(order: Order) -> Outcome:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(trials, tmp_path, stop, monkeypatch, retry_failed=True)
    assert (failed.status(first), failed.status(second)) == ("unfinished", "failed")


def test_a_trial_whose_process_still_runs_waits_for_it(tmp_path, monkeypatch):
    first, second = trials = make_trials(tmp_path, 2)
    looks = iter(["host H, process 7", "host H, process 7"])
    monkeypatch.setattr(
        ray_executor.workdirs, "holder", lambda of: next(looks, None) if of == first.directory else None
    )
    assert run(trials, tmp_path, finish, monkeypatch).ended == [second, first]


def test_a_board_that_begins_anew_has_forgotten_places_and_nothing_else(tmp_path, monkeypatch):
    [trial] = make_trials(tmp_path, 1)
    shown: list[list[str]] = []
    waits = iter([False, False])
    monkeypatch.setattr(DrawnRay, "wait", lambda self, refs, **_: (refs, []) if next(waits, True) else ([], refs))
    places = iter([{f"{trial.directory.name}/0": "a host"}])
    monkeypatch.setattr(Board, "places", lambda self: next(places, {}))
    monkeypatch.setattr(
        ray_executor.sweep_progress.Progress, "show", lambda self, running: shown.append([one.where for one in running])
    )
    assert run([trial], tmp_path, finish, monkeypatch).ended == [trial]
    assert shown == [["a host"], ["a host"], []]


def test_a_result_that_is_seen_late_counts(tmp_path, monkeypatch):
    [trial] = make_trials(tmp_path, 1)
    orders: list[Order] = []
    monkeypatch.setattr(ray_executor.time, "sleep", lambda _: finish(orders[0]))

    def work(order: Order) -> Outcome:
        orders.append(order)
        monkeypatch.setattr(ray_executor, "SHOW_SECONDS", 60.0)
        return Outcome("done")

    found = run([trial], tmp_path, work, monkeypatch)
    assert (found.ended, found.losses) == ([trial], [])
