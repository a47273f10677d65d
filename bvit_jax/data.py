"""The images of a run in three splits, held in memory or read as they are needed.

Axes: B batch, n images, H and W pixels, c channels.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import numpy as np

from bvit_jax import beds, drawn, prepared
from bvit_jax.batches import PADDING, Batch, EvalPlan, Plan, TrainPlan
from bvit_jax.data_config import EMBEDDED, DataConfig
from bvit_jax.model_config import require
from bvit_jax.streams import Streamed


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and labels in memory.

    Attributes:
        images: uint8 (n, H, W, c).
        labels: int32 (n,).
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, plan: Plan, numbers: range) -> Iterator[Batch]:
        """Yields the batches of these numbers; padding is images of zeros with label 0."""
        for number in numbers:
            indices = plan(number)
            real = indices != PADDING
            images, labels = self.images[indices], self.labels[indices]
            images[~real], labels[~real] = 0, 0
            yield Batch(images, labels, real.astype(np.float32))


AnySplit = Split | Streamed
SplitName = Literal["train", "validation", "test"]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three splits with no image in common; train to fit, validation to select, test to report.

    Attributes:
        train, validation, test: the splits.
    """

    train: AnySplit
    validation: AnySplit
    test: AnySplit


def load(config: DataConfig, found: prepared.PreparedSet | None = None) -> Dataset:
    """Loads, opens or draws the images that `config` names.

    The same configuration gives the same images and splits, whatever the seed of the run: all are tested alike. Every
    process holds, or can reach, all of them, as the order of training goes over the whole split; of a batch it makes
    its own rows alone.

    Args:
        config: which images.
        found: as `opened` gives it, if that is done already.

    Raises:
        ConfigError: if the set is not there (`prepared.open_set`), or is not as the configuration says.
    """
    found = found or opened(config)
    if found is None:
        return Dataset(**_embedded(config))
    return Dataset(**{name: _prepared(config, name, found) for name in get_args(SplitName)})


def load_split(config: DataConfig, name: SplitName, found: prepared.PreparedSet | None = None) -> AnySplit:
    """Loads one of the splits of `load` alone; arguments and errors as there."""
    found = found or opened(config)
    return _embedded(config)[name] if found is None else _prepared(config, name, found)


def opened(config: DataConfig) -> prepared.PreparedSet | None:
    """Opens the prepared set that a configuration names, and reads no image; None if it needs none.

    Raises:
        ConfigError: as `load`.
    """
    if config.name in EMBEDDED:
        return None
    found = prepared.open_set(config.name)
    classes = f"{found.num_classes}, of {found.name}"
    require(found.num_classes == config.num_classes, "data.num_classes", config.num_classes, classes)
    trained = found.splits.get("train", 0)
    held_out = config.num_validation
    require(held_out < trained, "data.num_validation", held_out, f"under {trained}, the images of split train")
    left = f"{trained - held_out} at most: split train holds {trained}, {held_out} of them are for validation"
    require(config.num_train <= trained - held_out, "data.num_train", config.num_train, left)
    require(config.test_split in found.splits, "data.test_split", config.test_split, " or ".join(found.splits))
    tested = found.splits[config.test_split]
    require(config.num_test <= tested, "data.num_test", config.num_test, f"{tested} at most, of {config.test_split}")
    return found


def _prepared(config: DataConfig, name: SplitName, found: prepared.PreparedSet) -> AnySplit:
    held_out = config.num_validation
    if name == "test":
        stored, places = config.test_split, slice(config.num_test)
    else:  # validation comes first: it is the same however many images are trained on
        stored = "train"
        places = slice(held_out) if name == "validation" else slice(held_out, held_out + config.num_train)
    indices = np.sort(_order(config, found.splits[stored])[places])
    parts = found.source(stored), indices, config.stored_size, config.channels
    return Streamed(*parts) if config.reading == "stream" else Split(*prepared.read_all(*parts))


def _embedded(config: DataConfig) -> dict[SplitName, Split]:
    parts = _MAKERS[config.name](config)
    return {name: Split(*part) for name, part in zip(get_args(SplitName), parts, strict=True)}


def _dealt(config: DataConfig, images: np.ndarray, labels: np.ndarray) -> list[beds.Labelled]:
    sizes = (config.num_train, config.num_validation, config.num_test)
    if sum(sizes) != len(labels):
        raise ValueError(f"splits of {sizes} images do not add up to the {len(labels)} of {config.name}")
    parts = np.split(_order(config, len(labels)), np.cumsum(sizes)[:-1])
    return [(images[part], labels[part]) for part in parts]


_MAKERS: dict[str, Callable[[DataConfig], list[beds.Labelled]]] = {
    "digits": lambda config: _dealt(config, *drawn.digits()),
    "procedural": lambda config: _dealt(config, *drawn.gratings(config)),
    "few_digits": beds.few_digits,
    "digit_pairs": beds.digit_pairs,
    "photo_patches": beds.photo_patches,
}
"""Of each embedded set, what makes its training, validation and test images."""


def _order(config: DataConfig, count: int) -> np.ndarray:
    return np.random.default_rng([config.seed, 1]).permutation(count)


def train_batches(split: AnySplit, batch_size: int, seed: int, steps: range, rows: np.ndarray) -> Iterator[Batch]:
    """Yields the places `rows` of the batches of these steps, each a pure function of (seed, step)."""
    return split.batches(TrainPlan(len(split), batch_size, seed, rows), steps)


def train_batch(split: AnySplit, batch_size: int, seed: int, step: int, rows: np.ndarray) -> Batch:
    """Returns the places `rows` of the batch of one training step."""
    return next(iter(train_batches(split, batch_size, seed, range(step, step + 1), rows)))


def eval_batches(split: AnySplit, batch_size: int, rows: np.ndarray) -> Iterator[Batch]:
    """Yields the places `rows` of batches of equal size, which hold every image of a split once, in order.

    The last is padded with images of zeros, label 0 and weight 0.
    """
    plan = EvalPlan(len(split), batch_size, rows)
    return split.batches(plan, plan.numbers)
