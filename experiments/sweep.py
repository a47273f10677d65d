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
from typing import Any

from absl import flags
from ml_collections import config_flags
from rich import box
from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

from bvit_jax import config, executor, memory, metrics, plots, sharding, sweep
from bvit_jax import workdir as workdirs
from bvit_jax.model_config import require
from experiments import entry

_DEFAULT_CONFIG = str(Path(__file__).parent.parent / "configs" / "sweep_digits.py")
_CONFIG = config_flags.DEFINE_config_file("config", _DEFAULT_CONFIG, "The sweep: base, grid and memory_base.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The sweep's directory; runs/NAME_OF_CONFIG if left out.")
_JOBS = flags.DEFINE_integer("jobs", 0, "Trials at a time; 0: one per core on CPUs (8 at most), one on accelerators.")
_RETRY_FAILED = flags.DEFINE_bool("retry_failed", False, "Run again the trials that failed in an earlier call.")

OUTPUTS = ("trials", "results.csv", "summary.md", "plots", "config.json", "checkpoints", "metrics.jsonl")
MEMORY_EXPERTS = tuple(2**power for power in range(13))
"""Numbers of experts of the memory curves: 1 to 4096."""


def main(argv: Sequence[str]) -> None:
    """Runs what is unfinished of a sweep and writes its tables and pictures."""
    del argv
    require(_JOBS.value >= 0, "jobs", _JOBS.value, "0 or more")
    raw = _CONFIG.value.to_dict()
    for section in ("base", "grid", "memory_base"):
        require(section in raw, f"config.{section}", None, "there: a sweep has base, grid and memory_base")
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    workdir = Path(_WORKDIR.value or Path("runs") / name)
    print(f"workdir: {workdir}")
    trials = sweep.expand(raw["base"], raw["grid"], workdir)
    memory_base = config.resolve(raw["memory_base"])
    platform = executor.probe_platform()
    for trial in trials:
        sharding.check_batch(trial.config.batch_size, platform.devices)
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
    _write_rows(workdir / "results.csv", rows)
    metrics.write_text(workdir / "summary.md", sweep.to_markdown(summaries, rows))
    return summaries


def _write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Writes rows as CSV, and as JSON beside it."""
    metrics.write_text(path, sweep.to_csv(rows))
    metrics.write_json(path.with_suffix(".json"), [dataclasses.asdict(row) for row in rows])


def _draw_memory(base: config.Config, workdir: Path) -> None:
    """Counts the memory_base model from 1 to 4096 experts, from shapes alone, and shows the 64-expert figures."""
    rows = memory.scaling(base.model, MEMORY_EXPERTS)
    _write_rows(workdir / "memory.csv", rows)
    m = base.model
    title = f"{sum(m.is_moe_by_layer)} mixture layers, d_model {m.d_model}, d_ff {m.d_ff}, {m.num_stages} stages"
    plots.memory_plot(rows, title, workdir / "plots" / "memory_vs_experts.png")
    table = _table("paper MB", "x", "full MB, FFN", "x", "full MB, all", "x")
    for row in (row for row in rows if row.num_experts == 64):
        table.add_row(
            _name(row.family, row.form),
            *(_megabytes(row.bytes_paper), f"{row.compression_paper:.1f}"),
            *(_megabytes(row.bytes_full_ffn), f"{row.compression_full_ffn:.1f}"),
            *(_megabytes(row.bytes_full), f"{row.compression_full:.1f}"),
        )
    print(f"{title}, 64 experts, counted from shapes (1 to 4096 experts: {workdir / 'memory.csv'}):")
    Console().print(table)


def _print_summary(summaries: Sequence[sweep.Summary]) -> None:
    table = _table("experts", "test %", "paper", "x", "full", "x", "img/s")
    for summary in summaries:
        row = summary.sample
        spread = "" if math.isnan(summary.accuracy_std) else f" ± {100 * summary.accuracy_std:.2f}"
        table.add_row(
            " ".join(part for part in (_name(row.family, row.form), row.settings) if part),
            *(str(row.num_experts), f"{100 * summary.accuracy_mean:.2f}{spread}"),
            *(_megabytes(row.bytes_paper), f"{row.compression_paper:.1f}"),
            *(_megabytes(row.bytes_full), f"{row.compression_full:.2f}", f"{summary.images_per_second:.0f}"),
        )
    seeds = " or ".join(sorted({str(summary.seeds) for summary in summaries})) or "no"
    print(f"Test accuracy, mean ± standard deviation over {seeds} seeds; sizes in MB; x: compression")
    Console().print(table)


def _table(*headers: str) -> Table:
    """Makes a table of a column of names and right-aligned ones of numbers."""
    table = Table(Column("", no_wrap=True), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _name(family: str, form: str) -> str:
    return family if form == "-" else f"{family} {form}"


def _megabytes(number: float) -> str:
    """Formats bytes as decimal MB to four figures, two decimals at most for large ones."""
    megabytes = number / 1e6
    return f"{megabytes:.2f}" if megabytes >= 100 else f"{megabytes:.3f}"


if __name__ == "__main__":
    entry.run(main)
