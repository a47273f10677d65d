"""Images that need no file: scikit-learn's digits, and gratings drawn from a seed.

Axes: n images, H and W pixels, c channels.
"""

from importlib import metadata

import numpy as np

from bvit_jax.data_config import DataConfig


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the 1,797 handwritten digits of scikit-learn, uint8 (n, 8, 8, 1), and their labels, int32 (n,).

    The original has grey levels from 0 to 16.
    """
    # Importing scikit-learn takes longer than everything else at the start of a run together: its file is enough.
    path = metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(path), np.uint8, delimiter=",")
    return _as_uint8(table[:, :-1].reshape(-1, 8, 8, 1) / 16), table[:, -1].astype(np.int32)


def gratings(config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Draws gratings: a class is an orientation, a wavelength and a colour; phase, contrast and noise vary.

    Returns:
        Images, uint8 (n, H, W, c), and labels, int32 (n,), of all splits of a `procedural` configuration.
    """
    rng = np.random.default_rng([config.seed, 0])
    count = config.num_train + config.num_validation + config.num_test
    labels = (np.arange(count) % config.num_classes).astype(np.int32)
    # The golden ratio spreads any number of classes evenly over orientations and wavelengths.
    spread = np.arange(config.num_classes) * 0.6180339887498949 % 1
    orientation = np.pi * np.arange(config.num_classes) / config.num_classes
    cycles = 1 + 2 * spread
    colour = 0.5 + 0.5 * np.cos(2 * np.pi * (spread[:, None] + np.arange(config.channels) / config.channels))
    axis = np.arange(config.image_size) / config.image_size
    images = np.empty((count, config.image_size, config.image_size, config.channels), np.uint8)
    for start in range(0, count, 1024):  # bounds the float64 temporaries
        y = labels[start : start + 1024]
        direction = orientation[y][:, None, None]
        across = np.cos(direction) * axis[None, None, :] + np.sin(direction) * axis[None, :, None]
        phase = rng.uniform(0, 2 * np.pi, (len(y), 1, 1))
        contrast = rng.uniform(0.25, 0.5, (len(y), 1, 1))
        wave = contrast * np.sin(2 * np.pi * cycles[y][:, None, None] * across + phase)
        pixels = 0.5 + wave[..., None] * colour[y][:, None, None, :]
        images[start : start + 1024] = _as_uint8(pixels + rng.normal(0, 0.05, pixels.shape))
    return images, labels


def _as_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
