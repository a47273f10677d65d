import numpy as np
import pytest
from PIL import Image

from bvit_jax import pictures


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 8, 9])
def test_pairs_are_drawn_one_above_the_other(tmp_path, channels, count):
    # Black above, white below: as many pure blacks and whites as there are images.
    above = np.zeros((count, 4, 4, channels))
    path = tmp_path / "pairs.png"
    pictures.pairs(above, above + 1, [f"image {index}" for index in range(count)], "title", path)
    with Image.open(path) as picture:
        grey = np.asarray(picture.convert("L"))
    rows = np.flatnonzero((grey == 0).sum(axis=1) > 50)  # text has fewer black pixels in a row
    assert len(np.flatnonzero(np.diff(rows) > 1)) + 1 == -(-count // pictures.ACROSS)
    across = (grey[rows[0]] == 0).sum() / (grey[rows[-1]] == 0).sum()
    assert across == pytest.approx({1: 1, 8: 1, 9: 8}[count], rel=0.1)
