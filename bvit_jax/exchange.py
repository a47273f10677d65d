"""Rows travel to the devices that hold their experts, and back: exact, no row dropped, whatever the routing is.

The experts are split over P devices in order, E / P each. A device sends at most C rows to each other device at a time
(an all-to-all of P x C rows), each device applies its own experts to what has come in, and a second all-to-all brings
the results back. C leaves room for the chance fluctuations of balanced routing. Where routing is so uneven that a pair
of devices has more than C rows for each other, the rest travels in further rounds, as many as the fullest pair needs.
So a device never holds more than N + 4 sqrt(N P) + 8 P slots, and in the common case nothing is sent twice. Slots that
stay empty are sent and multiplied too: where devices have few rows for each other, most of them are.

Axes: N rows of this device, E experts, P devices along the axis, S = P * C slots of one round, D channels.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Experts = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""(parameters of this device's experts, rows (S, D), expert of each row among them (S,)) -> rows (S, D)."""

OVERFLOW_SCOPE = "overflow"
"""Scope of the rounds beyond the first in a compiled program."""


@struct.dataclass
class _Plan:
    """Where each row goes.

    Attributes:
        round_N: int32 (N,), the round in which a row travels.
        slot_N: int32 (N,), its slot in that round.
        expert_N: int32 (N,), its expert among those of the device that it goes to.
        chips: P.
        capacity: C.
    """

    round_N: jax.Array
    slot_N: jax.Array
    expert_N: jax.Array
    chips: int = struct.field(pytree_node=False)
    capacity: int = struct.field(pytree_node=False)


def capacity(num_rows: int, chips: int) -> int:
    """Rows that a device sends to another in a round: their mean and four standard deviations, to a multiple of 8."""
    mean = num_rows / chips
    return min(num_rows, 8 * math.ceil((mean + 4 * math.sqrt(mean)) / 8))


def apply_experts(
    experts: Experts, params: Any, rows_NxD: jax.Array, expert_N: jax.Array, axis: str, mesh_axes: tuple[str, ...]
) -> jax.Array:
    """Applies to each row its expert, wherever that is; called inside `jax.shard_map`, and differentiable.

    Args:
        experts: what a device does with its rows; row by row, so that empty slots (zeros) disturb nothing.
        params: tree of arrays whose first axis is this device's E / P experts.
        rows_NxD: rows of this device.
        expert_N: int (N,), the expert of each, 0 to E - 1.
        axis: mesh axis over which the experts are split.
        mesh_axes: all axes of the mesh: the number of rounds is the same everywhere.

    Returns:
        Rows (N, D), in the order of `rows_NxD`.
    """
    chips = jax.lax.axis_size(axis)
    own_experts = jax.tree.leaves(params)[0].shape[0]
    if chips == 1:
        return experts(params, rows_NxD, expert_N)
    with jax.named_scope("dispatch"):
        plan = _plan(expert_N, own_experts, chips)
        rounds = jax.lax.pmax(plan.round_N.max() + 1, mesh_axes)
    y_NxD = _one_round(experts, axis, 0, rows_NxD, params, plan)
    return y_NxD + _further_rounds(experts, axis, rows_NxD, params, plan, rounds)


def _plan(expert_N: jax.Array, own_experts: int, chips: int) -> _Plan:
    chip_N = expert_N // own_experts
    counts_P = jnp.bincount(chip_N, length=chips)
    order_N = jnp.argsort(chip_N, stable=True)
    place_N = jnp.zeros_like(order_N).at[order_N].set(jnp.arange(len(order_N), dtype=order_N.dtype))
    rank_N = place_N - (jnp.cumsum(counts_P) - counts_P)[chip_N]
    room = capacity(len(expert_N), chips)
    slot_N = chip_N * room + rank_N % room
    parts = (rank_N // room, slot_N, expert_N % own_experts)
    round_N, slot_N, own_N = (part.astype(jnp.int32) for part in parts)
    return _Plan(round_N, slot_N, own_N, chips, room)


def _one_round(
    experts: Experts, axis: str, number: jax.Array | int, rows_NxD: jax.Array, params: Any, plan: _Plan
) -> jax.Array:
    """Returns the results of the rows that travel in this round, zeros for the others."""
    num_rows, slots = rows_NxD.shape[0], plan.chips * plan.capacity

    def exchanged(sent: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(sent, axis, split_axis=0, concat_axis=0, tiled=True)

    with jax.named_scope("dispatch"):
        slot_N = jnp.where(plan.round_N == number, plan.slot_N, slots)
        row_S = jnp.full(slots, num_rows, jnp.int32).at[slot_N].set(jnp.arange(num_rows, dtype=jnp.int32), mode="drop")
        x_SxD = exchanged(jnp.take(rows_NxD, row_S, axis=0, mode="fill", fill_value=0))
        expert_S = exchanged(jnp.take(plan.expert_N, row_S, mode="fill", fill_value=0))
    y_SxD = experts(params, x_SxD, expert_S)
    with jax.named_scope("dispatch"):
        return jnp.take(exchanged(y_SxD), slot_N, axis=0, mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _further_rounds(
    experts: Experts, axis: str, rows_NxD: jax.Array, params: Any, plan: _Plan, rounds: jax.Array
) -> jax.Array:
    """Adds up the rounds from the second on. Their number is known at run time only, so the gradient is a loop too."""

    def add(number: jax.Array, y_NxD: jax.Array) -> jax.Array:
        return y_NxD + _one_round(experts, axis, number, rows_NxD, params, plan)

    with jax.named_scope(OVERFLOW_SCOPE):
        return jax.lax.fori_loop(1, rounds, add, jnp.zeros_like(rows_NxD))


def _further_forward(
    experts: Experts, axis: str, rows_NxD: jax.Array, params: Any, plan: _Plan, rounds: jax.Array
) -> tuple[jax.Array, Any]:
    return _further_rounds(experts, axis, rows_NxD, params, plan, rounds), (rows_NxD, params, plan, rounds)


def _further_backward(experts: Experts, axis: str, saved: Any, dy_NxD: jax.Array) -> tuple[Any, ...]:
    rows_NxD, params, plan, rounds = saved

    def add(number: jax.Array, total: Any) -> Any:
        _, pull = jax.vjp(lambda rows, own: _one_round(experts, axis, number, rows, own, plan), rows_NxD, params)
        return jax.tree.map(jnp.add, total, pull(dy_NxD))

    zeros = jax.tree.map(jnp.zeros_like, (rows_NxD, params))
    with jax.named_scope(OVERFLOW_SCOPE):
        d_rows_NxD, d_params = jax.lax.fori_loop(1, rounds, add, zeros)
    no_gradient = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), (plan, rounds))
    return d_rows_NxD, d_params, *no_gradient


_further_rounds.defvjp(_further_forward, _further_backward)
