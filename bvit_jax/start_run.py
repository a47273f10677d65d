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
_OF_DIGITS = {"digits", "few_digits", "digit_pairs"}
_DEALING: dict[str, tuple[str, ...]] = {
    **{"digits": (), "few_digits": ("seed",), "digit_pairs": ("seed",), "photo_patches": ("seed",)},
    "procedural": ("seed", "num_train", "num_validation", "num_test"),
}
"""Fields that decide which images of an embedded set are held out."""


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
        ConfigError: if it is not there, not finished, cannot be read, is not of a dense model of equal shape, or had
            the same images dealt otherwise, so that it may have been trained on some that are held out now; for the
            form `reference`, which has no place for all its parameters.
    """
    if not config.start_from:
        return None
    reference = config.model.family == "butterfly" and config.model.form == "reference"
    require(not reference, "start_from", config.start_from, "empty for model.form = reference")
    name, source = f"start_from = {config.start_from!r}", Path(config.start_from)
    if not source.is_dir():
        raise ConfigError(f"{name}: {_FINISHED}; there is no such directory")
    try:
        digest = _digest(source / "result.json")
    except FileNotFoundError:
        raise ConfigError(f"{name}: {_FINISHED}; it has no result.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{name}: {_FINISHED}; its result.json cannot be read ({error!r})") from None
    _check(config, trained.config_of(source, name), name)
    return Start(config.start_from, digest)


def _check(config: Config, source: Config, name: str) -> None:
    family = source.model.family
    if family != "dense":
        raise ConfigError(f"{name}: it must be a run of a dense model; it is of family {family}")
    for field in (*(field.name for field in dataclasses.fields(VitShape)), "channels", "num_classes"):
        theirs, own = getattr(source.model, field), getattr(config.model, field)
        if theirs != own:
            raise ConfigError(f"{name}: it must be a run of equal shape; its model.{field} is {theirs}, not {own}")
    for field in _dealing(source.data.name, config.data.name):
        theirs, own = getattr(source.data, field), getattr(config.data, field)
        if theirs != own:
            raise ConfigError(
                f"{name}: it must be a run with the same images held out; its data.{field} is {theirs}, not {own}, so "
                f"that it may have been trained on images of this run's test or validation"
            )


def _dealing(*names: str) -> tuple[str, ...]:
    """Returns the fields that must be equal for two sets of images to hold out the same; none for different names.

    Versions of a prepared set are taken for the same images, its configurations for others.
    """
    bare = {name.partition(":")[0] for name in names}
    if len(bare) == 1:
        return _DEALING.get(bare.pop(), ("seed", "num_validation"))  # a prepared set holds out the first
    return ("name",) if bare <= _OF_DIGITS else ()


def claim(workdir: Path, config: Config) -> None:
    """Records what a run starts from; once that is recorded, only checks that it is not another run's parameters now.

    A run with a checkpoint goes on though its source is gone; one that needs it is told so by `recorded`.

    Args:
        workdir: of the run.
        config: of the run.

    Raises:
        ConfigError: as `find`, or if the parameters have changed since, or the record cannot be read.
    """
    if not (workdir / FILE).exists():
        found = find(config)
        if found is not None:
            files.write_json(workdir / FILE, dataclasses.asdict(found))
        return
    try:
        digest = _digest(Path(config.start_from) / "result.json")
    except (OSError, ValueError, KeyError, TypeError):
        return  # the source is gone, in whole or in part
    _check_same(workdir, Start(config.start_from, digest))


def recorded(workdir: Path, config: Config) -> Start | None:
    """Returns what a run that has been claimed starts from, which is still there; None if it starts from nothing.

    Raises:
        ConfigError: as `find` and `claim`.
    """
    found = find(config)
    if found is not None:
        _check_same(workdir, found)
    return found


def _digest(path: Path) -> str:
    """Reads the digest of parameters out of a result, or out of a record of what a run started from."""
    return str(json.loads(path.read_text())["params_digest"])


def _check_same(workdir: Path, found: Start) -> None:
    path = workdir / FILE
    try:
        before = _digest(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}); restore it, or choose another workdir") from None
    if before != found.params_digest:
        raise ConfigError(
            f"workdir = {str(workdir)!r}: it began with other parameters of start_from = {found.workdir!r}, digest "
            f"{before}, not {found.params_digest}; restore that, or choose another workdir"
        )
