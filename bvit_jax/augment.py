"""Augmentation of a batch, on device, inside the training step.

Axes: B batch, H and W pixels, c channels.
"""

import jax
import jax.numpy as jnp


def shift(key: jax.Array, images_BxHxWxc: jax.Array, max_shift: int) -> jax.Array:
    """Moves each image by whole pixels drawn uniformly from -max_shift to max_shift each way; zeros come in."""
    if max_shift == 0:
        return images_BxHxWxc
    batch, height, width, channels = images_BxHxWxc.shape
    margin = (max_shift, max_shift)
    padded = jnp.pad(images_BxHxWxc, [(0, 0), margin, margin, (0, 0)])
    starts_Bx2 = jax.random.randint(key, (batch, 2), 0, 2 * max_shift + 1)

    def crop(image: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, starts_Bx2)


def add_noise(key: jax.Array, images_BxHxWxc: jax.Array, std: float) -> jax.Array:
    """Adds Gaussian noise of standard deviation `std` to every pixel."""
    if std == 0:
        return images_BxHxWxc
    return images_BxHxWxc + std * jax.random.normal(key, images_BxHxWxc.shape, images_BxHxWxc.dtype)


def augment(key: jax.Array, images_BxHxWxc: jax.Array, max_shift: int, noise: float) -> jax.Array:
    """Applies `shift`, then `add_noise`, each with its own part of `key`."""
    shift_key, noise_key = jax.random.split(key)
    return add_noise(noise_key, shift(shift_key, images_BxHxWxc, max_shift), noise)
