"""What a run has learned, for those who only read it: export, evaluation, notebooks."""

import json
from pathlib import Path
from typing import Any

import jax

from bvit_jax import checkpoints, metrics, train_step
from bvit_jax.config import Config, from_dict
from bvit_jax.model_config import ConfigError


def best_params(workdir: Path) -> tuple[Config, int, Any]:
    """Reads the best checkpoint of a run onto the first device; nothing is changed, even while the run goes on.

    Returns:
        The run's configuration, the step of the checkpoint, and the parameters.

    Raises:
        ConfigError: if the directory is no run's, holds no checkpoint, one of another configuration, or a damaged one.
    """
    name = f"workdir = {str(workdir)!r}"
    try:
        config = from_dict(json.loads((workdir / "config.json").read_text()))
    except OSError:
        raise ConfigError(f"{name}: it must be the directory of a run; it has no config.json") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{workdir / 'config.json'}: it is damaged, or of another version ({error})") from None
    directory = workdir / checkpoints.DIRECTORY
    steps = checkpoints.steps_in(directory)
    if not steps:
        raise ConfigError(f"{name}: it holds no checkpoint yet")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = checkpoints.abstract_state(train_step.state_shapes(config), place)
    try:
        step = _best_step(workdir, checkpoints.read_record(directory, steps[-1]), steps)
        if step is None:
            raise ConfigError(f"{name}: it holds no evaluated checkpoint yet")
        return config, step, checkpoints.restore(directory, step, config, abstract)[0].params
    except checkpoints.DamagedError as error:
        remedy = "start the training again, without result.json if there is one: it makes good what is damaged"
        raise ConfigError(f"{name}: {error}; {remedy}") from None


def _best_step(workdir: Path, newest: checkpoints.Record, steps: list[int]) -> int | None:
    """Returns the step of the best checkpoint that is there; the log may be ahead of the newest one."""
    path = workdir / "metrics.jsonl"
    log = path.read_text(errors="replace") if path.exists() else ""
    rows = metrics.parse(log if log.startswith(newest.metrics) else newest.metrics)
    best = metrics.best_row([row for row in rows if row["step"] in steps])
    return best["step"] if best else None
