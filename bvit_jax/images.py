"""Images from files, made to fit a model.

PNG, JPEG and whatever else Pillow reads with 8 or 16 bits a channel are turned upright, laid over white where they are
transparent, converted to grey or RGB as the model has 1 or 3 channels, cut to a square in the middle and resized to the
model's size. Arrays (.npy) are taken as they are: (H, W, c) or (n, H, W, c) of the model's size, for grey models also
(H, W) or (n, H, W), uint8 from 0 to 255 or floating from 0 to 1.

Axes: n images, H and W pixels, c channels.
"""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bvit_jax.model_config import ConfigError, ModelConfig


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What one file holds.

    Attributes:
        name: the file, with the index of the image if it holds several.
        pixels: float32 (H, W, c), 0 to 1.
        note: what was changed to make it fit, empty if nothing.
    """

    name: str
    pixels: np.ndarray
    note: str


def load(path: Path, model: ModelConfig) -> list[Loaded]:
    """Reads the images of one file.

    Raises:
        ConfigError: if the file cannot be read, is no image, or an array does not fit the model.
    """
    try:
        if path.suffix.lower() == ".npy":
            return _arrays(path, np.load(path, allow_pickle=False), model)
        with Image.open(path) as image:
            return [_picture(path, image, model)]
    except FileNotFoundError:
        raise ConfigError(f"image {str(path)!r}: there is no such file") from None
    except (OSError, ValueError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"image {str(path)!r}: it must be a PNG, JPEG or .npy file ({error})") from None


def _picture(path: Path, image: Image.Image, model: ModelConfig) -> Loaded:
    if model.channels not in (1, 3):
        raise ConfigError(f"image {str(path)!r}: this model has {model.channels} channels; it must be a .npy file")
    image = ImageOps.exif_transpose(image)
    note = []
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip
        image = Image.fromarray((np.asarray(image, np.float64) / 257).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ConfigError(
            f"image {str(path)!r}: its pixels have 32 bits, of unknown range; save it as .npy from 0 to 1"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        note.append("laid over white")
    image = image.convert("L" if model.channels == 1 else "RGB")
    side = model.image_size
    if image.size != (side, side):
        width, height = image.size
        note.append(f"{'' if width == height else 'cut and '}resized from {width}x{height}")
        # Cut before resizing, so that nothing from outside the square bleeds in.
        left, top = (width - min(image.size)) // 2, (height - min(image.size)) // 2
        square = image.crop((left, top, left + min(image.size), top + min(image.size)))
        image = square.resize((side, side), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.float32) / 255
    return Loaded(str(path), pixels.reshape(side, side, model.channels), ", ".join(note))


def _arrays(path: Path, array: np.ndarray, model: ModelConfig) -> list[Loaded]:
    name = f"image {str(path)!r}"
    shape, wanted = array.shape, (model.image_size, model.image_size, model.channels)
    if model.channels == 1 and array.shape != wanted and array.ndim in (2, 3):
        array = array[..., None]
    stack = array[None] if array.ndim == 3 else array
    if stack.shape[1:] != wanted:
        raise ConfigError(f"{name}: its shape is {shape}; this model needs {wanted}, or several of them")
    if stack.dtype == np.uint8:
        stack = stack.astype(np.float32) / 255
    elif not np.issubdtype(stack.dtype, np.floating):
        raise ConfigError(f"{name}: its dtype is {stack.dtype}; it must be uint8 (0 to 255) or floating (0 to 1)")
    if not (np.isfinite(stack).all() and (stack >= 0).all() and (stack <= 1).all()):
        raise ConfigError(f"{name}: floating pixels must lie between 0 and 1")
    names = [str(path)] if array.ndim == 3 else [f"{path}[{index}]" for index in range(len(stack))]
    return [Loaded(name, pixels, "") for name, pixels in zip(names, stack.astype(np.float32), strict=True)]
