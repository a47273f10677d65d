"""Ternary quantiser with a straight-through estimator.

    scale = max(mean |W|, 1e-5)        W_q = scale * clip(round(W / scale), -1, 1)

with the mean taken over the input axis, which gives one scale per output channel (`row`: a row of the matrix W of
y = W x), or over the whole matrix (`tensor`). Rounding has no useful gradient, so the gradient of W_q is handed to W
unchanged.

References:
    Ma et al., "The Era of 1-bit LLMs", arXiv 2402.17764 (absmean quantiser).
    Bengio et al., arXiv 1308.3432 (straight-through estimator).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

ScaleKind = Literal["row", "tensor"]
SCALE_KINDS: tuple[ScaleKind, ...] = ("row", "tensor")
SCALE_FLOOR = 1e-5


@struct.dataclass
class TernaryStats:
    """What a prototype looks like once quantised, averaged over all its elements.

    Attributes:
        zeros: float32 (), share of weights that are 0.
        scale: float32 (), mean scale.
    """

    zeros: jax.Array
    scale: jax.Array


def ternarise(w_IxO: jax.Array, kind: ScaleKind = "row") -> tuple[jax.Array, jax.Array]:
    """Splits a matrix into trits and scales; not differentiable.

    Args:
        w_IxO: (..., inputs, outputs), floating: the kernel of y = x @ w.
        kind: `row` for one scale per output channel, `tensor` for one per matrix.

    Returns:
        Trits in {-1, 0, 1}, the shape and dtype of `w_IxO`, and scales of the same dtype, (..., 1, outputs) or
        (..., 1, 1).

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in SCALE_KINDS:
        raise ValueError(f"ternary scale {kind!r} is unknown; choose one of {', '.join(SCALE_KINDS)}")
    axes = (-2,) if kind == "row" else (-2, -1)
    scale = jnp.maximum(jnp.abs(w_IxO).mean(axis=axes, keepdims=True), SCALE_FLOOR)
    return jnp.clip(jnp.round(w_IxO / scale), -1, 1), scale


def quantise(w_IxO: jax.Array, kind: ScaleKind = "row") -> jax.Array:
    """Returns W_q = trits * scale, with the gradient of the identity; arguments as in `ternarise`."""
    trits, scale = ternarise(jax.lax.stop_gradient(w_IxO), kind)
    return straight_through(trits * scale, w_IxO)


def straight_through(rounded: jax.Array, w: jax.Array) -> jax.Array:
    """Returns `rounded`, a rounding of `w` through which no gradient flows, with the gradient of `w`."""
    # w - stop_gradient(w) is exactly zero, so the value is the rounded one to the last bit.
    return rounded + (w - jax.lax.stop_gradient(w))


def statistics(w_IxO: jax.Array, kind: ScaleKind = "row") -> TernaryStats:
    """Returns the statistics of a prototype, or of a stack of them; arguments as in `ternarise`."""
    trits, scale = ternarise(w_IxO, kind)
    return TernaryStats(zeros=(trits == 0).mean(dtype=jnp.float32), scale=scale.mean(dtype=jnp.float32))
