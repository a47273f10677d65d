"""What runs on the nodes of a Ray cluster: the process of a trial, or of each host of a slice, and who minds it.

Ray's own workers do no computing. A worker starts the process of a trial, as `bvit_jax.executor` does on one machine,
says on the board where it runs, looks there whether to stop, and returns how it ended. The process ends with its
worker, and the worker with its node or with the sweep; the trial then goes on from its newest checkpoint elsewhere.
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ray

from bvit_jax import cores, executor, peers, ray_cluster, trial_job
from bvit_jax.executor import Platform
from bvit_jax.ray_cluster import Need
from bvit_jax.trial_job import Job
from bvit_jax.trial_process import Order, Seat

POLL_SECONDS = 1.0
CHECK_IN_SECONDS = 2.0
"""Between two looks at the board, however many trials run."""
_CAUSE = "cause.txt"
_START_FAILURES = 10
"""Times that Ray may try in vain to start the workers of a slice: each takes minutes if a host is not there."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        kind: `done`; `stopped`, as it was told to; `failed` by itself; or `lost`, with its machine or by its fault.
        why: of the last two.
    """

    kind: Literal["done", "stopped", "failed", "lost"]
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all machines of a sweep must have in common.

    Attributes:
        path: a file of the sweep's directory.
        digest: SHA-256 of its content; empty if it cannot be read.
        versions: of `ray_cluster.versions`.
    """

    path: Path
    digest: str
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Errand:
    """A trial as it is handed to a node.

    Attributes:
        key: of this attempt, on the board.
        order: for its process, but for what depends on the node.
        threads: as `Need.threads`.
        shared: what the node must have in common with the sweep.
    """

    key: str
    order: Order
    threads: int | None
    shared: Shared


class Board:
    """Where trials run, and whether they are to stop; an actor on the sweep's own node."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}
        self._stopping = False

    def check_in(self, key: str, place: str) -> bool:
        """Takes note of where an attempt runs; says whether it is to stop."""
        self._places[key] = place
        return self._stopping

    def places(self) -> dict[str, str]:
        """Returns where attempts ran last, by their keys."""
        return self._places

    def stop(self) -> None:
        """Has all trials save and stop."""
        self._stopping = True


def shared(path: Path) -> Shared:
    """Returns what this machine has of what all must have in common."""
    content = None
    with contextlib.suppress(OSError):
        content = path.read_bytes()
    digest = "" if content is None else hashlib.sha256(content).hexdigest()
    return Shared(path, digest, ray_cluster.versions())


def differing(wanted: Shared) -> str | None:
    """Says how this machine differs from what is wanted; None if it does not."""
    here = shared(wanted.path)
    if here.versions != wanted.versions:
        return f"host {socket.gethostname()} has other packages than the sweep: {here.versions}, not {wanted.versions}"
    if here.digest != wanted.digest:
        return f"host {socket.gethostname()} does not see the sweep's directory {str(wanted.path.parent)!r}"
    return None


def platform() -> Platform:
    """Returns what a trial would find here; raises ConfigError if JAX finds no device."""
    return executor.probe_platform()


def run(errand: Errand, board: Any) -> Outcome:
    """Runs a trial in one process on this node."""
    return _run(errand, errand.order, board, socket.gethostname())


def _run(errand: Errand, order: Order, board: Any, place: str) -> Outcome:
    wrong = differing(errand.shared)
    if wrong is not None:
        return Outcome("lost", wrong)
    here = dataclasses.replace(order, cores=tuple(cores.available()), threads=errand.threads)
    try:
        job = trial_job.start(here)
    except OSError as error:  # no memory or no number left for a process
        return Outcome("lost", f"host {socket.gethostname()}: {type(error).__name__}: {error}")
    with _watched(board, errand.key, place) as told:
        try:
            while not job.ended(POLL_SECONDS) and not told.is_set():
                pass
            if told.is_set():
                job.tell_to_stop()
                job.ended(trial_job.STOP_SECONDS)
        finally:
            job.kill()
            job.ended()
    return _outcome(job, told.is_set())


def _outcome(job: Job, told_to_stop: bool) -> Outcome:
    if job.process.exitcode == 0:
        return Outcome("done")
    if job.cause is None and (told_to_stop or job.was_stopped):
        return Outcome("stopped")
    lost = job.cause is None and job.process.exitcode == peers.EXIT_STATUS
    return Outcome("lost" if lost else "failed", job.described)


@contextlib.contextmanager
def _watched(board: Any, key: str, place: str) -> Iterator[threading.Event]:
    """Checks in at the board, and sets what it yields when the trial is to stop, or the board is gone for good.

    It waits for answers in a thread of its own: while the main thread of a task waits, Ray starts another in its place.
    """
    told, ended = threading.Event(), threading.Event()

    def look() -> None:
        while not ended.wait(CHECK_IN_SECONDS):
            try:
                stop = ray.get(board.check_in.remote(key, place))
            except ray.exceptions.ActorDiedError:
                stop = True
            except ray.exceptions.RayError:  # it cannot be reached now
                stop = False
            if stop:
                told.set()
                return

    threading.Thread(target=look, daemon=True).start()
    try:
        yield told
    finally:
        ended.set()


def run_on_slice(errand: Errand, need: Need, board: Any) -> Outcome:
    """Runs a trial on a whole slice of TPUs, in a process on each of its hosts, by Ray's `JaxTrainer`.

    The trainer reserves the slice and puts a worker on each host; the processes that these start meet as those of
    `experiments.train` do. Compressions are made afterwards on this node, by its CPUs.
    """
    order = errand.order
    storage = order.directory.parent.parent / "ray" / order.directory.name
    try:
        found = _fit(
            dataclasses.replace(errand, order=dataclasses.replace(order, compressions=())), need, board, storage
        )
        told = [path.read_text(errors="replace") for path in sorted(storage.glob(f"*{_CAUSE}"))]
    finally:
        shutil.rmtree(storage, ignore_errors=True)
        with contextlib.suppress(OSError):
            storage.parent.rmdir()
    if told and found.kind != "done":
        return Outcome("failed", told[0])
    if found.kind != "done" or not order.compressions:
        return found
    if not (order.directory / "result.json").exists():
        return Outcome("lost", f"its result is not seen on host {socket.gethostname()}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    return run(errand, board)


def _fit(errand: Errand, need: Need, board: Any, storage: Path) -> Outcome:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.train.v2.jax import JaxConfig, JaxTrainer

    hosts, resources = ray_cluster.hosts_of(need)
    trainer = JaxTrainer(
        _on_host,
        train_loop_config={"errand": errand, "board": board, "storage": storage},
        jax_config=JaxConfig(),  # workers do not take the TPUs: the processes that they start do
        scaling_config=ScalingConfig(
            num_workers=hosts,
            use_tpu=True,
            topology=need.shape,
            accelerator_type=need.accelerator,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name="run",
            storage_path=str(storage),  # which it needs, though it has nothing to keep
            failure_config=FailureConfig(  # the sweep itself counts losses
                max_failures=0, max_preemption_failures=0, controller_failure_limit=_START_FAILURES
            ),
        ),
    )
    try:
        found: Outcome = trainer.fit().return_value
        return found
    except TrainingFailedError as error:
        return Outcome("lost", f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[-1]}")


def _on_host(given: dict[str, Any]) -> Outcome:
    """Runs one process of a trial; that of rank 0 returns how the trial ended, the others leave word if they fail."""
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    errand: Errand = given["errand"]
    context = ray.train.get_context()
    rank, count = context.get_world_rank(), context.get_world_size()
    address = broadcast_from_rank_zero(f"{ray.util.get_node_ip_address()}:{_free_port()}" if rank == 0 else "")
    order = dataclasses.replace(errand.order, seat=Seat(address, count, rank))
    place = f"{socket.gethostname()} and {count - 1} more" if count > 1 else socket.gethostname()
    own = dataclasses.replace(errand, key=errand.key if rank == 0 else f"{errand.key}, host {rank}")
    found = _run(own, order, given["board"], place)
    if found.kind == "failed":
        (given["storage"] / f"{rank}_{_CAUSE}").write_text(found.why, errors="replace")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
