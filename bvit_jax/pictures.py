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
    for row, part in enumerate(figure.subfigures(rows, 1, squeeze=False)[:, 0]):
        here = slice(row * ACROSS, (row + 1) * ACROSS)
        panels = part.subplots(2, ACROSS)
        for axes in panels.flat:
            axes.set(xticks=[], yticks=[], frame_on=False)
        for line, images in zip(panels, (above_nxHxWxc[here], below_nxHxWxc[here]), strict=True):
            for axes, image in zip(line, images, strict=False):
                grey = image.shape[-1] == 1
                axes.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1)
        for axes, caption in zip(panels[1], captions[here], strict=False):
            axes.set_xlabel(caption, fontsize=7)
    figure.suptitle(title, fontsize=10)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")
