"""Notice that a run is to stop: SIGTERM, which schedulers send some seconds before they take a machine away.

A process that was not joined to others sees its own signal. After `processes.start` has joined several, JAX takes the
signal in each, and one signal to one process has all of them stop at the same point.
"""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 75
"""Of a process that saved and stopped: EX_TEMPFAIL of sysexits.h, "try again later"."""

_points = itertools.count(1)  # over all runs of this process: JAX's point to stop at may lie in the next run


class Preempted(Exception):
    """The run was told to stop; what it had done is saved, and the same call goes on from there."""


class Notice:
    """Says whether to stop."""

    def __init__(self, joined: bool) -> None:
        self._joined = joined
        self._told = False

    def reached(self) -> bool:
        """Says whether this is the point to stop at. All processes of a run call it at the same points.

        Once true it stays true. Of several processes, each looks for its own signal once a second, and the point is the
        next that none has passed: a signal that came before the first point stops the run there, and one that comes
        after the last point has no effect.
        """
        if self._joined and not self._told:
            self._told = multihost_utils.reached_preemption_sync_point(next(_points))
        return self._told

    def _tell(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._told = True
        signal.signal(number, signal.SIG_DFL)  # a second signal does not wait


@contextlib.contextmanager
def watch() -> Iterator[Notice]:
    """Takes note of SIGTERM until it is closed; outside the main thread, a process on its own hears nothing.

    No backend of JAX is started.
    """
    notice = Notice(joined=jax.distributed.is_initialized())
    if notice._joined or threading.current_thread() is not threading.main_thread():
        yield notice
        return
    previous = signal.signal(signal.SIGTERM, notice._tell)
    try:
        yield notice
    finally:
        signal.signal(signal.SIGTERM, previous)
