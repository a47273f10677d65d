"""The images of a run in three splits, held in memory or read as they are needed.

Axes: B batch, n images, H and W pixels, c channels.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from bvit_jax import drawn, prepared
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


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three splits with no image in common; train to fit, validation to select, test to report.

    Attributes:
        train, validation, test: the splits.
        digest: of the prepared set they come from (`prepared.PreparedSet`); empty if the configuration says all.
        class_names: of the labels from 0; empty if they have none.
    """

    train: AnySplit
    validation: AnySplit
    test: AnySplit
    digest: str = ""
    class_names: tuple[str, ...] = ()


def load(config: DataConfig) -> Dataset:
    """Loads, opens or draws the images that `config` names.

    The same configuration gives the same images and splits, whatever the seed of the run: all are tested alike.

    Raises:
        ConfigError: if the set is not there (`prepared.open_set`), or is not as the configuration says.
    """
    return _embedded(config) if config.name in EMBEDDED else _from_prepared(config)


def _embedded(config: DataConfig) -> Dataset:
    images, labels = drawn.digits() if config.name == "digits" else drawn.gratings(config)
    sizes = (config.num_train, config.num_validation, config.num_test)
    if sum(sizes) != len(labels):
        raise ValueError(f"splits of {sizes} images do not add up to the {len(labels)} of {config.name}")
    parts = np.split(_order(config, len(labels)), np.cumsum(sizes)[:-1])
    train, validation, test = (Split(images[index], labels[index]) for index in parts)
    return Dataset(train, validation, test)


def _order(config: DataConfig, count: int) -> np.ndarray:
    return np.random.default_rng([config.seed, 1]).permutation(count)


def check(config: DataConfig) -> None:
    """Looks whether `load` will find the images that `config` names, without reading any.

    Raises:
        ConfigError: as `load`.
    """
    if config.name not in EMBEDDED:
        _opened(config)


def _opened(config: DataConfig) -> prepared.PreparedSet:
    """Opens a prepared set that holds what the configuration says."""
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


def _from_prepared(config: DataConfig) -> Dataset:
    found, held_out = _opened(config), config.num_validation
    trained, tested = found.splits["train"], found.splits[config.test_split]
    # Validation comes first: it is the same however many images are trained on.
    held, fitted = np.split(_order(config, trained)[: held_out + config.num_train], [held_out])
    parts = (("train", fitted), ("train", held), (config.test_split, _order(config, tested)[: config.num_test]))
    splits: list[AnySplit] = []
    for name, index in parts:
        split = Streamed(found.source(name), np.sort(index), config.stored_size, config.channels)
        splits.append(split if config.reading == "stream" else Split(*split.read_all()))
    train, validation, test = splits
    return Dataset(train, validation, test, found.digest, found.class_names)


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
