"""Mixup and CutMix: images of a batch mixed in pairs, and their labels with them.

Each image is mixed with its neighbour, 2 r with 2 r + 1: the images of a batch are in random order, and neighbours lie
on the same device where it holds an even number; otherwise some travel. The share is drawn once a step, as in timm's
mode "batch".

Axes: B batch, S pixels a side, c channels.
"""

import jax
import jax.numpy as jnp
from flax import struct

from bvit_jax.data_config import AugmentConfig


@struct.dataclass
class Mixed:
    """What images were mixed with: the loss is share * loss(own labels) + (1 - share) * loss(labels_B).

    Attributes:
        labels_B: labels of the images mixed in.
        share: (), float32, of an image itself, 0 to 1.
    """

    labels_B: jax.Array
    share: jax.Array


def mix(
    key: jax.Array, images_BxSxSxc: jax.Array, labels_B: jax.Array, config: AugmentConfig
) -> tuple[jax.Array, Mixed | None]:
    """Mixes each image with its neighbour by Mixup or CutMix, whichever `config` gives an alpha above 0.

    With both, each is done with probability 1/2. The last of an odd number of images is its own neighbour.

    Returns:
        The images and what they were mixed with; as they are and None, with nothing in the program, at alphas of 0.

    References:
        Zhang et al., "mixup", arXiv 1710.09412; Yun et al., "CutMix", arXiv 1905.04899.
    """
    if config.mixup == 0 and config.cutmix == 0:
        return images_BxSxSxc, None
    weights_SxS = draw(key, images_BxSxSxc.shape[1], config)
    weights_1xSxSx1 = weights_SxS[None, :, :, None]
    mixed = weights_1xSxSx1 * images_BxSxSxc + (1 - weights_1xSxSx1) * neighbours(images_BxSxSxc)
    return mixed, Mixed(neighbours(labels_B), weights_SxS.mean())


def draw(key: jax.Array, size: int, config: AugmentConfig) -> jax.Array:
    """Draws the weight of an image's own pixels, float32 (S, S).

    They are all equal to the share for Mixup; for CutMix, 0 in a box and 1 elsewhere.
    """
    choice_key, share_key, box_key = jax.random.split(key, 3)
    cut_probability = 0.0 if config.cutmix == 0 else 1.0 if config.mixup == 0 else 0.5
    cut = jax.random.bernoulli(choice_key, cut_probability)
    alpha = jnp.where(cut, config.cutmix, config.mixup)
    share = jax.random.beta(share_key, alpha, alpha)
    middle = jax.random.randint(box_key, (2,), 0, size)
    return jnp.where(cut, outside_box(share, middle, size), share)


def outside_box(share: jax.Array, middle: jax.Array, size: int) -> jax.Array:
    """Returns 0 in CutMix's box and 1 outside of it, float32 (size, size).

    The box would cover 1 - share of the image; its side is rounded down to an even number of pixels, and what lies over
    the edges is cut off.

    Args:
        share: ().
        middle: int (2,), row and column, 0 to size - 1.
        size: pixels a side.
    """
    half = jnp.floor(size * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
    pixels = jnp.arange(size)
    row, column = ((pixels >= centre - half) & (pixels < centre + half) for centre in middle)
    return 1.0 - (row[:, None] & column[None, :])


def neighbours(rows_B: jax.Array) -> jax.Array:
    """Swaps entries 2 r and 2 r + 1 of the first axis; the last of an odd number stays."""
    even = len(rows_B) // 2 * 2
    pairs = rows_B[:even].reshape(even // 2, 2, *rows_B.shape[1:])
    return jnp.concatenate([pairs[:, ::-1].reshape(rows_B[:even].shape), rows_B[even:]])
