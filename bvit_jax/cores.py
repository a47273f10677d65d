"""The CPU cores that this process may use."""

import os


def available() -> list[int]:
    """Lists them by number; where the system does not tell which, all there are."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
