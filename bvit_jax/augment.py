"""Augmentation of training images, on the device, inside the training step.

Everything that is done to an image depends on the image and its key alone: a batch may be cut up among devices at will.

Axes: B batch, S and Z pixels a side before and after, c channels.
"""

import jax
import jax.numpy as jnp
from flax import struct

from bvit_jax import randaugment, warp
from bvit_jax.chosen import where_chosen
from bvit_jax.data_config import AugmentConfig

CROP_RATIOS = (3 / 4, 4 / 3)
"""Least and largest ratio of width to height of a rectangle that is cut out."""
ERASE_AREAS = (0.02, 1 / 3)
ERASE_RATIOS = (0.3, 1 / 0.3)
ERASE_MEAN, ERASE_DEVIATION = 0.5, 0.25
"""Of the noise, about those of natural images: rectangles stand out by their texture, not by their brightness."""
TRIES = 10
"""Draws of a rectangle before one that does not fit is cut."""


@struct.dataclass
class Rectangle:
    """Whole pixels, int32: top, left, height and width, all ()."""

    top: jax.Array
    left: jax.Array
    height: jax.Array
    width: jax.Array


def augment(keys_B: jax.Array, images_BxSxSxc: jax.Array, size: int, config: AugmentConfig) -> jax.Array:
    """Crops, flips, applies RandAugment, erases and adds noise, as `config` says, each with its own part of the keys.

    What `config` leaves out is not in the program, and its being there does not change what the others draw.

    Args:
        keys_B: (B,), a key for each image; it should depend on the image's place in the whole batch.
        images_BxSxSxc: float32 (B, S, S, c), 0 to 1.
        size: Z, pixels a side of the result; S, unless `config.crop` is `resized`.
        config: what is done.

    Returns:
        float32 (B, Z, Z, c); 0 to 1, unless noise is added.
    """
    crop_B, flip_B, randaugment_B, erase_B, noise_B = jax.vmap(lambda key: jax.random.split(key, 5))(keys_B).T
    if config.crop == "resized":
        images = resized_crop(crop_B, images_BxSxSxc, size, config.min_area)
    else:
        images = shift(crop_B, images_BxSxSxc.transpose(0, 3, 1, 2), config.max_shift, config.shift_probability)
    if config.flip_probability > 0:
        images = flip(flip_B, images, config.flip_probability)
    if config.randaugment_ops > 0 and config.randaugment_probability > 0:
        images = randaugment.apply(images, jax.vmap(lambda key: randaugment.draw(key, config))(randaugment_B))
    if config.erase_probability > 0:
        images = erase(erase_B, images, config.erase_probability)
    if config.noise > 0:
        images = add_noise(noise_B, images, config.noise)
    return images.transpose(0, 2, 3, 1)


def shift(keys_B: jax.Array, images_BxcxSxS: jax.Array, max_shift: int, probability: float) -> jax.Array:
    """Moves each image, with this probability, by whole pixels uniform in -max_shift to max_shift; zeros come in."""
    if max_shift == 0 or probability == 0:
        return images_BxcxSxS

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        choice, *places = jax.random.uniform(key, (3,))
        steps = jnp.floor(jnp.stack(places) * (2 * max_shift + 1)).astype(jnp.int32) - max_shift
        down, right = jnp.where(choice < probability, steps, 0)
        image = warp.moved(image, down.reshape(1, 1, 1), 1, max_shift, 0.0)
        return warp.moved(image, right.reshape(1, 1, 1), 2, max_shift, 0.0)

    return jax.vmap(one)(keys_B, images_BxcxSxS)


def resized_crop(keys_B: jax.Array, images_BxSxSxc: jax.Array, size: int, min_area: float) -> jax.Array:
    """Cuts a rectangle of at least `min_area` of the image out of each and resizes it, (B, c, size, size).

    With `min_area` 1 it is the whole image, unchanged if it has the size.
    """
    stored = images_BxSxSxc.shape[1]
    if min_area == 1 and stored == size:
        return images_BxSxSxc.transpose(0, 3, 1, 2)

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        whole = Rectangle(*(jnp.int32(pixels) for pixels in (0, 0, stored, stored)))
        cut = whole if min_area == 1 else rectangle(key, stored, (min_area, 1.0), CROP_RATIOS)
        rows = warp.weights(cut.top, cut.height, stored, size)
        return warp.resized(image, rows, warp.weights(cut.left, cut.width, stored, size))

    return jax.vmap(one)(keys_B, images_BxSxSxc)


def flip(keys_B: jax.Array, images_BxcxSxS: jax.Array, probability: float) -> jax.Array:
    """Mirrors each image left to right, with this probability."""
    chosen_B = jax.vmap(jax.random.uniform)(keys_B) < probability
    return jnp.where(chosen_B[:, None, None, None], images_BxcxSxS[..., ::-1], images_BxcxSxS)


def erase(keys_B: jax.Array, images_BxcxSxS: jax.Array, probability: float) -> jax.Array:
    """Fills a rectangle of each image, with this probability, with Gaussian noise, clipped to 0 to 1.

    References:
        Zhong et al., "Random Erasing Data Augmentation", arXiv 1708.04896; noise for every pixel as in timm.
    """
    choice_B, rectangle_B, noise_B = jax.vmap(lambda key: jax.random.split(key, 3))(keys_B).T
    chosen_B = jax.vmap(jax.random.uniform)(choice_B) < probability
    size = images_BxcxSxS.shape[-1]
    erased_B = jax.vmap(lambda key: rectangle(key, size, ERASE_AREAS, ERASE_RATIOS))(rectangle_B)

    def one(image: jax.Array, erased: Rectangle, key: jax.Array) -> jax.Array:
        noise = ERASE_MEAN + ERASE_DEVIATION * jax.random.normal(key, image.shape)
        return jnp.where(covered(erased, size), jnp.clip(noise, 0.0, 1.0), image)

    return where_chosen(one, chosen_B, images_BxcxSxS, erased_B, noise_B)


def add_noise(keys_B: jax.Array, images_BxcxSxS: jax.Array, deviation: float) -> jax.Array:
    """Adds Gaussian noise to every pixel."""
    shape = images_BxcxSxS.shape[1:]
    return images_BxcxSxS + deviation * jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B)


def rectangle(key: jax.Array, size: int, areas: tuple[float, float], ratios: tuple[float, float]) -> Rectangle:
    """Draws a rectangle in a square image.

    Its share of the image's area is uniform, its ratio of width to height log-uniform and its place uniform; of ten
    draws the first that fits is taken, and else the first, with the side that is too long cut to the image's.

    Args:
        key: of this draw.
        size: pixels a side of the image.
        areas, ratios: least and largest.
    """
    draws = jax.random.uniform(key, (2 * TRIES + 2,))
    area = size**2 * (areas[0] + (areas[1] - areas[0]) * draws[:TRIES])
    ratio = ratios[0] * (ratios[1] / ratios[0]) ** draws[TRIES : 2 * TRIES]
    widths, heights = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    first = jnp.argmax((widths <= size) & (heights <= size))
    height, width = (jnp.clip(sides[first], 1, size) for sides in (heights, widths))
    top, left = (
        jnp.floor(draw * (size - side + 1)) for draw, side in zip(draws[2 * TRIES :], (height, width), strict=True)
    )
    top, left, height, width = (pixels.astype(jnp.int32) for pixels in (top, left, height, width))
    return Rectangle(top, left, height, width)


def covered(place: Rectangle, size: int) -> jax.Array:
    """Returns which pixels of a square image lie in a rectangle, bool (size, size)."""
    pixels = jnp.arange(size)
    rows = (pixels >= place.top) & (pixels < place.top + place.height)
    columns = (pixels >= place.left) & (pixels < place.left + place.width)
    return rows[:, None] & columns[None, :]
