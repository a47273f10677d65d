"""Which images a run is given, and what is done to them in training: plain data, checked when made."""

import dataclasses
import re
from typing import Any, Literal, get_args

from bvit_jax.model_config import require, require_choice

Reading = Literal["memory", "stream"]
Crop = Literal["shift", "resized"]
EMBEDDED = ("digits", "procedural", "few_digits", "digit_pairs", "photo_patches")
"""Sets that need no file; every other name is a data set of tensorflow-datasets."""
_PREPARED_NAME = re.compile(r"[a-z][a-z0-9_]*(/[a-zA-Z0-9_.-]+)?(:\d+\.\d+\.\d+)?")
_FIXED: dict[str, dict[str, Any]] = {
    "digits": {
        **{"image_size": 8, "channels": 1, "num_classes": 10},
        **{"num_train": 1200, "num_validation": 197, "num_test": 400, "seed": 0},
    },
    "few_digits": {"image_size": 8, "channels": 1, "num_classes": 10, "num_validation": 197, "num_test": 600},
    "digit_pairs": {"image_size": 32, "channels": 1, "num_classes": 100, "num_validation": 500, "num_test": 2000},
    "photo_patches": {"image_size": 16, "channels": 1, "num_classes": 12, "num_validation": 504, "num_test": 2004},
    "cifar10": {"image_size": 32, "channels": 3, "num_classes": 10, "stored_size": 32, "test_split": "test"},
    "cifar100": {"image_size": 32, "channels": 3, "num_classes": 100, "stored_size": 32, "test_split": "test"},
}
"""Properties of some sets, by name."""
_DEFAULT: dict[str, dict[str, Any]] = {
    "few_digits": {"num_train": 300, "seed": 0},
    "digit_pairs": {"num_train": 4000, "seed": 0},
    "photo_patches": {"num_train": 3996, "seed": 0},
}
"""What of a test bed is free, and its value where a configuration leaves it out."""
TRAIN_SIZES = {
    "few_digits": range(100, 1001, 10),
    "digit_pairs": range(100, 100_001, 100),
    "photo_patches": range(12, 24_001, 12),
}
"""Possible numbers of training images of a test bed: equally many of each class."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A set of square images and its splits.

    Attributes:
        name: `digits` (scikit-learn's, embedded), `procedural` (drawn from the seed, any size), a test bed (embedded,
            see `bvit_jax.beds`): `few_digits`, `digit_pairs` or `photo_patches`; or a data set of tensorflow-datasets,
            prepared as ArrayRecord: NAME, NAME/CONFIG, and :VERSION behind it if not the newest.
        reading: `memory` keeps all images of a split there, decoded; `stream` decodes them as they are needed.
        test_split: the prepared set's split to test on; training and validation are taken from its split `train`.
        stored_size: pixels a side as the device is given them; an image of another size has its shorter side brought to
            this and is cut to the square in the middle.
        image_size: pixels a side as the model sees them, `stored_size` at most.
        channels: 1 or 3 of a prepared set.
        num_classes, num_train, num_validation, num_test: a prepared set may hold more images than are used; of a test
            bed only `num_train` is free, with as many images of each class: a multiple of 10, 100 to 1,000
            (`few_digits`), of 100 to 100,000 (`digit_pairs`) or of 12 to 24,000 (`photo_patches`).
        seed: of the split into training and validation; of `procedural`, of the images; of a test bed, of everything.
            -1, which `config.resolve` takes, is the run's.
    """

    name: str
    reading: Reading
    test_split: str
    stored_size: int
    image_size: int
    channels: int
    num_classes: int
    num_train: int
    num_validation: int
    num_test: int
    seed: int

    def __post_init__(self) -> None:
        _require_name(self.name)
        require_choice("data.reading", self.reading, get_args(Reading))
        for field in ("image_size", "channels", "num_classes", "num_train", "num_validation", "num_test"):
            require(getattr(self, field) >= 1, f"data.{field}", getattr(self, field), "at least 1")
        require(self.seed >= 0, "data.seed", self.seed, "0 or more")
        large = self.stored_size >= self.image_size
        require(large, "data.stored_size", self.stored_size, f"image_size = {self.image_size} or more")
        if self.name in TRAIN_SIZES:
            sizes = TRAIN_SIZES[self.name]
            right = f"a multiple of {sizes.step} from {sizes[0]} to {sizes[-1]}"
            require(self.num_train in sizes, "data.num_train", self.num_train, right)
        if self.name not in EMBEDDED:
            require_choice("data.channels", self.channels, (1, 3))
            require(bool(self.test_split), "data.test_split", self.test_split, "the name of a split, such as test")


def with_fixed(data: dict[str, Any]) -> dict[str, Any]:
    """Fills in what a set fixes, so that equal data have equal configurations, and what a test bed has by default.

    A field that is None is as one that is left out.

    Raises:
        ConfigError: for a field with another value, or an impossible name.
    """
    data = {field: value for field, value in data.items() if value is not None}
    name = data.get("name")
    _require_name(name)
    fixed = dict(_FIXED.get(str(name).partition(":")[0], {}))
    if name in EMBEDDED:
        size = fixed.get("image_size", data.get("image_size"))
        fixed |= {"reading": "memory", "test_split": "test", "stored_size": size}
    for field, value in fixed.items():
        require(data.get(field, value) == value, f"data.{field}", data.get(field), f"{value}, which {name} fixes")
    return _DEFAULT.get(str(name), {}) | data | fixed


def _require_name(name: object) -> None:
    valid = isinstance(name, str) and (name in EMBEDDED or _PREPARED_NAME.fullmatch(name) is not None)
    require(valid, "data.name", name, f"{', '.join(EMBEDDED)} or a data set's name such as cifar100")


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """What is done to training images, in this order, on the device; 0 leaves a part out, with its other fields.

    Attributes:
        crop: `shift` moves an image, `resized` cuts out a rectangle and resizes it; each resets the other's fields.
        max_shift: of `shift`, pixels each way at most, edges filled with zeros: pad and crop.
        shift_probability: of `shift`, share of the images that move.
        min_area: of `resized`, the least share of the image that the rectangle covers; 1 leaves images whole.
        flip_probability: share of the images that are mirrored.
        randaugment_ops: RandAugment's operations an image.
        randaugment_magnitude: their strength, 0 to 10.
        randaugment_deviation: standard deviation of the strength from operation to operation.
        randaugment_probability: with which each of them is done.
        erase_probability: share of the images in which a rectangle is filled with noise.
        noise: standard deviation of the Gaussian noise added to every pixel, in units of the pixel range 0 to 1.
        mixup: alpha of the Beta distribution of Mixup's shares.
        cutmix: alpha of that of CutMix's areas; where both are above 0, each step does one or the other, evenly.
    """

    crop: Crop
    max_shift: int
    shift_probability: float
    min_area: float
    flip_probability: float
    randaugment_ops: int
    randaugment_magnitude: float
    randaugment_deviation: float
    randaugment_probability: float
    erase_probability: float
    noise: float
    mixup: float
    cutmix: float

    def __post_init__(self) -> None:
        require_choice("augment.crop", self.crop, get_args(Crop))
        for field in ("max_shift", "randaugment_ops", "randaugment_deviation", "noise", "mixup", "cutmix"):
            require(getattr(self, field) >= 0, f"augment.{field}", getattr(self, field), "0 or more")
        for field in ("shift_probability", "flip_probability", "randaugment_probability", "erase_probability"):
            require(0 <= getattr(self, field) <= 1, f"augment.{field}", getattr(self, field), "0 to 1")
        require(0 < self.min_area <= 1, "augment.min_area", self.min_area, "above 0 to 1")
        magnitude = self.randaugment_magnitude
        require(0 <= magnitude <= 10, "augment.randaugment_magnitude", magnitude, "0 to 10")

    def canonical(self) -> "AugmentConfig":
        """Resets the fields of parts that are left out, so that equal augmentations have equal configurations."""
        unused: dict[str, Any] = {}
        if self.crop == "resized" or self.max_shift == 0 or self.shift_probability == 0:
            unused |= {"max_shift": 0, "shift_probability": 0.0}
        if self.crop == "shift":
            unused["min_area"] = 1.0
        if self.randaugment_ops == 0 or self.randaugment_probability == 0:
            fields = ("magnitude", "deviation", "probability")
            unused |= {"randaugment_ops": 0, **{f"randaugment_{field}": 0.0 for field in fields}}
        return dataclasses.replace(self, **unused)
