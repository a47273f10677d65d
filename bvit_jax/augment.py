"""Augmentation of a batch, on device, inside the training step.

Axes: B batch, H and W pixels, c channels.
"""

import jax
import jax.numpy as jnp

from bvit_jax.config import DataConfig


def shift(key: jax.Array, images_BxHxWxc: jax.Array, max_shift: int, probability: float = 1.0) -> jax.Array:
    """Moves each image, with this probability, by whole pixels uniform in -max_shift to max_shift; zeros come in."""
    if max_shift == 0 or probability == 0:
        return images_BxHxWxc
    offset_key, choice_key = jax.random.split(key)
    batch, height, width, channels = images_BxHxWxc.shape
    margin = (max_shift, max_shift)
    padded = jnp.pad(images_BxHxWxc, [(0, 0), margin, margin, (0, 0)])
    offsets_Bx2 = jax.random.randint(offset_key, (batch, 2), -max_shift, max_shift + 1)
    starts_Bx2 = max_shift + offsets_Bx2 * jax.random.bernoulli(choice_key, probability, (batch, 1)).astype(jnp.int32)

    def crop(image: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, starts_Bx2)


def add_noise(key: jax.Array, images_BxHxWxc: jax.Array, std: float) -> jax.Array:
    """Adds Gaussian noise of standard deviation `std` to every pixel."""
    if std == 0:
        return images_BxHxWxc
    return images_BxHxWxc + std * jax.random.normal(key, images_BxHxWxc.shape, images_BxHxWxc.dtype)


def augment(key: jax.Array, images_BxHxWxc: jax.Array, config: DataConfig) -> jax.Array:
    """Applies `shift`, then `add_noise`, as `config` says, each with its own part of `key`."""
    shift_key, noise_key = jax.random.split(key)
    shifted = shift(shift_key, images_BxHxWxc, config.max_shift, config.shift_probability)
    return add_noise(noise_key, shifted, config.noise)
