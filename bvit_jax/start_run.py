"""The dense run that a run starts from: found, recorded beside it, and checked when it goes on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from bvit_jax import files, trained
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError, VitShape, require

FILE = "start.json"
_FINISHED = "it must be the directory of a finished run"


@dataclasses.dataclass(frozen=True)
class Start:
    """A finished run of a dense model.

    Attributes:
        workdir: its directory.
        params_digest: of its best parameters, as its result says.
    """

    workdir: str
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
        require(found == self.params_digest, "start_from", self.workdir, wanted)
        return params


def find(config: Config) -> Start | None:
    """Finds the run that a configuration names, and checks that it is such as it can start from; None if it names none.

    Raises:
        ConfigError: if it is not there, not finished, cannot be read, is not of a dense model of equal shape, or has
            been trained on another split of the same images, on some that are now for test; for the form `reference`,
            which has no place for all its parameters.
    """
    if not config.start_from:
        return None
    reference = config.model.family == "butterfly" and config.model.form == "reference"
    require(not reference, "start_from", config.start_from, "empty for model.form = reference")
    name, path = f"start_from = {config.start_from!r}", Path(config.start_from) / "result.json"
    if not path.parent.is_dir():
        raise ConfigError(f"{name}: {_FINISHED}; there is no such directory")
    try:
        digest = str(json.loads(path.read_text())["params_digest"])
    except FileNotFoundError:
        raise ConfigError(f"{name}: {_FINISHED}; it has no result.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{name}: {_FINISHED}; its result.json cannot be read ({error!r})") from None
    _check(config, trained.config_of(path.parent, name), name)
    return Start(config.start_from, digest)


def _check(config: Config, source: Config, name: str) -> None:
    family = source.model.family
    if family != "dense":
        raise ConfigError(f"{name}: it must be a run of a dense model; it is of family {family}")
    for field in (*(field.name for field in dataclasses.fields(VitShape)), "channels", "num_classes"):
        theirs, own = getattr(source.model, field), getattr(config.model, field)
        if theirs != own:
            raise ConfigError(f"{name}: it must be a run of equal shape; its model.{field} is {theirs}, not {own}")
    theirs, own = (each.data.name.partition(":")[0] for each in (source, config))
    if theirs == own and source.data.seed != config.data.seed:
        raise ConfigError(
            f"{name}: it must be a run on the same split of {own}; its data.seed is {source.data.seed}, not "
            f"{config.data.seed}, so that it has been trained on images of this run's test"
        )


def claim(workdir: Path, config: Config) -> None:
    """Records what a run starts from, or checks that it is as recorded.

    Args:
        workdir: of the run.
        config: of the run.

    Raises:
        ConfigError: as `find`, or if the parameters have changed since, or the record cannot be read.
    """
    found = find(config)
    if found is None:
        return
    path = workdir / FILE
    if not path.exists():
        files.write_json(path, dataclasses.asdict(found))
        return
    try:
        before = str(json.loads(path.read_text())["params_digest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}); restore it, or choose another workdir") from None
    if before != found.params_digest:
        raise ConfigError(
            f"workdir = {str(workdir)!r}: it began with other parameters of start_from = {found.workdir!r}, digest "
            f"{before}, not {found.params_digest}; restore that, or choose another workdir"
        )
