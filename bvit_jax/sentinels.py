"""What watches over a run: steps whose loss or gradient is not finite, and experts that die or collapse.

The first is found on the device, in the step itself: such a step changes no parameter, and after one too many nothing
changes any more, so the state in which it happened is still there when the host comes to look.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from bvit_jax import components, files
from bvit_jax.batches import Batch

COLLAPSED_SHARE = 0.25
"""Warn where the load is spread as if over less than this share of the experts."""


class NonFiniteError(FloatingPointError):
    """More steps than allowed had a loss or a gradient that is not finite; the message names the report."""


@struct.dataclass
class Sentinel:
    """What is known of the steps that were not finite.

    Attributes:
        skipped: int32 (), such steps so far.
        step: int32 (), the latest of them, counted from 1; 0 if there is none.
        loss: float32 (), of that step.
        squared_norms: {component: float32 ()}, squared norm of its gradient in each group of parameters.
    """

    skipped: jax.Array
    step: jax.Array
    loss: jax.Array
    squared_norms: dict[str, jax.Array]


def squared_norms(gradients: Any) -> dict[str, jax.Array]:
    """Returns {component: squared norm, float32 ()} for the components (`bvit_jax.components`) that are there."""
    sums: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = components.component_of(components.path_of(path))
        squared = optax.tree.norm(leaf, squared=True)  # as the clipping forms it: the compiler sees one sum
        sums[name] = sums[name] + squared if name in sums else squared
    return sums


def initial(params: Any) -> Sentinel:
    """Returns the sentinel before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return Sentinel(zero, zero, jnp.zeros(()), jax.tree.map(jnp.zeros_like, squared_norms(params)))


def watch(
    before: Sentinel, step: jax.Array, loss: jax.Array, norms: dict[str, jax.Array], allowed: int
) -> tuple[Sentinel, jax.Array]:
    """Looks at one step.

    Args:
        before: what was known.
        step: int32 (), number of this step, from 1.
        loss: float32 ().
        norms: as `squared_norms`.
        allowed: steps that may be skipped.

    Returns:
        What is known now, and whether to take the step: bool ().
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(sum(norms.values()))
    running = before.skipped <= allowed
    bad = Sentinel(before.skipped + 1, step, loss, norms)
    after = jax.tree.map(lambda new, old: jnp.where(running & ~finite, new, old), bad, before)
    return after, running & finite


def write_report(workdir: Path, sentinel: Sentinel, batch: Batch, indices: np.ndarray) -> Path:
    """Writes what is known of a step that was not finite.

    Args:
        workdir: gets `nonfinite/step_N.json` and, with the batch as it was before augmentation, `step_N.npz`.
        sentinel: of that step.
        batch: the whole batch of that step.
        indices: of its images in the training split.

    Returns:
        Path of the JSON file: step, loss, gradient_norm of every group ("inf", "nan" as text), groups (those that are
        not finite), and indices, labels, smallest and largest pixel of the batch, uint8.
    """
    step = int(sentinel.step)
    norms = {name: math.sqrt(float(squared)) for name, squared in sentinel.squared_norms.items()}
    path = workdir / "nonfinite" / f"step_{step}.json"
    path.parent.mkdir(exist_ok=True)
    np.savez(path.with_suffix(".npz"), images=batch.images, labels=batch.labels, indices=indices)
    report = {
        "step": step,
        "loss": _plain(float(sentinel.loss)),
        "groups": bad_groups(sentinel),
        "gradient_norm": {name: _plain(norm) for name, norm in norms.items()},
        "batch": {
            "indices": indices.tolist(),
            "labels": batch.labels.tolist(),
            "pixel_min": int(batch.images.min()),
            "pixel_max": int(batch.images.max()),
        },
    }
    files.write_json(path, report)
    return path


def bad_groups(sentinel: Sentinel) -> list[str]:
    """Lists the components whose gradient was not finite."""
    return [name for name, squared in sentinel.squared_norms.items() if not math.isfinite(float(squared))]


def describe(sentinel: Sentinel) -> str:
    """Says in words what was not finite."""
    groups = bad_groups(sentinel)
    gradient = f"gradient of {', '.join(groups)} not finite" if groups else "every group's gradient finite"
    return f"step {int(sentinel.step)}: loss {float(sentinel.loss):.4g}, {gradient}"


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


@dataclasses.dataclass(frozen=True)
class Spread:
    """How the tokens of one mixture layer are spread over its experts.

    Attributes:
        experts: in all.
        dead: experts that received nothing.
        busiest: share of the fullest.
        effective: experts that would give the same entropy of the load if they shared it equally, 1 to `experts`.
    """

    experts: int
    dead: int
    busiest: float
    effective: float

    @property
    def warning(self) -> str | None:
        """What is wrong in words, None if nothing is."""
        if not self.dead and self.effective >= COLLAPSED_SHARE * self.experts:
            return None
        return (
            f"{self.dead} of {self.experts} experts dead, the busiest took {100 * self.busiest:.1f} % of the load "
            f"(fair share {100 / self.experts:.1f} %), as if spread over {self.effective:.1f} experts"
        )


def spread(loads: tuple[float, ...]) -> Spread:
    """Measures the shares that the experts of a layer received; they sum to 1."""
    entropy = -sum(share * math.log(share) for share in loads if share > 0)
    return Spread(len(loads), sum(share == 0 for share in loads), max(loads), math.exp(entropy))


def expert_warnings(load_MxE: tuple[tuple[float, ...], ...]) -> list[str]:
    """Returns a line for each mixture layer whose experts are dead or collapsing."""
    found = ((number, spread(loads).warning) for number, loads in enumerate(load_MxE))
    return [f"mixture layer {number}: {warning}" for number, warning in found if warning]
