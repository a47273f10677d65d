"""Images in memory, split once and for all, and the order in which training sees them.

Axes: B batch, n images, H and W pixels, c channels.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from sklearn.datasets import load_digits

from bvit_jax.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and labels.

    Attributes:
        images: float32 (n, H, W, c), 0 to 1.
        labels: int32 (n,).
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images, labels and which of them count: `weights` is float32 (B,), 1, or 0 for padding."""

    images: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three splits with no image in common; train to fit, validation to select, test to report."""

    train: Split
    validation: Split
    test: Split


def load(config: DataConfig) -> Dataset:
    """Loads or draws the images that `config` names; the same configuration gives the same images and splits."""
    images, labels = _digits() if config.name == "digits" else _procedural(config)
    sizes = (config.num_train, config.num_validation, config.num_test)
    if sum(sizes) != len(labels):
        raise ValueError(f"splits of {sizes} images do not add up to the {len(labels)} of {config.name}")
    # A fixed order of our own: independent of the run's seed, so that all runs are tested on the same images.
    order = np.random.default_rng([config.seed, 1]).permutation(len(labels))
    parts = np.split(order, np.cumsum(sizes)[:-1])
    return Dataset(*(Split(images[index], labels[index]) for index in parts))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the 1,797 handwritten digits of scikit-learn, 8x8 grey levels from 0 to 16 in the original."""
    digits = load_digits()
    return (digits.images[..., None] / 16).astype(np.float32), digits.target.astype(np.int32)


def _procedural(config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Draws gratings: a class is an orientation, a wavelength and a colour; phase, contrast and noise vary."""
    rng = np.random.default_rng([config.seed, 0])
    count = config.num_train + config.num_validation + config.num_test
    labels = (np.arange(count) % config.num_classes).astype(np.int32)
    # The golden ratio spreads any number of classes evenly over orientations and wavelengths.
    spread = np.arange(config.num_classes) * 0.6180339887498949 % 1
    orientation = np.pi * np.arange(config.num_classes) / config.num_classes
    cycles = 1 + 2 * spread
    colour = 0.5 + 0.5 * np.cos(2 * np.pi * (spread[:, None] + np.arange(config.channels) / config.channels))
    axis = np.arange(config.image_size) / config.image_size
    images = np.empty((count, config.image_size, config.image_size, config.channels), np.float32)
    for start in range(0, count, 1024):  # bounds the float64 temporaries
        y = labels[start : start + 1024]
        direction = orientation[y][:, None, None]
        across = np.cos(direction) * axis[None, None, :] + np.sin(direction) * axis[None, :, None]
        phase = rng.uniform(0, 2 * np.pi, (len(y), 1, 1))
        contrast = rng.uniform(0.25, 0.5, (len(y), 1, 1))
        wave = contrast * np.sin(2 * np.pi * cycles[y][:, None, None] * across + phase)
        drawn = 0.5 + wave[..., None] * colour[y][:, None, None, :]
        images[start : start + 1024] = np.clip(drawn + rng.normal(0, 0.05, drawn.shape), 0, 1)
    return images, labels


def batch_indices(num_images: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Returns the indices of the training images of one step, int64 (batch_size,).

    Step s takes places s * batch_size onwards of an endless row of shuffled epochs; every epoch's order is drawn from
    (seed, epoch) alone. So a batch depends on (seed, step) and nothing else, and every image comes once an epoch.
    """
    places = step * batch_size + np.arange(batch_size)
    epochs = places // num_images
    indices = np.empty(batch_size, np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
        order = np.random.default_rng([seed, epoch]).permutation(num_images)
        here = epochs == epoch
        indices[here] = order[places[here] % num_images]
    return indices


def train_batch(split: Split, batch_size: int, seed: int, step: int, rows: np.ndarray) -> Batch:
    """Returns the places `rows` of the batch of one training step, a pure function of its arguments."""
    index = batch_indices(len(split), batch_size, seed, step)[rows]
    return Batch(split.images[index], split.labels[index], np.ones(len(rows), np.float32))


def eval_batches(split: Split, batch_size: int, rows: np.ndarray) -> Iterator[Batch]:
    """Yields the places `rows` of batches of equal size, which hold every image of a split once, in order.

    The last is padded with images of zeros and weight 0.
    """
    for start in range(0, len(split), batch_size):
        places = start + rows
        real = places < len(split)
        index = np.where(real, places, 0)
        weights = real.astype(np.float32)
        yield Batch(split.images[index] * weights[:, None, None, None], split.labels[index] * real, weights)
