"""Which prepared images a run or a sweep is of: recorded beside it, and checked wherever it goes on or is scored."""

import json
from pathlib import Path

from bvit_jax import files
from bvit_jax.model_config import ConfigError
from bvit_jax.prepared import PreparedSet

FILE = "images.json"


def claim(workdir: Path, name: str, found: PreparedSet) -> None:
    """Records the images of a run, or checks that they are the ones recorded.

    Args:
        workdir: of the run.
        name: of the images, as in the configuration.
        found: the set that is there now.

    Raises:
        ConfigError: if they are others.
    """
    check(workdir, name, found)
    described = {"digest": found.digest, "version": found.version, "classes": list(found.class_names)}
    recorded = _recorded(workdir) | {name: described}
    if recorded != _recorded(workdir):
        files.write_json(workdir / FILE, recorded)


def check(workdir: Path, name: str, found: PreparedSet) -> None:
    """Checks that images are those of a run, if it has recorded any.

    Raises:
        ConfigError: if they are others.
    """
    before = _recorded(workdir).get(name)
    if isinstance(before, dict) and before.get("digest") != found.digest:
        digests = f"digest {before.get('digest')}, not {found.digest} as in {found.directory}"
        raise ConfigError(
            f"workdir = {str(workdir)!r}: it is of other images of {name}, {digests}; give the data_dir that it began "
            f"with, or choose another workdir"
        )


def _recorded(workdir: Path) -> dict[str, object]:
    """Returns what is recorded; what is damaged is none, and is recorded again."""
    try:
        recorded = json.loads((workdir / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return recorded if isinstance(recorded, dict) else {}
