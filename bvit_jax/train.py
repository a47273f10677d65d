"""The training loop of one run: start or take up again, step, evaluate, keep checkpoints, report.

A run lives in a directory of its own:

    config.json      the resolved configuration        metrics.jsonl   training and evaluation, a row each
    checkpoints/     the newest and the best           timing.jsonl    seconds and images per second
    result.json      written when the run is complete  tensorboard/    the same numbers as events
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from bvit_jax import data, evaluate, memory, metrics, sharding, train_step
from bvit_jax.checkpoints import Checkpoints, abstract_state
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError

WARM_UP_WINDOWS = 1
"""Timed windows that do not count for throughput: the first after a start holds the compilation."""


def run(config: Config, workdir: Path, show_progress: bool = True) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint in `workdir` if there is one, and reports on the test split.

    Args:
        config: what to run.
        workdir: the run's directory; made if absent. A finished run's result is returned as it stands.
        show_progress: print what happens, with a progress bar on a terminal.

    Returns:
        The content of `result.json`: config_digest, seed, steps, best_step, test_accuracy, test_nll,
        validation_accuracy, validation_nll, params, the evaluation of the routers, ternary statistics, and under
        `timing` (which differs from run to run) images_per_second and wall_seconds.

    Raises:
        ConfigError: if the directory cannot be written to or holds a run of another configuration, or if the batch does
            not divide over the devices.
    """
    mesh = sharding.make_mesh()
    sharding.check_batch(config.batch_size, mesh)
    claim_workdir(config, workdir)
    result_path = workdir / "result.json"
    if result_path.exists():
        return json.loads(result_path.read_text())
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return _Run(config, workdir, mesh, checkpoints, show_progress).to_the_end()


def claim_workdir(config: Config, workdir: Path) -> None:
    """Makes the directory and records the configuration in it, or checks that it holds the same one.

    Raises:
        ConfigError: if the directory cannot be written to, or belongs to another configuration; nothing is changed.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise ConfigError(
            f"workdir = {str(workdir)!r}: it must be a directory that can be written to ({error})"
        ) from None
    if not path.exists():
        if (workdir / "checkpoints").exists():
            raise ConfigError(f"workdir = {str(workdir)!r}: it holds checkpoints but no config.json; choose another")
        metrics.write_json(path, config.to_dict())
        return
    try:
        stored = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is damaged ({error}); restore it or choose another workdir") from None
    differing = differences(stored, config.to_dict())
    if differing:
        raise ConfigError(
            f"workdir = {str(workdir)!r}: it holds a run of another configuration; choose another workdir. "
            f"Stored against asked for: {'; '.join(differing)}"
        )


def differences(stored: Any, asked: Any, prefix: str = "") -> list[str]:
    """Lists `field: stored value != asked value` for nested plain data."""
    if not (isinstance(stored, dict) and isinstance(asked, dict)):
        return [] if stored == asked else [f"{prefix or 'all'}: {stored!r} != {asked!r}"]
    names = sorted(stored.keys() | asked.keys())
    inner = (differences(stored.get(n), asked.get(n), f"{prefix}.{n}" if prefix else n) for n in names)
    return [line for lines in inner for line in lines]


class _Run:
    """One process's part of a run. The order at each step: batch, step, log, evaluate, checkpoint."""

    def __init__(
        self, config: Config, workdir: Path, mesh: Mesh, checkpoints: Checkpoints, show_progress: bool
    ) -> None:
        self.config = config
        self.workdir = workdir
        self.mesh = mesh
        self.checkpoints = checkpoints
        self.show_progress = show_progress
        self.dataset = data.load(config.data)

    def to_the_end(self) -> dict[str, Any]:
        state = self._start()
        log = metrics.RunLog(self.workdir, last_step=int(state.step))
        try:
            state = self._train(state, log)
            return self._report(state, log)
        finally:
            log.close()

    def _start(self) -> train_step.TrainState:
        whole = sharding.replicated(self.mesh)
        state = jax.jit(lambda: train_step.init_state(self.config), out_shardings=whole)()
        step = self.checkpoints.latest_step
        if step is None:
            return state
        self._say(f"going on from step {step}")
        return self.checkpoints.restore(step, abstract_state(state, whole))

    def _train(self, state: train_step.TrainState, log: metrics.RunLog) -> train_step.TrainState:
        config = self.config
        take_step = train_step.make_train_step(config, self.mesh)
        key = jax.device_put(jax.random.key(config.seed), sharding.replicated(self.mesh))
        # Queued steps with collectives can deadlock when several host devices share few cores.
        wait_each_step = self.mesh.size > 1 and jax.default_backend() == "cpu"
        start = int(state.step)
        clock = _Clock(config.batch_size, start)
        bar = tqdm(
            range(start, config.total_steps),
            initial=start,
            total=config.total_steps,
            unit="step",
            disable=None if self.show_progress else True,
            leave=False,
        )
        for step in bar:
            batch = data.train_batch(self.dataset.train, config.batch_size, config.seed, step)
            images, labels = sharding.put_batch((batch.images, batch.labels), self.mesh)
            state, values = take_step(state, key, images, labels)
            if wait_each_step:
                jax.block_until_ready(values)
            done = step + 1
            if done % config.log_every == 0 or done == config.total_steps:
                row = {name: float(value) for name, value in values.items()}
                jax.block_until_ready(state)
                log.metrics(done, "train", row)
                log.timing(done, clock.lap(done))
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
        best_step = self.checkpoints.best_step
        if best_step is None:
            raise RuntimeError(f"no checkpoint was kept in {self.workdir}")
        if best_step != int(state.step):
            state = self.checkpoints.restore(best_step, abstract_state(state, sharding.replicated(self.mesh)))
        found = self._evaluate(state.params, self.dataset.test)
        log.metrics(config.total_steps, "test", found.to_dict())
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
            "timing": total_timing(metrics.read_rows(self.workdir / "timing.jsonl")),
        }
        metrics.write_json(self.workdir / "result.json", result)
        self._say(f"test accuracy {found.accuracy:.4f}  nll {found.nll:.4f}  (step {best_step}, best on validation)")
        return result

    def _evaluate(self, params: Any, split: data.Split) -> evaluate.Evaluation:
        return evaluate.evaluate(params, self.config.model, split, self.config.batch_size, self.mesh)

    def _say(self, text: str) -> None:
        if self.show_progress:
            tqdm.write(text)


class _Clock:
    """Times windows of steps. A window's images per second leave out evaluation; its wall seconds leave out nothing."""

    def __init__(self, batch_size: int, step: int) -> None:
        self._batch_size = batch_size
        self._wall = self._train = time.perf_counter()
        self._step = step
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
