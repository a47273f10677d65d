"""Records of a run: JSON lines that can be taken up again after an interruption, and TensorBoard scalars."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from bvit_jax import files, timing


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines; a last line that was cut short is left out. An absent file has no rows."""
    return parse(path.read_text(errors="replace")) if path.exists() else []


def parse(text: str) -> list[dict[str, Any]]:
    """Reads JSON objects, one a line, up to the first line that is none; what has no line break is no line yet."""
    rows = []
    for line in text.split("\n")[:-1]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def best_row(text: str, steps: Collection[int] | None = None) -> dict[str, Any] | None:
    """Returns the validation row that does best of a whole `metrics.jsonl`, None if there is none.

    Higher accuracy first, then lower negative log-likelihood; of equals the later.

    Args:
        text: whole lines.
        steps: only rows of these.
    """
    # Of a long run nearly all rows are of training: they are left unread.
    rows = parse("".join(line for line in text.splitlines(keepends=True) if '"validation"' in line))
    scored = (row for row in rows if row.get("split") == "validation" and (steps is None or row["step"] in steps))
    return max(scored, key=lambda row: (row["accuracy"], -row["nll"], row["step"]), default=None)


class JsonLines:
    """Appends rows to a file that holds `text` to begin with."""

    def __init__(self, path: Path, text: str) -> None:
        files.write_text(path, text)
        self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row and flushes it."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class RunLog:
    """Writes a run's `metrics.jsonl`, `timing.jsonl` and TensorBoard events.

    On the same devices and library versions `metrics.jsonl` is a function of the configuration alone.

    Attributes:
        text: content of `metrics.jsonl`, also where another process writes it.
    """

    def __init__(self, workdir: Path, last_step: int, known: str, active: bool = True) -> None:
        """Takes the files up, perhaps after an interruption.

        Args:
            workdir: of the run.
            last_step: that the run goes on from; later rows of `timing.jsonl` are dropped.
            known: content of `metrics.jsonl` up to that step, which replaces whatever the file holds.
            active: one that is not writes nothing: of several processes, one does.
        """
        self.text = known
        self._active = active
        if not active:
            return
        rows = timing.valid(read_rows(workdir / "timing.jsonl"))
        timed = [row for row in rows if row["step"] <= last_step]
        self._metrics = JsonLines(workdir / "metrics.jsonl", known)
        self._timing = JsonLines(workdir / "timing.jsonl", "".join(json.dumps(row) + "\n" for row in timed))
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=last_step + 1)

    def metrics(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Records values of one split at one step; TensorBoard takes the numbers among them."""
        row = {"step": step, "split": split, **values}
        self.text += json.dumps(row) + "\n"
        if self._active:
            self._metrics.write(row)
            self._scalars(step, split, values)

    def timing(self, step: int, values: dict[str, float]) -> None:
        """Records how long things took and how much memory: what may differ from run to run."""
        if self._active:
            self._timing.write({"step": step, **values})
            self._scalars(step, "timing", values)

    def close(self) -> None:
        """Closes all files."""
        if self._active:
            self._metrics.close()
            self._timing.close()
            self._board.close()

    def _scalars(self, step: int, prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{prefix}/{name}", value, step)
