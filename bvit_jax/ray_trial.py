"""What runs on the nodes of a Ray cluster: the process of a trial, or of each host of a slice, and who minds it.

Ray's own workers do no computing. A worker starts the process of a trial, as `bvit_jax.executor` does on one machine,
says on the board where it runs, looks there whether to stop, and returns how it ended. The process ends with its
worker, and the worker with its node or with the sweep; the trial then goes on from its newest checkpoint elsewhere.
"""

import contextlib
import dataclasses
import os
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import ray

from bvit_jax import cores, executor, peers, ray_cluster, trial_job
from bvit_jax.executor import Platform
from bvit_jax.ray_cluster import Need
from bvit_jax.trial_job import Job
from bvit_jax.trial_process import Order, Seat

POLL_SECONDS = 1.0
CHECK_IN_SECONDS = 2.0
"""Between two looks at the board, however many trials run."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial ended; with neither a cause nor a loss it is done, or was told to stop.

    Attributes:
        cause: why it failed, None if it did not.
        lost: why its process, or one of them, was lost with its machine; None if it was not.
    """

    cause: str | None = None
    lost: str | None = None


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a node has to say before trials run there: the platform that they will find, None if not asked, and
    `ray_cluster.versions`.
    """

    platform: Platform | None
    versions: dict[str, str]


class Board:
    """Where trials run, and whether they are to stop; an actor on the sweep's own node."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}
        self._stopping = False

    def check_in(self, name: str, place: str) -> bool:
        """Takes note of where a trial runs; says whether it is to stop."""
        self._places[name] = place
        return self._stopping

    def places(self) -> dict[str, str]:
        """Returns where the trials ran last, by the names of their directories."""
        return self._places

    def forget(self, name: str) -> None:
        """Takes note that a trial no longer runs."""
        self._places.pop(name, None)

    def stop(self) -> None:
        """Has all trials save and stop."""
        self._stopping = True


def look(ask_jax: bool) -> Seen:
    """Looks around on a node; raises ConfigError if JAX is to be asked and finds no device."""
    return Seen(executor.probe_platform() if ask_jax else None, ray_cluster.versions())


def read(path: Path) -> bytes | None:
    """Returns a file as a node reads it; None if it cannot."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def run(order: Order, threads: int | None, board: Any) -> Outcome:
    """Runs a trial in one process on this node."""
    try:
        job = trial_job.start(_here(order, threads))
    except OSError as error:  # no memory or no number left for a process
        return Outcome(cause=f"{type(error).__name__}: {error}")
    return _mind(job, board, socket.gethostname())


def _here(order: Order, threads: int | None) -> Order:
    return dataclasses.replace(order, cores=tuple(cores.available()), threads=threads)


def _outcome(job: Job, told_to_stop: bool) -> Outcome:
    if job.process.exitcode == 0 or (job.cause is None and told_to_stop) or job.was_stopped:
        return Outcome()
    if job.cause is None and job.process.exitcode == peers.EXIT_STATUS:
        return Outcome(lost=job.described)
    return Outcome(cause=job.described)


def _mind(job: Job, board: Any, place: str) -> Outcome:
    """Waits for a trial's process, and has it stop if the board says so; it ends in any case."""
    told, ended = threading.Event(), threading.Event()
    watch = threading.Thread(target=_watch, args=(board, job.order.directory.name, place, told, ended), daemon=True)
    watch.start()
    try:
        while not job.ended(POLL_SECONDS) and not told.is_set():
            pass
        if told.is_set():
            job.tell_to_stop()
            job.ended(trial_job.STOP_SECONDS)
    finally:
        ended.set()
        job.kill()
        job.ended()
    return _outcome(job, told.is_set())


def _watch(board: Any, name: str, place: str, told: threading.Event, ended: threading.Event) -> None:
    """Checks in at the board, and notes whether to stop, which is so too when the board is gone.

    This waits for answers in a thread of its own: if the main thread of a task waits, Ray starts another in its place.
    """
    with contextlib.suppress(ray.exceptions.RayError):
        while not ray.get(board.check_in.remote(name, place)):
            if ended.wait(CHECK_IN_SECONDS):
                return
    told.set()


def run_on_slice(order: Order, need: Need, board: Any) -> Outcome:
    """Runs a trial on a whole slice of TPUs, in a process on each of its hosts, by Ray's `JaxTrainer`.

    The trainer reserves the slice and puts a worker on each host; the processes that these start meet as those of
    `experiments.train` do. Compressions are made afterwards on this node, by its CPUs.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.train.v2.jax import JaxConfig, JaxTrainer
    from ray.util.tpu import get_tpu_worker_resources

    hosts, resources = get_tpu_worker_resources(need.shape, need.accelerator, dict(need.resources) or None)
    storage = order.directory.parent.parent / "ray" / order.directory.name
    trainer = JaxTrainer(
        _on_host,
        train_loop_config={"order": dataclasses.replace(order, compressions=()), "board": board},
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
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),  # the sweep counts losses
        ),
    )
    try:
        found: Outcome = trainer.fit().return_value
    except TrainingFailedError as error:
        return Outcome(lost=f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(storage, ignore_errors=True)
        with contextlib.suppress(OSError):
            storage.parent.rmdir()
    if found != Outcome() or not order.compressions:
        return found
    os.environ["JAX_PLATFORMS"] = "cpu"
    return run(order, None, board)


def _on_host(config: dict[str, Any]) -> Outcome:
    """Runs one process of a trial; returns how the trial ended, in the worker of rank 0."""
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    rank, count = context.get_world_rank(), context.get_world_size()
    address = broadcast_from_rank_zero(f"{ray.util.get_node_ip_address()}:{_free_port()}" if rank == 0 else "")
    order = dataclasses.replace(config["order"], seat=Seat(address, count, rank))
    place = f"{socket.gethostname()} and {count - 1} more" if count > 1 else socket.gethostname()
    job = trial_job.start(_here(order, None))
    return _mind(job, config["board"], place)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
