"""The tables of docs/accuracy.md are what the sweeps make of the results that lie beside it."""

import csv
import dataclasses
import importlib
from pathlib import Path

import pytest

from bvit_jax import case_tables, comparison, grid, sweep

DOCS = Path(__file__).parent.parent / "docs"
STUDIES = {
    "parity": "parity",
    "parity_longer": "parity_longer",
    "rotations": "ablation_rotations",
    "training": "ablation_training",
    "routing": "ablation_routing",
    "start": "ablation_start",
}
MEASURED = ("test_accuracy", "val_accuracy", "test_nll", "images_per_second", "output_cosine", "experts_used")
LOST = ("lost_shuffled", "lost_one")
OLDER = ("rotations", "training")
"""Run when configurations had more fields; the digests are others, and so are some of the variants."""


def of_csv(trial: sweep.Trial, found: dict[str, str]) -> sweep.ResultRow:
    """The row of a trial with what was measured."""
    numbers = {name: float(found[name]) if found[name] else None for name in (*MEASURED, *LOST)}
    row = sweep.result_row(trial)
    assert row.bytes_full_ffn == int(found["bytes_full_ffn"])
    return dataclasses.replace(row, status=found["status"], **numbers)


@pytest.mark.parametrize("name", STUDIES)
def test_the_tables_are_those_of_the_results(name: str) -> None:
    raw = importlib.import_module(f"configs.{STUDIES[name]}").get_config().to_dict()
    trials = grid.expand(raw["base"], raw["grid"], Path("runs"), raw["cases"])
    with (DOCS / "accuracy" / f"{name}.csv").open() as file:
        found = {(row["settings"], int(row["seed"])): row for row in csv.DictReader(file)}
    rows = [of_csv(trial, found[trial.settings, trial.config.seed]) for trial in trials]
    if name not in OLDER:
        assert all(row.bytes_full == int(found[row.settings, row.seed]["bytes_full"]) for row in rows)
        assert {row["trial"] for row in found.values()} == {trial.config.digest() for trial in trials}
    compared = comparison.compare(trials, rows, **raw["compare"])
    text = case_tables.to_markdown(sweep.summarise(trials, rows), compared, raw["compare"]["label"])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) > 10
    docs = (DOCS / "accuracy.md").read_text()
    section = docs[docs.index(f"accuracy/{name}.csv") :].partition("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("|")] == lines
