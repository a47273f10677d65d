"""The tables of docs/rivals.md are what the sweeps make of the results that lie beside it."""

import csv
import dataclasses
import importlib
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from bvit_jax import grid, memory, rival_report, rivals
from bvit_jax.rivals import AS_TRAINED, RivalRow

DOCS = Path(__file__).parent.parent / "docs"
STUDIES = {"rivals": "rivals", "mixed_rank": "ablation_mixed_rank"}


def of_csv(line: dict[str, str]) -> RivalRow:
    """One line of rivals.csv, as it was before it was written."""
    hints = get_type_hints(RivalRow)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(RivalRow):
        text, kind = line[field.name], str(hints[field.name])
        number = float if "float" in kind else int
        values[field.name] = text if "str" in kind else number(text) if text else None
    return RivalRow(**values)


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("name", STUDIES)
def test_the_tables_are_those_of_the_results(name: str) -> None:
    with (DOCS / "rivals" / f"{name}.csv").open(newline="") as file:
        rows = [of_csv(line) for line in csv.DictReader(file)]
    text = rival_report.to_markdown(rivals.summarise(rows), rivals.steps(rows))
    docs = (DOCS / "rivals.md").read_text()
    section = docs[docs.index(f"rivals/{name}.csv") :].partition("\n## ")[0]
    assert table_lines(section) == table_lines(text)
    assert len(table_lines(text)) > 15

    raw = importlib.import_module(f"configs.{STUDIES[name]}").get_config().to_dict()
    trials = grid.expand(raw["base"], raw["grid"], Path("runs"), raw["cases"])
    requested = rivals.requested(trials, **raw["compress"])
    assert {row.trial for row in rows} == {trial.config.digest() for trial in trials}
    assert len(rows) == sum(1 + len(trial.compressions) for trial in requested)
    sizes = {trial.config.digest(): memory.ledger(trial.config).bytes_full for trial in trials}
    assert all(row.bytes_full == sizes[row.trial] for row in rows if row.compression == AS_TRAINED)
