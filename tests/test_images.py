import dataclasses

import numpy as np
import pytest
from PIL import Image

from bvit_jax import images
from bvit_jax.model_config import ConfigError
from tests.conftest import make_model

GREY = make_model()  # 8 x 8 x 1
COLOUR = dataclasses.replace(GREY, channels=3)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_a_png_of_the_right_size_is_taken_pixel_by_pixel(tmp_path, pixels):
    (loaded,) = images.load(save(tmp_path / "a.png", pixels), GREY)
    assert loaded.pixels.dtype == np.float32
    np.testing.assert_array_equal(loaded.pixels, (pixels / np.float32(255))[..., None])
    assert (loaded.name, loaded.note) == (str(tmp_path / "a.png"), "")


def test_colours_stay_colours_and_turn_grey_for_a_grey_model(tmp_path):
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    path = save(tmp_path / "red.png", red)
    np.testing.assert_array_equal(images.load(path, COLOUR)[0].pixels[0, 0], [1, 0, 0])
    # ITU-R 601 luma: 0.299 of red, 76 of 255.
    np.testing.assert_allclose(images.load(path, GREY)[0].pixels, 76 / 255)
    grey = save(tmp_path / "grey.png", np.full((8, 8), 51, np.uint8))
    np.testing.assert_allclose(images.load(grey, COLOUR)[0].pixels, np.full((8, 8, 3), 0.2), rtol=1e-6)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    # 65535 / 257 = 255: the brightest stays the brightest.
    path = save(tmp_path / "deep.png", np.linspace(0, 65535, 64).reshape(8, 8).round().astype(np.uint16))
    expected = np.linspace(0, 255, 64).reshape(8, 8, 1) / 255
    np.testing.assert_allclose(images.load(path, GREY)[0].pixels, expected, atol=0.51 / 255)
    assert images.load(path, GREY)[0].pixels.max() == 1


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused(tmp_path, dtype):
    with pytest.raises(ConfigError, match="its pixels have 32 bits, of unknown range"):
        images.load(save(tmp_path / "a.tiff", np.ones((8, 8), dtype)), GREY)


def test_transparency_is_laid_over_white(tmp_path):
    black = np.zeros((8, 8, 4), np.uint8)
    black[:, :4, 3] = 255  # the left half is opaque
    (loaded,) = images.load(save(tmp_path / "a.png", black), GREY)
    np.testing.assert_array_equal(loaded.pixels[0, :, 0], [0, 0, 0, 0, 1, 1, 1, 1])
    assert loaded.note == "laid over white"
    (small,) = images.load(save(tmp_path / "b.png", np.tile(black, (2, 2, 1))), COLOUR)
    assert small.note == "laid over white, resized from 16x16"
    palette = Image.new("P", (8, 8))
    palette.putpalette([9, 9, 9])
    palette.save(tmp_path / "c.png", transparency=0)
    np.testing.assert_array_equal(images.load(tmp_path / "c.png", GREY)[0].pixels, np.ones((8, 8, 1)))


def test_other_sizes_are_cut_in_the_middle_and_resized_and_this_is_said(tmp_path):
    wide = np.zeros((16, 48), np.uint8)
    wide[:, 16:32] = 255  # the middle square
    (loaded,) = images.load(save(tmp_path / "wide.png", wide), GREY)
    np.testing.assert_array_equal(loaded.pixels, np.ones((8, 8, 1)))
    assert loaded.note == "cut and resized from 48x16"
    (tall,) = images.load(save(tmp_path / "tall.png", wide.T), GREY)
    np.testing.assert_array_equal(tall.pixels, np.ones((8, 8, 1)))
    (square,) = images.load(save(tmp_path / "square.jpg", wide[:, :16]), GREY)
    assert square.note == "resized from 16x16"


def test_a_picture_lying_on_its_side_is_turned_upright(tmp_path):
    image = Image.new("L", (8, 8))
    image.putpixel((7, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row of the file is the right side
    image.save(tmp_path / "turned.png", exif=exif)
    (loaded,) = images.load(tmp_path / "turned.png", GREY)
    assert loaded.pixels[7, 7, 0] == 1
    assert loaded.pixels.sum() == 1


def test_arrays_of_every_shape_and_both_dtypes(tmp_path, pixels):
    exact = (pixels / np.float32(255))[..., None]
    for index, array in enumerate((pixels, pixels[..., None], exact[..., 0], exact.astype(np.float64))):
        np.save(tmp_path / f"{index}.npy", array)
        (loaded,) = images.load(tmp_path / f"{index}.npy", GREY)
        np.testing.assert_allclose(loaded.pixels, exact, rtol=1e-6)
        assert loaded.pixels.dtype == np.float32
    np.save(tmp_path / "many.npy", np.stack([exact, 1 - exact]))
    first, second = images.load(tmp_path / "many.npy", GREY)
    assert (first.name, second.name) == (f"{tmp_path / 'many.npy'}[0]", f"{tmp_path / 'many.npy'}[1]")
    np.testing.assert_array_equal(second.pixels, 1 - exact)
    np.save(tmp_path / "grey.npy", np.stack([pixels] * 8))
    assert len(images.load(tmp_path / "grey.npy", GREY)) == 8
    np.testing.assert_array_equal(images.load(tmp_path / "grey.npy", GREY)[7].pixels, exact)
    np.save(tmp_path / "one.npy", exact[None])
    assert images.load(tmp_path / "one.npy", GREY)[0].name == f"{tmp_path / 'one.npy'}[0]"
    np.save(tmp_path / "none.npy", np.zeros((0, 8, 8, 1), np.float32))
    assert images.load(tmp_path / "none.npy", GREY) == []


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((9, 8), np.uint8), r"its shape is \(9, 8\); this model needs \(8, 8, 1\)"),
        (np.zeros((8, 8, 3), np.uint8), r"its shape is \(8, 8, 3\)"),
        (np.zeros(64, np.uint8), r"its shape is \(64,\)"),
        (np.zeros((1, 2, 8, 8, 1), np.uint8), "its shape is"),
        (np.zeros((8, 8), np.int64), "its dtype is int64; it must be uint8"),
        (np.full((8, 8), 2.0), "must lie between 0 and 1"),
        (np.full((8, 8), -0.1), "must lie between 0 and 1"),
        (np.full((8, 8), np.nan), "must lie between 0 and 1"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ConfigError, match=message) as caught:
        images.load(tmp_path / "a.npy", GREY)
    assert str(tmp_path / "a.npy") in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.npy", "a"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY\x01\x00v\x00{", b"\xff\xd8\xff"])
def test_files_that_are_no_images_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match="it must be a PNG, JPEG or .npy file"):
        images.load(tmp_path / name, GREY)


def test_a_cut_off_picture_is_refused(tmp_path, pixels):
    raw = save(tmp_path / "a.png", np.tile(pixels, (20, 20))).read_bytes()
    (tmp_path / "a.png").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ConfigError, match="it must be a PNG"):
        images.load(tmp_path / "a.png", GREY)


def test_pickles_are_not_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="it must be a PNG, JPEG or .npy file"):
        images.load(tmp_path / "a.npy", GREY)


def test_absent_files_folders_and_channels_no_picture_has(tmp_path, pixels):
    with pytest.raises(ConfigError, match="there is no such file"):
        images.load(tmp_path / "a.png", GREY)
    with pytest.raises(ConfigError, match="it must be a PNG"):
        images.load(tmp_path, GREY)
    with pytest.raises(ConfigError, match="this model has 2 channels"):
        images.load(save(tmp_path / "a.png", pixels), dataclasses.replace(GREY, channels=2))


def test_a_picture_too_large_to_be_one_is_refused(tmp_path, pixels, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ConfigError, match="it must be a PNG, JPEG or .npy file"):
        images.load(save(tmp_path / "a.png", pixels), GREY)
