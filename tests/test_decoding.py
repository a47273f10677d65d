import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bvit_jax import decoding


def encode(image, form="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


def noise(*shape):
    return np.random.default_rng(shape).integers(0, 256, shape, np.uint8)


def weights(length, size):
    """The triangle filter as a matrix (size, length), as wide as two output pixels where it shrinks."""
    scale = length / size
    width = max(scale, 1)
    centres = (np.arange(size) + 0.5) * scale
    matrix = np.maximum(0, 1 - np.abs(np.arange(length) + 0.5 - centres[:, None]) / width)
    return matrix / matrix.sum(axis=1, keepdims=True)


def resized(pixels, size):
    """Cuts out the middle square and resizes it, in float64."""
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side].astype(np.float64)
    matrix = weights(side, size)
    return np.einsum("ih,hwc,jw->ijc", matrix, square, matrix)


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 3)])
def test_an_image_of_the_size_keeps_every_bit(shape):
    pixels = noise(*shape)
    channels = 1 if len(shape) == 2 else 3
    found = decoding.decode(encode(pixels), 32, channels)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, pixels.reshape(32, 32, channels))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 40), st.sampled_from([1, 3]))
def test_other_sizes_are_cut_to_a_square_and_resized_with_a_triangle_filter(height, width, size, channels):
    pixels = noise(height, width, channels)
    found = decoding.decode(encode(pixels.squeeze(-1) if channels == 1 else pixels), size, channels)
    assert found.shape == (size, size, channels)
    # Pillow rounds after each of the two axes.
    np.testing.assert_allclose(found, resized(pixels, size), atol=1.1)


def test_nothing_outside_the_square_bleeds_in():
    bands = np.zeros((10, 30), np.uint8)
    bands[:, 10:20] = 255
    np.testing.assert_array_equal(decoding.decode(encode(bands), 5, 1), np.full((5, 5, 1), 255))
    np.testing.assert_array_equal(decoding.decode(encode(bands.T), 20, 1), np.full((20, 20, 1), 255))


@pytest.mark.parametrize(("side", "fraction"), [(64, 2), (96, 2), (128, 4), (640, 8), (63, 1), (31, 1)])
def test_a_jpeg_is_decoded_at_a_fraction_that_is_no_smaller_than_wanted(side, fraction):
    encoded = encode(noise(side, side + 2 * 8, 3), "JPEG")
    with Image.open(io.BytesIO(encoded)) as image:
        reduced = ((side + 2 * 8) // fraction, side // fraction)
        image.draft(None, reduced)
        assert image.size == reduced
        pixels = np.asarray(image)
    np.testing.assert_allclose(decoding.decode(encoded, 32, 3), resized(pixels, 32), atol=1.1)


@pytest.mark.parametrize(("height", "width", "size"), [(400, 500, 48), (470, 401, 48), (399, 700, 48), (33, 41, 4)])
def test_a_fraction_looks_like_the_whole(height, width, size):
    # Slopes that are as steep for every size wanted.
    waves = 128 + 100 * np.sin(np.arange(height) * size / 1440)[:, None] * np.cos(np.arange(width) * size / 1920)
    found = decoding.decode(encode(waves.astype(np.uint8), "JPEG", quality=95), size, 1)
    # Half a pixel off would be 10 levels.
    np.testing.assert_allclose(found, resized(waves[..., None], size), atol=3)


def test_the_square_of_a_fraction_ends_where_that_of_the_whole_does():
    """33 pixels at 1/8 are 5, of which the last is an eighth full."""
    ramp = np.arange(33 * 33).reshape(33, 33) % 33 * 7
    found = decoding.decode(encode(ramp.astype(np.uint8), "JPEG", quality=95), 4, 1)
    np.testing.assert_allclose(found, resized(ramp[..., None], 4), atol=8)


def test_colours_turn_grey_by_luma_and_grey_turns_to_three_equal_channels():
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    np.testing.assert_array_equal(decoding.decode(encode(red), 4, 1), np.full((4, 4, 1), 76))  # 0.299 x 255
    np.testing.assert_array_equal(decoding.decode(encode(noise(4, 4)), 4, 3), noise(4, 4)[..., None].repeat(3, 2))


def test_every_mode_of_eight_bits_is_read():
    grey = noise(6, 6)
    image = Image.fromarray(grey)
    palette = image.convert("P")
    for encoded in (encode(palette), encode(palette, "GIF"), encode(image.convert("RGB"), "BMP")):
        np.testing.assert_array_equal(decoding.decode(encoded, 6, 1)[..., 0], grey)
    np.testing.assert_array_equal(decoding.decode(encode(Image.new("1", (3, 3), 1)), 3, 1), np.full((3, 3, 1), 255))
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(decoding.decode(encode(cmyk, "JPEG"), 8, 3)[0, 0], [255, 0, 0], atol=3)


def test_what_is_transparent_is_laid_over_white():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255  # the upper half is black, the lower one transparent
    found = decoding.decode(encode(pixels), 4, 1)[..., 0]
    np.testing.assert_array_equal(found, [[0] * 4, [0] * 4, [255] * 4, [255] * 4])


def test_orientation_is_not_applied():
    image = Image.fromarray(noise(8, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned, plain = encode(image, "JPEG", exif=exif), encode(image, "JPEG")
    np.testing.assert_array_equal(decoding.decode(turned, 8, 3), decoding.decode(plain, 8, 3))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_eight_bits_are_refused(dtype):
    with pytest.raises(ValueError, match="cannot be decoded.*more than 8 bits a channel"):
        decoding.decode(encode(np.ones((4, 4), dtype), "TIFF"), 4, 1)


def test_height_and_width_are_measured():
    assert decoding.measure(encode(noise(5, 9, 3))) == (5, 9)
    assert decoding.measure(encode(noise(500, 300), "JPEG")) == (500, 300)


@pytest.mark.parametrize("read", [lambda data: decoding.decode(data, 16, 3), decoding.measure])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_damage_is_a_value_error_whatever_pillow_raises(read, form):
    encoded = encode(noise(40, 40, 3), form)
    for data in (b"", b"no image", encoded[: len(encoded) // 2], encoded[:-100]):
        with pytest.raises(ValueError, match="the image cannot be decoded"):
            read(data)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        flipped = bytearray(encoded)
        flipped[rng.integers(len(encoded))] ^= 1 << rng.integers(8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read(bytes(flipped))
            except ValueError:
                refused += 1
    assert refused > 0
