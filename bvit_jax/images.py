"""Images from files, made to fit a model.

PNG, JPEG and whatever else Pillow reads with 8 or 16 bits a channel are prepared as the images of the model's own data
set are for evaluation: laid over white where they are transparent, converted to grey or RGB as the model has 1 or 3
channels, cut to a square in the middle, resized to the size at which the set is stored, and cut to the middle of that
which the model sees. Beyond that, they are turned upright as their EXIF orientation says. Arrays (.npy) are taken as
they are: (H, W, c) or (n, H, W, c) of the model's size, for grey models also (H, W) or (n, H, W), uint8 from 0 to 255
or floating from 0 to 1.

Axes: n images, H and W pixels, c channels.
"""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from bvit_jax import decoding
from bvit_jax.data_config import DataConfig
from bvit_jax.model_config import ConfigError
from bvit_jax.pixels import centre

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of an EXIF orientation upright (EXIF 2.32, tag 274); from 5 on height and width change places."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What one file holds.

    Attributes:
        name: the file, with the index of the image if it holds several.
        pixels: (H, W, c) of the model's size: uint8, 0 to 255, or of a floating array float32, 0 to 1.
        note: what was changed to make it fit, empty if nothing.
    """

    name: str
    pixels: np.ndarray
    note: str


def load(path: Path, config: DataConfig) -> list[Loaded]:
    """Reads the images of one file.

    Args:
        path: a PNG, a JPEG, whatever else Pillow reads, or a .npy file.
        config: of the data that the model was trained on.

    Raises:
        ConfigError: if the file cannot be read, is no image, or an array does not fit the model.
    """
    try:
        if path.suffix.lower() == ".npy":
            with path.open("rb") as file:  # np.load would open archives as well
                return _arrays(path, np.lib.format.read_array(file, allow_pickle=False), config)
        with Image.open(path) as image:
            return [_picture(path, image, config)]
    except FileNotFoundError:
        raise ConfigError(f"image {str(path)!r}: there is no such file") from None
    except decoding.DAMAGE as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"image {str(path)!r}: it must be a PNG, JPEG or .npy file ({error})") from None


def _picture(path: Path, image: Image.Image, config: DataConfig) -> Loaded:
    if config.channels not in (1, 3):
        raise ConfigError(f"image {str(path)!r}: this model has {config.channels} channels; it must be a .npy file")
    if image.mode in ("I", "F"):
        raise ConfigError(
            f"image {str(path)!r}: its pixels have 32 bits, of unknown range; save it as .npy from 0 to 1"
        )
    width, height = image.size
    shallow = _eight_bits(image)
    transparent = shallow.has_transparency_data
    square = decoding.fit(shallow, config.stored_size, config.channels)
    # Only now: Pillow turns some formats itself as it loads them, and says so here.
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation in _UPRIGHT:
        square = square.transpose(_UPRIGHT[orientation])
        width, height = (width, height) if orientation < 5 else (height, width)
    changes = ["laid over white"] if transparent else []
    changes += _size_changes(width, height, config)
    pixels = np.asarray(square).reshape(1, *square.size, config.channels)
    return Loaded(str(path), centre(pixels, config.image_size)[0], ", ".join(changes))


def _eight_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I;16"):
        return image
    # Pillow's own conversion would clip.
    return Image.fromarray((np.asarray(image, np.float64) / 257).round().astype(np.uint8))


def _size_changes(width: int, height: int, config: DataConfig) -> list[str]:
    cut = width != height or config.stored_size != config.image_size
    resized = min(width, height) != config.stored_size
    done = [verb for verb, was in (("cut", cut), ("resized", resized)) if was]
    return [f"{' and '.join(done)} from {width}x{height}"] if done else []


def _arrays(path: Path, array: np.ndarray, config: DataConfig) -> list[Loaded]:
    name = f"image {str(path)!r}"
    shape, wanted = array.shape, (config.image_size, config.image_size, config.channels)
    if config.channels == 1 and array.shape != wanted and array.ndim in (2, 3):
        array = array[..., None]
    stack = array[None] if array.ndim == 3 else array
    if stack.shape[1:] != wanted:
        raise ConfigError(f"{name}: its shape is {shape}; this model needs {wanted}, or several of them")
    floating = np.issubdtype(stack.dtype, np.floating)
    if not (floating or stack.dtype == np.uint8):
        raise ConfigError(f"{name}: its dtype is {stack.dtype}; it must be uint8 (0 to 255) or floating (0 to 1)")
    if floating and not (np.isfinite(stack).all() and (stack >= 0).all() and (stack <= 1).all()):
        raise ConfigError(f"{name}: floating pixels must lie between 0 and 1")
    stack = stack.astype(np.float32) if floating else stack
    names = [str(path)] if array.ndim == 3 else [f"{path}[{index}]" for index in range(len(stack))]
    return [Loaded(name, pixels, "") for name, pixels in zip(names, stack, strict=True)]
