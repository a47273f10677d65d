"""A run's or a sweep's directory: whose it is, and that one process at a time works in it."""

import _thread
import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from bvit_jax import files
from bvit_jax.model_config import ConfigError

LOCK_FILE = ".lock"
REFRESH_SECONDS = 10.0
"""How often the holder of a directory writes its lock anew."""
STALE_SECONDS = 60.0
"""A holder on another machine whose lock has not been written for as long is dead."""
SETTLE_SECONDS = 1.0
"""After two machines took over the same dead lock, each knows by then which of them wrote last."""
_POLL_SECONDS = 0.2
_LOCK_BYTES = 4096
_INTERRUPTED = 130
"""Exit status, as after Ctrl-C."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


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
        raise _cannot_be_written(name, error) from None
    if not path.exists():
        foreign = [output for output in outputs if (directory / output).exists()]
        if foreign:
            raise ConfigError(f"{name}: it holds {', '.join(foreign)} but no {identity_file}; choose another {flag}")
        try:
            files.write_json(path, identity)
        except OSError as error:
            raise _cannot_be_written(name, error) from None
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


def _cannot_be_written(name: str, error: OSError) -> ConfigError:
    return ConfigError(f"{name}: it must be a directory that can be written to ({error})")


@dataclasses.dataclass(frozen=True)
class _Holder:
    """Who wrote a lock: a process of a machine since that was last started (`boot`)."""

    host: str
    boot: str
    process: int

    def __str__(self) -> str:
        return f"host {self.host}, process {self.process}"

    def is_of_machine(self, other: "_Holder") -> bool:
        return (self.host, self.boot) == (other.host, other.boot)


@contextlib.contextmanager
def locked(directory: Path, patience_seconds: float, flag: str = "workdir") -> Iterator[str | None]:
    """Keeps other processes, on this machine and on others, out of an existing directory.

    On one machine the lock goes with the process, whatever ends it. Other machines, to which that may not show, go by
    the time since the holder last wrote its lock, as the directory's own file system tells it.

    Args:
        directory: a claimed one.
        patience_seconds: how long to wait for another process to end. With any patience, a holder on another machine
            that may be dead is waited for until it shows a sign of life or `STALE_SECONDS` have passed without.
        flag: what the user calls the directory.

    Yields:
        The dead process whose lock this one took over, "host H, process P", or None.

    Raises:
        KeyboardInterrupt: in the main thread, if another machine took the directory over because this one was
            suspended.
        ConfigError: if another process works there for longer than that; the message names it. Or if the lock cannot
            be written.
    """
    name = f"{flag} = {str(directory)!r}"
    path = directory / LOCK_FILE
    own = _Holder(socket.gethostname(), _boot(), os.getpid())
    try:
        lock, dead = _acquire(path, own, patience_seconds, name)
    except OSError as error:
        raise _cannot_be_written(name, error) from None
    done = threading.Event()
    refresher = threading.Thread(target=_keep_fresh, args=(path, lock, own, done), daemon=True)
    with lock:
        refresher.start()
        try:
            yield None if dead is None else str(dead)
        finally:
            done.set()
            refresher.join()
            with contextlib.suppress(OSError):
                if _read(path) == own:
                    lock.truncate(0)


def holder(directory: Path) -> str | None:
    """Returns who works in a directory, "host H, process P"; None if nobody does, as far as can be told by looking.

    A process of this machine must be running; one of another must have written its lock in the last `STALE_SECONDS`.
    """
    path = directory / LOCK_FILE
    found = _read(path)
    if found is None:
        return None
    if found.is_of_machine(_Holder(socket.gethostname(), _boot(), os.getpid())):
        working = found.process == os.getpid() or _is_running(found.process)
    else:
        working = time.time() - path.stat().st_mtime < STALE_SECONDS
    return str(found) if working else None


def _acquire(path: Path, own: _Holder, patience_seconds: float, name: str) -> tuple[BinaryIO, _Holder | None]:
    """Returns the open lock once it is this process's, and its dead holder."""
    start = time.monotonic()
    first_written = path.stat().st_mtime_ns
    while True:
        waited = time.monotonic() - start
        silent = path.stat().st_mtime_ns == first_written
        with contextlib.ExitStack() as closing:
            # Opened anew each time: network file systems look for what other hosts wrote when a file is opened.
            lock = closing.enter_context(path.open("r+b", buffering=0))
            flock = _flock(lock)
            holder = _read(path)
            if flock != "theirs" and (holder is None or _is_dead(holder, own, flock, path, waited if silent else 0.0)):
                _write(lock, own)
                alone = flock == "ours" and (holder is None or holder.is_of_machine(own))
                if alone or _is_settled(path, own):
                    closing.pop_all()
                    return lock, holder
        may_be_dead = flock != "theirs" and silent and patience_seconds > 0
        if waited > patience_seconds and not may_be_dead:
            raise ConfigError(f"{name}: in use by another process ({holder or 'unknown'})")
        time.sleep(_POLL_SECONDS)


def _flock(lock: BinaryIO) -> Literal["ours", "theirs", "unsupported"]:
    """Takes the kernel's lock of a file, if no other process has it and the file system has such locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "theirs"
    except OSError:
        return "unsupported"
    return "ours"


def _is_dead(holder: _Holder, own: _Holder, flock: str, path: Path, silent_seconds: float) -> bool:
    """Says whether the holder has ended, of a lock that the kernel does not keep from this process."""
    if holder.is_of_machine(own) and (flock == "ours" or not _is_running(holder.process)):
        return True
    return max(_age_seconds(path), silent_seconds) >= STALE_SECONDS


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process != os.getpid()  # another process had this number before


def _is_settled(path: Path, own: _Holder) -> bool:
    """Says whether a lock that others may have written at the same time is this process's after a moment."""
    time.sleep(SETTLE_SECONDS)
    return _read(path) == own


def _age_seconds(path: Path) -> float:
    """Returns the time since a file was written by the clock of its file system: hosts' clocks may differ."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=LOCK_FILE) as probe:
            now = os.fstat(probe.fileno()).st_mtime
    except OSError:
        now = time.time()
    return now - path.stat().st_mtime


def _keep_fresh(path: Path, lock: BinaryIO, own: _Holder, done: threading.Event) -> None:
    while not done.wait(REFRESH_SECONDS):
        with contextlib.suppress(OSError):
            holder = _read(path)
            if holder == own:
                _write(lock, own)
            elif holder is not None:  # another machine took over from this one, which was suspended
                sys.stderr.write(f"error: {path.parent}: {holder} took it over, as this process was silent too long\n")
                _stop_this_process()
                return


def _stop_this_process() -> None:
    """Stops a process that may write nothing more, from another thread."""
    if callable(signal.getsignal(signal.SIGINT)):
        _thread.interrupt_main()
    else:  # of a process in a shell's background SIGINT is ignored, and an interruption too
        os._exit(_INTERRUPTED)


def _write(lock: BinaryIO, holder: _Holder) -> None:
    content = json.dumps(dataclasses.asdict(holder)).encode()
    if os.pwrite(lock.fileno(), content, 0) != len(content):
        raise OSError(f"{LOCK_FILE} could be written in part only")
    lock.truncate(len(content))
    os.fsync(lock.fileno())


def _read(path: Path) -> _Holder | None:
    """Returns whom a lock names; None if nobody, or if it is damaged."""
    try:
        with path.open("rb") as lock:
            stored = json.loads(lock.read(_LOCK_BYTES))
        return _Holder(str(stored["host"]), str(stored["boot"]), int(stored["process"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _boot() -> str:
    """Returns what tells this start of this machine from others; empty where there is no such thing."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def differences(stored: Any, asked: Any, prefix: str = "") -> list[str]:
    """Lists `field: stored value != asked value` for nested plain data."""
    if not (isinstance(stored, dict) and isinstance(asked, dict)):
        return [] if stored == asked else [f"{prefix or 'all'}: {stored!r} != {asked!r}"]
    names = sorted(stored.keys() | asked.keys())
    inner = (differences(stored.get(n), asked.get(n), f"{prefix}.{n}" if prefix else n) for n in names)
    return [line for lines in inner for line in lines]
