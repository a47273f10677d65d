"""Data sets of tensorflow-datasets on disk: described and read at random, without TensorFlow.

`bvit_jax.data_dirs` finds a set. Of the file formats of tensorflow-datasets, ArrayRecord is read here.

Axes: n images, S pixels a side, c channels.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from bvit_jax import cores, data_dirs, decoding
from bvit_jax.model_config import ConfigError

_LARGEST_PIECE = 128
"""Images that a thread fetches at once and decodes one by one, at most."""
_PIECES = 4
"""Of a call, for each thread at least: so that none waits long for the last."""
_CHUNK = 1024
"""Images between two movements of the progress bar."""
_NO_LABEL = -1
"""What tensorflow-datasets stores for it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The images of one split, in the order of its files.

    Several threads may read at once, and other processes from a pickle; a process that was forked may not.

    Attributes:
        name: set, version and split, for messages.
        directory: that holds the files.
        num_classes: labels lie below it.
        records: the data source of tensorflow-datasets; its images are still encoded.
    """

    name: str
    directory: Path
    num_classes: int
    records: Any

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: np.ndarray, size: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads and decodes images, as many at once as the process has CPUs.

        Args:
            indices: integers (n,), 0 to under the number of images, in any order.
            size: S, pixels a side; `bvit_jax.decoding.decode` says how images are made to fit.
            channels: 1 or 3.

        Returns:
            images: uint8 (n, S, S, c).
            labels: int32 (n,).

        Raises:
            ConfigError: if a file is missing or damaged, an image cannot be decoded or has no label, or one out of
                range.
            IndexError: for an index out of range.
        """
        images = np.empty((len(indices), size, size, channels), np.uint8)

        def keep(place: int, encoded: bytes) -> None:
            images[place] = decoding.decode(encoded, size, channels)

        labels = self._visit(indices, keep, self._label)
        return images, labels

    def measure(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decodes images in full and returns their heights and widths, int32 (n, 2), and labels; else as `read`.

        The label of an image that has none is -1.
        """
        sizes = np.empty((len(indices), 2), np.int32)

        def keep(place: int, encoded: bytes) -> None:
            sizes[place] = decoding.measure(encoded)

        labels = self._visit(indices, keep, self._label_if_any)
        return sizes, labels

    def _visit(
        self, indices: np.ndarray, keep: Callable[[int, bytes], None], label: Callable[[dict[str, Any]], int]
    ) -> np.ndarray:
        """Hands every encoded image with its place among the indices to `keep`, in threads, and returns the labels."""
        if len(indices) and not 0 <= np.min(indices) <= np.max(indices) < len(self):
            raise IndexError(f"indices {np.min(indices)} to {np.max(indices)}: {self.name} has {len(self)} images")
        labels = np.empty(len(indices), np.int32)
        length = max(1, min(_LARGEST_PIECE, len(indices) // (_PIECES * len(cores.available()))))

        def fill(start: int) -> None:
            piece = indices[start : start + length].tolist()
            for place, (index, record) in enumerate(zip(piece, self._fetch(piece), strict=True), start):
                try:
                    keep(place, record["image"])
                    labels[place] = label(record)
                except ValueError as error:
                    known = record.get("id", record.get("file_name"))
                    named = f" ({known.decode(errors='replace')})" if isinstance(known, bytes) else ""
                    raise ConfigError(f"{self.name}, image {index}{named}: {error}") from None

        for _ in _threads().map(fill, range(0, len(indices), length)):
            pass
        return labels

    def _fetch(self, piece: list[int]) -> Sequence[dict[str, Any]]:
        try:
            return self.records.__getitems__(piece)
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise ConfigError(
                f"{self.name}: a record file is missing or damaged; remove {self.directory} and prepare it again "
                f"({_gist(error)})"
            ) from None

    def _label(self, record: dict[str, Any]) -> int:
        label = self._label_if_any(record)
        if label == _NO_LABEL:
            raise ValueError(f"the label is {label}: images of this split have no labels; they must be {self._labels}")
        return label

    def _label_if_any(self, record: dict[str, Any]) -> int:
        label = int(record["label"])
        if not (label == _NO_LABEL or 0 <= label < self.num_classes):
            raise ValueError(f"the label is {label}; it must be {self._labels}")
        return label

    @property
    def _labels(self) -> str:
        return f"0 to {self.num_classes - 1}"


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """What lies prepared.

    Attributes:
        name: NAME or NAME/CONFIG, without version.
        directory: that holds the files of this version.
        version: such as 3.0.2.
        splits: images in each split, by name.
        num_classes: labels are 0 to under it.
        class_names: by label.
        channels: of the images as the set describes them: 1 grey, 3 RGB, 4 with transparency.
        digest: 16 hexadecimal digits of a SHA-256 that change with the set: of version, lengths and bytes of the
            splits' files and names of features and classes. No image is read for it, so it does not notice damage. The
            bytes are those of encoded images: a set prepared again by another release of Pillow or zlib, or by
            TensorFlow, may have equal pixels and another digest.
    """

    name: str
    directory: Path
    version: str
    splits: dict[str, int]
    num_classes: int
    class_names: tuple[str, ...]
    channels: int
    digest: str

    def source(self, split: str) -> Source:
        """Opens one split.

        Raises:
            ConfigError: if there is no such split or one of its files is missing.
        """
        if split not in self.splits:
            raise ConfigError(f"{self.name} has no split {split!r}; it must be one of {', '.join(self.splits)}")
        builder = _builder(self.name, self.directory)
        decoders = {"image": tfds.decode.SkipDecoding()}
        records = builder.as_data_source(split=split, decoders=decoders, file_format=data_dirs.FORMAT)
        present = {path.name for path in self.directory.iterdir()}
        missing = [name for name in builder.info.splits[split].filenames if name not in present]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ConfigError(f"{self.name}: {missing[0]}{more} missing; remove {self.directory} and prepare it again")
        return Source(f"{self.name}:{self.version}, split {split}", self.directory, self.num_classes, records)


def open_set(name: str, place: Path | None = None) -> PreparedSet:
    """Finds a prepared set and reads its description.

    Args:
        name: NAME or NAME/CONFIG for the newest version there, or either with :VERSION behind it.
        place: where to look; None: in `data_dirs.current()`.

    Raises:
        ConfigError: if it is not there, in another file format than ArrayRecord, or no set of labelled images; the
            message says what to run.
    """
    base = name.partition(":")[0]
    directory = data_dirs.find(name, place or data_dirs.current())
    info = _builder(name, directory).info
    features = dict(info.features.items()) if isinstance(info.features, tfds.features.FeaturesDict) else {}
    image, label = features.get("image"), features.get("label")
    if not (isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel)):
        listed = ", ".join(sorted(features)) or "others"
        raise ConfigError(f"data.name = {name!r}: it must have an image and a label of one class each; it has {listed}")
    if image.np_dtype != np.uint8 or not label.num_classes:
        found = f"{image.np_dtype} and {label.num_classes} classes"
        raise ConfigError(f"data.name = {name!r}: it must have uint8 images and a number of classes; it has {found}")
    splits = {split: info.splits[split] for split in info.splits}
    content = {
        "name": base,
        "version": str(info.version),
        "splits": {key: [list(split.shard_lengths), int(split.num_bytes)] for key, split in splits.items()},
        "features": sorted(features),
        "classes": list(label.names),
    }
    return PreparedSet(
        name=base,
        directory=directory,
        version=str(info.version),
        splits={key: int(split.num_examples) for key, split in splits.items()},
        num_classes=int(label.num_classes),
        class_names=tuple(label.names),
        channels=int(image.shape[-1] or 3),
        digest=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16],
    )


def read_all(source: Source, indices: np.ndarray, size: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads many images into memory, with a progress bar on a terminal; otherwise as `Source.read`."""
    images = np.empty((len(indices), size, size, channels), np.uint8)
    labels = np.empty(len(indices), np.int32)
    for part in parts(source, len(indices)):
        images[part], labels[part] = source.read(indices[part], size, channels)
    return images, labels


def parts(source: Source, count: int) -> Iterator[slice]:
    """Yields slices that make up `count` images, each to be read before the next; a bar on a terminal shows how far."""
    with tqdm(total=count, desc=f"reading {source.name}", unit="image", disable=None, leave=False) as bar:
        for start in range(0, count, _CHUNK):
            part = slice(start, min(start + _CHUNK, count))
            yield part
            bar.update(part.stop - part.start)


def _builder(name: str, directory: Path) -> Any:
    """Returns the builder that reads this directory, of ArrayRecord files."""
    base = name.partition(":")[0]
    field = f"data.name = {name!r}"
    try:
        stored = json.loads((directory / data_dirs.DESCRIPTIONS[0]).read_text())
        formats = [stored.get("fileFormat", "tfrecord"), *stored.get("alternativeFileFormats", ())]
        builder = tfds.builder_from_directory(directory) if data_dirs.FORMAT in formats else None
    except Exception as error:  # tensorflow-datasets lets through whatever a damaged description raises
        raise ConfigError(
            f"{field}: its description cannot be read; remove {directory} and prepare it again ({_gist(error)})"
        ) from None
    if builder is None:
        place = directory.parents[1 + base.count("/")]
        found = f"{directory} holds {formats[0]} files, not {data_dirs.FORMAT}"
        raise ConfigError(f"{field}: {found}; remove it, then {data_dirs.how_to_prepare(base, place)}")
    return builder


def _gist(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """Returns the threads that decode, shared by all sources; Pillow decodes outside the interpreter's lock."""
    return concurrent.futures.ThreadPoolExecutor(len(cores.available()), thread_name_prefix="decode")
