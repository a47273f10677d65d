"""Archives in the layout of CIFAR's official ones, with drawn images, and prepared sets made from them.

    python tests/made_archive.py --dataset=cifar100 --out=DIR --train=50000 --test=10000

writes the archive and prints its SHA-256, for `python -m experiments.prepare_data --archive_dir=DIR --sha256=…`.
"""

import argparse
import contextlib
import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

LAYOUTS = {
    "cifar10": ("cifar-10-batches-bin", [f"data_batch_{n}.bin" for n in range(1, 6)], "test_batch.bin"),
    "cifar100": ("cifar-100-binary", ["train.bin"], "test.bin"),
}
CLASSES = {"cifar10": 10, "cifar100": 100}


@dataclass(frozen=True)
class Drawn:
    """Images uint8 (n, 32, 32, 3) and labels (n,) in the order of the archive."""

    images: np.ndarray
    labels: np.ndarray


def draw(num_classes: int, count: int, seed: int) -> Drawn:
    """Draws patches of colour that are a class's own, moved and lit differently in every image, under noise."""
    patterns = np.random.default_rng([num_classes, 7]).integers(0, 160, (num_classes, 4, 4, 3), np.uint8)
    patterns = patterns.repeat(8, axis=1).repeat(8, axis=2)
    rng = np.random.default_rng([num_classes, seed])
    labels = rng.permutation(np.arange(count) % num_classes)
    images = rng.integers(0, 32, (count, 32, 32, 3), np.uint8)
    light = rng.integers(0, 64, count, np.uint8)
    moves = rng.integers(-2, 3, (count, 2))
    for image, label, move, lit in zip(images, labels, moves, light, strict=True):
        image += np.roll(patterns[label], move, (0, 1)) + lit
    return Drawn(images, labels)


def file_contents(name: str, train: Drawn, test: Drawn) -> dict[str, bytes]:
    """Returns the files of an archive by their names in it."""
    folder, train_files, test_file = LAYOUTS[name]
    batches = zip(
        train_files,
        np.array_split(train.images, len(train_files)),
        np.array_split(train.labels, len(train_files)),
        strict=True,
    )
    files = {file: _records(name, Drawn(images, labels)) for file, images, labels in batches}
    files[test_file] = _records(name, test)
    if name == "cifar10":
        files["batches.meta.txt"] = _lines("class", 10) + b"\n"  # the official file ends in an empty line
    else:
        files |= {"coarse_label_names.txt": _lines("group", 20), "fine_label_names.txt": _lines("class", 100)}
    return {f"{folder}/{file}": content for file, content in files.items()}


def _records(name: str, drawn: Drawn) -> bytes:
    fine = drawn.labels.astype(np.uint8)[:, None]
    labels = [fine] if name == "cifar10" else [fine // 5, fine]
    pixels = drawn.images.transpose(0, 3, 1, 2).reshape(len(fine), 3072)
    return np.concatenate([*labels, pixels], axis=1).tobytes()


def _lines(word: str, count: int) -> bytes:
    return "".join(f"{word}_{number}\n" for number in range(count)).encode()


def write(name: str, folder: Path, files: dict[str, bytes]) -> str:
    """Writes an archive under its official name into a folder and returns its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{'cifar-10' if name == 'cifar10' else 'cifar-100'}-binary.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for file, content in files.items():
            member = tarfile.TarInfo(file)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make(name: str, folder: Path, train: int, test: int) -> str:
    """Draws images, writes their archive into a folder and returns its SHA-256."""
    classes = CLASSES[name]
    return write(name, folder, file_contents(name, draw(classes, train, 0), draw(classes, test, 1)))


def prepare_drawn(folder: Path, name: str = "cifar100", train: int = 300, test: int = 100) -> Path:
    """Prepares a drawn set under the name of CIFAR in folder/data, and returns that, for TFDS_DATA_DIR."""
    from bvit_jax import cifar

    sha256 = make(name, folder / "archive", train, test)
    cifar.prepare(name, folder / "data", folder / "archive", sha256)
    return folder / "data"


class TinyJpegs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Photographs in miniature: JPEGs of many sizes, whose class is their hue; every third is grey."""

    VERSION = tfds.core.Version("1.0.0")
    counts = {"train": 40, "validation": 20}  # noqa: RUF012 -- set before preparing

    def _info(self) -> Any:
        features = {
            "file_name": tfds.features.Text(),
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=4),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split, count) for split, count in self.counts.items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(count):
            example = {"file_name": f"{split}_{index}.jpg", "image": jpeg(split, index), "label": index % 4}
            yield index, example


def jpeg(split: str, index: int) -> bytes:
    """Returns one encoded image of `TinyJpegs`, a pure function of its name."""
    rng = np.random.default_rng([len(split), index])
    height, width = rng.integers(24, 130, 2)
    colour = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]])[index % 4]
    waves = np.sin(np.arange(height)[:, None] / 7 + rng.uniform(0, 6)) * np.cos(np.arange(width) / 9)
    pixels = np.clip(colour + 50 * waves[..., None] + rng.normal(0, 4, (height, width, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    encoded = io.BytesIO()
    (image.convert("L") if index % 3 == 2 else image).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def prepare_jpegs(folder: Path, train: int = 40, validation: int = 20, shards: int = 1) -> Path:
    """Prepares the set `tiny_jpegs`, splits train and validation, in a folder and returns that, for TFDS_DATA_DIR."""
    prepare_builder(TinyJpegs, folder, shards, counts={"train": train, "validation": validation})
    return folder


class Unlabelled(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Black images of 4 x 4 pixels in three classes; a label of -1 is none, as in the test split of ImageNet."""

    VERSION = tfds.core.Version("1.0.0")
    labels: dict[str, list[int]]

    def _info(self) -> Any:
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(labels) for split, labels in self.labels.items()}

    def _generate_examples(self, labels: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        encoded = io.BytesIO()
        Image.new("RGB", (4, 4)).save(encoded, "PNG")
        for index, label in enumerate(labels):
            yield index, {"image": encoded.getvalue(), "label": label}


def prepare_unlabelled(folder: Path, labels: dict[str, list[int]]) -> Path:
    """Prepares the set `unlabelled`, images with these labels by split, and returns the folder, for TFDS_DATA_DIR."""
    prepare_builder(Unlabelled, folder, labels=labels)
    return folder


def prepare_builder(builder_class: Any, folder: Path, shards: int = 1, **attributes: Any) -> Path:
    """Prepares a builder of tensorflow-datasets as ArrayRecord and returns the directory of the version."""
    builder = builder_class(data_dir=folder, file_format="array_record")
    for key, value in attributes.items():
        setattr(builder, key, value)
    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=shards)
    with contextlib.redirect_stdout(io.StringIO()):
        tfds.disable_progress_bar()
        builder.download_and_prepare(download_config=config)
        tfds.enable_progress_bar()
    return Path(builder.data_dir)


def stored_order(split: str, count: int) -> list[int]:
    """Returns which of `count` numbered images lies where: tensorflow-datasets sorts by the MD5 of split and number."""
    return sorted(range(count), key=lambda index: hashlib.md5(f"{split}{index}".encode()).digest())


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(LAYOUTS), default="cifar100")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--test", type=int, default=10_000)
    given = parser.parse_args()
    print(make(given.dataset, given.out, given.train, given.test))


if __name__ == "__main__":
    _main()
