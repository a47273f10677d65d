"""Exact evaluation over a whole split, and what a model's routers and prototypes look like, as plain data.

Axes: M mixture layers, E experts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bvit_jax import components, data, ternary, train_step
from bvit_jax.model_config import ModelConfig
from bvit_jax.sharding import Placement


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of one pass over a split; every image counted once.

    Attributes:
        accuracy: share classified rightly.
        nll: mean negative log-likelihood, nats.
        count: images.
        load_MxE: for each mixture layer, the share of (token, choice) pairs that each expert received; empty without
            mixture layers.
        entropy_M: mean entropy of the routing probabilities, nats.
    """

    accuracy: float
    nll: float
    count: int
    load_MxE: tuple[tuple[float, ...], ...] = ()
    entropy_M: tuple[float, ...] = ()

    @property
    def dead_experts_M(self) -> tuple[int, ...]:
        """For each mixture layer, the number of experts that received nothing."""
        return tuple(sum(share == 0 for share in loads) for loads in self.load_MxE)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON; the router's part only where there are mixture layers."""
        row: dict[str, Any] = {"accuracy": self.accuracy, "nll": self.nll, "count": self.count}
        if self.load_MxE:
            row |= {
                "router_entropy": list(self.entropy_M),
                "dead_experts": list(self.dead_experts_M),
                "expert_load": [list(loads) for loads in self.load_MxE],
            }
        return row


def evaluate(
    params: Any,
    config: ModelConfig,
    split: data.AnySplit,
    batch_size: int,
    placement: Placement,
    between: Callable[[], None] | None = None,
) -> Evaluation:
    """Runs the model over every image of `split`; sums are formed in float64.

    Args:
        params: as `vit.init_params`.
        config: the model they belong to.
        split: any number of images; the last batch is padded and masked.
        batch_size: images a batch, over all processes; a multiple of the devices.
        placement: devices to run on; in a run of several processes all of them call this.
        between: called after each batch; what it raises ends the evaluation.
    """
    step = train_step.make_eval_step(config, placement)
    rows = placement.host_rows(batch_size)
    total: Any = None
    for batch in data.eval_batches(split, batch_size, rows):
        arrays = (batch.images, batch.labels, batch.weights)
        sums = step(params, *placement.put_batch(arrays, rows, batch_size))
        sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        if between is not None:
            between()
    count = float(total.count)
    load: tuple[tuple[float, ...], ...] = ()
    entropy: tuple[float, ...] = ()
    if total.assignments_MxE is not None:
        shares_MxE = total.assignments_MxE / total.assignments_MxE.sum(axis=1, keepdims=True)
        load = tuple(tuple(row) for row in shares_MxE.tolist())
        entropy = tuple((total.entropy_M / count).tolist())
    return Evaluation(float(total.correct) / count, float(total.nll) / count, int(count), load, entropy)


def from_logits(logits_nxC: np.ndarray, labels_n: np.ndarray) -> Evaluation:
    """Scores logits, one row an image, against labels; sums are formed in float64."""
    logits = logits_nxC.astype(np.float64)
    largest = logits.max(axis=1)
    log_norm = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    nll = log_norm - logits[np.arange(len(labels_n)), labels_n]
    return Evaluation(float((logits.argmax(axis=1) == labels_n).mean()), float(nll.mean()), len(labels_n))


def without_rotations(params: Any) -> Any:
    """Returns parameters with every angle 0: all butterfly experts of a layer become one, the prototype itself."""

    def stilled(path: Any, leaf: jax.Array) -> jax.Array:
        return jnp.zeros_like(leaf) if components.component_of(components.path_of(path)) == "angles" else leaf

    return jax.tree_util.tree_map_with_path(stilled, params)


def ternary_statistics(params: Any, config: ModelConfig) -> dict[str, dict[str, float]]:
    """Returns {"zeros", "scale"} of the ternary matrices by path, averaged over layers, and experts, of one path."""
    found: dict[str, dict[str, float]] = {}
    if not config.has_ternary_experts or config.ternary_scale == "none":
        return found
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = components.path_of(key_path)
        if components.component_of(path) in ("prototype", "experts"):
            stats = ternary.statistics(leaf, config.ternary_scale)
            found[path] = {"zeros": float(stats.zeros), "scale": float(stats.scale)}
    return found
