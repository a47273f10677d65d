"""Which prepared images a run or a sweep is of: recorded beside it, and checked when it goes on or is scored."""

import json
from pathlib import Path
from typing import Any

from bvit_jax import files
from bvit_jax.model_config import ConfigError
from bvit_jax.prepared import PreparedSet

FILE = "images.json"


def claim(workdir: Path, name: str, found: PreparedSet | None) -> None:
    """Records the images of a run, or checks that they are the ones recorded.

    Args:
        workdir: of the run.
        name: of the images, as in the configuration.
        found: the set that is there now; None if the images need none.

    Raises:
        ConfigError: if they are others, or the record cannot be read.
    """
    if found is None:
        return
    recorded = _recorded(workdir)
    _compare(workdir, name, found, recorded)
    described = {"digest": found.digest, "version": found.version, "classes": list(found.class_names)}
    if recorded.get(name) != described:
        files.write_json(workdir / FILE, recorded | {name: described})


def check(workdir: Path, name: str, found: PreparedSet | None) -> None:
    """Checks that images are those of a run, if it has recorded any; arguments and errors as of `claim`."""
    if found is not None:
        _compare(workdir, name, found, _recorded(workdir))


def _compare(workdir: Path, name: str, found: PreparedSet, recorded: dict[str, dict[str, Any]]) -> None:
    before = recorded.get(name)
    if before is not None and before.get("digest") != found.digest:
        digests = f"digest {before.get('digest')}, not {found.digest} as in {found.directory}"
        raise ConfigError(
            f"workdir = {str(workdir)!r}: it is of other images of {name}, {digests}; give the data_dir that it began "
            f"with, or choose another workdir"
        )


def _recorded(workdir: Path) -> dict[str, dict[str, Any]]:
    """Returns what is recorded: by name, each with its digest."""
    path = workdir / FILE
    try:
        recorded = json.loads(path.read_text())
        if not (isinstance(recorded, dict) and all(isinstance(held, dict) for held in recorded.values())):
            raise ValueError("not as it was written")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        remedy = "restore it, or remove it if the images are the same"
        raise ConfigError(f"{path} cannot be read ({error}); {remedy}") from None
    return recorded
