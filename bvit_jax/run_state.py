"""How far a run is, by what lies in its directory; nothing is written there, and a run that goes on is left alone."""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from bvit_jax import journal, metrics, trained
from bvit_jax import workdir as workdirs
from bvit_jax.config import Config

Status = Literal["finished", "going on", "stopped", "not begun"]
_ENDS: tuple[journal.Kind, ...] = ("preempted", "stopped")
"""Incidents that end a process."""


@dataclasses.dataclass(frozen=True, eq=False)
class RunState:
    """One run.

    Attributes:
        path: its directory.
        config: its configuration.
        status: `finished` with a result; else `going on` while a process holds the directory, `stopped` if none does,
            and `not begun` if no step has been recorded either.
        steps: done so far, as is known from metrics and incidents.
        note: why it stands where it stands, for people; empty of a finished run.
        result: the content of `result.json`; None if there is none.
        incidents: the rows of `incidents.jsonl`.
        metrics: the rows of `metrics.jsonl`: step, split, loss, accuracy, nll, ...; some are nan in rows of a split.
    """

    path: Path
    config: Config
    status: Status
    steps: int
    note: str
    result: dict[str, Any] | None
    incidents: list[dict[str, Any]]
    metrics: pd.DataFrame

    @property
    def progress(self) -> str:
        """Says how far it is, in a few words."""
        total = self.config.total_steps
        if self.status == "finished":
            return f"finished, {total:,} steps"
        return f"{self.status} at step {self.steps:,} of {total:,}" + (f": {self.note}" if self.note else "")


def read(workdir: str | os.PathLike[str]) -> RunState:
    """Looks at the directory of a run.

    Raises:
        ConfigError: if it is none (`trained.config_of`).
    """
    path = Path(workdir)
    config = trained.config_of(path, f"workdir = {str(path)!r}")
    rows = metrics.read_rows(path / "metrics.jsonl")
    result = trained.result_of(path)
    incidents = [row for row in journal.read(path) if isinstance(row, dict)]
    holder = workdirs.holder(path)
    steps = max((int(row.get("step", 0)) for row in rows), default=0)
    ends = [row for row in incidents if row.get("kind") in _ENDS and int(row.get("step", 0)) >= steps]
    steps = max([steps, *(int(row.get("step", 0)) for row in ends)])
    status: Status = "stopped" if steps or ends else "not begun"
    note = str(ends[-1].get("text", "")) if ends else ""
    if result is not None:
        status, note = "finished", ""
    elif holder is not None:
        status, note = "going on", holder
    return RunState(path, config, status, steps, note, result, incidents, pd.DataFrame(rows))
