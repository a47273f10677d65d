"""Records of a run: JSON lines that can be taken up again after an interruption, and TensorBoard scalars."""

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from bvit_jax import files


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines; a last line that was cut short is left out. An absent file has no rows."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().split("\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class JsonLines:
    """Appends rows, each with a `step`, to a file; on opening drops those after `last_step`, and any of the test split.

    The test split is reported last, so a run that is taken up again has not come to it.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [row for row in read_rows(path) if row["step"] <= last_step and row.get("split") != "test"]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
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

    On the same devices and library versions `metrics.jsonl` is a function of the configuration alone. One that is not
    `active` writes nothing: of several processes, one does.
    """

    def __init__(self, workdir: Path, last_step: int, active: bool = True) -> None:
        self._active = active
        if not active:
            return
        self._metrics = JsonLines(workdir / "metrics.jsonl", last_step)
        self._timing = JsonLines(workdir / "timing.jsonl", last_step)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=last_step + 1)

    def metrics(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Records values of one split at one step; TensorBoard takes the numbers among them."""
        if self._active:
            self._metrics.write({"step": step, "split": split, **values})
            self._scalars(step, split, values)

    def timing(self, step: int, values: dict[str, float]) -> None:
        """Records how long things took and how much memory: what may differ from run to run."""
        if self._active:
            self._timing.write({"step": step, **values})
            self._scalars(step, "timing", values)

    def close(self) -> None:
        """Closes all files."""
        if not self._active:
            return
        self._metrics.close()
        self._timing.close()
        self._board.close()

    def _scalars(self, step: int, prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{prefix}/{name}", value, step)
