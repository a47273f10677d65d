"""What a run has learned, for those who only read it: export, evaluation, notebooks."""

import json
from pathlib import Path
from typing import Any

import jax

from bvit_jax import bundles, checkpoints, digests, metrics, train_step
from bvit_jax.config import Config, from_dict
from bvit_jax.model_config import ConfigError


def best_params(workdir: Path, place: jax.sharding.Sharding | None = None) -> tuple[Config, int, Any]:
    """Reads the best checkpoint of a run; nothing is changed, even while the run goes on.

    Args:
        workdir: of the run.
        place: where every array goes, the first device by default; one of several processes is for all of them to read.

    Returns:
        The run's configuration, the step of the checkpoint, and the parameters, averaged if the run averages them.

    Raises:
        ConfigError: if the directory is no run's, holds no checkpoint, one of another configuration, or a damaged one.
    """
    name = f"workdir = {str(workdir)!r}"
    config = config_of(workdir, name)
    place = place or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = train_step.abstract_state(train_step.state_shapes(config), place)
    while True:
        directory, step = workdir / checkpoints.DIRECTORY, _best_step(workdir, name)
        try:
            return config, step, checkpoints.restore(directory, step, config, abstract)[0].evaluated
        except (checkpoints.DamagedError, ConfigError) as error:
            if (directory / str(step)).exists():
                if isinstance(error, ConfigError):
                    raise
                remedy = "start the training again, without result.json if there is one: it makes good what is damaged"
                raise ConfigError(f"{name}: {error}; {remedy}") from None
            # The run has found a better one and dropped this.


def config_of(workdir: Path, name: str) -> Config:
    """Reads the configuration of a run.

    Args:
        workdir: of the run.
        name: what the user calls the directory, for errors.

    Raises:
        ConfigError: if the directory is no run's, or its configuration is damaged.
    """
    try:
        return from_dict(json.loads((workdir / "config.json").read_text()))
    except OSError:
        raise ConfigError(f"{name}: it must be the directory of a run; it has no config.json") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{workdir / 'config.json'}: it is damaged, or of another version ({error})") from None


def result_of(workdir: Path) -> dict[str, Any] | None:
    """Reads the content of a run's `result.json`; None if it is not there yet, or cannot be read."""
    try:
        found = json.loads((workdir / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def params_digest(params: Any) -> str:
    """Returns one digest of parameters; in a run of several processes all of them call this."""
    return digests.combined(digests.of_tree(bundles.bundle(params)))


def _best_step(workdir: Path, name: str) -> int:
    """Returns the step of the best checkpoint that is there."""
    directory = workdir / checkpoints.DIRECTORY
    steps = checkpoints.steps_in(directory)
    if not steps:
        raise ConfigError(f"{name}: it holds no checkpoint yet")
    path = workdir / "metrics.jsonl"
    log = path.read_text(errors="replace") if path.exists() else ""
    known = _newest_known(directory, steps)
    # The log may be ahead of the newest checkpoint; one that does not begin as it should is damaged.
    best = metrics.best_row(log if log.startswith(known) else known, steps)
    if best is None:
        raise ConfigError(f"{name}: it holds no evaluated checkpoint yet")
    return int(best["step"])


def _newest_known(directory: Path, steps: list[int]) -> str:
    """Returns the rows of metrics of the newest checkpoint that is not damaged; none if all are."""
    for step in reversed(steps):
        try:
            return checkpoints.read_record(directory, step).metrics
        except checkpoints.DamagedError:
            continue
    return ""
