"""The training loop of one run: start or take up again, step, evaluate, keep checkpoints, report.

A run lives in a directory of its own:

    config.json      the resolved configuration        metrics.jsonl    training and evaluation, a row each
    checkpoints/     newest, best, every n-th          timing.jsonl     seconds, images per second, bytes on a device
    result.json      written when the run is complete  incidents.jsonl  interruptions, damage, steps left out
    damaged/         checkpoints found to be damaged   nonfinite/       reports of steps that were not finite
    tensorboard/     the numbers as events             images.json      which prepared images it is of, if of any
    start.json       the dense run that it starts from, if from one

However often a run is interrupted, `metrics.jsonl`, `result.json` (but for its timing) and the arrays of the last and
the best checkpoint are those of an uninterrupted one, to the bit, on the same devices and library versions.

With several processes, all of them call `run` with the same arguments and a directory that all can reach; the first
writes the files, and all write checkpoints. The directory can be taken up again with any number of devices.
"""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from bvit_jax import (
    checkpoints,
    data,
    device_memory,
    evaluate,
    expert_use,
    files,
    memory,
    metrics,
    preemption,
    processes,
    run_images,
    sentinels,
    sharding,
    start_run,
    timing,
    trained,
)
from bvit_jax import workdir as workdirs
from bvit_jax.checkpoints import Checkpoints
from bvit_jax.config import Config
from bvit_jax.journal import FILE as INCIDENTS_FILE
from bvit_jax.journal import Journal
from bvit_jax.prepared import PreparedSet
from bvit_jax.sharding import Layout, Placement
from bvit_jax.stepping import Stepper
from bvit_jax.train_step import TrainState

OUTPUTS = (
    *("checkpoints", "damaged", "metrics.jsonl", "timing.jsonl", INCIDENTS_FILE),
    *("nonfinite", "tensorboard", "result.json", "sweep.json", run_images.FILE, start_run.FILE),
)
LOCK_PATIENCE_SECONDS = 5.0
"""A trial whose sweep was killed needs a moment to end."""


def run(config: Config, workdir: Path, show_progress: bool = True, layout: Layout = sharding.DEFAULT) -> dict[str, Any]:
    """Trains to the end, from the newest good checkpoint in `workdir` if there is one, and reports on the test split.

    Args:
        config: what to run.
        workdir: the run's directory; made if absent. A finished run's result is returned as it stands.
        show_progress: print what happens, with a progress bar on a terminal. Warnings are printed in any case.
        layout: of the mesh; the results are the same up to rounding whatever it is.

    Returns:
        The content of `result.json`: config_digest, seed, steps, best_step, params_digest (of the best checkpoint's
        parameters, equal for equal bits), test_accuracy, test_nll, validation_accuracy, validation_nll, params, the
        evaluation of the routers, ternary statistics, warnings about experts, skipped_steps, under `memory` the bytes
        on a device of parameters and optimiser, under `experts`, if there are any, whether they differ and are used
        (`expert_use.ExpertUse`), and under `timing`, which differs from run to run, images_per_second, wall_seconds,
        and the peak of bytes on a device where the backend tells it.

    Raises:
        ConfigError: if the directory cannot be written to, holds something else or is in use by another process, if
            the model or its batch does not divide over the mesh, or if the images, or the runs that the configuration
            names, are not there or not those that the run began with; in all processes.
        preemption.Preempted: after SIGTERM, when the state is saved; the same call goes on.
        sentinels.NonFiniteError: if more steps than the configuration allows had a loss or gradient that is not finite,
            at the next step that is logged, evaluated or saved.
        checkpoints.SaveError: if two checkpoints in succession, or the last, could not be written.
    """
    with contextlib.ExitStack() as held:
        notice = held.enter_context(preemption.watch())
        processes.check_same("configuration", config.digest())
        processes.check_same("layout", repr(layout))
        placement = sharding.place(config.model, config.batch_size, layout)
        result = processes.on_first(lambda: _open(config, workdir, held))
        processes.check_everywhere(_sees(workdir, config), "workdir", str(workdir), "a directory that all hosts share")
        if result is not None:
            return result
        images = processes.in_all(lambda: data.opened(config.data))
        processes.check_same(f"digest of {config.data.name}", images.digest if images else "")
        processes.on_first(lambda: run_images.claim(workdir, config.data.name, images))
        return _Run(config, workdir, placement, notice, Journal(workdir, show_progress), images).to_the_end()


def _open(config: Config, workdir: Path, held: contextlib.ExitStack) -> dict[str, Any] | None:
    """Claims and locks the directory until `held` is closed; returns the result of a run that is already finished."""
    if not (workdir / "config.json").exists():
        start_run.find(config)  # a wrong name is not to claim the directory
    _mend_config(config, workdir)
    workdirs.claim(workdir, "config.json", config.to_dict(), OUTPUTS)
    held.enter_context(workdirs.locked(workdir, LOCK_PATIENCE_SECONDS))
    path = workdir / "result.json"
    if not path.exists():
        start_run.claim(workdir, config)
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        if result["config_digest"] == config.digest():
            return result
        error: Exception | str = "of another configuration"
    except (ValueError, TypeError, KeyError) as raised:  # of JSON or of UTF-8, or some other JSON
        error = raised
    start_run.claim(workdir, config)
    path.unlink()
    Journal(workdir, False).warn("damaged", config.total_steps, f"result.json is damaged ({error}): made again")
    return None


def _mend_config(config: Config, workdir: Path) -> None:
    """Writes a damaged config.json again if a good checkpoint says that it was this one."""
    path = workdir / "config.json"
    try:
        json.loads(path.read_text())
    except OSError:  # of which there is more to say where the directory is claimed
        return
    except ValueError as error:
        for step in reversed(checkpoints.steps_in(workdir / checkpoints.DIRECTORY)):
            with contextlib.suppress(checkpoints.DamagedError):
                record = checkpoints.read_record(workdir / checkpoints.DIRECTORY, step)
                if record.config == config.to_dict():
                    files.write_json(path, config.to_dict())
                    text = f"config.json is damaged ({error}): taken from the checkpoint of step {step}"
                    Journal(workdir, False).warn("damaged", step, text)
                    return


def _sees(workdir: Path, config: Config) -> bool:
    """Whether this process finds what the first one wrote."""
    try:
        return bool(json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(config.to_dict())))
    except (OSError, ValueError):
        return False


class _Run:
    """One process's part of a run. The order at each step: batch, step, log, evaluate, checkpoint, stop if told to."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        placement: Placement,
        notice: preemption.Notice,
        journal: Journal,
        images: PreparedSet | None,
    ) -> None:
        self.config = config
        self.workdir = workdir
        self.directory = workdir / checkpoints.DIRECTORY
        self.placement = placement
        self.notice = notice
        self.journal = journal
        self.stepper = Stepper(config, placement, images)
        self.clock = timing.Clock(config.batch_size)
        self.skipped = 0

    def to_the_end(self) -> dict[str, Any]:
        state, known = self._start()
        state_bytes = device_memory.of_state(state)
        log = metrics.RunLog(self.workdir, int(state.step), known, active=processes.is_first())
        try:
            keep_every = self.config.keep_every * self.config.eval_every
            with Checkpoints(self.directory, keep_every, known, self._on_failure) as writer:
                state = self._train(state, state_bytes, log, writer)
                return self._report(state, state_bytes, log, writer)
        except preemption.Preempted:
            # The checkpoint is on disk: leaving the context above waited for it.
            step = max(checkpoints.steps_in(self.directory), default=0)
            text = f"told to stop; step {step} is saved" if step else "told to stop before the first step"
            self.journal.incident("preempted", step, text)
            raise preemption.Preempted(text) from None
        except checkpoints.SaveError as error:
            with contextlib.suppress(OSError):  # the disk may be full for this too
                self.journal.incident("stopped", error.step, str(error))
            raise
        finally:
            log.close()

    def _on_failure(self, error: checkpoints.SaveError) -> None:
        self.journal.warn("unsaved", error.step, f"{error}; the next one will be tried")

    def _start(self) -> tuple[TrainState, str]:
        """Returns the state to go on from, and the rows of `metrics.jsonl` that lead to it."""
        found = self._restore_newest()
        if found is None:
            return self._first_state(), ""
        state, record = found
        step = int(state.step)
        self.skipped = int(state.sentinel.skipped)
        self.journal.incident("resumed", step, f"going on from step {step}")
        path = self.workdir / "metrics.jsonl"
        if processes.is_first() and not (path.exists() and path.read_bytes().startswith(record.metrics.encode())):
            self.journal.warn("damaged", step, f"metrics.jsonl is damaged: taken from the checkpoint of step {step}")
        return state, record.metrics

    def _first_state(self) -> TrainState:
        return self.stepper.first_state(processes.in_all(lambda: start_run.recorded(self.workdir, self.config)))

    def _restore_newest(self, before: int | None = None) -> tuple[TrainState, checkpoints.Record] | None:
        def on_damage(step: int, text: str) -> None:
            self.journal.warn("damaged", step, text)

        abstract = self.stepper.abstract_state()
        return checkpoints.restore_newest(self.directory, self.config, abstract, on_damage, before)

    def _train(
        self, state: TrainState, state_bytes: dict[str, int], log: metrics.RunLog, writer: Checkpoints
    ) -> TrainState:
        config = self.config
        saved = done = int(state.step)
        self.clock.skip(done)
        disable = None if self.journal.shows else True
        bar = tqdm(initial=done, total=config.total_steps, unit="step", disable=disable, leave=False)
        try:
            self._stop_if_told()
            if self._is_evaluated_at(done) and not _has_evaluation(log, done):
                self._evaluate_step(state, done, log)  # it was told to stop within this evaluation
            for step in range(done, config.total_steps):
                state, values = self.stepper.take(state, step)
                done = step + 1
                bar.update()
                if done % config.log_every == 0 or done == config.total_steps:
                    self._look_for_nonfinite(state)
                    row = {name: float(value) for name, value in values.items()}
                    row = {name: value for name, value in row.items() if math.isfinite(value)}  # JSON has no NaN
                    jax.block_until_ready(state)
                    log.metrics(done, "train", row)
                    log.timing(done, self.clock.lap(done) | state_bytes | device_memory.peak())
                    shown = {name: f"{row[name]:.3f}" for name in ("loss", "accuracy") if name in row}
                    bar.set_postfix(shown, images_s=f"{self.clock.rate:.0f}")
                if self._is_evaluated_at(done):
                    self._look_for_nonfinite(state)
                    self._evaluate_step(state, done, log)
                    writer.save(state, config, log.text)
                    saved = done
                    self.clock.skip(done)
                self._stop_if_told()
        except preemption.Preempted:
            if saved != done:
                self._look_for_nonfinite(state)
                writer.save(state, config, log.text)
            raise
        finally:
            bar.close()
        return state

    def _is_evaluated_at(self, step: int) -> bool:
        return step > 0 and (step % self.config.eval_every == 0 or step == self.config.total_steps)

    def _stop_if_told(self) -> None:
        if self.notice.reached():
            raise preemption.Preempted

    def _look_for_nonfinite(self, state: TrainState) -> None:
        """Reports steps that were not finite since the last look; raises if there were more than may be left out."""
        sentinel = jax.device_get(state.sentinel)
        if int(sentinel.skipped) == self.skipped:
            return
        self.skipped = int(sentinel.skipped)
        step, allowed = int(sentinel.step), self.config.max_skipped_steps
        batch, indices = self.stepper.whole_batch(step - 1)
        path = processes.on_first(lambda: str(sentinels.write_report(self.workdir, sentinel, batch, indices)))
        text = f"{sentinels.describe(sentinel)} (report: {path})"
        if self.skipped <= allowed:
            left_out = f"{self.skipped} of at most {allowed} such steps left out so far"
            self.journal.warn("skipped", step, f"{text}; {left_out}")
            return
        self.journal.warn("stopped", step, text)
        raise sentinels.NonFiniteError(
            f"{text}; max_skipped_steps = {allowed} may be left out; try a lower learning rate, or allow more"
        )

    def _evaluate_step(self, state: TrainState, step: int, log: metrics.RunLog) -> None:
        found = self._evaluate(state.evaluated, self.stepper.dataset.validation)
        ternary = evaluate.ternary_statistics(state.evaluated, self.config.model)
        log.metrics(step, "validation", found.to_dict() | ({"ternary": ternary} if ternary else {}))
        self.journal.say(f"step {step:>6}  validation accuracy {found.accuracy:.4f}  nll {found.nll:.4f}")
        for warning in sentinels.expert_warnings(found.load_MxE):
            self.journal.warn("experts", step, f"step {step}, {warning}")

    def _report(
        self, state: TrainState, state_bytes: dict[str, int], log: metrics.RunLog, writer: Checkpoints
    ) -> dict[str, Any]:
        config = self.config
        peak = device_memory.peak()
        best = metrics.best_row(log.text)
        assert best is not None, "the last step is evaluated"
        if best["step"] != int(state.step):
            jax.tree.map(lambda leaf: leaf.delete(), state)  # two states may be more than a device holds
            writer.wait()
            state = self._best_state(best, log.text, writer)
        found = self._evaluate(state.evaluated, self.stepper.dataset.test)
        result = {
            "config_digest": config.digest(),
            "seed": config.seed,
            "steps": config.total_steps,
            "best_step": best["step"],
            "params_digest": trained.params_digest(state.evaluated),
            "test_accuracy": found.accuracy,
            "test_nll": found.nll,
            "validation_accuracy": best["accuracy"],
            "validation_nll": best["nll"],
            "params": memory.count_params(state.params),
            "test": found.to_dict(),
            "ternary": evaluate.ternary_statistics(state.evaluated, config.model),
            "warnings": sentinels.expert_warnings(found.load_MxE),
            "skipped_steps": self.skipped,
            "memory": state_bytes,
        } | self._experts(state.evaluated, found)
        writer.wait()  # a result says that the run is complete
        log.metrics(config.total_steps, "test", found.to_dict())
        log.timing(config.total_steps, self.clock.lap(config.total_steps))
        result = processes.on_first(lambda: self._write(result, peak))
        shown = f"test accuracy {found.accuracy:.4f}  nll {found.nll:.4f}"
        self.journal.say(f"{shown}  (step {best['step']}, best on validation)")
        return result

    def _experts(self, params: Any, found: evaluate.Evaluation) -> dict[str, Any]:
        """Returns what the result says of the experts, on the test split; nothing if there is no mixture.

        It takes memory that training did not, and what is trained is reported without it if there is not enough.
        """
        config, split = self.config, self.stepper.dataset.test
        rest = config.batch_size, self.placement, config.seed, self._stop_if_told
        try:
            use = expert_use.measure(params, config.model, split, found, *rest)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or jax.process_count() > 1:  # the others wait for this one
                raise
            gist, _, _ = str(error).partition("\n")
            text = f"whether experts differ could not be measured: {gist}; experiments.evaluate --experts tries again"
            self.journal.warn("experts", config.total_steps, text)
            return {}
        return {} if use is None else {"experts": use.to_dict()}

    def _best_state(self, best: dict[str, Any], log: str, writer: Checkpoints) -> TrainState:
        """Reads the best checkpoint; makes it again, by the same steps, if it is damaged or gone."""
        step = best["step"]
        try:
            return checkpoints.restore(self.directory, step, self.config, self.stepper.abstract_state())[0]
        except checkpoints.DamagedError as error:
            self.journal.warn("damaged", step, f"{error}; {checkpoints.set_aside(self.directory, step)}")
        found = self._restore_newest(before=step)
        state = found[0] if found else self._first_state()
        self.journal.incident("remade", step, f"making step {step} again from step {int(state.step)}")
        for number in range(int(state.step), step):
            state, _ = self.stepper.take(state, number)
            self._stop_if_told()
        found_again = self._evaluate(state.evaluated, self.stepper.dataset.validation)
        if (found_again.accuracy, found_again.nll) != (best["accuracy"], best["nll"]):
            again = f"nll {found_again.nll} instead of {best['nll']}: other devices or versions?"
            self.journal.warn("remade", step, f"step {step} made again is not quite as it was: {again}")
        lines = [line for line in log.splitlines(keepends=True) if json.loads(line)["step"] <= step]
        writer.save(state, self.config, "".join(lines))
        return state

    def _write(self, result: dict[str, Any], peak: dict[str, int]) -> dict[str, Any]:
        result["timing"] = timing.total(metrics.read_rows(self.workdir / "timing.jsonl")) | peak
        files.write_json(self.workdir / "result.json", result)
        return result

    def _evaluate(self, params: Any, split: data.AnySplit) -> evaluate.Evaluation:
        config = self.config
        return evaluate.evaluate(params, config.model, split, config.batch_size, self.placement, self._stop_if_told)


def _has_evaluation(log: metrics.RunLog, step: int) -> bool:
    return any(row["step"] == step and row["split"] == "validation" for row in metrics.parse(log.text))
