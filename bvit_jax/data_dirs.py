"""Where prepared data sets lie: the directory that holds them, and what is in it.

A set lies in `current()` as tensorflow-datasets prepares it: NAME[/CONFIG]/VERSION with `dataset_info.json` and
`features.json`. `bvit_jax.prepared` opens it.
"""

import os
import shlex
from pathlib import Path

import tensorflow_datasets as tfds

from bvit_jax.model_config import ConfigError

VARIABLE = "TFDS_DATA_DIR"
"""The environment variable that tensorflow-datasets itself reads."""
WITHOUT_TENSORFLOW = ("cifar10", "cifar100")
"""The sets that `bvit_jax.cifar` prepares."""
FORMAT = "array_record"
"""Of the files, the one that is read here."""
DESCRIPTIONS = ("dataset_info.json", "features.json")
"""Files of every version."""
_LISTED = 8
"""Sets that a message names at most."""


def current() -> Path:
    """Returns the directory of prepared sets: TFDS_DATA_DIR of the environment, or ~/tensorflow_datasets."""
    return Path(os.environ.get(VARIABLE) or "~/tensorflow_datasets").expanduser()


def find(name: str, place: Path) -> Path:
    """Returns the directory of a prepared version.

    Args:
        name: NAME or NAME/CONFIG for the newest version there, or either with :VERSION behind it.
        place: where to look.

    Raises:
        ConfigError: if it is not there; the message says what is, and what to run.
    """
    field = f"data.name = {name!r}"
    if not place.is_dir():
        raise ConfigError(f"{field}: there is no directory {place}; {how_to_prepare(name, place)}")
    base, _, version = name.partition(":")
    there = versions(place / base)
    wanted = version or max(there, key=_numbers, default="")
    if wanted in there:
        return place / base / wanted
    sets = _sets(place)
    listed = ", ".join(sets[:_LISTED]) + (f" and {len(sets) - _LISTED} more" if len(sets) > _LISTED else "")
    raise ConfigError(f"{field}: not prepared in {place} (there: {listed or 'none'}); {how_to_prepare(name, place)}")


def versions(folder: Path) -> list[str]:
    """Lists the prepared versions in a set's folder; half-prepared ones have other names."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return [path.name for path in paths if is_prepared(path)]


def is_prepared(version: Path) -> bool:
    """Says whether a directory has the name and the descriptions of a prepared version."""
    return bool(_numbers(version.name)) and all((version / file).is_file() for file in DESCRIPTIONS)


def how_to_prepare(name: str, place: Path) -> str:
    """Says what to run so that a set is in a directory.

    Some sets, such as imagenet2012, are not for everyone to download: of those it first says which files must lie
    where, in the words of tensorflow-datasets.
    """
    directory = shlex.quote(str(place))
    base = name.partition(":")[0]
    if base in WITHOUT_TENSORFLOW:
        return f"run: python -m experiments.prepare_data --dataset={base} --data_dir={directory}"
    asked = _to_download_by_hand(base)
    manual = place / "downloads" / "manual"
    by_hand = f"put its files into manual_dir, which is {manual} ({asked}); then " if asked else ""
    command = f"tfds build {name} --data_dir={directory} --file_format={FORMAT}"
    return f"{by_hand}where TensorFlow is installed, run: {command}"


def _to_download_by_hand(base: str) -> str:
    """Returns which files tensorflow-datasets must be given for a set; nothing for most, and for unknown ones."""
    try:
        asked = tfds.builder_cls(base.partition("/")[0]).MANUAL_DOWNLOAD_INSTRUCTIONS
    except (tfds.core.DatasetNotFoundError, ImportError):
        return ""
    return " ".join((asked or "").split()).removesuffix(".")


def _sets(place: Path) -> list[str]:
    """Lists all that is prepared, as names that `find` takes."""
    folders = [folder for pattern in ("*", "*/*") for folder in place.glob(pattern) if folder.is_dir()]
    return sorted(f"{folder.relative_to(place)}:{version}" for folder in folders for version in versions(folder))


def _numbers(version: str) -> tuple[int, ...]:
    """Returns 3, 0, 2 of "3.0.2", so that versions can be compared; nothing if it is no version."""
    parts = version.split(".")
    return tuple(map(int, parts)) if len(parts) == 3 and all(p.isascii() and p.isdigit() for p in parts) else ()
