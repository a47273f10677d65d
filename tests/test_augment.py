import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from bvit_jax import augment
from tests.test_randaugment import CONFIG

NONE = CONFIG = dataclasses.replace(CONFIG, randaugment_ops=0)
RECIPE = dataclasses.replace(CONFIG, min_area=0.5, flip_probability=0.5, randaugment_ops=2, erase_probability=0.5)
SHIFT = dataclasses.replace(CONFIG, crop="shift", max_shift=1, shift_probability=1.0)
apply = jax.jit(augment.augment, static_argnums=(2, 3))


def augmented(key: jax.Array, images: np.ndarray, config: object, size: int | None = None) -> np.ndarray:
    return np.asarray(apply(jax.random.split(key, len(images)), images, size or images.shape[1], config))


def random_images(batch: int, size: int = 6, channels: int = 2) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 1, (batch, size, size, channels)).astype(np.float32)


def rectangles(count: int, size: int, areas: tuple[float, float], ratios: tuple[float, float]) -> np.ndarray:
    """Top, left, height and width of many draws, (4, count)."""
    keys = jax.random.split(jax.random.key(3), count)
    drawn = jax.jit(jax.vmap(lambda key: augment.rectangle(key, size, areas, ratios)))(keys)
    return np.stack([drawn.top, drawn.left, drawn.height, drawn.width])


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


@pytest.mark.parametrize("max_shift", [1, 2])
def test_every_image_moves_by_an_offset_within_range_and_all_occur(key, max_shift):
    images = random_images(400)
    moved = augmented(key, images, dataclasses.replace(SHIFT, max_shift=max_shift))
    found = offsets_of(images, moved, max_shift)
    steps = range(-max_shift, max_shift + 1)
    assert set(found) == {(dy, dx) for dy in steps for dx in steps}
    # 400 draws of (2 m + 1)^2 equal chances: the standard deviation of a count is under sqrt(400 p).
    chance = 1 / (2 * max_shift + 1) ** 2
    counts = np.array([found.count(offset) for offset in set(found)])
    assert np.abs(counts - 400 * chance).max() < 4.5 * np.sqrt(400 * chance)
    assert abs(np.corrcoef(np.array(found).T)[0, 1]) < 0.2  # the two directions are drawn apart


def test_what_a_shift_lets_in_is_zero(key):
    moved = augmented(key, np.ones((200, 4, 4, 1), np.float32), dataclasses.replace(SHIFT, max_shift=2))
    assert set(np.unique(moved)) == {0, 1}
    # Of an image moved by (dy, dx), (4 - |dy|) (4 - |dx|) pixels are left: at least 2 x 2.
    assert moved.sum(axis=(1, 2, 3)).min() == 4


def test_only_a_share_of_the_images_moves(key):
    images = random_images(2000, 3, 1)
    moved = augmented(key, images, dataclasses.replace(SHIFT, shift_probability=0.25))
    # Of those chosen, 1 in 9 draws the offset (0, 0): 0.25 x 8/9 = 0.222 move, with a deviation of 0.0093.
    share = np.mean((moved != images).any(axis=(1, 2, 3)))
    assert share == pytest.approx(0.25 * 8 / 9, abs=0.04)
    offsets_of(images[:100], moved[:100], 1)


@pytest.mark.parametrize(
    "config", [NONE, *(dataclasses.replace(SHIFT, **{field: 0}) for field in ("max_shift", "shift_probability"))]
)
@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_left_out_leaves_images_exactly_as_they_are_and_no_work(key, config, size, channels):
    images = random_images(3, size, channels)
    np.testing.assert_array_equal(augmented(key, images, config), images)
    keys = jax.random.split(key, 3)
    # Nothing but transpositions is left of the program.
    operations = apply.lower(keys, images, size, config).compile().as_text()
    assert not any(word in operations for word in ("while", "dot", "select", "xor", "pad("))


def test_a_flip_mirrors_a_share_of_the_images_left_to_right(key):
    images = random_images(1000, 4, 3)
    result = augmented(key, images, dataclasses.replace(CONFIG, flip_probability=0.3))
    mirrored = (result == images[:, :, ::-1]).all(axis=(1, 2, 3))
    kept = (result == images).all(axis=(1, 2, 3))
    assert (mirrored | kept).all()
    assert mirrored.mean() == pytest.approx(0.3, abs=0.06)  # the deviation is 0.0145


def test_rectangles_have_the_areas_and_ratios_asked_for():
    # So small that every one fits: areas and ratios are as drawn, but for whole pixels.
    _, _, height, width = rectangles(3000, 1000, (0.02, 0.3), (0.5, 2.0))
    areas, ratios = height * width / 1e6, np.log(width / height)
    assert stats.kstest(areas, stats.uniform(0.02, 0.28).cdf).pvalue > 0.01
    assert stats.kstest(ratios, stats.uniform(-math.log(2), 2 * math.log(2)).cdf).pvalue > 0.01
    assert abs(np.corrcoef(areas, ratios)[0, 1]) < 0.08


def test_rectangles_lie_inside_and_anywhere():
    size = 8
    top, left, height, width = rectangles(5000, size, (0.05, 1.0), (3 / 4, 4 / 3))
    for start, length in ((top, height), (left, width)):
        assert start.min() == 0
        assert (start + length).max() == size
        assert length.min() >= 1
        # With a length of 5, the places 0 to 3 are equally likely.
        counts = np.bincount(start[length == 5], minlength=4)
        assert len(counts) == 4
        assert stats.chisquare(counts).pvalue > 0.001
    assert abs(np.corrcoef(top[height == 5], left[height == 5])[0, 1]) < 0.15


def test_rectangles_that_do_not_fit_are_drawn_again_and_at_last_cut():
    # An area of 0.8 to 1 in a ratio of 3/4 to 4/3 fits with a chance of 0.37, and ten times not with one of 0.009: if
    # none were drawn again, 0.63 would have a side of 1000. Of those that fit, few do within half a pixel.
    _, _, height, width = rectangles(4000, 1000, (0.8, 1.0), (3 / 4, 4 / 3))
    assert 0.003 < np.mean(np.maximum(height, width) == 1000) < 0.04
    # No rectangle of the whole area and a ratio of 4 fits: of 100 x 100, one of 200 x 50 becomes one of 100 x 50.
    _, _, height, width = rectangles(5, 100, (1.0, 1.0), (4.0, 4.0001))
    assert set(zip(height.tolist(), width.tolist(), strict=True)) == {(50, 100)}
    assert (rectangles(20, 1, (0.02, 1 / 3), (0.3, 3.3)) == np.array([[0], [0], [1], [1]])).all()


@pytest.mark.parametrize(("stored", "size"), [(12, 12), (12, 8), (9, 16)])
def test_a_resized_crop_is_what_pillow_cuts_out_and_resizes(key, stored, size):
    images = random_images(6, stored, 1)
    keys = jax.random.split(key, 6)
    config = dataclasses.replace(CONFIG, min_area=0.2)
    result = augmented(key, images, config, size)
    assert result.shape == (6, size, size, 1)
    for image, image_key, got in zip(images, keys, result, strict=True):
        place = augment.rectangle(jax.random.split(image_key, 5)[0], stored, (0.2, 1.0), (3 / 4, 4 / 3))
        top, left, height, width = (int(each) for each in (place.top, place.left, place.height, place.width))
        cut = Image.fromarray(image[..., 0]).crop((left, top, left + width, top + height))
        expected = cut.resize((size, size), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(got[..., 0], np.asarray(expected), atol=1e-5)


def test_without_a_crop_the_whole_image_is_resized(key):
    images = random_images(8, 60, 1)
    result = augmented(key, images, CONFIG, 8)
    for image, got in zip(images, result, strict=True):
        expected = Image.fromarray(image[..., 0]).resize((8, 8), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(got[..., 0], np.asarray(expected), atol=1e-5)


def test_a_share_of_the_images_has_a_rectangle_of_noise(key):
    images = np.full((600, 32, 32, 3), 2.0, np.float32)
    result = augmented(key, images, dataclasses.replace(CONFIG, erase_probability=0.4))
    erased = (result != 2).all(axis=-1)
    assert ((result != 2).any(axis=-1) == erased).all()  # all channels of a pixel
    chosen = erased.any(axis=(1, 2))
    assert chosen.mean() == pytest.approx(0.4, abs=0.08)
    for mask in erased[chosen]:
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        np.testing.assert_array_equal(mask, np.outer(rows, columns))
        assert np.flatnonzero(rows).size == np.ptp(np.flatnonzero(rows)) + 1
        assert np.flatnonzero(columns).size == np.ptp(np.flatnonzero(columns)) + 1
    areas = erased[chosen].mean(axis=(1, 2))
    # Uniform in 0.02 to 1/3: mean 0.177, deviation 0.0905; about 240 draws.
    assert areas.mean() == pytest.approx(0.177, abs=0.025)
    assert areas.std() == pytest.approx(0.0905, abs=0.02)
    assert 0.01 < areas.min() < 0.05
    assert 0.28 < areas.max() < 0.36


def test_the_noise_of_erasing_is_gaussian_for_every_value(key):
    images = np.full((300, 16, 16, 3), 2.0, np.float32)
    result = augmented(key, images, dataclasses.replace(CONFIG, erase_probability=1.0))
    noise = result[result != 2]
    # Mean 0.5, deviation 0.25, of which what lies beyond two deviations is cut off: P(x <= 0) = 0.0228.
    assert noise.min() == 0
    assert noise.max() == 1
    assert np.mean(noise == 0) == pytest.approx(0.0228, abs=0.004)
    assert np.mean(noise < 0.25) == pytest.approx(0.1587, abs=0.01)
    assert noise.mean() == pytest.approx(0.5, abs=0.005)
    assert len(np.unique(noise)) > 0.8 * noise.size


def test_noise_has_the_deviation_asked_for(key):
    images = np.full((50, 20, 20, 1), 0.5, np.float32)
    noise = augmented(key, images, dataclasses.replace(CONFIG, noise=0.1)) - images
    # 20,000 draws: the deviation of the mean is 0.1 / sqrt(20000) = 0.0007, of the deviation 0.0005.
    assert noise.mean() == pytest.approx(0, abs=0.003)
    assert noise.std() == pytest.approx(0.1, abs=0.002)
    assert len(np.unique(noise)) > 10_000  # a draw for every pixel, not for every image
    assert noise.dtype == np.float32


def test_noise_comes_after_the_shift(key):
    result = augmented(key, np.zeros((50, 4, 4, 1), np.float32), dataclasses.replace(SHIFT, noise=0.1))
    assert (result != 0).all()  # also where zeros came in


def test_an_image_becomes_what_its_key_says_whatever_else_is_in_the_batch(key):
    config = dataclasses.replace(RECIPE, noise=0.1)
    images, keys = random_images(7, 9, 3), jax.random.split(key, 7)
    whole = np.asarray(apply(keys, images, 8, config))
    for row in range(7):
        alone = apply(keys[row : row + 1], images[row : row + 1], 8, config)
        np.testing.assert_allclose(alone[0], whole[row], atol=1e-5)
    again = np.asarray(apply(keys[::-1], images[::-1], 8, config))
    np.testing.assert_allclose(again[::-1], whole, atol=1e-5)


def test_images_of_one_key_are_treated_alike_and_of_others_not(key):
    config = dataclasses.replace(RECIPE, noise=0.1)
    images = np.repeat(random_images(1, 9, 3), 7, axis=0)
    same = np.asarray(apply(jnp.repeat(key[None], 7), images, 8, config))
    np.testing.assert_allclose(same, np.repeat(same[:1], 7, axis=0), atol=1e-6)
    assert len(np.unique(augmented(key, images, config, 8).reshape(7, -1), axis=0)) == 7


def test_jit_equals_eager_and_the_images_are_floats(key):
    images = random_images(4, 8, 3)
    keys = jax.random.split(key, 4)
    config = dataclasses.replace(RECIPE, randaugment_ops=0)  # compiled op by op, it would take long
    compiled = apply(keys, images, 8, config)
    np.testing.assert_allclose(compiled, augment.augment(keys, jnp.asarray(images), 8, config), atol=1e-5)
    assert compiled.dtype == jnp.float32


def test_a_part_draws_the_same_with_and_without_the_others(key):
    images = random_images(60, 8, 3)
    flipped = augmented(key, images, dataclasses.replace(CONFIG, flip_probability=0.5))
    noise = augmented(key, images, dataclasses.replace(CONFIG, noise=0.1)) - images
    both = augmented(key, images, dataclasses.replace(CONFIG, flip_probability=0.5, noise=0.1))
    np.testing.assert_allclose(both, flipped + noise, atol=1e-6)
    erased = augmented(key, images, dataclasses.replace(CONFIG, erase_probability=0.5))
    both = augmented(key, images, dataclasses.replace(CONFIG, flip_probability=0.5, erase_probability=0.5))
    np.testing.assert_array_equal(both, np.where(erased != images, erased, flipped))


def test_parts_are_drawn_apart(key):
    images = random_images(2000, 3, 1)
    flipped = (augmented(key, images, dataclasses.replace(CONFIG, flip_probability=0.5)) != images).any(axis=(1, 2, 3))
    erased = (augmented(key, images, dataclasses.replace(CONFIG, erase_probability=0.5)) != images).any(axis=(1, 2, 3))
    moved = (augmented(key, images, dataclasses.replace(SHIFT, shift_probability=0.5)) != images).any(axis=(1, 2, 3))
    # The deviation of a correlation over 2,000 images is 0.022.
    assert np.abs(np.corrcoef([flipped, erased, moved]) - np.eye(3)).max() < 0.1


@pytest.mark.parametrize(("batch", "size", "channels"), [(3, 1, 3), pytest.param(1, 8, 1, marks=pytest.mark.long)])
def test_the_whole_recipe_takes_small_images(key, batch, size, channels):
    images = random_images(batch, size, channels)
    result = augmented(key, images, RECIPE)
    assert result.shape == images.shape
    assert result.min() >= 0
    assert result.max() <= 1 + 1e-6
