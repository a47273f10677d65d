"""How long a run takes: windows of steps, and their sum."""

import time
from typing import Any

import numpy as np

WARM_UP_WINDOWS = 1
"""Timed windows that do not count for throughput: the first after a start holds the compilation."""


class Clock:
    """Times windows of steps. A window's images per second leave out evaluation; its wall seconds leave out nothing."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._wall = self._train = time.perf_counter()
        self._step = 0
        self._windows = 0
        self.rate = float("nan")

    def lap(self, step: int) -> dict[str, float]:
        """Closes the window at `step`; the first after a start has no images_per_second: it holds compilation."""
        now = time.perf_counter()
        row = {"wall_seconds": now - self._wall}
        self._windows += 1
        if self._windows > WARM_UP_WINDOWS and step > self._step:
            self.rate = row["images_per_second"] = (step - self._step) * self._batch_size / (now - self._train)
        self._wall = self._train = now
        self._step = step
        return row

    def skip(self, step: int) -> None:
        """Leaves the time since the last step out of the next window's throughput."""
        self._train = time.perf_counter()
        self._step = step


def valid(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows that have a step and seconds: times are no result, so a damaged one is left out."""
    return [row for row in rows if all(isinstance(row.get(name), int | float) for name in ("step", "wall_seconds"))]


def total(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Sums up `timing.jsonl`: the median images per second (None if too short to tell) and all wall seconds."""
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return {
        "images_per_second": float(np.median(rates)) if rates else None,
        "wall_seconds": sum(row["wall_seconds"] for row in rows),
    }
