"""How fast images come: read, moved, augmented, and whether a training step ever waits for them.

Each part is timed alone, and steps that get their batches as a run does are timed in turn with steps that get the same
batch again, which is on the device already; the order changes from turn to turn, and what counts is the median of the
differences.

Every part that takes batches has a reader of its own, which goes on from window to window. Before a window, a part does
its work until what its reader had ready (`streams.held`) is used up, so that no batch of the window comes for nothing;
while other parts are timed, its reader gets as many ready again and stops.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from bvit_jax import sharding, streams, train_step
from bvit_jax.config import Config
from bvit_jax.stepping import MOST_STEPS, Inputs, Stepper

WINDOW_SECONDS = 0.5
"""A timed window is as many batches or steps as take this long, at least."""

COLUMNS: dict[str, str] = {
    "load_average": "programs that wanted a core in the minute before the start",
    "devices": "that share the batch out",
    "batch_size": "images a step",
    "stored_size": "pixels a side as images reach the device",
    "image_size": "pixels a side as the model sees them",
    "open_seconds": "seconds to open the set; where images are held in memory, to decode them all",
    "repeats": "times that all was timed; every figure is the median",
    "host_images_s": "images a second out of memory or off the disk, as batches on the host",
    "device_images_s": "images a second, moved to the devices too",
    "augment_images_s": "images a second augmented and mixed by the devices, without a step",
    "step_images_s": "images a second through the training step, batches read as in a run",
    "step_ms": "milliseconds of such a step",
    "fixed_step_ms": "milliseconds of a step that gets the same batch again, on the device already",
    "waiting_percent": "what batches add to a step, in per cent of it",
    "waiting_percent_lower": "lower quartile of the same",
    "waiting_percent_upper": "upper quartile of the same",
    "augment_percent": "time of the augmentation alone over that of a step, in per cent",
}
"""What each figure is, and its unit."""


def measure(config: Config, repeats: int, on_repeat: Callable[[], Any] = lambda: None) -> dict[str, float]:
    """Times the input of a run on the devices that are there.

    Args:
        config: of the run.
        repeats: times that all is timed, at least 1.
        on_repeat: called `repeats` times.

    Returns:
        The figures of `COLUMNS`.

    Raises:
        ConfigError: if the images are not there, or the model or its batch does not divide over the devices.
    """
    load_average = os.getloadavg()[0]
    bench = _Bench(config)
    windows = {name: _window(work) for name, work in bench.parts().items()}
    turns: list[dict[str, float]] = []
    for turn in range(repeats):
        order = list(windows.items())
        turns.append({name: window() for name, window in (order if turn % 2 else reversed(order))})
        on_repeat()
    seconds = {name: float(np.median([turn[name] for turn in turns])) for name in windows}
    waiting = [100 * (turn["step"] - turn["fixed"]) / turn["step"] for turn in turns]
    lower, median, upper = (float(at) for at in np.percentile(waiting, (25, 50, 75)))
    rates = {f"{name}_images_s": config.batch_size / seconds[name] for name in ("host", "device", "augment", "step")}
    return {
        "load_average": load_average,
        "devices": jax.device_count(),
        "batch_size": config.batch_size,
        "stored_size": config.data.stored_size,
        "image_size": config.data.image_size,
        "open_seconds": bench.open_seconds,
        "repeats": repeats,
        **rates,
        "step_ms": 1e3 * seconds["step"],
        "fixed_step_ms": 1e3 * seconds["fixed"],
        "waiting_percent": median,
        "waiting_percent_lower": lower,
        "waiting_percent_upper": upper,
        "augment_percent": 100 * seconds["augment"] / seconds["step"],
    }


Work = Callable[[int], Any]
"""Does something so many times and waits for it."""


class _Bench:
    """The parts of a run's input.

    Attributes:
        open_seconds: that opening the set took.
    """

    def __init__(self, config: Config) -> None:
        placement = sharding.place(config.model, config.batch_size)
        start = time.perf_counter()
        self._stepper = Stepper(config, placement)
        self.open_seconds = time.perf_counter() - start
        self._state = self._stepper.first_state()
        self._key = jax.device_put(jax.random.key(config.seed), placement.replicated)
        self._as_seen = jax.jit(
            lambda key, step, *inputs: train_step.as_seen(
                config, placement, train_step.step_keys(key, step)[0], *inputs
            )
        )

    def parts(self) -> dict[str, Work]:
        """Returns what is timed, by name; results are let go of, as a window may make more than fit."""
        fixed = next(self._moved(range(1)))
        made, moved, fresh = self._stepper.reader(range(MOST_STEPS)), self._moved(), self._moved()

        def host(times: int) -> None:
            for _ in range(times):
                next(made)

        def device(times: int) -> None:
            for _ in range(times):
                jax.block_until_ready(next(moved))

        def augment(times: int) -> None:
            last = None
            for step in range(times):
                seen = self._as_seen(self._key, step, *fixed)
                jax.block_until_ready(last)  # one is queued while another is made; more would fill the memory
                last = seen
            jax.block_until_ready(last)

        def train(inputs: Iterator[Inputs], times: int) -> None:
            for _ in range(times):
                self._state, _ = self._stepper.take_with(self._state, next(inputs))
            jax.block_until_ready(self._state)

        return {
            "host": host,
            "device": device,
            "augment": augment,
            "step": lambda times: train(fresh, times),
            "fixed": lambda times: train(itertools.repeat(fixed), times),
        }

    def _moved(self, steps: range = range(MOST_STEPS)) -> Iterator[Inputs]:
        """Returns the batches of a new reader, each moved to the devices when it is asked for."""
        return map(self._stepper.moved, self._stepper.reader(steps))


def _window(work: Work) -> Callable[[], float]:
    """Warms up and returns a function that times a window; it returns the seconds of doing the work once."""
    warm_up = streams.held(MOST_STEPS) + 1
    work(warm_up)
    times = 1
    while (seconds := _seconds(work, times)) < WINDOW_SECONDS:
        times = math.ceil(times * min(max(1.2 * WINDOW_SECONDS / seconds, 1.5), 10))

    def window() -> float:
        work(warm_up)
        return _seconds(work, times) / times

    return window


def _seconds(work: Work, times: int) -> float:
    start = time.perf_counter()
    work(times)
    return time.perf_counter() - start
