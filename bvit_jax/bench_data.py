"""How fast images come: read, moved, augmented, and whether a training step ever waits for them.

Each part is timed alone, and steps that get their batches as a run does are timed in turn with steps that get the same
batch again, which is on the device already; the order changes from turn to turn, and what counts is the median of the
differences.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from bvit_jax import sharding, train_step
from bvit_jax.config import Config
from bvit_jax.stepping import Stepper

WINDOW_SECONDS = 0.5
"""A timed window is as many batches or steps as take this long, at least."""
WARM_UP_STEPS = 3

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
    start = time.perf_counter()
    bench = _Bench(config)
    open_seconds = time.perf_counter() - start
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
        "open_seconds": open_seconds,
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
    """The parts of a run's input."""

    def __init__(self, config: Config) -> None:
        placement = sharding.place(config.model, config.batch_size)
        self._stepper = Stepper(config, placement)
        self._state = self._stepper.first_state()
        self._key = jax.device_put(jax.random.key(config.seed), placement.replicated)
        self._as_seen = jax.jit(
            lambda key, step, *inputs: train_step.as_seen(
                config, placement, train_step.step_keys(key, step)[0], *inputs
            )
        )

    def parts(self) -> dict[str, Work]:
        """Returns what is timed, by name."""
        fixed = self._stepper.inputs(0)
        host, device, steps = itertools.count(), itertools.count(), itertools.count()

        def train(inputs: Iterator[Any], times: int) -> None:
            for _ in range(times):
                self._state, _ = self._stepper.take_with(self._state, next(inputs))
            jax.block_until_ready(self._state)

        fresh = (self._stepper.inputs(step) for step in steps)
        moved = (self._stepper.inputs(step) for step in device)
        made = (self._stepper.batch(step) for step in host)
        return {
            "host": lambda times: [next(made) for _ in range(times)][-1],
            "device": lambda times: [jax.block_until_ready(next(moved)) for _ in range(times)][-1],
            "augment": lambda times: jax.block_until_ready(
                [self._as_seen(self._key, step, *fixed) for step in range(times)][-1]
            ),
            "step": lambda times: train(fresh, times),
            "fixed": lambda times: train(itertools.repeat(fixed), times),
        }


def _window(work: Work) -> Callable[[], float]:
    """Warms up and returns a function that times a window; it returns the seconds of doing the work once."""
    work(WARM_UP_STEPS)
    times = 1
    while (seconds := _seconds(work, times)) < WINDOW_SECONDS:
        times = math.ceil(times * min(max(1.2 * WINDOW_SECONDS / seconds, 1.5), 10))
    return lambda: _seconds(work, times) / times


def _seconds(work: Work, times: int) -> float:
    start = time.perf_counter()
    work(times)
    return time.perf_counter() - start
