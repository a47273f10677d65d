"""Which other runs a run takes parameters from: found, recorded beside it, and checked when it goes on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from bvit_jax import files, trained
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError, VitShape, require

FILE = "sources.json"
_FINISHED = "it must be the directory of a finished run"


@dataclasses.dataclass(frozen=True)
class Source:
    """A finished run.

    Attributes:
        field: of the configuration, that names it.
        workdir: its directory.
        config: its configuration.
        params_digest: of its best parameters, as its result says.
    """

    field: str
    workdir: str
    config: Config
    params_digest: str

    def params(self, place: jax.sharding.Sharding) -> Any:
        """Reads its best parameters; in a run of several processes all of them call this.

        Args:
            place: where every array goes.

        Raises:
            ConfigError: as `trained.best_params`, or if they are not those of its result.
        """
        params = trained.best_params(Path(self.workdir), place)[2]
        found = trained.params_digest(params)
        wanted = f"a run whose best parameters have the digest of its result.json, {self.params_digest}; it is {found}"
        require(found == self.params_digest, self.field, self.workdir, wanted)
        return params


def find(config: Config) -> list[Source]:
    """Finds the runs that a configuration names, and checks that they are such as it can use.

    Raises:
        ConfigError: if one is not there, not finished, cannot be read or is of the wrong kind.
    """
    return [start(config)] if config.start_from else []


def start(config: Config) -> Source:
    """Finds the run that this one starts from; errors as of `find`."""
    source = _finished("start_from", config.start_from)
    family = source.config.model.family
    if family != "dense":
        raise ConfigError(
            f"start_from = {config.start_from!r}: it must be a run of a dense model; it is of family {family}"
        )
    for field in (*(field.name for field in dataclasses.fields(VitShape)), "channels", "num_classes"):
        theirs, own = getattr(source.config.model, field), getattr(config.model, field)
        require(
            theirs == own,
            "start_from",
            config.start_from,
            f"a run of equal shape; its model.{field} is {theirs}, not {own}",
        )
    return source


def claim(workdir: Path, config: Config) -> None:
    """Records the runs that a run takes parameters from, or checks that they are as recorded.

    Args:
        workdir: of the run.
        config: of the run.

    Raises:
        ConfigError: as `find`, or if their parameters have changed since, or the record cannot be read.
    """
    sources = find(config)
    if not sources:
        return
    found = {source.field: {"workdir": source.workdir, "params_digest": source.params_digest} for source in sources}
    path = workdir / FILE
    if not path.exists():
        files.write_json(path, found)
        return
    try:
        recorded = json.loads(path.read_text())
        before = {field: recorded[field]["params_digest"] for field in found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}); restore it, or choose another workdir") from None
    for source in sources:
        if before[source.field] != source.params_digest:
            raise ConfigError(
                f"workdir = {str(workdir)!r}: it began with other parameters of {source.field} = {source.workdir!r}, "
                f"digest {before[source.field]}, not {source.params_digest}; restore that, or choose another workdir"
            )


def _finished(field: str, workdir: str) -> Source:
    name, path = f"{field} = {workdir!r}", Path(workdir) / "result.json"
    if not path.parent.is_dir():
        raise ConfigError(f"{name}: {_FINISHED}; there is no such directory")
    try:
        digest = str(json.loads(path.read_text())["params_digest"])
    except FileNotFoundError:
        raise ConfigError(f"{name}: {_FINISHED}; it has no result.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{name}: {_FINISHED}; its result.json cannot be read ({error!r})") from None
    return Source(field, workdir, trained.config_of(path.parent, name), digest)
