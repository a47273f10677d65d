"""Pixels as they are stored, and as a model takes them.

Axes: B batch, H and W pixels, c channels, S pixels a side as stored.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar("Array", np.ndarray, jax.Array)


def to_unit(images_BxHxWxc: jax.Array) -> jax.Array:
    """Returns pixels from 0 to 1, float32; uint8 pixels lie from 0 to 255, floating ones are left as they are."""
    if images_BxHxWxc.dtype != jnp.uint8:
        return images_BxHxWxc
    return images_BxHxWxc.astype(jnp.float32) / 255


def centre(images_BxSxSxc: Array, size: int) -> Array:
    """Cuts images to the square of `size` pixels a side in their middle."""
    margin = (images_BxSxSxc.shape[1] - size) // 2
    return images_BxSxSxc[:, margin : margin + size, margin : margin + size]
