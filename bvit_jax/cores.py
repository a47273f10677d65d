"""The CPU cores that this process may use."""

import os
from collections.abc import Sequence

import threadpoolctl


def available() -> list[int]:
    """Lists them by number; where the system does not tell which, all there are."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def keep_to(numbers: Sequence[int], threads: int | None = None) -> None:
    """Has this process, and what it starts from now on, use these alone, where the system can do that.

    Args:
        numbers: of the cores.
        threads: of computations; as many as cores if None. Linear algebra that is loaded gets as many: its threads wait
            for each other, and more than cores crawl. XLA's CPU backend has one a core, or takes $NPROC.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, numbers)
    if threads is not None:
        os.environ["NPROC"] = str(threads)
    threadpoolctl.threadpool_limits(threads or len(numbers))
