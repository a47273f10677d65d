"""FFN of rotated experts over tokens, by the kernels of `bvit_jax.kernels.ffn`.

Rows (a token and one of its experts) are sorted by expert and moved to slots; angles become tables.

Axes: T tokens, K selected experts, S slots, D d_model, F d_ff, E experts, A angles of one rotation, C columns of the
table.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bvit_jax import dispatch
from bvit_jax.kernels import ffn, rotation
from bvit_jax.kernels.cut import Angles, Cut, strips_of
from bvit_jax.kernels.ffn import BLOCK, Table, Tiles, Weights


def apply(
    cut: Cut, x_TxD: jax.Array, expert_TxK: jax.Array, angles: Angles, weights: Weights, bias_D: jax.Array
) -> jax.Array:
    """Applies to each token the FFN of each of its experts; gradients run through a kernel too.

    Args:
        cut: how the FFN is divided (`bvit_jax.kernels.cut.choose`).
        x_TxD: tokens, float32 or bfloat16.
        expert_TxK: int32, the experts of each token.
        angles: of all experts.
        weights: shared by all experts; prototypes in the dtype of `x_TxD`.
        bias_D: of the outputs. It is added here: with it in them, outputs rounded to bfloat16 would no longer tell the
            gradients of the last rotation.

    Returns:
        (T, K, D), dtype of `x_TxD`.
    """
    top_k, num_experts = expert_TxK.shape[1], angles[cut.sides[0].name].shape[0]
    grouping = dispatch.group(expert_TxK.reshape(-1), num_experts, BLOCK, cut.plan.tile, cut.plan.chunk)
    x_SxD = dispatch.to_slots(x_TxD, grouping, copies=top_k)
    strips = [_on_slots(cut, grouping, x_SxD, *strip) for strip in strips_of(cut, angles, weights)]
    y_SxD = functools.reduce(jnp.add, (strip.astype(jnp.float32) for strip in strips)) if len(strips) > 1 else strips[0]
    y_NxD = dispatch.to_rows(y_SxD.astype(x_TxD.dtype), grouping)
    y_NxD = (y_NxD.astype(jnp.float32) + bias_D.astype(jnp.float32).reshape(1, -1)).astype(x_TxD.dtype)
    return y_NxD.reshape(*expert_TxK.shape, bias_D.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _on_slots(cut: Cut, grouping: dispatch.Grouping, x_SxD: jax.Array, angles: Angles, weights: Weights) -> jax.Array:
    return ffn.forward(cut.plan, _tiles(grouping), x_SxD, _table(cut, angles), _as_rows(weights))


def _forward(
    cut: Cut, grouping: dispatch.Grouping, x_SxD: jax.Array, angles: Angles, weights: Weights
) -> tuple[jax.Array, Any]:
    y_SxD = _on_slots(cut, grouping, x_SxD, angles, weights)
    return y_SxD, (grouping, x_SxD, angles, weights, y_SxD)


def _backward(cut: Cut, saved: Any, dy_SxD: jax.Array) -> tuple[None, jax.Array, Angles, Weights]:
    grouping, x_SxD, angles, weights, y_SxD = saved
    dx_SxD, d_columns_ExC, d_weights = ffn.backward(
        cut.plan, _tiles(grouping), x_SxD, _table(cut, angles), _as_rows(weights), y_SxD, dy_SxD
    )
    # The kernel has not been to chunks without slots.
    d_columns_ExC = jnp.where(grouping.sizes_E[:, None] > 0, d_columns_ExC, 0)
    d_angles = {}
    for side, turn in zip(cut.sides, cut.plan.turns, strict=True):
        part = d_columns_ExC[:, turn.start : turn.start + rotation.num_columns(turn.stages)]
        d_angles[side.name] = rotation.angle_gradients(part, side.stages).astype(angles[side.name].dtype)
    d_weights = jax.tree.map(lambda gradient, like: gradient.reshape(like.shape).astype(like.dtype), d_weights, weights)
    return None, dx_SxD, d_angles, d_weights


_on_slots.defvjp(_forward, _backward)


def _tiles(grouping: dispatch.Grouping) -> Tiles:
    return Tiles(
        chunk=grouping.expert_S[:: grouping.tile] // grouping.chunk,
        expert=grouping.expert_S[::BLOCK] % grouping.chunk,
        used=(grouping.sizes_E.sum(keepdims=True) // grouping.tile).astype(jnp.int32),
    )


def _table(cut: Cut, angles: Angles) -> Table:
    """Sets the tables of the rotations side by side, in the order of their columns."""
    stages = {side.name: side.stages for side in cut.sides}
    cos, sin = zip(*(rotation.tables(angles[name], stages[name]) for name in stages), strict=True)
    return jnp.concatenate(cos, axis=-1), jnp.concatenate(sin, axis=-1)


def _as_rows(weights: Weights) -> Weights:
    """Gives the kernels a float32 bias of two axes."""
    return dataclasses.replace(weights, up_bias=weights.up_bias.reshape(1, -1).astype(jnp.float32))
