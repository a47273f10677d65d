"""A sweep, or several side by side, in pictures and tables, with whatever of them is there."""

from pathlib import Path

import pandas as pd

from bvit_jax import failures, fits, sweep_figures, sweep_results
from bvit_jax.page import File, Part, Section, Table
from bvit_jax.run_report import Report

_SHOWN = ["sweep", "trial", "family", "form", "num_experts", "settings", "seed", "status", "test_accuracy"]


def of_sweeps(paths: list[Path]) -> Report:
    """Reports on sweeps.

    Raises:
        ConfigError: if a directory is no sweep's, or its results are damaged (`sweep_results.read`).
    """
    results = sweep_results.read(*paths)
    means = sweep_results.means(results)
    found = fits.series_fits(results)
    curves: list[Part] = list(sweep_figures.curves(results, means, found))
    sections = [Section("Trials", _trials(results, paths))]
    sections.append(Section("Curves", tuple(curves) or ("No trial has a result yet.",)))
    if found:
        text = "Intervals are 95 %, and take runs for independent; those of bytes tell of the misfit of the law."
        sections.append(Section("Laws", (text, Table("Fits over single runs.", fits.fit_table(found)))))
    if len(means):
        sections.append(Section("Means over seeds", (Table("Accuracy as a share; intervals: half, 95 %.", means),)))
    own = [
        File(path, f"{path.parent.parent.name}: {path.stem}") for of in paths for path in sorted(of.glob("plots/*.png"))
    ]
    if own:
        sections.append(Section("The sweep's own pictures", tuple(own)))
    names = " and ".join(path.resolve().name for path in paths)
    counts = results["status"].value_counts()
    told = ", ".join(f"{count} {status}" for status, count in counts.items()) or "none has begun"
    return Report(f"Sweep {names}", f"{len(results)} trials: {told}.", sections)


def _trials(results: pd.DataFrame, paths: list[Path]) -> tuple[Part, ...]:
    """Says which trials are not done, and why."""
    missing = results[results["status"] != "ok"]
    if not len(missing):
        return ("All are done.",) if len(results) else ("No trial has begun.",)
    caption = """Trials that are not done. Those without a test accuracy are left out of the curves; one that has it is
        trained, and what was to follow is not done."""
    parts: list[Part] = [Table(caption, missing[_SHOWN])]
    for path in paths:
        for failed in missing[(missing["sweep"] == path.resolve().name) & (missing["status"] == "failed")].itertuples():
            where = path / failures.FOLDER / f"{failed.trial}.txt"
            parts.append(f"{failed.trial} failed: {failed.error or 'no cause is known'} (all of it: {where})")
    return tuple(parts)
