import io
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from bvit_jax import figures


def line(figure: Figure) -> None:
    axes = figure.subplots()
    axes.plot([1, 2, 3], [3.0, 1.0, 2.0], label="a line")
    axes.set_xlabel("step")


@pytest.fixture
def picture() -> figures.Picture:
    return figures.draw("line", "A line", "Some\n    words   apart.", (figures.COLUMN, 2.0), line)


def test_a_picture_is_saved_as_png_of_its_width_in_print_and_as_svg(picture: figures.Picture, tmp_path: Path) -> None:
    png, svg = picture.save(tmp_path)
    assert (png.name, svg.name) == ("line.png", "line.svg")
    assert matplotlib.image.imread(png).shape[:2] == (2.0 * figures.DPI, figures.COLUMN * figures.DPI)
    assert svg.read_text().count("<svg") == 1
    assert picture.caption == "Some words apart."


def test_the_same_picture_gives_the_same_files(picture: figures.Picture, tmp_path: Path) -> None:
    again = figures.draw("line", "A line", "", (figures.COLUMN, 2.0), line)
    (tmp_path / "again").mkdir()
    for one, other in zip(picture.save(tmp_path), again.save(tmp_path / "again"), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_notebook_shows_the_png(picture: figures.Picture) -> None:
    content, size = picture._repr_png_()
    shown = matplotlib.image.imread(io.BytesIO(content))
    assert shown.shape[1] / 2 < size["width"] < shown.shape[1]


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(0, 3, []), (3, 3, [0, 1, 2]), (5, 3, [0, 2, 4]), (10, 1, [0]), (12, 4, [0, 4, 7, 11])],
)
def test_some_are_spread_with_the_first_and_the_last(count: int, most: int, expected: list[int]) -> None:
    assert figures.some(count, most) == expected


def test_a_heatmap_has_its_own_colour_for_what_is_not_known() -> None:
    axes = Figure().subplots()
    shown = figures.heatmap(axes, np.array([[0.0, np.nan], [0.5, 1.0]]), 0.0, 1.0)
    red, green, blue, _ = shown.cmap(np.ma.masked_invalid([np.nan]))[0]
    assert red == green == blue == 0.9
    assert shown.get_clim() == (0.0, 1.0)
    assert figures.heatmap(axes, np.array([[0.0, 7.0]]), 0.0).get_clim() == (0.0, 7.0)


def test_layers_stand_in_whole_numbers() -> None:
    axes = Figure().subplots()
    figures.layer_axis(axes, (1, 3, 5))
    assert axes.get_xlim() == (0.5, 5.5)
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
