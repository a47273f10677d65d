"""The linear maps that each expert of a mixture amounts to, y = x W_i, whatever its parameters are.

Of rotated experts W_i = B(theta_i) W_q B(phi_i)^T as it acts on rows, of low-rank ones W + U_i V_i. They are never
made whole for all experts at once: `rows` makes some rows of all.

Axes: E experts, n of them that are wanted, b rows, I inputs, O outputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bvit_jax import butterfly, rotated
from bvit_jax.kernels.cut import Side
from bvit_jax.model_config import ModelConfig


def names(model: ModelConfig) -> tuple[str, ...]:
    """Names the maps of an expert: `up` and `down`; `up` alone where the other is its transpose, or is shared."""
    return ("up",) if model.family == "butterfly" and model.form != "separate" else ("up", "down")


def shape(model: ModelConfig, name: str) -> tuple[int, int]:
    """Returns (I, O) of a map."""
    return (model.d_model, model.d_ff) if name == "up" else (model.d_ff, model.d_model)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="count")
def rows(model: ModelConfig, name: str, ffn: Any, experts_n: jax.Array, start: int, count: int) -> jax.Array:
    """Returns rows of the matrices W_i of some experts, float32 (n, b, O); rows beyond I are zeros.

    Args:
        model: with everything rounded already, as `opened.Opened.model`.
        name: of the map, one of `names`.
        ffn: parameters of the layer.
        experts_n: int, whose.
        start: the first row.
        count: b.
    """
    places_b = start + jnp.arange(count)

    def rows_of(leaf: str, *experts: jax.Array) -> jax.Array:
        return ffn[f"{name}_{leaf}"].at[*experts, places_b].get(mode="fill", fill_value=0)

    if model.stores_experts:
        return rows_of("kernel", experts_n[:, None])
    if model.family == "low_rank":
        return rows_of("kernel")[None] + rows_of("left", experts_n[:, None]) @ ffn[f"{name}_right"][experts_n]
    product = rotated.products(model, ffn)[names(model).index(name)]
    basis_bxI = jax.nn.one_hot(places_b, shape(model, name)[0])

    def of_expert(expert: jax.Array) -> jax.Array:
        turned_bxI = turn(ffn, product.before, expert, basis_bxI)
        return turn(ffn, product.after, expert, turned_bxI @ product.weights_DxO)

    return jax.vmap(of_expert)(experts_n)


def turn(ffn: Any, side: Side, expert: jax.Array, x: jax.Array) -> jax.Array:
    """Applies the rotation of one expert on one side of a product to the last axis of `x`."""
    if not side.stages:
        return x
    return butterfly.rotate(x, ffn[f"{side.name}_angles"][expert], side.stages, inverse=side.inverse)
