"""CIFAR-10 and CIFAR-100 prepared from their official archives as tensorflow-datasets does it, without TensorFlow.

The builders are those of tensorflow-datasets; only unpacking the archive and encoding the images, for which they need
TensorFlow, are done by Python and Pillow. Names, order, labels and pixels of the images come out the same, in
ArrayRecord files. Data: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

import contextlib
import hashlib
import io
import logging
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import registered
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.image_classification import cifar
from tqdm import tqdm

from bvit_jax import data_dirs, prepared
from bvit_jax.model_config import ConfigError, require, require_choice
from bvit_jax.prepared import PreparedSet

SIZE = 32
"""Pixels a side."""
_PIXELS = 3 * SIZE * SIZE
_SEAL = "archive.sha256"
"""The file beside the records that says which archive they were made from."""
_ROOM = 1.2
"""Bytes on disk for every byte of labels and pixels, at most: noise grows a little when it is encoded."""


def prepare(name: str, directory: Path, archive_dir: Path | None = None, sha256: str | None = None) -> PreparedSet:
    """Prepares CIFAR in a directory, from its official archive; returns at once what is prepared there already.

    The archive is downloaded from its official address to `directory`/downloads, unless that is done already. What is
    being prepared lies under another name until it is whole, so that a preparation may be interrupted at any time.

    Args:
        name: `cifar10` or `cifar100`.
        directory: of prepared sets, made if absent (`bvit_jax.data_dirs.current`).
        archive_dir: holds the archive, under its official name; nothing is downloaded.
        sha256: of that archive, in place of the official one, for an archive that is not the official one: what comes
            out bears the same name, but is not CIFAR.

    Raises:
        ConfigError: if the archive cannot be had, has another checksum or another content, or nothing can be written.
    """
    require_choice("dataset", name, tuple(_BUILDERS))
    require(sha256 is None or archive_dir is not None, "sha256", sha256, "given with archive_dir alone")
    official = _official(name)
    expected = sha256 or official.checksum
    _make(directory)
    builder = _BUILDERS[name](data_dir=directory, file_format="array_record")
    version = Path(builder.data_dir)
    if version.exists():
        return _check(name, directory, version, expected, official.checksum)
    builder.sha256 = expected
    if archive_dir is not None:
        builder.archive = _archive(name, archive_dir, expected)
    config = tfds.download.DownloadConfig(try_download_gcs=False, force_checksums_validation=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()), _bars(shown=False):
            builder.download_and_prepare(download_config=config)
    except (OSError, RuntimeError) as error:  # of the writer of ArrayRecord the latter
        raise ConfigError(f"data_dir = {str(directory)!r}: {name} cannot be written there ({error})") from None
    return _check(name, directory, version, expected, official.checksum)


class _WithoutTensorFlow:
    """What replaces the parts of a stock builder that need TensorFlow.

    Attributes:
        archive: the archive, None to download it.
        sha256: its checksum.
    """

    archive: Path | None = None
    sha256: str = ""

    def _split_generators(self: Any, dl_manager: Any) -> dict[str, Any]:
        layout = self._cifar_info
        archive = self.archive or _download(dl_manager, layout.url)
        splits = {"train": layout.train_files, "test": layout.test_files}
        names = [layout.prefix + file for file in (*layout.label_files, *layout.train_files, *layout.test_files)]
        contents = _unpack(archive, names)
        classes = []
        for key, file in zip(layout.label_keys, layout.label_files, strict=True):
            feature = self.info.features[key]
            found = contents[layout.prefix + file].decode(errors="replace").split("\n")
            feature.names = _class_names(archive, file, [line for line in found if line], feature.num_classes)
            classes.append(feature.num_classes)
        records = {
            split: np.concatenate([_records(archive, file, contents[layout.prefix + file], classes) for file in files])
            for split, files in splits.items()
        }
        _require_room(Path(self.data_dir_root), sum(held.nbytes for held in records.values()))
        (Path(self.data_dir) / _SEAL).write_text(self.sha256 + "\n")
        return {split: self._generate_examples(split, held) for split, held in records.items()}

    def _generate_examples(self: Any, split: str, records: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        keys = self._cifar_info.label_keys
        images = records[:, len(keys) :].reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)
        bar = tqdm(images, desc=f"preparing {self.name}, {split}", unit="image", disable=None, leave=False)
        for index, image in enumerate(bar):
            png = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(image)).save(png, "PNG")
            labels = {key: int(records[index, column]) for column, key in enumerate(keys)}
            # The keys that the stock builder gives: they fix the order of the images.
            yield index, {"id": f"{split}_{index:05d}", "image": png.getvalue(), **labels}


with registered.skip_registration():  # the stock builders bear these names already

    class _Cifar10(_WithoutTensorFlow, cifar.Cifar10):
        name = "cifar10"
        url_infos = cifar.Cifar10.url_infos

    class _Cifar100(_WithoutTensorFlow, cifar.Cifar100):
        name = "cifar100"
        url_infos = cifar.Cifar100.url_infos


_BUILDERS: dict[str, Any] = {"cifar10": _Cifar10, "cifar100": _Cifar100}


def _official(name: str) -> Any:
    """Returns size, checksum and file name of the official archive, as tensorflow-datasets records them."""
    (info,) = _BUILDERS[name].url_infos.values()
    return info


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(f"data_dir = {str(directory)!r}: it must be a directory to write to ({error})") from None


def _check(name: str, directory: Path, version: Path, expected: str, official: str) -> PreparedSet:
    """Opens what is prepared and all its splits, if it was made from the archive that is asked for."""
    remedy = f"remove {version} and prepare it again, or give another data_dir"
    seal = version / _SEAL
    found = seal.read_text().strip() if seal.exists() else official  # TensorFlow's builder takes no other
    if found != expected:
        raise ConfigError(f"{version} was made from an archive of SHA-256 {found}, not {expected}: {remedy}")
    if not data_dirs.is_prepared(version):
        raise ConfigError(f"{version} is no prepared set: {remedy}")
    opened = prepared.open_set(f"{name}:{version.name}", directory)
    for split in opened.splits:
        opened.source(split)
    return opened


def _archive(name: str, archive_dir: Path, expected: str) -> Path:
    """Returns the archive in a folder if it has the expected checksum."""
    path = archive_dir / str(_official(name).filename)
    (url,) = _BUILDERS[name].url_infos
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"archive_dir: {path} cannot be read ({reason}); the file comes from {url}") from None
    _require_checksum(path, found, expected, url)
    return path


def _require_checksum(where: object, found: str, expected: str, url: str) -> None:
    if found != expected:
        raise ConfigError(f"{where}: its SHA-256 is {found}, not {expected}; the official archive comes from {url}")


def _download(dl_manager: Any, url: str) -> Path:
    """Downloads the archive with its checksum verified, unless that is done already."""
    downloader.MAX_RETRIES = 3  # ten, with pauses that double, take minutes to find that there is no network
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it reports every retry
    try:
        with _bars(shown=sys.stderr.isatty()):
            return Path(dl_manager.download(url))
    except NonMatchingChecksumError as error:
        expected, found = re.findall(r"[0-9a-f]{64}", str(error).split("* Expected:")[-1])
        _require_checksum(f"what was downloaded from {url}", found, expected, url)
        raise
    except (requests.RequestException, tfds.download.DownloadError) as error:
        hint = f"without a network, put the file into a folder and give that as --archive_dir ({type(error).__name__})"
        raise ConfigError(f"{url} cannot be downloaded; {hint}") from None


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Shows or hides the progress bars of tensorflow-datasets."""
    tfds.display_progress_bar(shown)
    try:
        yield
    finally:
        tfds.enable_progress_bar()


def _unpack(archive: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Reads files of a gzipped tar into memory."""
    contents = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name in names else None
                if file is not None:
                    contents[member.name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"archive {archive}: it is truncated or no gzipped tar ({error})") from None
    missing = [name for name in names if name not in contents]
    if missing:
        raise ConfigError(f"archive {archive}: it must hold {', '.join(missing)}")
    return contents


def _class_names(archive: Path, file: str, names: list[str], num_classes: int) -> list[str]:
    different = len(set(names))
    if not len(names) == different == num_classes:
        found = f"it holds {len(names)}, {different} different ones"
        raise ConfigError(f"archive {archive}: {file} must hold {num_classes} different names of classes, {found}")
    return names


def _records(archive: Path, file: str, content: bytes, classes: Sequence[int]) -> np.ndarray:
    """Returns labels and pixels, uint8 (n, labels + 3072), of a file of records, the pixels channel by channel."""
    length = len(classes) + _PIXELS
    if not content or len(content) % length:
        raise ConfigError(f"archive {archive}: {file} must hold records of {length} bytes, it has {len(content)} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, length)
    for column, num_classes in enumerate(classes):
        wrong = np.flatnonzero(records[:, column] >= num_classes)
        if len(wrong):
            label = records[wrong[0], column]
            raise ConfigError(
                f"archive {archive}: {file}, image {wrong[0]}: the label is {label}; it must be 0 to {num_classes - 1}"
            )
    return records


def _require_room(directory: Path, held: int) -> None:
    free, needed = shutil.disk_usage(directory).free / 1e6, _ROOM * held / 1e6
    if free < needed:
        raise ConfigError(f"data_dir = {str(directory)!r}: it needs {needed:.0f} MB, its disk has {free:.0f} MB free")
