import dataclasses
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from bvit_jax import plots, scaling, sweep
from bvit_jax.storage import Storage
from tests.conftest import make_config

NAMES = ["accuracy_vs_experts.png", "bytes_vs_experts.png", "accuracy_vs_bytes.png"]


def summary(argument: str, accuracy: float, deviation: float = 0.01, settings: str = "") -> sweep.Summary:
    trial = sweep.Trial(make_config(argument), Path("absent"), settings)
    row, both = sweep.result_row(trial), (accuracy - 0.01, accuracy + 0.01)
    return sweep.Summary(row, trial, 2, both, accuracy, deviation, deviation, accuracy, 1.0, 100.0, {})


@pytest.fixture(scope="module")
def summaries() -> list[sweep.Summary]:
    return [
        summary("dense,4", 0.9),
        summary("standard,16", 0.95),
        summary("standard,4", 0.92),
        summary("butterfly,4", 0.91),
        summary("butterfly,16", 0.93, math.nan),
        summary("butterfly,4,tied", 0.9, settings="model.num_stages=2"),
    ]


def check_picture(path: Path) -> np.ndarray:
    """Reads a picture, which must be a PNG of a size for the screen with axes, text and lines on it."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = matplotlib.image.imread(path)
    height, width, _ = pixels.shape
    assert 400 <= height <= 1200
    assert 600 <= width <= 1600
    assert len(colours(pixels)) > 50
    return pixels


def colours(pixels: np.ndarray) -> set[int]:
    """Colours as 0xRRGGBB."""
    rgb = (pixels[..., :3] * 255).round().astype(int)
    return set(np.unique(rgb @ np.array([1 << 16, 1 << 8, 1])).tolist())


def has_colour(pixels: np.ndarray, colour: str) -> bool:
    return int(colour[1:], 16) in colours(pixels)


def test_a_sweep_has_three_pictures(summaries, tmp_path):
    directory = tmp_path / "deep" / "plots"
    found = plots.sweep_plots(summaries, directory)
    assert found == [directory / name for name in NAMES]
    assert sorted(path.name for path in directory.iterdir()) == sorted(NAMES)
    pictures = [check_picture(path) for path in found]
    for picture in pictures:
        # One series each: dense, standard, butterfly separate, butterfly tied.
        assert all(has_colour(picture, colour) for colour in plots.COLOURS[:4])
        assert not has_colour(picture, plots.COLOURS[5])


def test_pictures_show_the_numbers(summaries, tmp_path):
    first = [path.read_bytes() for path in plots.sweep_plots(summaries, tmp_path / "a")]
    again = [path.read_bytes() for path in plots.sweep_plots(summaries, tmp_path / "b")]
    assert first == again
    moved = [*summaries[:-1], dataclasses.replace(summaries[-1], accuracy_mean=0.7)]
    changed = [path.read_bytes() for path in plots.sweep_plots(moved, tmp_path / "c")]
    assert [a != b for a, b in zip(first, changed, strict=True)] == [True, False, True]


def test_without_results_there_are_no_pictures(tmp_path):
    assert plots.sweep_plots([], tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize("arguments", [["dense,4"], ["butterfly,4"], ["butterfly,4", "butterfly,64"]])
def test_few_results_can_be_drawn(arguments, tmp_path):
    found = plots.sweep_plots([summary(argument, 0.5, math.nan) for argument in arguments], tmp_path)
    for path in found:
        check_picture(path)


def test_more_series_than_colours_can_be_drawn(tmp_path):
    many = [summary("butterfly,4", 0.5 + index / 100, settings=f"loss.router_z={index}") for index in range(9)]
    check_picture(plots.sweep_plots(many, tmp_path)[0])


def test_series_rise_with_the_experts(summaries):
    lines = plots._series(summaries)
    assert list(lines) == ["butterfly separate", "butterfly tied model.num_stages=2", "dense", "standard"]
    assert [s.sample.num_experts for s in lines["standard"]] == [4, 16]


def test_accuracies_are_in_per_cent_and_a_lone_seed_has_no_bar(summaries):
    mean, spread = plots._accuracy(plots._series(summaries)["butterfly separate"])
    np.testing.assert_allclose(mean, [91, 93])
    np.testing.assert_allclose(spread, [1, 0])


def test_memory_curves(tmp_path):
    points = scaling.points(make_config(), scaling.all_variants(Storage()), (1, 64))
    path = plots.memory_plot(points, "title", tmp_path / "deep" / "memory.png")
    assert path == tmp_path / "deep" / "memory.png"
    picture = check_picture(path)
    assert all(has_colour(picture, colour) for colour in plots.COLOURS[:4])
    other = plots.memory_plot(points, "another", tmp_path / "other.png")
    assert other.read_bytes() != path.read_bytes()
