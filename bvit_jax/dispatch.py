"""Grouped matrix products: each row times the kernel of its own expert, exactly, with no capacity and nothing dropped.

For stored experts (`bvit_jax.moe.StandardMoe`) three paths give the same result:

- `tiles`: rows sorted by expert, then JAX's Megablox kernel for TPUs. (XLA's own `ragged_dot` for TPUs computes the
  gradient of the kernels as all rows times all experts.)
- `blocks`: rows sorted by expert and padded, expert by expert, to blocks of equal height, so that each block is one
  plain matrix product. On CPUs XLA expands `ragged_dot` to all rows times all experts, and this is many times faster.
- `ragged`: rows sorted by expert, then `jax.lax.ragged_dot`; for what is neither, GPUs, untimed so far.

Axes: N rows (tokens x choices), T tokens, E experts, D inputs, F outputs, S slots (rows after sorting and padding).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental.pallas.ops.tpu import megablox

TILE = 128
"""Rows that the kernel for TPUs takes at a time."""
_WIDEST_TILE = 512


@struct.dataclass
class Grouping:
    """Where the rows of each expert lie once sorted.

    Attributes:
        slot_N: int32 (N,), the slot of each row; no two rows share one.
        row_S: int32 (S,), the row of each slot; N for a slot that holds none.
        expert_S: int32 (S,), the expert of each slot.
        sizes_E: int32 (E,), slots of each expert, padding included.
        block: height of a block, 0 for none.
        tile: rows of a tile, 0 for none.
        chunk: experts of a chunk, whose rows fill whole tiles.
    """

    slot_N: jax.Array
    row_S: jax.Array
    expert_S: jax.Array
    sizes_E: jax.Array
    block: int = struct.field(pytree_node=False, default=0)
    tile: int = struct.field(pytree_node=False, default=0)
    chunk: int = struct.field(pytree_node=False, default=0)


def default_block(num_rows: int, num_experts: int) -> int:
    """Block height for CPUs: the rows that an expert gets on average, to a power of two from 16 to 128."""
    mean_rows = max(num_rows / num_experts, 1)
    return min(max(1 << round(math.log2(mean_rows)), 16), 128)


def group(expert_N: jax.Array, num_experts: int, block: int = 0, tile: int = 0, chunk: int = 0) -> Grouping:
    """Groups rows by expert, in order within each expert.

    Args:
        expert_N: int (N,), the expert of each row.
        num_experts: number of experts E.
        block: height of a block: the rows of each expert are padded to a multiple of it.
        tile: rows of a tile, a multiple of `block`: the rows of each chunk are padded to a multiple of it.
        chunk: experts of a chunk, 0 for all in one.

        With neither block nor tile slots are the sorted rows without padding.
    """
    expert_N, chunk = jnp.asarray(expert_N), chunk or num_experts
    num_rows = expert_N.shape[0]
    height = block or 1
    # Sorted, searched and gathered: TPUs scatter slowly, and libtpu's compiler aborts on some scatters of many slots.
    order_N = jnp.argsort(expert_N, stable=True)
    first_E = jnp.searchsorted(expert_N[order_N], jnp.arange(num_experts + 1, dtype=expert_N.dtype))
    counts_E, first_E = jnp.diff(first_E), first_E[:-1]
    sizes_E = -(-counts_E // height) * height
    if tile:  # the last expert of a chunk takes what fills the tile: kernels leave what belongs to nobody as it was
        chunk_E = np.arange(num_experts) // chunk
        of_chunks = jnp.pad(sizes_E, (0, -num_experts % chunk)).reshape(-1, chunk).sum(axis=1)
        is_last_E = np.append(chunk_E[1:] != chunk_E[:-1], True)
        sizes_E = sizes_E + jnp.where(is_last_E, (-of_chunks % tile)[chunk_E], 0)
    num_slots = _most_slots(num_rows, num_experts, height, tile or height, chunk)
    start_E, end_E = jnp.cumsum(sizes_E) - sizes_E, jnp.cumsum(sizes_E)
    slot_N = jnp.argsort(order_N) + (start_E - first_E)[expert_N]
    slots_S = jnp.arange(num_slots, dtype=jnp.int32)
    expert_S = jnp.searchsorted(end_E, slots_S, side="right")
    expert_S = jnp.minimum(expert_S, num_experts - 1)  # trailing slots hold no rows
    place_S = slots_S - start_E[expert_S]
    row_S = order_N.at[first_E[expert_S] + place_S].get(mode="clip")
    row_S = jnp.where(place_S < counts_E[expert_S], row_S, num_rows)
    slot_N, row_S, expert_S = (array.astype(jnp.int32) for array in (slot_N, row_S, expert_S))
    return Grouping(slot_N, row_S, expert_S, sizes_E.astype(jnp.int32), block, tile, chunk)


def _most_slots(num_rows: int, num_experts: int, block: int, tile: int, chunk: int) -> int:
    """Slots that suffice however rows fall; padding is worst where all that have rows have one row too many."""
    by_expert = min(num_experts, num_rows) * (block - 1)
    by_chunk = min(-(-num_experts // chunk), num_rows) * (tile - block)
    return (num_rows + by_expert + by_chunk) // tile * tile


def to_slots(x_TxD: jax.Array, grouping: Grouping, copies: int = 1) -> jax.Array:
    """Moves rows to their slots, (S, D); slots without a row hold any other's.

    Args:
        x_TxD: N / copies tokens; a token's copies are rows that follow each other.
        grouping: of the rows.
        copies: rows of a token.
    """
    return _to_slots(x_TxD, grouping, copies)


def to_rows(slots_SxD: jax.Array, grouping: Grouping) -> jax.Array:
    """Moves slots back to their rows, (N, D). Slots without a row get no gradient."""
    return _to_rows(slots_SxD, grouping)


def _take_slots(x_TxD: jax.Array, grouping: Grouping, copies: int) -> jax.Array:
    return jnp.take(x_TxD, grouping.row_S // copies, axis=0, mode="clip")


def _take_rows(slots_SxD: jax.Array, grouping: Grouping) -> jax.Array:
    return slots_SxD.at[grouping.slot_N].get(mode="promise_in_bounds", unique_indices=True)


def _give_back_to_tokens(copies: int, grouping: Grouping, d_slots_SxD: jax.Array) -> tuple[jax.Array, None]:
    d_rows_NxD = _take_rows(d_slots_SxD, grouping)
    dtype = np.promote_types(d_slots_SxD.dtype, np.float32)
    d_tokens = d_rows_NxD.reshape(-1, copies, d_rows_NxD.shape[-1]).sum(axis=1, dtype=dtype)
    return d_tokens.astype(d_slots_SxD.dtype), None


# Each slot holds one row at most, so that the gradient of either gather is the other; XLA would scatter.
_to_slots = jax.custom_vjp(_take_slots, nondiff_argnums=(2,))
_to_slots.defvjp(lambda x, grouping, copies: (_take_slots(x, grouping, copies), grouping), _give_back_to_tokens)
_to_rows = jax.custom_vjp(_take_rows)
_to_rows.defvjp(
    lambda slots, grouping: (_take_rows(slots, grouping), grouping),
    lambda grouping, d_rows: (jnp.take(d_rows, grouping.row_S, axis=0, mode="fill", fill_value=0), None),
)


def grouped_matmul(
    slots_SxD: jax.Array, kernel_ExDxF: jax.Array, grouping: Grouping, interpret: bool = False
) -> jax.Array:
    """Multiplies each slot by the kernel of its expert, (S, F); the path is the grouping's.

    With `interpret` the `tiles` path runs anywhere, slowly.
    """
    if grouping.tile:
        return _by_tiles(slots_SxD, kernel_ExDxF, grouping.sizes_E, grouping.tile, interpret)
    if not grouping.block:
        return jax.lax.ragged_dot(slots_SxD, kernel_ExDxF, grouping.sizes_E)
    blocks = slots_SxD.reshape(-1, grouping.block, slots_SxD.shape[-1])
    kernels = kernel_ExDxF[grouping.expert_S[:: grouping.block]]
    return jnp.einsum("nbd,ndf->nbf", blocks, kernels).reshape(slots_SxD.shape[0], -1)


def _gmm(slots_SxD: jax.Array, kernel_ExDxF: jax.Array, sizes_E: jax.Array, tile: int, interpret: bool) -> jax.Array:
    def tiling(_: int, inputs: int, outputs: int) -> tuple[int, int, int]:
        return tile, min(inputs, _WIDEST_TILE), min(outputs, _WIDEST_TILE)

    return megablox.gmm(slots_SxD, kernel_ExDxF, sizes_E, slots_SxD.dtype, tiling, interpret=interpret)


def _gmm_forward(*arguments: Any) -> tuple[jax.Array, Any]:
    return _gmm(*arguments), arguments[:3]


def _gmm_backward(tile: int, interpret: bool, saved: Any, dy_SxF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    slots_SxD, kernel_ExDxF, sizes_E = saved
    with jax.numpy_dtype_promotion("standard"):  # Megablox does not keep to strict promotion in its gradients
        _, pull = jax.vjp(lambda x, w: _gmm(x, w, sizes_E, tile, interpret), slots_SxD, kernel_ExDxF)
        return *pull(dy_SxF), None


_by_tiles = jax.custom_vjp(_gmm, nondiff_argnums=(3, 4))
_by_tiles.defvjp(_gmm_forward, _gmm_backward)
