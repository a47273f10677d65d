"""Ways to damage the files of a run, for the test of what survives them."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from bvit_jax import checkpoints

Damage = Callable[[Path, random.Random], str]
"""(folder of a checkpoint, source of randomness) -> what was done, in words."""


def flip_byte(folder: Path, rng: random.Random) -> str:
    """Flips one bit of one byte of one file."""
    path = rng.choice([path for path in _files(folder, "state", "record") if path.stat().st_size])
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"a bit of byte {place} of {path.relative_to(folder)} flipped"


def truncate(folder: Path, rng: random.Random) -> str:
    """Cuts one file of the state short."""
    path = rng.choice([path for path in _files(folder, "state") if path.stat().st_size])
    length = rng.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:length])
    return f"{path.relative_to(folder)} cut to {length} bytes"


def remove_file(folder: Path, rng: random.Random) -> str:
    """Removes one file of the state."""
    path = rng.choice(_files(folder, "state"))
    path.unlink()
    return f"{path.relative_to(folder)} removed"


def empty(folder: Path, rng: random.Random) -> str:
    """Removes everything in the folder."""
    del rng
    shutil.rmtree(folder)
    folder.mkdir()
    return "emptied"


def spoil_json(folder: Path, rng: random.Random) -> str:
    """Cuts the record's JSON off within its text."""
    path = folder / "record" / "metadata"
    text = path.read_text()
    path.write_text(text[: rng.randrange(1, len(text) - 1)] + '"')
    return "the record's JSON spoilt"


KINDS: dict[str, Damage] = {
    "flipped byte": flip_byte,
    "truncated file": truncate,
    "missing file": remove_file,
    "empty step": empty,
    "bad JSON": spoil_json,
}


def cut_metrics(workdir: Path, rng: random.Random) -> str:
    """Cuts `metrics.jsonl` short, within what the newest checkpoint knows."""
    path = workdir / "metrics.jsonl"
    directory = workdir / checkpoints.DIRECTORY
    known = len(checkpoints.read_record(directory, checkpoints.steps_in(directory)[-1]).metrics)
    length = rng.randrange(known)
    path.write_bytes(path.read_bytes()[:length])
    return f"metrics.jsonl cut to {length} bytes"


def _files(folder: Path, *parts: str) -> list[Path]:
    return sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file())
