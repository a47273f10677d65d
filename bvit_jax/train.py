"""The training loop of one run: start or take up again, step, evaluate, keep checkpoints, report.

A run lives in a directory of its own:

    config.json      the resolved configuration        metrics.jsonl   training and evaluation, a row each
    checkpoints/     the newest and the best           timing.jsonl    seconds, images per second, bytes on a device
    result.json      written when the run is complete  tensorboard/    the same numbers as events

With several processes, all of them call `run` with the same arguments and a directory that all can reach; the first
writes the files, and all write checkpoints. The directory can be taken up again with any number of devices.
"""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from bvit_jax import data, device_memory, evaluate, files, memory, metrics, processes, sharding, train_step
from bvit_jax import workdir as workdirs
from bvit_jax.checkpoints import Checkpoints, abstract_state
from bvit_jax.config import Config
from bvit_jax.model_config import require
from bvit_jax.sharding import Layout, Placement

OUTPUTS = ("checkpoints", "metrics.jsonl", "timing.jsonl", "tensorboard", "result.json", "sweep.json")
LOCK_PATIENCE_SECONDS = 5.0
"""A trial whose sweep was killed needs a moment to end."""
WARM_UP_WINDOWS = 1
"""Timed windows that do not count for throughput: the first after a start holds the compilation."""


def run(config: Config, workdir: Path, show_progress: bool = True, layout: Layout = sharding.DEFAULT) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint in `workdir` if there is one, and reports on the test split.

    Args:
        config: what to run.
        workdir: the run's directory; made if absent. A finished run's result is returned as it stands.
        show_progress: print what happens, with a progress bar on a terminal.
        layout: of the mesh; the results are the same up to rounding whatever it is.

    Returns:
        The content of `result.json`: config_digest, seed, steps, best_step, test_accuracy, test_nll,
        validation_accuracy, validation_nll, params, the evaluation of the routers, ternary statistics, under
        `timing` (which differs from run to run) images_per_second and wall_seconds, and under `memory` the bytes on a
        device of parameters and optimiser, with the peak where the backend tells it.

    Raises:
        ConfigError: if the directory cannot be written to, holds something else or is in use by another process, or if
            the model or its batch does not divide over the mesh; in all processes.
        FloatingPointError: if the loss or the gradient is not finite, at the next step that is logged.
    """
    processes.check_same("configuration", config.digest())
    processes.check_same("layout", repr(layout))
    placement = sharding.place(config.model, config.batch_size, layout)
    with contextlib.ExitStack() as held:
        result = processes.on_first(lambda: _open(config, workdir, held))
        processes.check_everywhere(_sees(workdir, config), "workdir", str(workdir), "a directory that all hosts share")
        if result is not None:
            return result
        show_progress = show_progress and processes.is_first()
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            return _Run(config, workdir, placement, checkpoints, show_progress).to_the_end()


def _open(config: Config, workdir: Path, held: contextlib.ExitStack) -> dict[str, Any] | None:
    """Claims and locks the directory until `held` is closed; returns the result of a run that is already finished."""
    workdirs.claim(workdir, "config.json", config.to_dict(), OUTPUTS)
    held.enter_context(workdirs.locked(workdir, LOCK_PATIENCE_SECONDS))
    path = workdir / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def _sees(workdir: Path, config: Config) -> bool:
    """Whether this process finds what the first one wrote."""
    try:
        return bool(json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(config.to_dict())))
    except (OSError, ValueError):
        return False


class _Run:
    """One process's part of a run. The order at each step: batch, step, log, evaluate, checkpoint."""

    def __init__(
        self, config: Config, workdir: Path, placement: Placement, checkpoints: Checkpoints, show_progress: bool
    ) -> None:
        self.config = config
        self.workdir = workdir
        self.placement = placement
        self.shardings = train_step.state_shardings(config, placement)
        self.checkpoints = checkpoints
        self.show_progress = show_progress
        self.clock = _Clock(config.batch_size)
        self.dataset = data.load(config.data)
        self.state_bytes: dict[str, int] = {}

    def to_the_end(self) -> dict[str, Any]:
        state = self._start()
        self.state_bytes = device_memory.of_state(state)
        log = metrics.RunLog(self.workdir, last_step=int(state.step), active=processes.is_first())
        try:
            state = self._train(state, log)
            return self._report(state, log)
        finally:
            log.close()

    def _start(self) -> train_step.TrainState:
        step = self.checkpoints.latest_step
        processes.check_same("newest checkpoint", str(step))
        if step is None:
            return jax.jit(lambda: train_step.init_state(self.config), out_shardings=self.shardings)()
        differing = workdirs.differences(self.checkpoints.config(step), self.config.to_dict())
        require(
            not differing, "workdir", str(self.workdir), f"one whose checkpoints are of this configuration: {differing}"
        )
        self._say(f"going on from step {step}")
        return self._restore(step)

    def _restore(self, step: int) -> train_step.TrainState:
        shapes = jax.eval_shape(lambda: train_step.init_state(self.config))
        return self.checkpoints.restore(step, abstract_state(shapes, self.shardings))

    def _train(self, state: train_step.TrainState, log: metrics.RunLog) -> train_step.TrainState:
        config = self.config
        placement = self.placement
        take_step = train_step.make_train_step(config, placement)
        key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=placement.replicated)()
        rows = placement.host_rows(config.batch_size)
        # Queued steps with collectives can deadlock when several host devices share few cores.
        wait_each_step = placement.mesh.size > 1 and jax.default_backend() == "cpu"
        start = int(state.step)
        clock = self.clock
        clock.skip(start)
        bar = tqdm(
            range(start, config.total_steps),
            initial=start,
            total=config.total_steps,
            unit="step",
            disable=None if self.show_progress else True,
            leave=False,
        )
        for step in bar:
            batch = data.train_batch(self.dataset.train, config.batch_size, config.seed, step, rows)
            images, labels = placement.put_batch((batch.images, batch.labels), rows, config.batch_size)
            state, values = take_step(state, key, images, labels)
            if wait_each_step:
                jax.block_until_ready(values)
            done = step + 1
            if done % config.log_every == 0 or done == config.total_steps:
                row = {name: float(value) for name, value in values.items()}
                broken = [name for name, value in row.items() if not math.isfinite(value)]
                if broken:
                    raise FloatingPointError(f"step {done}: {', '.join(broken)} not finite; try a lower learning rate")
                jax.block_until_ready(state)
                log.metrics(done, "train", row)
                log.timing(done, clock.lap(done) | self.state_bytes | device_memory.peak())
                bar.set_postfix(
                    loss=f"{row['loss']:.3f}", accuracy=f"{row['accuracy']:.3f}", images_s=f"{clock.rate:.0f}"
                )
            if done % config.eval_every == 0 or done == config.total_steps:
                self._evaluate_and_save(state, log)
                clock.skip(done)
        return state

    def _evaluate_and_save(self, state: train_step.TrainState, log: metrics.RunLog) -> None:
        step = int(state.step)
        found = self._evaluate(state.params, self.dataset.validation)
        ternary = evaluate.ternary_statistics(state.params, self.config.model)
        log.metrics(step, "validation", found.to_dict() | ({"ternary": ternary} if ternary else {}))
        self._say(
            f"step {step:>6}  validation accuracy {found.accuracy:.4f}  nll {found.nll:.4f}"
            + (f"  dead experts {sum(found.dead_experts_M)}" if found.load_MxE else "")
        )
        self.checkpoints.save(state, self.config, found.accuracy, found.nll)

    def _report(self, state: train_step.TrainState, log: metrics.RunLog) -> dict[str, Any]:
        config = self.config
        peak = device_memory.peak()
        best_step = self.checkpoints.best_step
        if best_step is None:
            raise RuntimeError(f"no checkpoint was kept in {self.workdir}")
        if best_step != int(state.step):
            jax.tree.map(lambda leaf: leaf.delete(), state)  # two states may be more than a device holds
            state = self._restore(best_step)
        found = self._evaluate(state.params, self.dataset.test)
        log.metrics(config.total_steps, "test", found.to_dict())
        log.timing(config.total_steps, self.clock.lap(config.total_steps))
        validation = self.checkpoints.metrics(best_step)
        result = {
            "config_digest": config.digest(),
            "seed": config.seed,
            "steps": config.total_steps,
            "best_step": best_step,
            "test_accuracy": found.accuracy,
            "test_nll": found.nll,
            "validation_accuracy": validation["accuracy"],
            "validation_nll": validation["nll"],
            "params": memory.count_params(state.params),
            "test": found.to_dict(),
            "ternary": evaluate.ternary_statistics(state.params, config.model),
            "memory": self.state_bytes | peak,
        }
        result = processes.on_first(lambda: self._write(result))
        self._say(f"test accuracy {found.accuracy:.4f}  nll {found.nll:.4f}  (step {best_step}, best on validation)")
        return result

    def _write(self, result: dict[str, Any]) -> dict[str, Any]:
        result["timing"] = total_timing(metrics.read_rows(self.workdir / "timing.jsonl"))
        files.write_json(self.workdir / "result.json", result)
        return result

    def _evaluate(self, params: Any, split: data.Split) -> evaluate.Evaluation:
        return evaluate.evaluate(params, self.config.model, split, self.config.batch_size, self.placement)

    def _say(self, text: str) -> None:
        if self.show_progress:
            tqdm.write(text)


class _Clock:
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


def total_timing(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Sums up `timing.jsonl`: the median images per second (None if too short to tell) and all wall seconds."""
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return {
        "images_per_second": float(np.median(rates)) if rates else None,
        "wall_seconds": sum(row["wall_seconds"] for row in rows),
    }
