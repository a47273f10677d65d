import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax import augment
from tests.conftest import make_config

apply = jax.jit(augment.augment, static_argnums=2)
shift = jax.jit(augment.shift, static_argnums=(2, 3))


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moves an image (H, W, c) with zeros coming in."""
    height, width, _ = image.shape
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                result[row, column] = image[row - down, column - right]
    return result


def offsets_of(images: np.ndarray, moved: np.ndarray, max_shift: int) -> list[tuple[int, int]]:
    """Finds the one offset within range that explains each moved image."""
    found = []
    steps = range(-max_shift, max_shift + 1)
    for image, result in zip(images, moved, strict=True):
        matches = [(dy, dx) for dy in steps for dx in steps if np.array_equal(shifted(image, dy, dx), result)]
        assert len(matches) == 1
        found += matches
    return found


def random_images(batch: int, height: int = 5, width: int = 7, channels: int = 2) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 1, (batch, height, width, channels)).astype(np.float32)


@pytest.mark.parametrize("max_shift", [1, 2])
def test_every_image_moves_by_an_offset_within_range_and_all_occur(key, max_shift):
    images = random_images(400)
    found = offsets_of(images, np.asarray(shift(key, images, max_shift)), max_shift)
    steps = range(-max_shift, max_shift + 1)
    assert set(found) == {(dy, dx) for dy in steps for dx in steps}
    # 400 draws of (2 m + 1)^2 equal chances: the standard deviation of a count is under sqrt(400 p).
    chance = 1 / (2 * max_shift + 1) ** 2
    counts = np.array([found.count(offset) for offset in set(found)])
    assert np.abs(counts - 400 * chance).max() < 4.5 * np.sqrt(400 * chance)


def test_the_two_directions_are_drawn_apart(key):
    found = offsets_of(random_images(100), np.asarray(shift(key, random_images(100), 1)), 1)
    assert abs(np.corrcoef(np.array(found).T)[0, 1]) < 0.4


def test_what_comes_in_is_zero(key):
    moved = np.asarray(shift(key, np.ones((200, 4, 4, 1), np.float32), 2))
    assert set(np.unique(moved)) == {0, 1}
    # Of an image moved by (dy, dx), (4 - |dy|) (4 - |dx|) pixels are left: at least 2 x 2.
    assert moved.sum(axis=(1, 2, 3)).min() == 4


def test_no_shift_is_the_identity(key):
    images = random_images(8)
    np.testing.assert_array_equal(shift(key, images, 0), images)
    np.testing.assert_array_equal(shift(key, images, 2, 0.0), images)


def test_only_a_share_of_the_images_moves(key):
    images = random_images(2000, 3, 3, 1)
    moved = np.asarray(shift(key, images, 1, 0.25))
    # Of those chosen, 1 in 9 draws the offset (0, 0): 0.25 x 8/9 = 0.222 move, with a deviation of 0.0093.
    share = np.mean((moved != images).any(axis=(1, 2, 3)))
    assert share == pytest.approx(0.25 * 8 / 9, abs=0.04)
    offsets_of(images[:100], moved[:100], 1)


def test_a_shift_is_settled_by_its_key(key):
    images = random_images(20)
    np.testing.assert_array_equal(shift(key, images, 2), shift(key, images, 2))
    assert not np.array_equal(shift(key, images, 2), shift(jax.random.key(1), images, 2))


def test_noise_has_the_deviation_asked_for(key):
    images = jnp.full((50, 20, 20, 1), 0.5)
    noise = np.asarray(augment.add_noise(key, images, 0.1) - images)
    # 20,000 draws: the deviation of the mean is 0.1 / sqrt(20000) = 0.0007, of the deviation 0.0005.
    assert noise.mean() == pytest.approx(0, abs=0.003)
    assert noise.std() == pytest.approx(0.1, abs=0.002)
    assert len(np.unique(noise)) > 10_000  # a draw for every pixel, not for every image
    assert noise.dtype == np.float32


def test_noise_is_settled_by_its_key_and_none_is_the_identity(key):
    images = random_images(4)
    np.testing.assert_array_equal(augment.add_noise(key, images, 0.1), augment.add_noise(key, images, 0.1))
    assert not np.array_equal(augment.add_noise(key, images, 0.1), augment.add_noise(jax.random.key(1), images, 0.1))
    np.testing.assert_array_equal(augment.add_noise(key, images, 0), images)


def test_augment_does_what_the_configuration_says(key):
    images = random_images(100)
    config = dataclasses.replace(make_config().data, max_shift=1, shift_probability=1.0, noise=0.0)
    still = dataclasses.replace(config, max_shift=0)
    assert set(offsets_of(images, np.asarray(apply(key, images, config)), 1)) > {(0, 0)}
    rare = apply(key, images, dataclasses.replace(config, shift_probability=0.1))
    assert 0 < np.mean((np.asarray(rare) != images).any(axis=(1, 2, 3))) < 0.3
    np.testing.assert_array_equal(apply(key, images, still), images)
    noisy = np.asarray(apply(key, images, dataclasses.replace(still, noise=0.1)))
    assert (noisy - images).std() == pytest.approx(0.1, abs=0.01)


def test_noise_comes_after_the_shift(key):
    config = dataclasses.replace(make_config().data, max_shift=2, shift_probability=1.0, noise=0.1)
    result = np.asarray(apply(key, np.zeros((50, 4, 4, 1), np.float32), config))
    assert (result != 0).all()  # also where zeros came in
