"""Images made into squares of one size, as training, evaluation and prediction take them.

What stands in a data set is taken as it is stored: unlike `bvit_jax.images`, which reads a user's own photographs,
`decode` applies no EXIF orientation, since the readers on which published results rest apply none.
"""

import contextlib
import io
import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

_DEEP = ("I", "F")
"""First letters of Pillow's modes of more than 8 bits a channel."""
DAMAGE = (OSError, ValueError, EOFError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises for damaged images."""


def decode(encoded: bytes, size: int, channels: int) -> np.ndarray:
    """Decodes an image and makes it fit, as `fit` says.

    Args:
        encoded: a PNG, a JPEG or whatever else Pillow reads, of 8 bits a channel at most.
        size: pixels a side.
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 (size, size, channels).

    Raises:
        ValueError: if this is no such image or a damaged one.
    """
    with _opened(encoded) as image:
        return np.asarray(fit(image, size, channels)).reshape(size, size, channels)


def fit(image: Image.Image, size: int, channels: int) -> Image.Image:
    """Cuts out the square in the middle of an image and resizes that; an image of this size keeps every bit.

    A JPEG at least twice too large is decoded at 1/2, 1/4 or 1/8 of its size, at no less than `size`. Resizing is
    Pillow's bilinear, which averages over what it shrinks. Transparent images are laid over white.

    Args:
        image: of 8 bits a channel at most; one just opened, not yet loaded, is loaded by this.
        size: pixels a side.
        channels: 1 for grey (ITU-R 601 luma of colours), 3 for RGB.

    Returns:
        A new image of mode L or RGB, `size` pixels a side.

    Raises:
        ValueError: if it has more bits a channel; one just opened may raise any of `DAMAGE`.
    """
    width, height = image.size
    drafted = image.draft(None, (size, size))  # only JPEG has one
    fraction = width / drafted[1][2] if drafted else 1
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = tuple(edge / fraction for edge in (left, top, left + side, top + side))
    return _resize(_convert(image, channels), square, size)


def measure(encoded: bytes) -> tuple[int, int]:
    """Decodes an image in full and returns its height and width; raises ValueError as `decode`."""
    with _opened(encoded) as image:
        image.load()
        return image.height, image.width


@contextlib.contextmanager
def _opened(encoded: bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            yield image
    except DAMAGE as error:
        raise ValueError(f"the image cannot be decoded ({error})") from None


def _convert(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith(_DEEP):
        raise ValueError(f"mode {image.mode}: more than 8 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _resize(image: Image.Image, square: tuple[float, ...], size: int) -> Image.Image:
    """Resizes the square between left, top, right and bottom edge, which need not lie between pixels."""
    left, top = math.floor(square[0]), math.floor(square[1])
    right, bottom = math.ceil(square[2]), math.ceil(square[3])
    if (left, top, right, bottom) != (0, 0, *image.size):
        # Cut before resizing, so that nothing from outside the square bleeds in.
        image = image.crop((left, top, right, bottom))
    if image.size == (size, size):
        return image
    box = (square[0] - left, square[1] - top, square[2] - left, square[3] - top)
    return image.resize((size, size), Image.Resampling.BILINEAR, box)
