"""Seals of folders: what every file in them holds, so that damage is named before anything tries to read it."""

import hashlib
import json
from pathlib import Path

from bvit_jax import files

FILE = "seal.json"


class BrokenSealError(Exception):
    """A folder is not as it was sealed; the message says which file differs and how."""


def seal(folder: Path) -> None:
    """Writes `seal.json`: for every file below the folder's own folders its size in bytes and its SHA-256."""
    held = {
        path.relative_to(folder).as_posix(): _measure(path) for path in sorted(folder.glob("*/**/*")) if path.is_file()
    }
    content = json.dumps(held)
    files.write_json(folder / FILE, {"files": held, "sha256": hashlib.sha256(content.encode()).hexdigest()})


def check(folder: Path) -> None:
    """Compares a folder with its seal.

    Raises:
        BrokenSealError: if the seal or a file is missing or differs.
        OSError: if a file is there but cannot be read, which says nothing about what it holds.
    """
    if not any(folder.iterdir()):
        raise BrokenSealError("it is empty")
    for name, (size, digest) in _read(folder / FILE).items():
        path = folder / name
        try:
            if path.is_dir():
                raise IsADirectoryError
            found = path.stat().st_size
            if found != size:
                raise BrokenSealError(f"{name} has {found} bytes instead of {size}")
            if _measure(path)[1] != digest:
                raise BrokenSealError(f"{name} holds other bytes than were written")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise BrokenSealError(f"{name} is missing") from None


def _read(path: Path) -> dict[str, tuple[int, str]]:
    try:
        stored = json.loads(path.read_text())
        held: dict[str, tuple[int, str]] = stored["files"]
        whole = hashlib.sha256(json.dumps(held).encode()).hexdigest() == stored["sha256"]
    except (FileNotFoundError, IsADirectoryError):
        raise BrokenSealError(f"{FILE} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenSealError(f"{FILE} cannot be read ({error})") from None
    if not whole:
        raise BrokenSealError(f"{FILE} differs from its own digest")
    return held


def _measure(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
