"""Grouped matrix products: each row times the kernel of its own expert, exactly, with no capacity and nothing dropped.

Two paths give the same result:

- `ragged`: rows sorted by expert, then `jax.lax.ragged_dot`; made for TPUs; GPUs take it too, untimed so far.
- `blocks`: rows sorted by expert and padded, expert by expert, to blocks of equal height, so that each block is one
  plain matrix product. On CPUs XLA expands `ragged_dot` to all rows times all experts, and this is many times faster.

Axes: N rows (tokens x choices), E experts, D inputs, F outputs, S slots (rows after sorting and padding).
"""

import math

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Grouping:
    """Where the rows of each expert lie once sorted.

    Attributes:
        slot_N: int32 (N,), the slot of each row; no two rows share one.
        row_S: int32 (S,), the row of each slot; N for a slot that holds none.
        expert_S: int32 (S,), the expert of each slot.
        sizes_E: int32 (E,), slots of each expert (`ragged`).
        block: height of a block, 0 for the `ragged` path.
    """

    slot_N: jax.Array
    row_S: jax.Array
    expert_S: jax.Array
    sizes_E: jax.Array
    block: int = struct.field(pytree_node=False, default=0)


def default_block(num_rows: int, num_experts: int) -> int:
    """Block height for CPUs: the rows that an expert gets on average, to a power of two from 16 to 128."""
    mean_rows = max(num_rows / num_experts, 1)
    return min(max(1 << round(math.log2(mean_rows)), 16), 128)


def group(expert_N: jax.Array, num_experts: int, block: int = 0) -> Grouping:
    """Groups rows by expert, in order within each expert.

    Args:
        expert_N: int (N,), the expert of each row.
        num_experts: number of experts E.
        block: height of a block for the `blocks` path; 0 for `ragged`, where slots are the sorted rows without padding.
    """
    num_rows = expert_N.shape[0]
    height = block or 1
    counts_E = jnp.bincount(expert_N, length=num_experts)
    sizes_E = -(-counts_E // height) * height
    # sum of ceil(count / height) is largest when every expert that has rows has one row too many.
    num_slots = (num_rows + min(num_experts, num_rows) * (height - 1)) // height * height
    order_N = jnp.argsort(expert_N, stable=True)
    rank_N = jnp.zeros(num_rows, jnp.int32).at[order_N].set(jnp.arange(num_rows, dtype=jnp.int32))
    shift_E = (jnp.cumsum(sizes_E) - sizes_E) - (jnp.cumsum(counts_E) - counts_E)
    slot_N = (rank_N + shift_E[expert_N]).astype(jnp.int32)
    row_S = jnp.full(num_slots, num_rows, jnp.int32).at[slot_N].set(jnp.arange(num_rows, dtype=jnp.int32))
    expert_S = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(num_slots), side="right")
    expert_S = jnp.minimum(expert_S, num_experts - 1).astype(jnp.int32)  # trailing slots hold no rows
    return Grouping(slot_N, row_S, expert_S, sizes_E.astype(jnp.int32), block)


def to_slots(rows_NxD: jax.Array, grouping: Grouping) -> jax.Array:
    """Moves rows to their slots, (S, D); slots without a row are zero."""
    return jnp.take(rows_NxD, grouping.row_S, axis=0, mode="fill", fill_value=0)


def to_rows(slots_SxD: jax.Array, grouping: Grouping) -> jax.Array:
    """Moves slots back to their rows, (N, D)."""
    return slots_SxD[grouping.slot_N]


def grouped_matmul(slots_SxD: jax.Array, kernel_ExDxF: jax.Array, grouping: Grouping) -> jax.Array:
    """Multiplies each slot by the kernel of its expert, (S, F); the path is the grouping's."""
    if not grouping.block:
        return jax.lax.ragged_dot(slots_SxD, kernel_ExDxF, grouping.sizes_E)
    blocks = slots_SxD.reshape(-1, grouping.block, slots_SxD.shape[-1])
    kernels = kernel_ExDxF[grouping.expert_S[:: grouping.block]]
    return jnp.einsum("nbd,ndf->nbf", blocks, kernels).reshape(slots_SxD.shape[0], -1)
