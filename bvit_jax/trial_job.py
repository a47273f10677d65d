"""The process of a trial, seen by the one that starts it: heard, told to stop, and how it ended."""

import contextlib
import dataclasses
import multiprocessing
import signal
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from bvit_jax import failures, preemption, trial_process
from bvit_jax.trial_process import Order

STOP_SECONDS = 60.0
"""How long a trial that is told to stop has to save; then it is killed."""


@dataclasses.dataclass
class Job:
    """A trial that runs, or has run; `cause` is why it failed, once its process has said so."""

    order: Order
    process: BaseProcess
    pipe: Connection
    cause: str | None = None

    def ended(self, timeout_seconds: float = 0.0) -> bool:
        """Says whether the process has ended, after waiting for that at most so long, and takes what it has sent."""
        wait([self.process.sentinel], timeout_seconds)
        has_ended = self.process.exitcode is not None  # before listening: what it said last is in the pipe by then
        if not self.pipe.closed:
            self.listen()
        if has_ended:
            self.pipe.close()
        return has_ended

    def listen(self) -> None:
        """Takes what the process has sent so far."""
        with contextlib.suppress(OSError, EOFError):
            while self.pipe.poll():
                self.cause = self.pipe.recv_bytes().decode(errors="replace")

    def tell_to_stop(self) -> None:
        """Has the process save and stop; one that has had SIGTERM itself hears no second one."""
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(trial_process.STOP)

    def kill(self) -> None:
        """Ends the process, if it has not ended."""
        self.process.kill()
        self.process.join()

    @property
    def was_stopped(self) -> bool:
        """Whether the ended process was told to stop, and stopped for that."""
        return self.cause is None and self.process.exitcode in (preemption.EXIT_STATUS, -signal.SIGTERM)

    @property
    def described(self) -> str:
        """Why an ended process that left no result failed: what it said, or how it ended."""
        return self.cause or failures.describe_end(self.process.exitcode, self.order.output)


def start(order: Order) -> Job:
    """Starts the process of a trial; raises OSError if the system has no memory or no number left for one."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with there:
        process = context.Process(target=trial_process.run, args=(order, there))
        process.start()
    return Job(order, process, here)
