import dataclasses
import math
from pathlib import Path

from bvit_jax import case_plots, plots, sweep
from tests.conftest import make_config
from tests.test_plots import check_picture, has_colour


def summary(bed: str, argument: str, accuracy: float, interval: float = 0.02) -> sweep.Summary:
    labels = {"bed": bed, "kind": argument}
    trial = sweep.Trial(make_config(argument), Path("absent"), f"{bed} {argument}", labels)
    row, both = sweep.result_row(trial), (accuracy - 0.01, accuracy + 0.01)
    return sweep.Summary(row, trial, 2, both, accuracy, 0.01, interval, accuracy, 1.0, 100.0, {})


def test_every_family_is_in_both_pictures(tmp_path: Path) -> None:
    kinds = {"dense,1": 0.9, "standard,4": 0.92, "ternary,4": 0.91, "butterfly,4": 0.93}
    found = [summary(bed, kind, accuracy) for bed in ("few", "pairs") for kind, accuracy in kinds.items()]
    found.append(dataclasses.replace(summary("patches", "butterfly,8", 0.8, math.nan), seeds=1, accuracies=(0.8,)))
    paths = case_plots.draw(found, "kind", ["standard,4"], tmp_path / "plots")
    assert [path.name for path in paths] == ["cases.png", "cases_vs_bytes.png"]
    for path in paths:
        picture = check_picture(path)
        assert all(has_colour(picture, colour) for colour in plots.COLOURS[:4])


def test_nothing_finished_draws_nothing(tmp_path: Path) -> None:
    assert case_plots.draw([], "kind", [], tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()
