"""Trains a grid of models and compares accuracy, bytes, compression and speed.

    python -m experiments.sweep
    python -m experiments.sweep --config=configs/sweep_digits.py --workdir=runs/sweep_digits

Started again on the same workdir, it skips what is finished and takes up the rest; the grid may grow from call to call.
Any field can be changed on the command line: --config.grid.model.num_experts="(8, 32)" --config.base.total_steps=500
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from bvit_jax import config, executor, files, memory_report, plots, sharding, storage, sweep
from bvit_jax import workdir as workdirs
from bvit_jax.model_config import require
from experiments import entry, tables

_DEFAULT_CONFIG = str(Path(__file__).parent.parent / "configs" / "sweep_digits.py")
_CONFIG = config_flags.DEFINE_config_file("config", _DEFAULT_CONFIG, "The sweep: base, grid and memory_base.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The sweep's directory; runs/NAME_OF_CONFIG if left out.")
_JOBS = flags.DEFINE_integer("jobs", 0, "Trials at a time; 0: one per core on CPUs (8 at most), one on accelerators.")
_RETRY_FAILED = flags.DEFINE_bool("retry_failed", False, "Run again the trials that failed in an earlier call.")

OUTPUTS = ("trials", "results.csv", "summary.md", "plots", "config.json", "checkpoints", "metrics.jsonl")
MEMORY_EXPERTS = tuple(2**power for power in range(13))
"""Numbers of experts of the memory curves: 1 to 4096."""
SHOWN_ANGLES = ("32-bit", "8-bit")


def main(argv: Sequence[str]) -> None:
    """Runs what is unfinished of a sweep and writes its tables and pictures."""
    del argv
    require(_JOBS.value >= 0, "jobs", _JOBS.value, "0 or more")
    raw = entry.read_config(_CONFIG)
    for section in ("base", "grid", "memory_base"):
        require(section in raw, f"config.{section}", None, "there: a sweep has base, grid and memory_base")
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    workdir = Path(_WORKDIR.value or Path("runs") / name)
    print(f"workdir: {workdir}")
    trials = sweep.expand(raw["base"], raw["grid"], workdir)
    memory_base = config.resolve(raw["memory_base"])
    platform = executor.probe_platform()
    for trial in trials:
        model, batch_size = trial.config.model, trial.config.batch_size
        sharding.mesh_shape(model, batch_size, sharding.DEFAULT, platform.devices)
    workdirs.claim(workdir, "sweep.json", {"base": raw["base"]}, OUTPUTS)
    with workdirs.locked(workdir, patience_seconds=0):
        _run(trials, memory_base, workdir, _JOBS.value or platform.default_jobs)


def _run(trials: Sequence[sweep.Trial], memory_base: config.Config, workdir: Path, jobs: int) -> None:
    _draw_memory(memory_base, workdir)
    statuses = [trial.status for trial in trials]
    print(
        f"{len(trials)} trials, {statuses.count('ok')} finished, {statuses.count('failed')} failed; {jobs} at a time; "
        f"Ctrl-C is safe, the same command goes on"
    )

    def on_end(trial: sweep.Trial) -> None:
        row = sweep.result_row(trial)
        shown = row.error if row.test_accuracy is None else f"test accuracy {row.test_accuracy:.4f}"
        tqdm.write(f"{trial.label:<40} {row.status:<7} {shown}")
        sys.stdout.flush()
        _write_tables(trials, workdir)

    try:
        executor.run_trials(trials, jobs, _RETRY_FAILED.value, workdir / "compilation_cache", on_end)
    finally:
        summaries = _write_tables(trials, workdir)
        plots.sweep_plots(summaries, workdir / "plots")
    _print_summary(summaries)
    others = {path.name for path in workdir.glob("trials/*")} - {trial.directory.name for trial in trials}
    if others:
        print(f"{len(others)} trials of earlier grids are kept in {workdir / 'trials'}, outside these tables")
    print(f"results: {workdir / 'results.csv'}, {workdir / 'summary.md'}, {workdir / 'plots'}")
    failed = [trial.label for trial in trials if trial.status == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}; --retry_failed runs them again")
        sys.exit(1)


def _write_tables(trials: Sequence[sweep.Trial], workdir: Path) -> list[sweep.Summary]:
    rows = [sweep.result_row(trial) for trial in trials]
    summaries = sweep.summarise(trials, rows)
    files.write_rows(workdir / "results.csv", [dataclasses.asdict(row) for row in rows])
    files.write_text(workdir / "summary.md", sweep.to_markdown(summaries, rows))
    return summaries


def _draw_memory(base: config.Config, workdir: Path) -> None:
    """Counts the memory_base model from 1 to 4096 experts, from shapes alone, and shows the 64-expert figures."""
    points = memory_report.write(base, storage.Storage(router=base.model.router_precision), MEMORY_EXPERTS, workdir)
    shown = [p for p in points if p.num_experts == 64 and p.variant.numbers in ("float32", *SHOWN_ANGLES)]
    print(f"{memory_report.describe(base)}, 64 experts, counted from shapes (all: {workdir / 'memory_totals.csv'}):")
    tables.show(tables.memory_table(shown))


def _print_summary(summaries: Sequence[sweep.Summary]) -> None:
    table = tables.table("experts", "test %", "paper", "x", "full", "x", "img/s")
    for summary in summaries:
        row = summary.sample
        spread = "" if math.isnan(summary.accuracy_std) else f" ± {100 * summary.accuracy_std:.2f}"
        table.add_row(
            " ".join(part for part in (_name(row.family, row.form), row.settings) if part),
            *(str(row.num_experts), f"{100 * summary.accuracy_mean:.2f}{spread}"),
            *(tables.megabytes(row.bytes_paper), f"{row.compression_paper:.1f}"),
            *(tables.megabytes(row.bytes_full), f"{row.compression_full:.2f}", f"{summary.images_per_second:.0f}"),
        )
    seeds = " or ".join(sorted({str(summary.seeds) for summary in summaries})) or "no"
    print(f"Test accuracy, mean ± standard deviation over {seeds} seeds; sizes in MB; x: compression")
    tables.show(table)


def _name(family: str, form: str) -> str:
    return family if form == "-" else f"{family} {form}"


if __name__ == "__main__":
    entry.run(main, resumes=True)
