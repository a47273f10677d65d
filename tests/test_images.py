import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageOps

from bvit_jax import decoding, images
from bvit_jax.data_config import DataConfig
from bvit_jax.model_config import ConfigError
from tests.conftest import make_config

GREY = make_config().data  # 8 x 8 x 1
COLOUR = dataclasses.replace(GREY, channels=3)
MIDDLE = dataclasses.replace(COLOUR, stored_size=16)  # of which the model sees pixels 4 to 11


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_a_png_of_the_right_size_is_taken_pixel_by_pixel(tmp_path, pixels):
    (loaded,) = images.load(save(tmp_path / "a.png", pixels), GREY)
    assert loaded.pixels.dtype == np.uint8
    np.testing.assert_array_equal(loaded.pixels, pixels[..., None])
    assert (loaded.name, loaded.note) == (str(tmp_path / "a.png"), "")


def test_colours_stay_colours_and_turn_grey_for_a_grey_model(tmp_path):
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    path = save(tmp_path / "red.png", red)
    np.testing.assert_array_equal(images.load(path, COLOUR)[0].pixels[0, 0], [255, 0, 0])
    # ITU-R 601 luma: 0.299 of red, 76 of 255.
    np.testing.assert_array_equal(images.load(path, GREY)[0].pixels, np.full((8, 8, 1), 76))
    grey = save(tmp_path / "grey.png", np.full((8, 8), 51, np.uint8))
    np.testing.assert_array_equal(images.load(grey, COLOUR)[0].pixels, np.full((8, 8, 3), 51))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    # 65535 / 257 = 255: the brightest stays the brightest.
    path = save(tmp_path / "deep.png", np.linspace(0, 65535, 64).reshape(8, 8).round().astype(np.uint16))
    (loaded,) = images.load(path, GREY)
    np.testing.assert_allclose(loaded.pixels, np.linspace(0, 255, 64).reshape(8, 8, 1), atol=0.51)
    assert loaded.pixels.max() == 255
    (large,) = images.load(path, dataclasses.replace(GREY, image_size=4))
    np.testing.assert_array_equal(large.pixels, loaded.pixels[2:6, 2:6])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused(tmp_path, dtype):
    with pytest.raises(ConfigError, match="its pixels have 32 bits, of unknown range"):
        images.load(save(tmp_path / "a.tiff", np.ones((8, 8), dtype)), GREY)


def test_transparency_is_laid_over_white(tmp_path):
    black = np.zeros((8, 8, 4), np.uint8)
    black[:, :4, 3] = 255  # the left half is opaque
    (loaded,) = images.load(save(tmp_path / "a.png", black), GREY)
    np.testing.assert_array_equal(loaded.pixels[0, :, 0], [0, 0, 0, 0, 255, 255, 255, 255])
    assert loaded.note == "laid over white"
    (small,) = images.load(save(tmp_path / "b.png", np.tile(black, (2, 2, 1))), COLOUR)
    assert small.note == "laid over white, resized from 16x16"
    palette = Image.new("P", (8, 8))
    palette.putpalette([9, 9, 9])
    palette.save(tmp_path / "c.png", transparency=0)
    np.testing.assert_array_equal(images.load(tmp_path / "c.png", GREY)[0].pixels, np.full((8, 8, 1), 255))


def test_other_sizes_are_cut_in_the_middle_and_resized_and_this_is_said(tmp_path):
    wide = np.zeros((16, 48), np.uint8)
    wide[:, 16:32] = 255  # the middle square
    (loaded,) = images.load(save(tmp_path / "wide.png", wide), GREY)
    np.testing.assert_array_equal(loaded.pixels, np.full((8, 8, 1), 255))
    assert loaded.note == "cut and resized from 48x16"
    (tall,) = images.load(save(tmp_path / "tall.png", wide.T), GREY)
    np.testing.assert_array_equal(tall.pixels, np.full((8, 8, 1), 255))
    (square,) = images.load(save(tmp_path / "square.jpg", wide[:, :16]), GREY)
    assert square.note == "resized from 16x16"


@pytest.mark.parametrize(
    ("size", "note"),
    [
        ((16, 16), "cut from 16x16"),
        ((20, 16), "cut from 20x16"),
        ((8, 8), "cut and resized from 8x8"),
        ((40, 30), "cut and resized from 40x30"),
    ],
)
def test_a_model_that_sees_the_middle_of_its_images_is_given_that(tmp_path, size, note):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), np.uint8))
    image.save(tmp_path / "a.png")
    (loaded,) = images.load(tmp_path / "a.png", MIDDLE)
    wanted = ImageOps.fit(image, (16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(loaded.pixels, np.asarray(wanted)[4:12, 4:12])
    assert loaded.note == note


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize("config", [GREY, COLOUR, MIDDLE])
@pytest.mark.parametrize("shape", [(16, 16, 3), (41, 57, 3), (130, 70, 3), (9, 5, 3), (24, 24)])
def test_a_picture_is_prepared_as_the_same_picture_of_a_data_set(tmp_path, name, config: DataConfig, shape):
    path = save(tmp_path / name, np.random.default_rng(shape).integers(0, 256, shape, np.uint8))
    stored = decoding.decode(path.read_bytes(), config.stored_size, config.channels)
    margin = (config.stored_size - 8) // 2
    (loaded,) = images.load(path, config)
    assert loaded.pixels.dtype == stored.dtype
    np.testing.assert_array_equal(loaded.pixels, stored[margin : margin + 8, margin : margin + 8])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tiff", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_lying_on_its_side_is_turned_upright(tmp_path, suffix, orientation):
    path = tmp_path / f"turned{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(2).integers(0, 256, (16, 20, 3), np.uint8)
    Image.fromarray(pixels).save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    (loaded,) = images.load(path, MIDDLE)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    width, height = upright.size
    assert (width, height) == ((20, 16) if orientation < 5 else (16, 20))
    left, top = (width - 8) // 2, (height - 8) // 2
    np.testing.assert_array_equal(loaded.pixels, np.asarray(upright)[top : top + 8, left : left + 8])
    assert loaded.note == f"cut from {width}x{height}"


def test_a_picture_much_too_large_and_on_its_side(tmp_path):
    """Decoded at an eighth of its size; the note gives the whole one."""
    image = Image.new("L", (256, 130))
    image.paste(255, (192 - 63, 0, 256, 65))  # right upper part of the middle square
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row of the file is the right side
    image.save(tmp_path / "a.jpg", exif=exif)
    (loaded,) = images.load(tmp_path / "a.jpg", GREY)
    corners = loaded.pixels[[0, 0, -1, -1], [0, -1, 0, -1], 0]
    np.testing.assert_allclose(corners, [0, 0, 0, 255], atol=5)  # right lower, once turned
    assert loaded.note == "cut and resized from 130x256"


@pytest.mark.parametrize("config", [GREY, dataclasses.replace(GREY, stored_size=16)])
def test_arrays_of_every_shape_and_both_dtypes(tmp_path, pixels, config):
    """Their size is that which the model sees, whatever is stored."""
    exact = (pixels / np.float32(255))[..., None]
    for index, array in enumerate((pixels, pixels[..., None], exact[..., 0], exact.astype(np.float64))):
        np.save(tmp_path / f"{index}.npy", array)
        (loaded,) = images.load(tmp_path / f"{index}.npy", config)
        np.testing.assert_array_equal(loaded.pixels, pixels[..., None] if index < 2 else exact)
        assert loaded.pixels.dtype == (np.uint8 if index < 2 else np.float32)
        assert loaded.note == ""
    np.save(tmp_path / "many.npy", np.stack([exact, 1 - exact]))
    first, second = images.load(tmp_path / "many.npy", config)
    assert (first.name, second.name) == (f"{tmp_path / 'many.npy'}[0]", f"{tmp_path / 'many.npy'}[1]")
    np.testing.assert_array_equal(second.pixels, 1 - exact)
    np.save(tmp_path / "grey.npy", np.stack([pixels] * 8))
    assert len(images.load(tmp_path / "grey.npy", config)) == 8
    np.testing.assert_array_equal(images.load(tmp_path / "grey.npy", config)[7].pixels, pixels[..., None])
    np.save(tmp_path / "one.npy", exact[None])
    assert images.load(tmp_path / "one.npy", config)[0].name == f"{tmp_path / 'one.npy'}[0]"
    np.save(tmp_path / "none.npy", np.zeros((0, 8, 8, 1), np.float32))
    assert images.load(tmp_path / "none.npy", config) == []


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
        (np.full((8, 8), 1.5, np.float16), "must lie between 0 and 1"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ConfigError, match=message) as caught:
        images.load(tmp_path / "a.npy", GREY)
    assert str(tmp_path / "a.npy") in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.npy", "a"])
@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY\x01\x00v\x00{", b"\xff\xd8\xff", b"PK\x03\x04"]
)
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
