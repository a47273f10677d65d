"""What a run tells people: lines on the terminal, and `incidents.jsonl`, the story of its interruptions."""

import contextlib
import datetime
import json
import sys
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from bvit_jax import processes

FILE = "incidents.jsonl"
Kind = Literal["resumed", "preempted", "damaged", "remade", "skipped", "stopped", "unsaved", "experts"]


class Journal:
    """Speaks for one run; of several processes the first does."""

    def __init__(self, workdir: Path, show_progress: bool) -> None:
        self._workdir = workdir
        self._active = processes.is_first()
        self.shows = show_progress and self._active

    def say(self, text: str) -> None:
        """Prints a line where progress is shown, above its bar."""
        if self.shows:
            tqdm.write(text)

    def incident(self, kind: Kind, step: int, text: str) -> None:
        """Writes an incident down and says it."""
        self._write(kind, step, text)
        self.say(text)

    def warn(self, kind: Kind, step: int, text: str) -> None:
        """Writes an incident down and prints it on standard error, whether progress is shown or not."""
        self._write(kind, step, text)
        if self._active:
            tqdm.write(f"warning: {text}", file=sys.stderr)

    def _write(self, kind: Kind, step: int, text: str) -> None:
        if self._active:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            path = self._workdir / FILE
            torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
            with path.open("a") as file:
                row = json.dumps({"utc": now, "kind": kind, "step": step, "text": text})
                file.write(("\n" if torn else "") + row + "\n")


def read(workdir: Path) -> list[dict[str, Any]]:
    """Reads a run's incidents; lines that were cut short are left out."""
    path = workdir / FILE
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
