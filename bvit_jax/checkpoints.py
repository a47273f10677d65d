"""Checkpoints of a run, kept by orbax: the newest, to go on from, and the best on validation, to report."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from bvit_jax.config import Config
from bvit_jax.train_step import TrainState


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
    """Orders checkpoints: higher accuracy first, then lower negative log-likelihood; of equals the later wins."""
    return metrics["accuracy"], -metrics["nll"]


class Checkpoints:
    """The checkpoints under one directory; use it as a context, which waits for what is still being written."""

    def __init__(self, directory: Path) -> None:
        # Ranks are tuples, which sort as well as the floats that orbax's annotations ask for.
        rank: Any = _rank
        best = BestN(get_metric_fn=rank, n=1)
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=rank,
                preservation_policy=AnyPreservationPolicy([LatestN(1), best]),
                cleanup_tmp_directories=True,
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


def abstract_state(state: TrainState, placement: jax.sharding.Sharding) -> TrainState:
    """Describes a state to be restored with every array placed as told."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement), state)
