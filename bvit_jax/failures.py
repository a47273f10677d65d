"""Why trials of a sweep failed: kept in the sweep's own folder, for a trial's directory may be what is broken."""

import contextlib
import signal
import traceback
from collections.abc import Sequence
from pathlib import Path

from bvit_jax import files
from bvit_jax.sweep import Status, Trial

FOLDER = "errors"


class Failures:
    """The causes, one file a trial, DIGEST.txt; what cannot be written is kept in memory. Nothing here raises OSError.

    Args:
        directory: of the files; made when there is a failure.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._in_memory: dict[Path, str | None] = {}

    def record(self, trial: Trial, cause: str) -> None:
        """Marks a trial as failed; the last line of `cause` goes into the tables."""
        path = self._path(trial)
        self._in_memory.pop(path, None)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            files.write_bytes(path, (cause.rstrip() + "\n").encode(errors="replace"))
        except OSError:
            self._in_memory[path] = cause

    def forget(self, trial: Trial) -> None:
        """Takes the mark away."""
        path = self._path(trial)
        self._in_memory.pop(path, None)
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            pass
        except OSError:
            self._in_memory[path] = None

    def cause(self, trial: Trial) -> str | None:
        """Returns why a trial failed; None if it did not."""
        path = self._path(trial)
        if path in self._in_memory:
            return self._in_memory[path]
        try:
            return path.read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return f"failed; the cause cannot be read: {error}"

    def status(self, trial: Trial) -> Status:
        """Says how far a trial is."""
        return trial.status(self.cause(trial))

    def waiting(self, trials: Sequence[Trial], retry_failed: bool) -> list[Trial]:
        """Lists the trials that are to run: those that are unfinished, and if wanted those that have failed."""
        wanted = ("unfinished", "failed") if retry_failed else ("unfinished",)
        return [trial for trial in trials if self.status(trial) in wanted]

    def is_recorded(self, trial: Trial) -> bool:
        """Says whether a failure will be known to a later call."""
        return self._in_memory.get(self._path(trial)) is None

    def _path(self, trial: Trial) -> Path:
        return self.directory / f"{trial.config.digest()}.txt"


def describe(error: BaseException) -> str:
    """Formats an exception with its traceback; the last line is its type and the first line of its message.

    JAX and others add notes below the message, which would be the last line otherwise.
    """
    text = "".join(traceback.format_exception(error)).rstrip()
    gist = traceback.format_exception_only(error)[0].splitlines()[0]
    return text if text.splitlines()[-1] == gist else f"{text}\n\n{gist}"


def describe_end(exit_code: int | None, output: Path) -> str:
    """Says how a process ended that left no word of its own; `output` is where its output is."""
    return f"the trial's process ended early: {_how(exit_code)}; its output is in {output}"


def _how(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"exit status {exit_code}"
    number = -exit_code
    if number == signal.SIGKILL:
        return f"killed by signal {number} (kill -9, or the kernel when memory ran out)"
    name = ""
    with contextlib.suppress(ValueError):
        name = f" ({signal.Signals(number).name})"
    return f"killed by signal {number}{name}"
