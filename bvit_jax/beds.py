"""Test beds that need no download: real images, seeded, with splits that have no source in common.

Each bed gives its training, validation and test images in this order, and takes equally many of every class for
training. More of them are the same ones with others behind, and leave validation and test images as they are, so that
accuracies of several numbers of training images can be compared.

Axes: n images, H and W pixels, c channels.
"""

from collections.abc import Sequence
from importlib import resources

import numpy as np
from PIL import Image

from bvit_jax import drawn
from bvit_jax.data_config import DataConfig
from bvit_jax.model_config import ConfigError

Labelled = tuple[np.ndarray, np.ndarray]
"""Images, uint8 (n, H, W, c), and labels, int32 (n,)."""
_POOL, _TESTED = 100, 60
"""Digits of each class that are for training, and for test; those left, 14 to 23 of a class, are for validation."""


def few_digits(config: DataConfig) -> list[Labelled]:
    """Deals scikit-learn's digits, few of them for training: 8 x 8 x 1, 10 classes.

    Of a pool of 1,000 the first `num_train` are used; 197 are for validation, 600 for test.
    """
    images, labels = drawn.digits()
    train, *held_out = dealt_digits(labels, config.seed)
    # One digit of each class after the other: the first 10 n hold n of each.
    pool = np.stack(train, axis=1).ravel()[: config.num_train]
    return [(images[part], labels[part]) for part in (pool, *map(np.concatenate, held_out))]


def dealt_digits(labels: np.ndarray, seed: int) -> list[list[np.ndarray]]:
    """Deals the digits of each class to training, validation and test: 1,000, 197 and 600 of scikit-learn's 1,797.

    Args:
        labels: of all digits, (n,).
        seed: of the order within each class.

    Returns:
        By split and class, the places of the digits in `labels`, shuffled.
    """
    rng = np.random.default_rng([seed, 2])
    by_class = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    bounds = (_POOL, -_TESTED)
    return [list(parts) for parts in zip(*(np.split(places, bounds) for places in by_class), strict=True)]


_SIDE, _DIGIT, _FRAGMENT = 32, 16, 6
"""Pixels a side of a pair's image, of its digits and of a fragment."""
_FRAGMENTS = (2, 4)
"""Fewest and most."""
_DIGIT_CONTRAST, _CLUTTER_CONTRAST = (0.7, 1.0), (0.2, 0.4)
"""Least and largest."""


def digit_pairs(config: DataConfig) -> list[Labelled]:
    """Draws two digits on clutter: 32 x 32 x 1, 100 classes, the label is 10 times the left digit plus the right one.

    Scikit-learn's digits, enlarged to 16 pixels, lie side by side in the middle, on 2 to 4 fragments of others of less
    contrast anywhere. A split's digits and fragments come from its own digits (`dealt_digits`).
    """
    images, labels = drawn.digits()
    enlarged = np.stack([_enlarged(image[..., 0]) for image in images])
    sources = dealt_digits(labels, config.seed)
    sizes = (config.num_train, config.num_validation, config.num_test)
    found = []
    for split, (of_class, count) in enumerate(zip(sources, sizes, strict=True)):
        rng = np.random.default_rng([config.seed, 3, split])
        pairs = (np.arange(count) % 100).astype(np.int32)
        canvas = [_pair(int(pair), enlarged, of_class, rng) for pair in pairs]
        found.append((np.stack(canvas)[..., None], pairs))
    return found


def _enlarged(image_HxW: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image_HxW).resize((_DIGIT, _DIGIT), Image.Resampling.BILINEAR))


def _pair(pair: int, enlarged: np.ndarray, of_class: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    canvas = np.zeros((_SIDE, _SIDE), np.uint8)
    for _ in range(rng.integers(_FRAGMENTS[0], _FRAGMENTS[1] + 1)):
        digit = enlarged[rng.choice(of_class[int(rng.integers(10))])]
        y, x = rng.integers(_DIGIT - _FRAGMENT + 1, size=2)
        top, left = map(int, rng.integers(_SIDE - _FRAGMENT + 1, size=2))
        _lay(canvas, digit[y : y + _FRAGMENT, x : x + _FRAGMENT], rng.uniform(*_CLUTTER_CONTRAST), top, left)
    for half, label in enumerate(divmod(pair, 10)):
        digit = enlarged[rng.choice(of_class[label])]
        _lay(canvas, digit, rng.uniform(*_DIGIT_CONTRAST), (_SIDE - _DIGIT) // 2, half * _DIGIT)
    return canvas


def _lay(canvas: np.ndarray, image: np.ndarray, contrast: float, top: int, left: int) -> None:
    """Lays a light image on the canvas: the lighter of both is seen."""
    here = canvas[top : top + len(image), left : left + len(image)]
    np.maximum(here, np.round(contrast * image).astype(np.uint8), out=here)


PHOTOGRAPHS = {
    "skimage.data": (
        *("brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg"),
        *("ihc.png", "page.png", "retina.jpg", "rocket.jpg", "text.png"),
    ),
    "sklearn.datasets.images": ("china.jpg",),
}
_PATCH, _BLOCK = 16, 32
"""Pixels a side."""
_SHARES = (0.6, 0.15)
"""Of a photograph's blocks, those for training and for validation; the others are for test."""
_LEAST_DEVIATION = 10.0
"""Grey levels: where a patch varies less, it is sky, paper or the dark, and shows nothing of its photograph."""


def photo_patches(config: DataConfig) -> list[Labelled]:
    """Cuts patches out of photographs: 16 x 16 x 1, a class is a photograph (`PHOTOGRAPHS`).

    Each photograph is cut into blocks of 32 x 32, which are dealt to the splits; a patch lies within a block, anywhere.
    No place is used twice, and none where grey levels deviate by less than 10, but patches of a block overlap: the
    smallest photograph has 15 blocks for its 167 test patches. Grey levels are left as they are: by the mean of a patch
    alone, its 25 nearest neighbours in training name the photograph of 31 % of the test patches.

    Raises:
        ConfigError: if a photograph has too few places.
    """
    rng = np.random.default_rng([config.seed, 4])
    sizes = (config.num_train, config.num_validation, config.num_test)
    wanted = [size // config.num_classes for size in sizes]
    by_photograph = [_cut(grey, wanted, rng) for grey in photographs()]
    found = []
    for parts in zip(*by_photograph, strict=True):
        patches = np.stack(parts, axis=1)  # one of each photograph after the other
        labels = np.tile(np.arange(len(parts), dtype=np.int32), len(patches))
        found.append((patches.reshape(-1, _PATCH, _PATCH, 1), labels))
    return found


def photographs() -> list[np.ndarray]:
    """Returns the photographs in grey, uint8 (H, W), out of the packages that they are installed with.

    Colour would give a photograph away. They are read as files, as scikit-image's functions may download theirs.
    """
    named = [(package, name) for package, names in PHOTOGRAPHS.items() for name in names]
    found = []
    for package, name in named:
        with resources.as_file(resources.files(package) / name) as path, Image.open(path) as image:
            found.append(np.asarray(image.convert("L")))
    return found


def _cut(grey_HxW: np.ndarray, wanted: Sequence[int], rng: np.random.Generator) -> list[np.ndarray]:
    """Returns as many patches for each split as wanted, (n, 16, 16)."""
    windows = np.lib.stride_tricks.sliding_window_view(grey_HxW, (_PATCH, _PATCH))
    varied = _deviation(grey_HxW) >= _LEAST_DEVIATION
    found = []
    for blocks, count in zip(_dealt_blocks(grey_HxW, rng), wanted, strict=True):
        within = np.indices((_BLOCK - _PATCH + 1,) * 2).reshape(2, 1, -1)
        y, x = (_BLOCK * blocks.T[..., None] + within).reshape(2, -1)
        places = rng.permutation(np.flatnonzero(varied[y, x]))[:count]
        if len(places) < count:
            raise ConfigError(
                f"data.num_train: with this data.seed a photograph has {len(places)} places for {count} patches; fewer "
                f"would be right"
            )
        found.append(windows[y[places], x[places]])
    return found


def _dealt_blocks(grey_HxW: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Deals a photograph's blocks; returns their rows and columns by split, each (blocks, 2)."""
    rows, columns = (side // _BLOCK for side in grey_HxW.shape)
    blocks = rng.permutation(np.indices((rows, columns)).reshape(2, -1).T)
    return np.split(blocks, np.round(np.cumsum(_SHARES) * len(blocks)).astype(int))


def _deviation(grey_HxW: np.ndarray) -> np.ndarray:
    """Returns the standard deviation of the grey levels of the patch that begins at each place."""
    exact = grey_HxW.astype(np.float64)
    mean, square = _means(exact), _means(exact**2)
    return np.sqrt(np.maximum(square - mean**2, 0))


def _means(values_HxW: np.ndarray) -> np.ndarray:
    sums = np.pad(values_HxW.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    low, high = sums[:-_PATCH], sums[_PATCH:]
    return (high[:, _PATCH:] - high[:, :-_PATCH] - low[:, _PATCH:] + low[:, :-_PATCH]) / _PATCH**2
