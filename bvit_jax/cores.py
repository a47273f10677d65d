"""The CPU cores that this process may use."""

import os
from collections.abc import Sequence

import threadpoolctl


def available() -> list[int]:
    """Lists them by number; where the system does not tell which, all there are."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def keep_to(numbers: Sequence[int]) -> None:
    """Has this process, and what it starts from now on, use these alone, where the system can do that.

    The linear algebra that is loaded gets as many threads: they wait for each other, and more than cores crawl.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, numbers)
    threadpoolctl.threadpool_limits(len(numbers))
