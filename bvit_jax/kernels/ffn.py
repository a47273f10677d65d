"""FFN of rotated experts as one Pallas kernel for TPUs, and its gradient as another.

Rows come sorted by expert. The grid walks over tiles of rows; both prototypes stay in VMEM for the whole walk, so that
HBM sees the rows once on their way in and once on their way out, and every angle once. Within a tile each block of
`BLOCK` rows belongs to one expert and is turned by its angles, while the matrix products take the whole tile: many
experts with few rows each cost hardly more than few with many. Tables of angles come by chunks of experts; a tile's
rows are all of one chunk, whose number is known before the tile is fetched (scalar prefetch).

The backward kernel keeps nothing but the forward's inputs and output. It recomputes what lies between, walks back
through the inverse rotations, and sums gradients where they stay for as long as they grow: those of prototypes and
biases in VMEM for the whole walk, those of angles while consecutive tiles belong to one chunk.

Arithmetic is float32 throughout, but that matrix products take operands in the dtype of the rows.

Axes: S slots (rows sorted by expert and padded), R rows of a tile or block, D d_model, F d_ff, E experts, C columns of
the table of angles (`bvit_jax.kernels.rotation`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bvit_jax.kernels import rotation
from bvit_jax.kernels.rotation import Turn

BLOCK = 16
"""Rows turned at a time: what one register of bfloat16 holds."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed when the kernel is built.

    Attributes:
        turns: the rotations before the first product, after it, before the second and after it.
        tile: rows of a tile, a multiple of `BLOCK`.
        chunk: experts whose angles are in VMEM at a time.
        vmem_bytes: what a kernel may take of VMEM.
        slots: in use where rows fall evenly on experts, for the estimate of cost.
        interpret: run anywhere, slowly.
    """

    turns: tuple[Turn, ...]
    tile: int
    chunk: int
    vmem_bytes: int
    slots: int
    interpret: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Whose rows lie where; for `i` at or beyond the tiles in use, what is there is left alone.

    Attributes:
        chunk: int32 (tiles,), the chunk of experts of each tile.
        expert: int32 (S / BLOCK,), the expert of each block, counted within its chunk.
        used: int32 (1,), number of tiles in use, at least 1.
    """

    chunk: jax.Array
    expert: jax.Array
    used: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Prototypes in the dtype of the rows, and the bias between, for the kernels float32 (1, F)."""

    up_DxF: jax.Array
    up_bias: jax.Array
    down_FxD: jax.Array


Table = tuple[jax.Array, jax.Array]
"""Cosines and sines, float32 (E, C) both."""


def forward(plan: Plan, tiles: Tiles, x_SxD: jax.Array, table: Table, weights: Weights) -> jax.Array:
    """Returns the output of each slot without the last bias, (S, D); of tiles that are not in use, anything."""
    d_model, d_ff = weights.up_DxF.shape
    call = _Call(plan, x_SxD, table, weights)
    (y_SxD,) = call(
        functools.partial(_forward_kernel, plan),
        tiles,
        inputs=[(x_SxD, call.rows), *_zip(table, [call.angles] * 2), *_zip(_leaves(weights), call.weights)],
        outputs=[(jax.ShapeDtypeStruct(x_SxD.shape, x_SxD.dtype), call.rows)],
        scratch=[(d_model, x_SxD.dtype), (d_ff, jnp.float32), (d_ff, x_SxD.dtype), (d_model, jnp.float32)],
        products=2,
    )
    return y_SxD


def backward(
    plan: Plan, tiles: Tiles, x_SxD: jax.Array, table: Table, weights: Weights, y_SxD: jax.Array, dy_SxD: jax.Array
) -> tuple[jax.Array, jax.Array, Weights]:
    """Returns gradients of the slots (S, D), of the columns of the table (E, C), and of the weights, float32.

    Slots without a row must have dy = 0, and x of any finite value. Of tiles that are not in use, and of chunks without
    any, anything comes back.
    """
    d_model, d_ff = weights.up_DxF.shape
    call = _Call(plan, x_SxD, table, weights)
    rows = [(array, call.rows) for array in (x_SxD, y_SxD, dy_SxD)]
    sums = [jax.ShapeDtypeStruct(array.shape, jnp.float32) for array in (table[0], *_leaves(weights))]
    dx_SxD, d_columns_ExC, *d_weights = call(
        functools.partial(_backward_kernel, plan),
        tiles,
        inputs=[*rows, *_zip(table, [call.angles] * 2), *_zip(_leaves(weights), call.weights)],
        outputs=[
            (jax.ShapeDtypeStruct(x_SxD.shape, x_SxD.dtype), call.rows),
            *_zip(sums, [call.angles, *call.weights]),
        ],
        scratch=[
            *((d_model, x_SxD.dtype), (d_model, x_SxD.dtype), (d_model, jnp.float32)),
            *((d_ff, jnp.float32), (d_ff, x_SxD.dtype), (d_ff, jnp.float32)),
        ],
        products=5,
    )
    return dx_SxD, d_columns_ExC, Weights(*d_weights)


def _leaves(weights: Weights) -> tuple[jax.Array, ...]:
    return weights.up_DxF, weights.up_bias, weights.down_FxD


def _zip(arrays: Iterable[Any], specs: Iterable[pl.BlockSpec]) -> list[tuple[Any, pl.BlockSpec]]:
    return list(zip(arrays, specs, strict=True))


def _forward_kernel(plan: Plan, chunk: Any, expert: Any, used: Any, *refs: Any) -> None:
    x, cos, sin, up, up_bias, down, y, u, h, v, z = refs
    into_up, out_of_up, into_down, out_of_down = plan.turns
    tile = pl.program_id(0)
    del chunk

    @pl.when(tile < used[0])
    def _() -> None:
        @_each_block(plan, tile, expert, cos, sin)
        def _(rows: pl.Slice, c: Any, s: Any) -> None:
            u[rows] = rotation.turn(into_up, x[rows].astype(jnp.float32), c, s).astype(u.dtype)

        h[:] = _product(u[:], up[:])

        @_each_block(plan, tile, expert, cos, sin)
        def _(rows: pl.Slice, c: Any, s: Any) -> None:
            a = jax.nn.gelu(rotation.turn(out_of_up, h[rows], c, s) + up_bias[:])
            v[rows] = rotation.turn(into_down, a, c, s).astype(v.dtype)

        z[:] = _product(v[:], down[:])

        @_each_block(plan, tile, expert, cos, sin)
        def _(rows: pl.Slice, c: Any, s: Any) -> None:
            y[rows] = rotation.turn(out_of_down, z[rows], c, s).astype(y.dtype)


def _backward_kernel(plan: Plan, chunk: Any, expert: Any, used: Any, *refs: Any) -> None:
    x, y, dy, cos, sin, up, up_bias, down, dx, d_angles, d_up, d_up_bias, d_down, u, dz, du, h, v, dv = refs
    into_up, out_of_up, into_down, out_of_down = plan.turns
    tile = pl.program_id(0)

    @pl.when(tile == 0)
    def _() -> None:
        for sum_ in (d_up, d_up_bias, d_down):
            sum_[:] = jnp.zeros_like(sum_)

    @pl.when((tile == 0) | (chunk[tile] != chunk[jnp.maximum(tile - 1, 0)]))
    def _() -> None:
        d_angles[:] = jnp.zeros_like(d_angles)

    @pl.when(tile < used[0])
    def _() -> None:
        @_each_block(plan, tile, expert, cos, sin, d_angles)
        def _(rows: pl.Slice, c: Any, s: Any, d: Any) -> None:
            u[rows] = rotation.turn(into_up, x[rows].astype(jnp.float32), c, s).astype(u.dtype)
            y_, dy_ = y[rows].astype(jnp.float32), dy[rows].astype(jnp.float32)
            dz[rows] = rotation.unturn(out_of_down, y_, dy_, c, s, d)[1].astype(dz.dtype)

        h[:] = _product(u[:], up[:])
        dv[:] = _product(dz[:], down[:], contract=(1, 1))

        @_each_block(plan, tile, expert, cos, sin)
        def _(rows: pl.Slice, c: Any, s: Any) -> None:
            h[rows] = rotation.turn(out_of_up, h[rows], c, s)
            v[rows] = rotation.turn(into_down, jax.nn.gelu(h[rows] + up_bias[:]), c, s).astype(v.dtype)

        d_down[:] += _product(v[:], dz[:], contract=(0, 0))

        @_each_block(plan, tile, expert, cos, sin, d_angles)
        def _(rows: pl.Slice, c: Any, s: Any, d: Any) -> None:
            _, da = rotation.unturn(into_down, v[rows].astype(jnp.float32), dv[rows], c, s, d)
            _, pull = jax.vjp(jax.nn.gelu, h[rows] + up_bias[:])
            (dh,) = pull(da)
            d_up_bias[:] += dh.sum(axis=0, keepdims=True)
            v[rows] = rotation.unturn(out_of_up, h[rows], dh, c, s, d)[1].astype(v.dtype)

        d_up[:] += _product(u[:], v[:], contract=(0, 0))
        du[:] = _product(v[:], up[:], contract=(1, 1))

        @_each_block(plan, tile, expert, cos, sin, d_angles)
        def _(rows: pl.Slice, c: Any, s: Any, d: Any) -> None:
            dx[rows] = rotation.unturn(into_up, u[rows].astype(jnp.float32), du[rows], c, s, d)[1].astype(dx.dtype)


def _each_block(plan: Plan, tile: jax.Array, expert: Any, *by_expert: Any) -> Callable[[Callable[..., None]], None]:
    """Runs a function on the blocks of a tile, with its rows and their expert's row of each table."""
    blocks = plan.tile // BLOCK

    def run(function: Callable[..., None]) -> None:
        @pl.loop(0, blocks)
        def _(block: jax.Array) -> None:
            row = pl.ds(expert[tile * blocks + block], 1)
            function(pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK), *(table.at[row] for table in by_expert))

    return run


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """Multiplies in float32, contracting the given axes."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


class _Call:
    """A kernel over the tiles: how its arrays are brought, and what it costs."""

    def __init__(self, plan: Plan, x_SxD: jax.Array, table: Table, weights: Weights) -> None:
        self.plan, self.grid = plan, (x_SxD.shape[0] // plan.tile,)
        self.flops_of_product = 2 * plan.slots * math.prod(weights.up_DxF.shape)
        # A tile that is not in use names the rows that are there already, so that nothing moves.
        self.rows = pl.BlockSpec(
            (plan.tile, x_SxD.shape[1]), lambda tile, chunk, expert, used: (jnp.minimum(tile, used[0] - 1), 0)
        )
        self.angles = pl.BlockSpec((plan.chunk, table[0].shape[1]), lambda tile, chunk, expert, used: (chunk[tile], 0))
        self.weights = [pl.BlockSpec(memory_space=pltpu.VMEM)] * len(dataclasses.fields(Weights))

    def __call__(
        self,
        kernel: Callable[..., None],
        tiles: Tiles,
        inputs: Sequence[tuple[jax.Array, pl.BlockSpec]],
        outputs: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
        scratch: Sequence[tuple[int, Any]],
        products: int,
    ) -> Any:
        """Runs `kernel`; `scratch` lists channels and dtype of its buffers of one tile."""
        spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=self.grid,
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=[pltpu.VMEM((self.plan.tile, width), dtype) for width, dtype in scratch],
        )
        cost = pl.CostEstimate(
            flops=products * self.flops_of_product,
            transcendentals=0,
            bytes_accessed=sum(self._moved(array, spec) for array, spec in (*inputs, *outputs)),
        )
        run = pl.pallas_call(
            kernel,
            grid_spec=spec,
            out_shape=[shape for shape, _ in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",), vmem_limit_bytes=self.plan.vmem_bytes
            ),
            cost_estimate=cost,
            interpret=self.plan.interpret,
        )
        return run(tiles.chunk, tiles.expert, tiles.used, *(array for array, _ in inputs))

    def _moved(self, array: Any, spec: pl.BlockSpec) -> int:
        """Bytes between HBM and VMEM: tiles in use, angles and weights pass once each."""
        rows = self.plan.slots if spec is self.rows else array.shape[0]
        return rows * math.prod(array.shape[1:]) * array.dtype.itemsize
