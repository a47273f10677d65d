"""Figures that are fit to be printed: a picture knows its title and caption, and saves itself as PNG and SVG.

Widths are those of one and of two columns of a journal, in inches, so that the text is read as it is set: at 8 points
and 7. Colours are Okabe and Ito's, told apart with any colour vision.
"""

import dataclasses
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLUMN, PAGE = 3.5, 7.16
"""Widths of one column and of two, inches."""
DPI = 200
SEQUENTIAL = "cividis"
"""Colour map of ordered values; it looks alike with any colour vision."""
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "bvit_jax",  # the same figure gives the same file
}


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """One figure.

    Attributes:
        name: of its files, without ending.
        title: in a few words.
        caption: what is to be seen, and how it was measured.
        figure: drawn already.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    def save(self, directory: Path) -> list[Path]:
        """Writes NAME.png and NAME.svg into a directory that is there, and returns their paths."""
        paths = [directory / f"{self.name}.png", directory / f"{self.name}.svg"]
        paths[0].write_bytes(self.png)
        with mpl.rc_context(STYLE):
            self.figure.savefig(paths[1], metadata={"Date": None})
        return paths

    @functools.cached_property
    def png(self) -> bytes:
        """The figure as PNG."""
        content = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.figure.savefig(content, format="png", dpi=DPI)
        return content.getvalue()

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """Shows itself in a notebook, as wide as in print."""
        return self.png, {"width": int(96 * self.figure.get_figwidth() * 1.25)}


def draw(name: str, title: str, caption: str, size: tuple[float, float], onto: Callable[[Figure], None]) -> Picture:
    """Draws one picture.

    Args:
        name, title, caption: as in `Picture`.
        size: width and height, inches.
        onto: draws onto an empty figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        onto(figure)
    return Picture(name, title, " ".join(caption.split()), figure)


def layer_axis(axes: Axes, layers: tuple[int, ...]) -> None:
    """Labels the horizontal axis by layers of the model."""
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)


def heatmap(axes: Axes, values: np.ndarray, low: float, high: float | None = None) -> Any:
    """Shows a matrix in the sequential colours from `low` to `high`, or its largest value; nan is light grey.

    Returns:
        What a colour bar is made of.
    """
    axes.grid(False)
    colours = mpl.colormaps[SEQUENTIAL].with_extremes(bad="0.9")
    shown = axes.imshow(values, cmap=colours, aspect="auto", interpolation="nearest", vmin=low, vmax=high)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    return shown


def some(count: int, most: int) -> list[int]:
    """Returns at most `most` of the numbers from 0 to count - 1, evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(index * (count - 1) / max(most - 1, 1)) for index in range(most)})
