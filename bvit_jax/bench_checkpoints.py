"""What checkpoints cost: steps with a save among them and without one, timed in turn in one process.

A window is as many steps as take twice a save. It is timed plain, and with a save at its beginning and a wait for it at
its end, so nothing of the save falls outside; the order changes from turn to turn, and what counts is the median of the
differences. Windows are shorter than intervals, which may take minutes: the per cent is the seconds that a save adds
over those of an interval's steps. That holds where an interval is longer than a save. The log in the record is as long
as at the run's end.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bvit_jax import bundles, checkpoints, digests, seals, sharding
from bvit_jax.checkpoints import Checkpoints
from bvit_jax.config import Config
from bvit_jax.stepping import Stepper

WARM_UP_STEPS = 3
"""Steps after the first, which compiles."""
SAVES_A_WINDOW = 2.0

COLUMNS: dict[str, str] = {
    "load_average": "programs that wanted a core in the minute before the start",
    "arrays": "arrays of the state",
    "state_bytes": "bytes of the state",
    "disk_bytes": "bytes of a checkpoint's files",
    "files": "files of a checkpoint",
    "repeats": "times that all was timed; every time is the median",
    "window_steps": "steps of a timed window",
    "step_ms": "milliseconds of a step without a save",
    "interval_steps": "steps from one checkpoint to the next (eval_every)",
    "interval_seconds": "seconds of so many steps without a save",
    "added_seconds": "seconds that a save adds to the steps beside which it is written",
    "added_seconds_lower": "lower quartile of the same",
    "added_seconds_upper": "upper quartile of the same",
    "added_percent": "added_seconds over interval_seconds, in per cent",
    "added_percent_at_most": "the same if nothing overlapped: blocking_seconds + background_seconds instead",
    "blocking_seconds": "seconds until save() returns, nothing else running; digests included",
    "digests_seconds": "seconds of the digests of all arrays",
    "background_seconds": "seconds from there until the checkpoint is on disk, nothing else running; seal included",
    "seal_seconds": "seconds to check the files against the seal; making it reads as much",
    "restore_seconds": "seconds of a restore with seal and digests checked",
}
"""What each figure is, and its unit."""


def measure(
    config: Config, directory: Path, repeats: int, on_repeat: Callable[[], Any] = lambda: None
) -> dict[str, float]:
    """Times the checkpoints of a run on the devices that are there.

    Args:
        config: of the run.
        directory: checkpoints are written to a folder of their own in it, which is gone at the end.
        repeats: times that all is timed, at least 1.
        on_repeat: called `2 * repeats` times.

    Returns:
        The figures of `COLUMNS`.

    Raises:
        ConfigError: if the model or its batch does not divide over the devices.
    """
    load_average = os.getloadavg()[0]
    loop = _Loop(config)
    loop.run(1)
    step_seconds = _seconds(lambda: loop.run(WARM_UP_STEPS)) / WARM_UP_STEPS
    parts: list[dict[str, float]] = []
    plain: list[float] = []
    saving: list[float] = []
    with tempfile.TemporaryDirectory(dir=directory) as name, Checkpoints(folder := Path(name)) as writer:
        loop.alone(writer, folder)  # compiles
        for _ in range(repeats):
            parts.append(loop.alone(writer, folder))
            on_repeat()
        save_seconds = float(np.median([part["blocking_seconds"] + part["background_seconds"] for part in parts]))
        steps = math.ceil(SAVES_A_WINDOW * save_seconds / step_seconds)
        windows = [(plain, lambda: loop.run(steps)), (saving, lambda: loop.run_saving(steps, writer))]
        for turn in range(repeats):
            for seconds, window in windows if turn % 2 else reversed(windows):
                seconds.append(_seconds(window))
            on_repeat()
        newest = folder / str(checkpoints.steps_in(folder)[-1])
        sizes = [path.stat().st_size for path in newest.rglob("*") if path.is_file()]
    leaves = jax.tree.leaves(loop.state)
    figures = {
        "load_average": load_average,
        "arrays": len(leaves),
        "state_bytes": sum(leaf.nbytes for leaf in leaves),
        "disk_bytes": sum(sizes),
        "files": len(sizes),
        **added(plain, saving, steps, config.eval_every),
        **{name: float(np.median([part[name] for part in parts])) for name in parts[0]},
    }
    whole = figures["blocking_seconds"] + figures["background_seconds"]
    figures["added_percent_at_most"] = 100 * whole / figures["interval_seconds"]
    return {name: figures[name] for name in COLUMNS}


def added(plain: Sequence[float], saving: Sequence[float], steps: int, interval: int) -> dict[str, float]:
    """Returns what a save adds.

    Args:
        plain: seconds of windows without a save.
        saving: seconds of as many windows with one, each timed next to that of `plain` at its place.
        steps: of a window.
        interval: steps from one save to the next.
    """
    step_seconds = float(np.median(plain)) / steps
    lower, median, upper = (float(at) for at in np.percentile(np.subtract(saving, plain), (25, 50, 75)))
    return {
        "repeats": len(plain),
        "window_steps": steps,
        "step_ms": 1e3 * step_seconds,
        "interval_steps": interval,
        "interval_seconds": interval * step_seconds,
        "added_seconds": median,
        "added_seconds_lower": lower,
        "added_seconds_upper": upper,
        "added_percent": 100 * median / (interval * step_seconds),
    }


class _Loop:
    """The steps of a run, one after the other."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stepper = Stepper(config, sharding.place(config.model, config.batch_size))
        self._done = 0
        self.state = self._stepper.first_state()
        row = {"step": 0, "split": "train", **{f"a number called {number}": 0.123456789 for number in range(9)}}
        self._log = (json.dumps(row) + "\n") * (config.total_steps // config.log_every)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.state, _ = self._stepper.take(self.state, self._done)
            self._done += 1
        jax.block_until_ready(self.state)

    def run_saving(self, steps: int, writer: Checkpoints) -> None:
        self._save(writer)
        self.run(steps)
        writer.wait()

    def alone(self, writer: Checkpoints, directory: Path) -> dict[str, float]:
        """Returns the seconds of the parts of one save, and of reading it, with nothing else running."""
        parts = {
            "digests_seconds": _seconds(lambda: digests.of_tree(bundles.bundle(self.state))),
            "blocking_seconds": _seconds(lambda: self._save(writer)),
            "background_seconds": _seconds(writer.wait),
        }
        step, abstract = checkpoints.steps_in(directory)[-1], self._stepper.abstract_state()
        parts["seal_seconds"] = _seconds(lambda: seals.check(directory / str(step)))
        parts["restore_seconds"] = _seconds(lambda: checkpoints.restore(directory, step, self._config, abstract))
        self.run(1)  # a step can be saved once
        return parts

    def _save(self, writer: Checkpoints) -> None:
        writer.save(self.state, self._config, self._log)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
