"""Pictures of images: grids that are saved as PNG.

Axes: n images, H and W pixels, c channels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ACROSS = 8
"""Images side by side."""


def pairs(
    above_nxHxWxc: np.ndarray, below_nxHxWxc: np.ndarray, captions: Sequence[str], title: str, path: Path
) -> None:
    """Draws two images of each, one above the other, and a caption beneath; some pairs side by side.

    Args:
        above_nxHxWxc: floating, 0 to 1, with 1 or 3 channels.
        below_nxHxWxc: likewise.
        captions: of the pairs.
        title: over all.
        path: of the PNG file; its directory exists.
    """
    rows = -(-len(captions) // ACROSS)
    figure = Figure(figsize=(1.25 * ACROSS, 3.1 * rows + 0.4), layout="constrained", dpi=110)
    panels = figure.subplots(2 * rows, ACROSS, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for index, caption in enumerate(captions):
        row, column = divmod(index, ACROSS)
        for axes, image in (
            (panels[2 * row, column], above_nxHxWxc[index]),
            (panels[2 * row + 1, column], below_nxHxWxc[index]),
        ):
            grey = image.shape[-1] == 1
            axes.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1)
        # Axes are off, so the caption is text, which the layout leaves room for.
        panels[2 * row + 1, column].set_title(caption, fontsize=7, y=-0.02, va="top")
    figure.suptitle(title, fontsize=10)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")
