"""The notebooks, run as they are on small runs: one line is changed in each, the one that names its input."""

import re
from pathlib import Path
from typing import Any

import jupytext
import pytest
from nbclient import NotebookClient

from bvit_jax import train
from tests.conftest import ROOT, make_config
from tests.test_reports import sweep_of

NOTEBOOKS = ROOT / "notebooks"
INPUT = re.compile(r"^(WORKDIR|SWEEPS|RUNS) = .*$", re.MULTILINE)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a run."""
    directory = tmp_path_factory.mktemp("runs") / "small"
    train.run(make_config("butterfly,4"), directory, show_progress=False)
    return str(directory)


def executed(name: str, value: object) -> Any:
    """Runs a notebook as Jupyter would, with its input named by `value`."""
    notebook = jupytext.read(NOTEBOOKS / f"{name}.py")
    [cell] = [cell for cell in notebook.cells if cell.cell_type == "code" and INPUT.search(cell.source)]
    assert len(INPUT.findall(cell.source)) == 1
    cell.source = INPUT.sub(lambda found: f"{found[1]} = {value!r}", cell.source)
    return NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()


def shown(notebook: Any) -> tuple[int, str]:
    """Returns how many pictures a notebook shows, and all its text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output["data"] for output in outputs if "data" in output]
    text = "".join(output.get("text", "") for output in outputs) + "".join(each.get("text/plain", "") for each in data)
    return sum("image/png" in each for each in data), text


def test_one_run(run: str) -> None:
    pictures, text = shown(executed("checkpoint", run))
    assert pictures == 11
    assert "finished, 6 steps" in text
    assert "butterfly, 4 experts" in text


def test_two_runs(run: str) -> None:
    pictures, text = shown(executed("routing", {"one": run, "again": run}))
    assert pictures == 4
    assert "kappa" in text
    assert "test_accuracy" in text


def test_sweeps_side_by_side_and_with_holes(tmp_path: Path) -> None:
    sweep_of(tmp_path / "whole")
    failed = sweep_of(tmp_path / "holes", finished=4, failed=1)[0]
    pictures, text = shown(executed("scaling", [str(tmp_path / "whole"), str(tmp_path / "holes")]))
    assert pictures == 4
    assert failed.config.digest() in text
    assert "whole: standard" in text


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*")), ids=lambda path: path.name)
def test_a_notebook_names_the_command_that_makes_its_input(path: Path) -> None:
    assert path.suffix == ".py", "notebooks are kept as text, without outputs"
    text = path.read_text()
    [line] = [match[0] for match in INPUT.finditer(text)]
    inputs = re.findall(r'"(runs/[^"]+)"', line)
    assert inputs
    for made in inputs:
        assert re.search(rf"^# python -m experiments\.\w+ .*--workdir={re.escape(made)}\b", text, re.MULTILINE)
