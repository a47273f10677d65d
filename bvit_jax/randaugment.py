"""RandAugment: operations drawn at random, one after the other, on images of 0 to 1.

The operations and their strengths are those of timm's `rand-m9-mstd0.5-inc1`, all of which grow with the level; each
does what Pillow does to 8-bit images, without rounding. Unlike timm, what comes in at the edges is always grey, and
interpolation is always linear, never cubic.

All images go through one program: one movement, one blend, one curve and one equalisation, each of which leaves an
image as it is, exactly, where another was drawn.

Axes: B batch, N operations an image, c channels, S pixels a side.

References:
    Cubuk et al., "RandAugment", arXiv 1909.13719; Wightman, timm, `timm/data/auto_augment.py`.
"""

import enum
import math

import jax
import jax.numpy as jnp
from flax import struct

from bvit_jax import warp
from bvit_jax.chosen import where_chosen
from bvit_jax.data_config import AugmentConfig

GREY = 0.5
"""Value of what comes in at the edges."""
LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in a pixel's brightness (ITU-R BT.601), as Pillow has them."""


class Operation(enum.IntEnum):
    """What is done, and what its argument says; `NOTHING` is never drawn but stands where none is done.

    The argument of ROTATE is in degrees counterclockwise, of the shears in pixels a pixel, of the translations a share
    of the side, of POSTERIZE the bits that are kept, of SOLARIZE the least level (0 to 255) that is inverted, of
    SOLARIZE_ADD the levels added to those under 128, of COLOR, CONTRAST, BRIGHTNESS and SHARPNESS the factor of the
    difference to an image without; the others have none.
    """

    AUTO_CONTRAST = 0
    EQUALIZE = 1
    INVERT = 2
    ROTATE = 3
    POSTERIZE = 4
    SOLARIZE = 5
    SOLARIZE_ADD = 6
    COLOR = 7
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    SHEAR_X = 11
    SHEAR_Y = 12
    TRANSLATE_X = 13
    TRANSLATE_Y = 14
    NOTHING = 15


@struct.dataclass
class Plan:
    """What is done to an image, in order.

    Attributes:
        operations_N: int32, each an `Operation`.
        arguments_N: float32.
    """

    operations_N: jax.Array
    arguments_N: jax.Array


def draw(key: jax.Array, config: AugmentConfig) -> Plan:
    """Draws an image's operations, evenly and with replacement, and for each its level and whether it is done."""
    even_key, normal_key = jax.random.split(key)
    operation_N, done_N, sign_N = jax.random.uniform(even_key, (3, config.randaugment_ops))
    drawn_N = jnp.floor(Operation.NOTHING * operation_N).astype(jnp.int32)
    deviates_N = config.randaugment_deviation * jax.random.normal(normal_key, drawn_N.shape)
    levels_N = jnp.clip(config.randaugment_magnitude + deviates_N, 0.0, 10.0)
    signs_N = jnp.where(sign_N < 0.5, -1.0, 1.0)
    done_N = done_N < config.randaugment_probability
    return Plan(jnp.where(done_N, drawn_N, Operation.NOTHING), argument(drawn_N, levels_N, signs_N))


def argument(operation: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """Returns the argument of an operation at a level of 0 to 10, float32; `sign` is 1 or -1, for those with two."""
    share = level / 10
    factor = 1 + 0.9 * share * sign
    arguments = {
        Operation.ROTATE: 30 * share * sign,
        Operation.POSTERIZE: 4 - jnp.floor(4 * share),
        Operation.SOLARIZE: 256 - jnp.floor(256 * share),
        Operation.SOLARIZE_ADD: jnp.floor(110 * share),
        **dict.fromkeys((Operation.COLOR, Operation.CONTRAST, Operation.BRIGHTNESS, Operation.SHARPNESS), factor),
        **dict.fromkeys((Operation.SHEAR_X, Operation.SHEAR_Y), warp.LARGEST_SHEAR * share * sign),
        **dict.fromkeys((Operation.TRANSLATE_X, Operation.TRANSLATE_Y), warp.LARGEST_SHIFT * share * sign),
    }
    return jnp.select([operation == each for each in arguments], list(arguments.values()), 0.0)


def apply(images_BxcxSxS: jax.Array, plans_B: Plan) -> jax.Array:
    """Does to each image of 0 to 1 what its plan says.

    Args:
        images_BxcxSxS: float32 (B, c, S, S); of other than 3 channels, the brightness of a pixel is their mean.
        plans_B: operations and arguments (B, N).
    """

    def step(images: jax.Array, operation_and_argument_B: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        operation_B, argument_B = operation_and_argument_B
        # Each part leaves alone what is another's, so that their order is free. Compilers fuse what stands together,
        # and would repeat a movement for every pixel that a blend reads: the loops stand between the two.
        images = jax.vmap(_curved)(jax.vmap(_blended)(images, operation_B, argument_B), operation_B, argument_B)
        images = where_chosen(equalized, operation_B == Operation.EQUALIZE, images)
        return jax.vmap(_sheared)(images, operation_B, argument_B), None

    return jax.lax.scan(step, images_BxcxSxS, (plans_B.operations_N.T, plans_B.arguments_N.T))[0]


def _sheared(image: jax.Array, operation: jax.Array, argument: jax.Array) -> jax.Array:
    def only(*operations: Operation) -> jax.Array:
        return jnp.stack([jnp.where(operation == each, argument, 0.0) for each in operations])

    angle = only(Operation.ROTATE)[0] * math.radians(1)
    shear = only(Operation.SHEAR_X, Operation.SHEAR_Y)
    shift = only(Operation.TRANSLATE_X, Operation.TRANSLATE_Y)
    return warp.sheared(image, angle, shear, shift, GREY)


def _blended(image: jax.Array, operation: jax.Array, argument: jax.Array) -> jax.Array:
    """Moves an image away from, or towards, one without colour, contrast, brightness or sharpness; `AUTO_CONTRAST`."""
    channels = len(image)
    shares = jnp.asarray(LUMA if channels == 3 else [1 / channels] * channels)
    bright = (shares[:, None, None] * image).sum(axis=0, keepdims=True) if channels > 1 else image
    plain = jnp.zeros(())
    for each, other in (
        (Operation.COLOR, bright),
        (Operation.CONTRAST, bright.mean()),
        (Operation.SHARPNESS, _smoothed(image)),
    ):
        plain = jnp.where(operation == each, other, plain)
    enhanced = (Operation.COLOR, Operation.CONTRAST, Operation.BRIGHTNESS, Operation.SHARPNESS)
    factor = jnp.where(jnp.isin(operation, jnp.asarray(enhanced)), argument, 1.0)
    blend = jnp.clip(plain + factor * (image - plain), 0.0, 1.0)
    low, high = (extreme(image, axis=(1, 2), keepdims=True) for extreme in (jnp.min, jnp.max))
    stretch = (operation == Operation.AUTO_CONTRAST) & (high > low)
    return jnp.where(stretch, (image - low) / jnp.where(stretch, high - low, 1.0), blend)


def _smoothed(image: jax.Array) -> jax.Array:
    """Means of 3 x 3 pixels, of which the middle has weight 5; pixels at the edges stay as they are."""
    _, height, width = image.shape
    if min(height, width) < 3:
        return image
    rows = image[:, :-2] + image[:, 1:-1] + image[:, 2:]
    blocks = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    means = jnp.pad((blocks + 4 * image[:, 1:-1, 1:-1]) / 13, ((0, 0), (1, 1), (1, 1)))
    inside = jnp.pad(jnp.ones((1, height - 2, width - 2), bool), ((0, 0), (1, 1), (1, 1)))
    return jnp.where(inside, means, image)


def _curved(image: jax.Array, operation: jax.Array, argument: jax.Array) -> jax.Array:
    """Changes each value by itself: `INVERT`, `POSTERIZE`, `SOLARIZE`, `SOLARIZE_ADD`."""
    levels = _levels(image)
    step = 2.0 ** (8 - argument)
    curves = {
        Operation.INVERT: 1 - image,
        Operation.POSTERIZE: jnp.floor(levels / step) * step / 255,
        Operation.SOLARIZE: jnp.where(levels < argument, image, 1 - image),
        Operation.SOLARIZE_ADD: jnp.where(levels < 128, image + argument / 255, image),
    }
    for each, curve in curves.items():
        image = jnp.where(operation == each, curve, image)
    return image


def equalized(image_cxSxS: jax.Array) -> jax.Array:
    """Spreads the 256 levels of each channel evenly, as Pillow does, in whole steps.

    As there, what lies at the highest level does not count, the number of pixels to a level is rounded down, and an
    image with fewer than 255 other pixels, such as one of 8 x 8, stays as it is. Counting and looking up are products
    of matrices: a level is two digits of 16, each a row of zeros and a one.
    """
    channels = len(image_cxSxS)
    levels_cx1xP = _levels(image_cxSxS).reshape(channels, 1, -1)
    digits = jnp.arange(16, dtype=jnp.float32)[None, :, None]
    high_cx16xP = (jnp.floor(levels_cx1xP / 16) == digits).astype(jnp.float32)
    low_cx16xP = (levels_cx1xP % 16 == digits).astype(jnp.float32)
    # Whole numbers all: exact in a product, in the least precise of its forms too.
    counts_cx16x16 = jnp.einsum("chp,clp->chl", high_cx16xP, low_cx16xP)
    table_cx256 = jax.vmap(_equal_table)(counts_cx16x16.reshape(channels, 256).astype(jnp.int32))
    table_cx16x16 = table_cx256.reshape(channels, 16, 16).astype(jnp.float32)
    by_low_cx16xP = jnp.einsum("chl,chp->clp", table_cx16x16, high_cx16xP)
    found_cxP = (by_low_cx16xP * low_cx16xP).sum(axis=1)
    # A channel that stays is not rounded either.
    stays_c = (table_cx256 == jnp.arange(256)[None]).all(axis=1)
    return jnp.where(stays_c[:, None, None], image_cxSxS, found_cxP.reshape(image_cxSxS.shape) / 255)


def _equal_table(counts_256: jax.Array) -> jax.Array:
    """Returns the new level of each, int (256,), from the number of pixels that have it."""
    levels = jnp.arange(256)
    highest = jnp.max(jnp.where(counts_256 > 0, levels, 0))
    step = (counts_256.sum() - counts_256[highest]) // 255
    below = jnp.cumsum(counts_256) - counts_256
    table = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table, levels)


def _levels(image: jax.Array) -> jax.Array:
    """Returns the nearest of 256 levels, 0 to 255, as floats."""
    return jnp.clip(jnp.floor(255 * image + 0.5), 0.0, 255.0)
