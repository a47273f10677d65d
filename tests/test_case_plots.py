import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

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


def test_means_intervals_seeds_and_baselines_stand_where_they_belong() -> None:
    line = [summary("few", "dense,1", 0.9, 0.02), summary("few", "butterfly,4", 0.7, 0.05)]
    line.append(dataclasses.replace(summary("few", "standard,4", 0.8, math.nan), seeds=1, accuracies=(0.8,)))
    figure = Figure()
    case_plots._by_case(figure, {"few": line}, "kind", ["dense,1"], (1, 1))
    [axes] = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["dense,1", "butterfly,4", "standard,4"]
    bars = [(container.lines[0], container.lines[2]) for container in axes.containers]
    assert [bar.get_xydata().tolist() for bar, _ in bars] == [[[90.0, 0.0]], [[70.0, 1.0]], [[80.0, 2.0]]]
    spans = [np.ptp(segments[0].get_segments()[0][:, 0]) if segments else None for _, segments in bars]
    assert spans[:2] == [pytest.approx(4), pytest.approx(10)]
    assert spans[2] is None
    [level] = [one for one in axes.lines if one.get_linestyle() == "--"]
    assert list(level.get_xdata()) == [90.0, 90.0]
    dots = [list(one.get_xdata()) for one in axes.lines if one.get_marker() == "."]
    assert dots == [pytest.approx([89.0, 91.0]), pytest.approx([69.0, 71.0]), [80.0]]


def test_bytes_are_those_of_the_mixture_layers() -> None:
    found = summary("few", "butterfly,4", 0.7)
    figure = Figure()
    case_plots._against_bytes(figure, {"few": [found]}, "kind", (1, 1))
    [[x, y]] = figure.axes[0].containers[0].lines[0].get_xydata()
    assert (x, y) == (found.sample.bytes_full_ffn / 1e3, pytest.approx(70))
