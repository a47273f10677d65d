"""Prepares CIFAR-10 or CIFAR-100, and reads every image of a prepared data set to see that it is whole.

    python -m experiments.prepare_data --dataset=cifar100 --data_dir=data
    python -m experiments.prepare_data --dataset=cifar100 --data_dir=data --archive_dir=downloads
    python -m experiments.prepare_data --dataset=imagenet2012 --data_dir=data

The first downloads the official archive; the second, for machines without a network, takes it from a folder. Both check
its SHA-256 and can be stopped and given again at any time. Of every other data set of tensorflow-datasets, the command
reads what is prepared, or says how to prepare it where TensorFlow is installed; here it is not needed.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from rich.table import Table

from bvit_jax import cifar, data_dirs, prepared
from bvit_jax.model_config import require
from bvit_jax.prepared import PreparedSet, Source
from experiments import data_flags, entry, tables

_DATASET = flags.DEFINE_string("dataset", None, "cifar10, cifar100, or another data set's name, such as imagenet2012.")
_ARCHIVE_DIR = flags.DEFINE_string("archive_dir", None, "The folder that holds CIFAR's archive, under its own name.")
_SHA256 = flags.DEFINE_string(
    "sha256", None, "Of the archive in --archive_dir, if it is not the official one: the images are then not CIFAR."
)
flags.adopt_module_key_flags(data_flags)


@dataclasses.dataclass(frozen=True)
class _Read:
    """What one split holds: per image height and width, int32 (n, 2), and label, int32 (n,); and seconds to read it.

    An image without a label has -1.
    """

    sizes: np.ndarray
    labels: np.ndarray
    seconds: float


def main(argv: Sequence[str]) -> None:
    """Prepares, reads every image and prints what is there."""
    del argv
    name, place = str(_DATASET.value), data_flags.apply()
    given = {"archive_dir": _ARCHIVE_DIR.value, "sha256": _SHA256.value}
    if name in data_dirs.WITHOUT_TENSORFLOW:
        archive_dir = Path(_ARCHIVE_DIR.value).expanduser() if _ARCHIVE_DIR.value else None
        before = data_dirs.versions(place / name)
        found = cifar.prepare(name, place, archive_dir, _SHA256.value)
        if archive_dir is not None and found.version in before:
            print("already prepared; the archive was not read")
    else:
        for flag, value in given.items():
            require(value is None, flag, value, f"left out, as {name} is not prepared here")
        found = prepared.open_set(name)
    splits = {split: _read(found.source(split)) for split in found.splits}
    print(f"{found.name}:{found.version} in {found.directory}, digest {found.digest}")
    print(f"{found.num_classes} classes, {found.channels} channels; every image was read.")
    print("a class: images of the smallest and the largest; pixels: heights and widths.")
    tables.show(_table(found, splits))
    print(f"To train on it: --data_dir={place} and data.name = {found.name!r} in the configuration.")


def _read(source: Source) -> _Read:
    """Decodes a whole split in the order of its files."""
    sizes, labels = np.empty((len(source), 2), np.int32), np.empty(len(source), np.int32)
    every = np.arange(len(source))
    started = time.perf_counter()
    for part in prepared.parts(source, len(source)):
        sizes[part], labels[part] = source.measure(every[part])
    return _Read(sizes, labels, time.perf_counter() - started)


def _table(found: PreparedSet, splits: dict[str, _Read]) -> Table:
    made = tables.table("images", "a class", "pixels", "images/s")
    for split, read in splits.items():
        heights, widths = (_range(read.sizes[:, axis]) for axis in (0, 1))
        classes = _classes(read.labels, found.num_classes)
        speed = len(read.labels) / read.seconds
        made.add_row(split, f"{len(read.labels):,}", classes, f"{heights} x {widths}", f"{speed:,.0f}")
    return made


def _classes(labels: np.ndarray, num_classes: int) -> str:
    """Says how many images the smallest and the largest class have, and how many have none."""
    given = labels[labels >= 0]
    if not len(given):
        return "without labels"
    unlabelled = len(labels) - len(given)
    shown = _range(np.bincount(given, minlength=num_classes))
    return f"{shown}; {unlabelled:,} without label" if unlabelled else shown


def _range(numbers: np.ndarray) -> str:
    least, most = np.min(numbers), np.max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


if __name__ == "__main__":
    flags.mark_flags_as_required(["dataset"])
    entry.run(main)
