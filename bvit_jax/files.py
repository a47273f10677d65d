"""Files written whole or not at all: a reader never finds half a file."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Writes JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes bytes."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave the new name with nothing behind it
    partial.replace(path)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table as CSV, and as JSON beside it."""
    write_text(path, to_csv(rows))
    write_json(path.with_suffix(".json"), list(rows))


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats rows of the same columns as CSV with a header, nothing if there are none; None is an empty cell."""
    text = io.StringIO()
    if not rows:
        return ""
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
    return text.getvalue()
