import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bvit_jax import warp

FILL = 0.5
NOTHING = np.zeros(2, np.float32)


def random_image(size: int, channels: int = 2) -> np.ndarray:
    return np.random.default_rng(size).uniform(0, 1, (channels, size, size)).astype(np.float32)


def smooth_image(size: int) -> np.ndarray:
    """Waves much longer than a pixel, on which every good interpolation agrees."""
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(5 * x + 2 * y), np.cos(4 * y - 3 * x), np.sin(6 * y) * np.cos(4 * x)]
    return (0.5 + 0.4 * np.stack(waves)).astype(np.float32)


def bilinear(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Values of an image (c, H, W), surrounded by FILL, at places (x, y), in float64."""
    _, height, width = image.shape
    result = np.zeros((len(image), *x.shape))
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        weight = (1 - np.abs(x - column)) * (1 - np.abs(y - row))
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        values = image[:, np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)].astype(np.float64)
        result += weight * np.where(inside, values, FILL)
    return result


def places(size: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:size, :size].astype(np.float64)
    return x, y


def rotated_places(size: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the pixels of an image come from that is turned counterclockwise, rows counted downwards."""
    x, y = places(size)
    middle = (size - 1) / 2
    x, y, cos, sin = x - middle, y - middle, math.cos(angle), math.sin(angle)
    return cos * x - sin * y + middle, sin * x + cos * y + middle


def sheared(image: np.ndarray, angle: float = 0.0, shear: object = NOTHING, shift: object = NOTHING) -> np.ndarray:
    arguments = (jnp.float32(angle), jnp.asarray(shear, jnp.float32), jnp.asarray(shift, jnp.float32))
    return np.asarray(jax.jit(warp.sheared, static_argnums=4)(image, *arguments, FILL))


@given(
    st.integers(1, 12), st.integers(0, 80), st.sampled_from([1, 2]), st.integers(-3, 3), st.integers(1, 15), st.data()
)
@settings(max_examples=15, deadline=None)
def test_every_line_moves_by_its_own_offset(size, reach, axis, start, length, data):
    image = random_image(size)
    offsets = np.array(data.draw(st.lists(st.integers(-reach, reach), min_size=size, max_size=size)))
    shape = (1, size, 1) if axis == 2 else (1, 1, size)
    result = np.asarray(
        warp.moved(jnp.asarray(image), jnp.asarray(offsets.reshape(shape)), axis, reach, FILL, (start, start + length))
    )
    for line in range(size):
        for i in range(length):
            place = start + i + offsets[line]
            for channel in range(2):
                read = (channel, line, place) if axis == 2 else (channel, place, line)
                got = (channel, line, i) if axis == 2 else (channel, i, line)
                assert result[got] == (image[read] if 0 <= place < size else np.float32(FILL))


@pytest.mark.parametrize("reach", [1, 3, 4, 31, 32, 101])
def test_all_offsets_within_reach_are_told_apart(reach):
    # 0 to 2 x 3 are one digit of base 8, 0 to 2 x 4 and 2 x 31 two, 0 to 2 x 32 and 2 x 101 three.
    image = jnp.arange(1.0, 301.0).reshape(1, 1, 300)
    offsets = jnp.arange(-reach, reach + 1)
    read = jax.vmap(lambda offset: warp.moved(image, offset.reshape(1, 1, 1), 2, reach, 0.0, (150, 151)))(offsets)
    np.testing.assert_array_equal(read.reshape(-1), 151 + offsets)


def test_half_a_pixel_is_the_mean_of_two_and_of_one_and_the_fill():
    # Of 0, 1, 4 at -0.5, 0.5, 1.5 and 2.5, with 0.5 outside: (0.5 + 0) / 2, (0 + 1) / 2, (1 + 4) / 2, (4 + 0.5) / 2.
    image = jnp.asarray([[[0.0, 1.0, 4.0]]])
    half = jnp.full((1, 1, 1), 0.5)
    np.testing.assert_array_equal(warp.slid(image, half, 2, 1, FILL), [[[0.5, 2.5, 2.25]]])
    np.testing.assert_array_equal(warp.slid(image, -half, 2, 1, FILL), [[[0.25, 0.5, 2.5]]])


@pytest.mark.parametrize("size", [1, 2, 8, 9, 33])
def test_nothing_leaves_an_image_exactly_as_it_is(size):
    np.testing.assert_array_equal(sheared(random_image(size)), random_image(size))


@pytest.mark.parametrize("size", [1, 5, 8, 32, 33])
@pytest.mark.parametrize("share", [-0.45, -0.2, 0.13, 0.45])
def test_a_shift_is_the_bilinear(size, share):
    image = random_image(size)
    x, y = places(size)
    expected = bilinear(image, x + share * size, y)
    np.testing.assert_allclose(sheared(image, shift=[share, 0.0]), expected, rtol=0, atol=1e-5)
    expected = bilinear(image, x, y + share * size)
    np.testing.assert_allclose(sheared(image, shift=[0.0, share]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 8, 32, 33])
@pytest.mark.parametrize("slope", [-0.3, 0.11, 0.3])
def test_a_shear_is_the_bilinear(size, slope):
    image = random_image(size)
    x, y = places(size)
    expected = bilinear(image, x + slope * (y + 0.5), y)
    np.testing.assert_allclose(sheared(image, shear=[slope, 0.0]), expected, rtol=0, atol=1e-5)
    expected = bilinear(image, x, y + slope * (x + 0.5))
    np.testing.assert_allclose(sheared(image, shear=[0.0, slope]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [16, 32, 33])
@pytest.mark.parametrize("degrees", [-30, -7, 3, 18, 30])
def test_a_rotation_is_the_bilinear_where_the_image_is_smooth(size, degrees):
    image, angle = smooth_image(size), math.radians(degrees)
    x, y = rotated_places(size, angle)
    difference = np.abs(sheared(image, angle) - bilinear(image, x, y))
    # At the edges the grey from outside is blended in, by all three passes; two pixels are room enough for it.
    inside = (x >= 2) & (x <= size - 3) & (y >= 2) & (y <= size - 3)
    outside = (x < -2) | (x > size + 1) | (y < -2) | (y > size + 1)
    # The waves change by up to 0.4 x 7 / size a pixel; their curvature bounds each pass's error by
    # (0.4 x 6^2 / size^2) / 8 = 1.8 / size^2, 0.007 at 16.
    assert inside.sum() > 0.4 * size**2
    assert difference[:, inside].max() < 3 * 1.8 / size**2
    assert difference[:, outside].max(initial=0) < 1e-6


def test_a_rotation_keeps_what_the_first_pass_moves_out_of_the_sides():
    size, angle = 32, math.radians(30)
    x, y = rotated_places(size, angle)
    image = np.ones((1, size, size), np.float32)
    inside = (x >= 2) & (x <= size - 3) & (y >= 2) & (y <= size - 3)
    np.testing.assert_allclose(sheared(image, angle)[:, inside], 1, atol=1e-6)


def test_a_rotation_is_counterclockwise_about_the_middle_as_in_pillow():
    image = np.zeros((1, 33, 33), np.float32)
    image[0, 14:19, 26:31] = 1  # right of the middle
    result = sheared(image, math.radians(30))
    expected = np.asarray(Image.fromarray((image[0] * 255).astype(np.uint8)).rotate(30, Image.Resampling.BILINEAR))
    # It goes up: rows are counted from the top.
    mass = np.where(result[0] == FILL, 0, result[0])
    centres = [
        np.array(np.average(np.indices((33, 33)), axis=(1, 2), weights=w)) for w in (mass * (mass > 0.6), expected)
    ]
    np.testing.assert_allclose(centres[0], centres[1], atol=0.5)
    assert centres[0][0] < 12


def test_a_batch_is_its_images():
    images = np.stack([random_image(9)] * 5)
    angles = jnp.linspace(-0.5, 0.5, 5)
    shears = jnp.zeros((5, 2))
    result = jax.vmap(lambda image, *rest: warp.sheared(image, *rest, FILL))(images, angles, shears, shears)
    for image, angle, turned in zip(images, angles, result, strict=True):
        np.testing.assert_allclose(sheared(image, float(angle)), turned, atol=1e-6)


@pytest.mark.parametrize(
    ("span", "stored", "size"),
    [((0, 8), 8, 8), ((2, 5), 8, 5), ((0, 8), 8, 3), ((3, 4), 9, 7), ((1, 10), 12, 4), ((5, 1), 8, 3), ((0, 1), 1, 1)],
)
def test_resizing_a_crop_is_pillows(span, stored, size):
    start, length = span
    image = np.random.default_rng(0).uniform(0, 1, (stored, stored)).astype(np.float32)
    weights = warp.weights(jnp.int32(start), jnp.int32(length), stored, size)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    result = warp.resized(jnp.asarray(image[..., None]), weights, weights)
    cut = Image.fromarray(image).crop((start, start, start + length, start + length))
    expected = np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(result[0], expected, atol=1e-5)


def test_rows_and_columns_are_resized_apart_and_channels_come_first():
    image = np.random.default_rng(0).uniform(0, 1, (8, 8, 3)).astype(np.float32)
    rows, columns = (warp.weights(jnp.int32(start), jnp.int32(2), 8, 2) for start in (1, 5))
    # Two pixels to two pixels: the rectangle itself.
    np.testing.assert_allclose(warp.resized(image, rows, columns), image[1:3, 5:7].transpose(2, 0, 1), atol=1e-6)
