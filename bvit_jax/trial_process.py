"""What runs in the process of one trial of a sweep."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from absl import flags

from bvit_jax import (
    compress_request,
    compressed,
    config,
    cores,
    failures,
    orphans,
    peers,
    preemption,
    processes,
    train,
)
from bvit_jax.sweep import Trial

OUTPUT_FILE = "output.txt"
"""What a trial prints, in its directory."""
STOP = b"stop"
"""What is sent to the process to have the trial save and stop."""


@dataclasses.dataclass(frozen=True)
class Seat:
    """The place of one of several processes that run a trial together, as `processes.start` takes it."""

    coordinator: str
    num_processes: int
    process_id: int


@dataclasses.dataclass(frozen=True)
class Order:
    """What a process is to run, in plain data.

    Attributes:
        stored: the configuration as plain data.
        directory: of the trial; made if absent.
        compressions: `compress_request.Request` as plain data; those that are done are left as they are.
        compilation_cache: directory for compiled programs.
        cores: to run on.
        threads: of computations on CPUs; one a core if None.
        seat: None where the process is alone.
    """

    stored: dict[str, Any]
    directory: Path
    compressions: tuple[dict[str, Any], ...]
    compilation_cache: Path
    cores: tuple[int, ...]
    threads: int | None = None
    seat: Seat | None = None

    @property
    def output(self) -> Path:
        """The file that takes what the process prints."""
        number = self.seat.process_id if self.seat else 0
        return self.directory / (f"output_{number}.txt" if number else OUTPUT_FILE)


def order(trial: Trial, compilation_cache: Path, own_cores: Sequence[int]) -> Order:
    """Returns what a process is to run that does all of a trial, on these cores."""
    requests = tuple(dataclasses.asdict(request) for request in trial.compressions)
    return Order(trial.config.to_dict(), trial.directory, requests, compilation_cache, tuple(own_cores))


def run(order: Order, pipe: Connection) -> None:
    """Runs one trial to its end, and compresses what it trained; if it fails, sends the cause, and exits with status 1.

    One that is told to stop exits with `preemption.EXIT_STATUS`, one of several whose others are lost with
    `peers.EXIT_STATUS`.

    Args:
        order: what to run.
        pipe: to the process that started this one; this one ends when that does.
    """
    signal.signal(signal.SIGTERM, _exit_as_preempted)
    orphans.end_with_parent()
    threading.Thread(target=_obey, args=(pipe,), daemon=True).start()
    try:
        order.directory.mkdir(parents=True, exist_ok=True)
        with order.output.open("a") as output:
            os.dup2(output.fileno(), sys.stdout.fileno())
            os.dup2(output.fileno(), sys.stderr.fileno())
        cores.keep_to(order.cores, order.threads)  # before JAX counts its threads
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            jax.config.update("jax_compilation_cache_dir", str(order.compilation_cache))
        flags.FLAGS.mark_as_parsed()  # those of the sweep are not this process's, and readers of images look at theirs
        if order.seat is not None:
            processes.start(*dataclasses.astuple(order.seat))
        with peers.together():
            train.run(config.from_dict(order.stored), order.directory, show_progress=False)
        if order.compressions:
            compressed.run_all(order.directory, [compress_request.from_dict(fields) for fields in order.compressions])
    except (preemption.Preempted, KeyboardInterrupt):
        sys.exit(preemption.EXIT_STATUS)
    except Exception as error:
        pipe.send_bytes(failures.describe(error).encode(errors="replace"))
        sys.exit(1)


def _exit_as_preempted(number: int, frame: FrameType | None) -> None:
    """Ends a trial before its training takes note of SIGTERM itself."""
    del number, frame
    sys.exit(preemption.EXIT_STATUS)


def _obey(pipe: Connection) -> None:
    """Stops this process when it is told so."""
    with contextlib.suppress(OSError, EOFError):
        pipe.recv_bytes()
        main = threading.main_thread().ident
        # It may have had SIGTERM itself, and a second one does not wait until the run is saved.
        if main is not None and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            signal.pthread_kill(main, signal.SIGTERM)
