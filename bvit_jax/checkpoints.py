"""Checkpoints of a run, kept by orbax: the newest, to go on from, and the best on validation, to report."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from bvit_jax import workdir as workdirs
from bvit_jax.config import Config, from_dict
from bvit_jax.model_config import ConfigError
from bvit_jax.train_step import TrainState, init_state


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
    """Orders checkpoints: higher accuracy first, then lower negative log-likelihood; of equals the later wins."""
    return metrics["accuracy"], -metrics["nll"]


class Checkpoints:
    """The checkpoints under one directory; use it as a context, which waits for what is still being written.

    With `read_only` nothing in the directory changes, even while a run writes there.
    """

    def __init__(self, directory: Path, read_only: bool = False) -> None:
        # Ranks are tuples, which sort as well as the floats that orbax's annotations ask for.
        rank: Any = _rank
        best = BestN(get_metric_fn=rank, n=1)
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=rank,
                preservation_policy=AnyPreservationPolicy([LatestN(1), best]),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                enable_async_checkpointing=False,
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint that does best on validation, None if there is none."""
        return self._manager.best_step()

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the validation accuracy and negative log-likelihood of a checkpoint."""
        return self._manager.metrics(step)

    def save(self, state: TrainState, config: Config, accuracy: float, nll: float) -> None:
        """Writes the state, with the configuration inside, and drops what is neither newest nor best."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(config.to_dict())),
            metrics={"accuracy": accuracy, "nll": nll},
        )

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads the state of a step; `abstract` gives shapes, dtypes and, where they have one, shardings."""
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=arguments)["state"]

    def config(self, step: int) -> dict[str, Any]:
        """Reads the configuration inside a checkpoint, as `Config.to_dict` gave it."""
        return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]


def best_params(workdir: Path) -> tuple[Config, int, Any]:
    """Reads the best checkpoint of a run onto the first device.

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
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        raise ConfigError(f"{name}: it holds no checkpoint yet")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # orbax warns of read_only itself
    try:
        return config, *_best(directory, config, name)
    finally:
        logging.set_verbosity(verbosity)


def _best(directory: Path, config: Config, name: str) -> tuple[int, Any]:
    with Checkpoints(directory, read_only=True) as checkpoints:
        step = checkpoints.best_step
        if step is None:
            raise ConfigError(f"{name}: it holds no checkpoint yet")
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        state = jax.eval_shape(lambda: init_state(config))
        try:
            differing = workdirs.differences(checkpoints.config(step), config.to_dict())
            if differing:
                raise ConfigError(
                    f"{name}: config.json and the checkpoint of step {step} differ: {'; '.join(differing)}"
                )
            return step, checkpoints.restore(step, abstract_state(state, place)).params
        except ConfigError:
            raise
        except Exception as error:  # orbax raises what it likes, bare Exception included
            raise ConfigError(f"{name}: the checkpoint of step {step} cannot be read: {str(error)[:200]}") from None


def abstract_state(state: TrainState, shardings: Any) -> TrainState:
    """Describes a state that is not there, every array where `shardings` says; a single one stands for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, state)
    return jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), state, shardings)
