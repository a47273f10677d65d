"""Moving, shearing and resizing of one image without reading pixels by computed index.

Rows and columns move by offsets of their own, digit by digit: a digit of base 8 is a choice among eight static slices,
so that shifts by up to 256 pixels take three of them. Resizing multiplies by a matrix for each axis. Neither needs a
gather, which some processors are slow at; `jax.vmap` carries both over to a batch.

Axes: c channels, H and W pixels, S and Z pixels a side before and after.
"""

import math

import jax
import jax.numpy as jnp

LARGEST_ANGLE = math.radians(30)
LARGEST_SHEAR = 0.3
LARGEST_SHIFT = 0.45
"""Bounds of what `sheared` is asked for: radians, pixels a pixel, share of the side."""
_BASE = 8
"""Of the digits of an offset; 2 would choose less at a time but pass over the image more often."""


def moved(
    image: jax.Array, offsets: jax.Array, axis: int, reach: int, fill: float, span: tuple[int, int] | None = None
) -> jax.Array:
    """Returns out[i] = image[i + offset] along one axis, and `fill` where that is outside.

    Args:
        image: floating, of any axes.
        offsets: int, an offset for each line: 1 long in `axis`, and 1 or as long as the image in others.
        axis: of the image.
        reach: bound of the offsets, which lie within -reach to reach.
        fill: value of what comes in.
        span: first i and the one behind the last; the image's own if left out.
    """
    start, stop = span or (0, image.shape[axis])
    places = [1]
    while places[-1] * _BASE <= 2 * reach:
        places.append(places[-1] * _BASE)
    largest = [min(2 * reach // place, _BASE - 1) for place in places]
    furthest = sum(digit * place for digit, place in zip(largest, places, strict=True))
    margins = [(0, 0, 0)] * image.ndim
    margins[axis] = (reach - start, stop - reach + furthest - image.shape[axis], 0)
    lines = jax.lax.pad(image, jnp.asarray(fill, image.dtype), margins)
    for place, most in zip(reversed(places), reversed(largest), strict=True):
        digits = (offsets + reach) // place % _BASE
        length = lines.shape[axis] - most * place
        choices = [jax.lax.slice_in_dim(lines, i * place, i * place + length, axis=axis) for i in range(most + 1)]
        lines = choices[0]
        for digit in range(1, most + 1):
            lines = jnp.where(digits == digit, choices[digit], lines)
    return lines


def slid(
    image: jax.Array, offsets: jax.Array, axis: int, reach: int, fill: float, span: tuple[int, int] | None = None
) -> jax.Array:
    """Does what `moved` does for floating offsets: linear between neighbours, and towards `fill` at the edges."""
    start, stop = span or (0, image.shape[axis])
    whole = jnp.floor(offsets)
    lines = moved(image, whole.astype(jnp.int32), axis, reach, fill, (start, stop + 1))
    near = jax.lax.slice_in_dim(lines, 0, -1, axis=axis)
    return near + (offsets - whole) * (jax.lax.slice_in_dim(lines, 1, None, axis=axis) - near)


def sheared(image_cxSxS: jax.Array, angle: jax.Array, shear: jax.Array, shift: jax.Array, fill: float) -> jax.Array:
    """Turns, shears or shifts an image; out(x, y) is the image at a place (X, Y) that is linear in (x, y).

    Three passes, along rows, columns and rows again, each move every line by an offset of its own. A rotation is three
    shears; its interpolation is linear in each of them, somewhat softer than the bilinear. With one kind of movement
    at a time, a shear or shift is exactly the linear interpolation along its axis, and at 0 nothing changes, exactly.

    Args:
        image_cxSxS: (c, S, S), floating.
        angle: (), radians counterclockwise about the middle, at most LARGEST_ANGLE either way.
        shear: (2,), X - x = shear[0] (y + 1/2) or Y - y = shear[1] (x + 1/2): the left or upper edge stays; at most
            LARGEST_SHEAR either way.
        shift: (2,), X - x and Y - y as a share of S, at most LARGEST_SHIFT either way.
        fill: value of what comes in.

    References:
        Paeth, "A Fast Algorithm for General Raster Rotation", Graphics Interface 1986.
    """
    size = image_cxSxS.shape[-1]
    reach = math.ceil(LARGEST_SHIFT * size)
    # What the first pass moves out of the sides, the third brings back.
    margin = math.ceil(math.tan(LARGEST_ANGLE / 2) * size / 2)
    rows = jnp.arange(size, dtype=jnp.float32)[:, None]
    columns = jnp.arange(-margin, size + margin, dtype=jnp.float32)
    middle = (size - 1) / 2
    tilt = -jnp.tan(angle / 2)
    across = tilt * (rows - middle)
    down = jnp.sin(angle) * (columns - middle)
    first = across + shear[0] * (rows + 0.5) + shift[0] * size
    second = down + shear[1] * (columns + 0.5) + shift[1] * size
    wide = slid(image_cxSxS, first[None], 2, reach, fill, (-margin, size + margin))
    turned = slid(wide, second[None, None], 1, reach, fill)
    return slid(turned, across[None], 2, margin, fill, (margin, size + margin))


def weights(start: jax.Array, length: jax.Array, size_in: int, size_out: int) -> jax.Array:
    """Weights (size_out, size_in), float32, that resize pixels start to start + length - 1 of an axis to all of it.

    Bilinear: a triangle about each new pixel's middle, as wide as its neighbours are apart, in the old or the new
    pixels, whichever are larger (so that shrinking does not alias); pixels outside the span have no weight.

    Args:
        start, length: (), int.
        size_in, size_out: pixels.
    """
    scale = length.astype(jnp.float32) / size_out
    centres = start + (jnp.arange(size_out, dtype=jnp.float32)[:, None] + 0.5) * scale
    pixels = jnp.arange(size_in)[None, :]
    triangle = jnp.maximum(0.0, 1 - jnp.abs(pixels + 0.5 - centres) / jnp.maximum(scale, 1.0))
    inside = triangle * ((pixels >= start) & (pixels < start + length))
    return inside / inside.sum(axis=1, keepdims=True)


def resized(image_SxSxc: jax.Array, rows_ZxS: jax.Array, columns_ZxS: jax.Array) -> jax.Array:
    """Applies `weights` for rows and for columns and puts channels first: (c, Z, Z)."""
    # About 16 bits of the factors survive, enough for 8-bit pixels, at half the cost of all 24.
    precise = jax.lax.Precision.HIGH
    half_done = jnp.einsum("hwc,yh->wcy", image_SxSxc, rows_ZxS, precision=precise)
    return jnp.einsum("wcy,xw->cyx", half_done, columns_ZxS, precision=precise)
