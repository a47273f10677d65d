"""A run's or a sweep's directory: whose it is, and that one process at a time works in it."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bvit_jax import files
from bvit_jax.model_config import ConfigError

LOCK_FILE = ".lock"


def claim(
    directory: Path, identity_file: str, identity: dict[str, Any], outputs: tuple[str, ...], flag: str = "workdir"
) -> None:
    """Makes the directory and records what it is for, or checks that it is for the same.

    Args:
        directory: made if absent.
        identity_file: name of the JSON file that says what the directory is for.
        identity: plain data, the content of that file.
        outputs: names of files and folders that work here would write; in a directory without the identity file they
            belong to somebody else.
        flag: what the user calls the directory.

    Raises:
        ConfigError: if the directory cannot be written to, holds something else, or its identity file is damaged;
            nothing in it is changed.
    """
    name = f"{flag} = {str(directory)!r}"
    path = directory / identity_file
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / LOCK_FILE).open("a").close()
    except OSError as error:
        raise ConfigError(f"{name}: it must be a directory that can be written to ({error})") from None
    if not path.exists():
        foreign = [output for output in outputs if (directory / output).exists()]
        if foreign:
            raise ConfigError(f"{name}: it holds {', '.join(foreign)} but no {identity_file}; choose another {flag}")
        files.write_json(path, identity)
        return
    try:
        stored = json.loads(path.read_text())
        if not isinstance(stored, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:  # of JSON or of UTF-8
        raise ConfigError(f"{path} is damaged ({error}); restore it or choose another {flag}") from None
    differing = differences(stored, json.loads(json.dumps(identity)))
    if differing:
        raise ConfigError(
            f"{name}: it is of another configuration; choose another {flag}. "
            f"Stored against asked for: {'; '.join(differing)}"
        )


@contextlib.contextmanager
def locked(directory: Path, patience_seconds: float, flag: str = "workdir") -> Iterator[None]:
    """Keeps other processes of this machine out of an existing directory; the lock goes with the process.

    Args:
        directory: a claimed one.
        patience_seconds: how long to wait for another process to end.
        flag: what the user calls the directory.

    Raises:
        ConfigError: if another process works there for longer than that; the message names it.
    """
    with (directory / LOCK_FILE).open("r+") as lock:
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = lock.read() or "unknown"
                    raise ConfigError(f"{flag} = {str(directory)!r}: in use by another process ({holder})") from None
                time.sleep(0.1)
        lock.truncate()
        lock.write(f"host {socket.gethostname()}, process {os.getpid()}")
        lock.flush()
        yield
        lock.truncate(0)


def differences(stored: Any, asked: Any, prefix: str = "") -> list[str]:
    """Lists `field: stored value != asked value` for nested plain data."""
    if not (isinstance(stored, dict) and isinstance(asked, dict)):
        return [] if stored == asked else [f"{prefix or 'all'}: {stored!r} != {asked!r}"]
    names = sorted(stored.keys() | asked.keys())
    inner = (differences(stored.get(n), asked.get(n), f"{prefix}.{n}" if prefix else n) for n in names)
    return [line for lines in inner for line in lines]
