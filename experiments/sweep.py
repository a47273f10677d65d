"""Trains a grid of models and compares accuracy, bytes, compression and speed.

    python -m experiments.sweep
    python -m experiments.sweep --config=configs/sweep_digits.py --workdir=runs/sweep_digits

Started again on the same workdir, it skips what is finished and takes up the rest; the grid may grow from call to call.
A trial that fails is a row with its cause, which errors/ has in full, and the others go on. Upon SIGTERM the trials
that run save and stop, and the sweep ends with exit status 75.

With --executor=ray the trials run on a Ray cluster (requirements-ray.txt), on nodes that share the workdir:

    python -m experiments.sweep --executor=ray --ray_address=auto --workdir=/mnt/runs/mine --topology=v6e:4x4

Any field can be changed on the command line: --config.grid.model.num_experts="(8, 32)" --config.base.total_steps=500
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from bvit_jax import (
    case_plots,
    case_tables,
    checkpoints,
    comparison,
    config,
    data,
    failures,
    files,
    grid,
    memory_report,
    plots,
    preemption,
    rival_report,
    rivals,
    run_images,
    sharding,
    start_run,
    storage,
    sweep,
    tuning,
)
from bvit_jax import workdir as workdirs
from bvit_jax.failures import Failures
from bvit_jax.model_config import require
from experiments import data_flags, entry, executor_flags, tables

_DEFAULT_CONFIG = str(Path(__file__).parent.parent / "configs" / "sweep_digits.py")
_CONFIG = config_flags.DEFINE_config_file(
    "config", _DEFAULT_CONFIG, "The sweep: base and grid; if wanted cases, compare, choose, compress, memory_base."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The sweep's directory; runs/NAME_OF_CONFIG if left out.")
flags.adopt_module_key_flags(data_flags)
flags.adopt_module_key_flags(executor_flags)

OUTPUTS = (
    *("trials", "errors", "results.csv", "comparisons.csv", "tuning.csv", "summary.md", "plots"),
    *("rivals.csv", "rival_steps.csv", "config.json", "checkpoints", "metrics.jsonl"),
)
LOCK_PATIENCE_SECONDS = 1.0
"""Any at all, so that a sweep on another machine that may be dead is waited for until that is known."""
MEMORY_EXPERTS = tuple(2**power for power in range(13))
"""Numbers of experts of the memory curves: 1 to 4096."""
SHOWN_ANGLES = ("32-bit", "8-bit")


def main(argv: Sequence[str]) -> None:
    """Runs what is unfinished of a sweep and writes its tables and pictures."""
    del argv
    data_flags.apply()
    jax.config.update("jax_platforms", "cpu")  # to count shapes; an accelerator is for the trials
    raw = entry.read_config(_CONFIG)
    for section in ("base", "grid"):
        require(section in raw, f"config.{section}", None, "there: a sweep has a base and a grid")
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    workdir = executor_flags.workdir(_WORKDIR.value or f"runs/{name}")
    print(f"workdir: {workdir}")
    trials = grid.expand(raw["base"], raw["grid"], workdir, raw.get("cases", (({}, {}),)))
    compare = _section(raw, "compare", ("label", "baselines"))
    choose = _section(raw, "choose", ("kind", "setting"))
    compress = _section(raw, "compress", ("label", "of"))
    if compare:
        comparison.check(**compare, trials=trials)
    if choose:
        tuning.check(**choose, trials=trials)
    if compress:
        trials = rivals.requested(trials, **compress)
    memory_base = config.resolve(raw["memory_base"]) if "memory_base" in raw else None
    runs = executor_flags.chosen(trials, _say)
    for trial in trials:
        model, batch_size = trial.config.model, trial.config.batch_size
        sharding.mesh_shape(model, batch_size, sharding.DEFAULT, runs.devices)
    failed = Failures(workdir / failures.FOLDER)
    for trial in failed.waiting(trials, executor_flags.retry_failed()):
        if not checkpoints.steps_in(trial.directory / checkpoints.DIRECTORY):
            start_run.find(trial.config)
    images = {of.name: data.opened(of) for of in {trial.config.data for trial in trials}}
    workdirs.claim(workdir, "sweep.json", {"base": raw["base"]}, OUTPUTS)
    with preemption.watch() as notice, workdirs.locked(workdir, LOCK_PATIENCE_SECONDS) as dead:
        if dead is not None:
            print(f"taking over from {dead}, which ended without letting go")
        for name, found in images.items():
            run_images.claim(workdir, name, found)
        report = _Report(trials, failed, workdir, compare, choose, compress.get("label"))
        if memory_base is not None:
            report.draw_memory(memory_base)
        _run(report, runs, notice)


def _section(raw: dict[str, Any], name: str, fields: tuple[str, ...]) -> dict[str, Any]:
    """Returns a section of the configuration that may be absent, or be these fields."""
    section = raw.get(name, {})
    known = isinstance(section, dict) and (not section or section.keys() == set(fields))
    require(known, f"config.{name}", section, f"of {' and '.join(fields)}")
    return dict(section)


def _run(report: "_Report", runs: executor_flags.Executor, notice: preemption.Notice) -> None:
    trials, failed, workdir = report.trials, report.failed, report.workdir
    statuses = [failed.status(trial) for trial in trials]
    print(
        f"{len(trials)} trials, {statuses.count('ok')} finished, {statuses.count('failed')} failed; {runs.how}; "
        f"Ctrl-C is safe, the same command goes on"
    )
    try:
        runs.run(trials, failed, workdir, report.show_ended, notice)
    finally:
        found = report.write()
        report.draw(found)
    _print_summary(found.summaries)
    others = {path.name for path in workdir.glob("trials/*")} - {trial.directory.name for trial in trials}
    if others:
        print(f"{len(others)} trials of earlier grids are kept in {workdir / 'trials'}, outside these tables")
    print(f"results: {workdir / 'results.csv'}, {workdir / 'summary.md'}, {workdir / 'plots'}")
    if report.show_trouble():
        sys.exit(1)
    unfinished = [trial.label for trial in trials if failed.status(trial) == "unfinished"]
    if unfinished:
        raise preemption.Preempted(f"trials were told to stop and are unfinished: {', '.join(unfinished)}")


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the finished trials say; rivals are there where they are asked for."""

    summaries: list[sweep.Summary]
    rivals: list[rivals.Rival]


class _Report:
    """The sweep's tables and pictures; what cannot be written does not end the sweep."""

    def __init__(
        self,
        trials: Sequence[sweep.Trial],
        failed: Failures,
        workdir: Path,
        compare: dict[str, Any],
        choose: dict[str, Any],
        rivals_by: str | None,
    ) -> None:
        self.trials = trials
        self.failed = failed
        self.workdir = workdir
        self._compare = compare
        self._choose = choose
        self._rivals_by = rivals_by
        self._unwritten: dict[str, OSError] = {}

    def show_ended(self, trial: sweep.Trial) -> None:
        """Prints how a trial ended, and brings the tables up to date."""
        row = sweep.result_row(trial, self.failed.cause(trial))
        scored = row.test_accuracy is not None and row.status != "failed"
        shown = f"test accuracy {row.test_accuracy:.4f}" if scored else row.error
        _say(f"{trial.label:<40} {row.status:<10} {shown}")
        for warning in (trial.result or {}).get("warnings", []):
            _say(f"    {warning}")
        self.write()

    def write(self) -> _Found:
        """Writes the tables as things stand."""
        rows = [sweep.result_row(trial, self.failed.cause(trial)) for trial in self.trials]
        summaries = sweep.summarise(self.trials, rows)
        compressed = rivals.rows(self.trials, rows, self._rivals_by) if self._rivals_by else []
        found_rivals = rivals.summarise(compressed)
        with self._goes_on("tables"):
            files.write_rows(self.workdir / "results.csv", [dataclasses.asdict(row) for row in rows])
            text = sweep.to_markdown(summaries, rows)
            if self._compare:
                found = comparison.compare(self.trials, rows, **self._compare)
                files.write_rows(self.workdir / "comparisons.csv", [dataclasses.asdict(row) for row in found])
                text += case_tables.to_markdown(summaries, found, self._compare["label"])
            if self._choose:
                scores = tuning.choose(self.trials, rows, **self._choose)
                files.write_rows(self.workdir / "tuning.csv", [dataclasses.asdict(score) for score in scores])
                text += tuning.to_markdown(scores)
            if self._rivals_by:
                files.write_rows(self.workdir / "rivals.csv", [dataclasses.asdict(row) for row in compressed])
                steps = rivals.steps(compressed)
                files.write_rows(self.workdir / "rival_steps.csv", [dataclasses.asdict(step) for step in steps])
                text += rival_report.to_markdown(found_rivals, steps)
            files.write_text(self.workdir / "summary.md", text)
        return _Found(summaries, found_rivals)

    def draw(self, found: _Found) -> None:
        """Draws accuracy and bytes of the finished trials."""
        directory = self.workdir / "plots"
        with self._goes_on("plots"):
            if self._rivals_by:
                rival_report.draw(found.rivals, directory)
            if self._compare:
                case_plots.draw(found.summaries, **self._compare, directory=directory)
            elif not self._rivals_by:
                plots.sweep_plots(found.summaries, directory)

    def draw_memory(self, base: config.Config) -> None:
        """Counts the memory_base model from 1 to 4096 experts, from shapes alone, and shows the 64-expert figures."""
        rest = storage.Storage(router=base.model.router_precision)
        with self._goes_on("memory report"):
            points = memory_report.write(base, rest, MEMORY_EXPERTS, self.workdir)
            shown = [p for p in points if p.num_experts == 64 and p.variant.numbers in ("float32", *SHOWN_ANGLES)]
            where = self.workdir / "memory_totals.csv"
            print(f"{memory_report.describe(base)}, 64 experts, counted from shapes (all: {where}):")
            tables.show(tables.memory_table(shown))

    def show_trouble(self) -> bool:
        """Prints what failed and what is not written as it should be; says whether there was any."""
        for name, error in self._unwritten.items():
            print(f"{name} could not be written: {error}")
        failed = [trial for trial in self.trials if self.failed.status(trial) == "failed"]
        for trial in failed:
            print(f"failed: {trial.label}: {sweep.result_row(trial, self.failed.cause(trial)).error}")
        for trial in failed:
            if not self.failed.is_recorded(trial):
                print(f"{self.failed.directory} could not be written; what it should say of {trial.label}:")
                print(self.failed.cause(trial))
        if failed:
            print(f"{len(failed)} trials failed, see {self.failed.directory}; --retry_failed runs them again")
        return bool(failed or self._unwritten)

    @contextlib.contextmanager
    def _goes_on(self, name: str) -> Iterator[None]:
        """Says so when something cannot be written, the first time in a row."""
        try:
            yield
        except OSError as error:
            if name not in self._unwritten:
                _say(f"{name} could not be written, the sweep goes on: {error}")
            self._unwritten[name] = error
        else:
            self._unwritten.pop(name, None)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # output may go to the disk that is full
        print(text, flush=True)


def _print_summary(summaries: Sequence[sweep.Summary]) -> None:
    table = tables.table("experts", "test %", "paper", "x", "full", "x", "img/s")
    for summary in summaries:
        row = summary.sample
        spread = "" if math.isnan(summary.accuracy_std) else f" ± {100 * summary.accuracy_std:.2f}"
        table.add_row(
            sweep.series(row.family, row.form, row.settings),
            *(str(row.num_experts), f"{100 * summary.accuracy_mean:.2f}{spread}"),
            *(tables.megabytes(row.bytes_paper), f"{row.compression_paper:.1f}"),
            *(tables.megabytes(row.bytes_full), f"{row.compression_full:.2f}", f"{summary.images_per_second:.0f}"),
        )
    seeds = " or ".join(sorted({str(summary.seeds) for summary in summaries})) or "no"
    print(f"Test accuracy, mean ± standard deviation over {seeds} seeds; sizes in MB; x: compression")
    tables.show(table)


if __name__ == "__main__":
    entry.run(main, resumes=True)
