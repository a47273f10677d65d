"""Products with rotated matrices over rows sorted by expert, a tile at a time, with a gradient of its own, by XLA.

A layer is y = B_out(B_in(x) W) + b, where the rotations B are those of the row's expert and W is shared by all; layers
follow each other with gelu between. Rows come in blocks of one expert each (`bvit_jax.block_rotation`). A loop runs
over tiles of rows that stay in cache, as many as are in use. The forward pass keeps each layer's product; the backward
pass recomputes all else, tile by tile too.

Axes: S slots (sorted and padded rows), R rows of a tile, P blocks of a tile, b rows of a block, D and O inputs and
outputs of a layer, E experts, A angles of one rotation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from bvit_jax import block_rotation, butterfly
from bvit_jax.block_rotation import Plan, Table
from bvit_jax.dispatch import Grouping

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Rotation:
    """A rotation around a product, and whether it turns back."""

    plan: Plan
    inverse: bool

    @property
    def begin(self) -> int:
        """The pass that is applied first, as an end of `block_rotation.arrange`."""
        return -1 if self.inverse else 0

    @property
    def end(self) -> int:
        """The pass that is applied last."""
        return 0 if self.inverse else -1


class Layer(NamedTuple):
    """Parameters of one layer.

    Attributes:
        before, after: angles of the rotations before and after the product, float32 (E, A).
        weights_DxO: in the dtype of the rows.
        bias_O: likewise.
    """

    before: jax.Array
    weights_DxO: jax.Array
    after: jax.Array
    bias_O: jax.Array


AT_MOST_SCOPE = "tiles_at_most_"
"""Loops are in scopes that so begin and go on with the number of tiles that there may be."""
Rotations = tuple[tuple[Rotation, Rotation], ...]
"""Of each layer, before and after its product."""


def apply(rotations: Rotations, x_SxD: jax.Array, layers: list[Layer], grouping: Grouping) -> jax.Array:
    """Applies the layers to rows in slots.

    Args:
        rotations: of each layer.
        x_SxD: rows in slots, float32 or bfloat16.
        layers: their parameters.
        grouping: of the rows, with blocks and tiles.

    Returns:
        (S, O), dtype of `x_SxD`; of tiles that are not in use, anything.
    """
    arranged = [_arrange(*around, layer) for around, layer in zip(rotations, layers, strict=True)]
    first, last = rotations[0][0], rotations[-1][1]
    x_SxD = block_rotation.arrange(first.plan, x_SxD, first.begin)
    return block_rotation.restore(last.plan, _apply(rotations, x_SxD, arranged, grouping), last.end)


def _arrange(before: Rotation, after: Rotation, layer: Layer) -> Layer:
    """Orders channels and angles as the passes of the rotations take them."""
    weights_OxD = block_rotation.arrange(before.plan, layer.weights_DxO.T, before.end)
    return Layer(
        block_rotation.arrange_angles(before.plan, layer.before),
        block_rotation.arrange(after.plan, weights_OxD.T, after.begin),
        block_rotation.arrange_angles(after.plan, layer.after),
        block_rotation.arrange(after.plan, layer.bias_O, after.end),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(rotations: Rotations, x_SxD: jax.Array, layers: list[Layer], grouping: Grouping) -> jax.Array:
    return _forward(rotations, x_SxD, layers, grouping)[0]


def _forward(rotations: Rotations, x_SxD: jax.Array, layers: list[Layer], grouping: Grouping) -> tuple[jax.Array, Any]:
    tables = [(butterfly.cos_sin(layer.before), butterfly.cos_sin(layer.after)) for layer in layers]

    def step(i: jax.Array, kept: list[jax.Array]) -> list[jax.Array]:
        tile = _Tile(grouping, i)
        x_PxbxD, products = tile.blocks(tile.get(x_SxD)), []
        for number, layer in enumerate(layers):
            before, after = tile.turners(rotations[number], tables[number])
            u_PxbxD = before.turn(_activation(number)(x_PxbxD))
            products.append(_rows(u_PxbxD, x_SxD.dtype) @ layer.weights_DxO)
            x_PxbxD = after.turn(tile.blocks(products[-1])) + _along(layer.bias_O)
        return [tile.put(whole, rows) for whole, rows in zip(kept, (*products, _rows(x_PxbxD)), strict=True)]

    widths = [layer.weights_DxO.shape[1] for layer in layers]
    kept = [jax.lax.empty((x_SxD.shape[0], width), x_SxD.dtype) for width in (*widths, widths[-1])]
    *products, y_SxO = _each_tile(grouping, step, kept)
    return y_SxO, (x_SxD, layers, grouping, tables, products)


def _backward(rotations: Rotations, saved: Any, dy_SxO: jax.Array) -> tuple[jax.Array, list[Layer], None]:
    x_SxD, layers, grouping, tables, products = saved

    def step(i: jax.Array, sums: tuple[jax.Array, list[Layer]]) -> tuple[jax.Array, list[Layer]]:
        (dx_SxD, d_layers), tile = sums, _Tile(grouping, i)
        x_PxbxD, seen = tile.blocks(tile.get(x_SxD)), []
        for number, layer in enumerate(layers):
            before, after = tile.turners(rotations[number], tables[number])
            a_PxbxD, pull = jax.vjp(_activation(number), x_PxbxD)
            y_PxbxO = after.turn(tile.blocks(tile.get(products[number])))
            seen.append((before, before.turn(a_PxbxD), after, y_PxbxO, pull))
            x_PxbxD = y_PxbxO + _along(layer.bias_O)
        dy_PxbxO = tile.blocks(tile.get(dy_SxO))
        for number in reversed(range(len(layers))):
            before, u_PxbxD, after, y_PxbxO, pull = seen[number]
            dh_PxbxO, d_after_PxA = after.unturn(y_PxbxO, dy_PxbxO)
            dh_RxO = _rows(dh_PxbxO, x_SxD.dtype)
            du_PxbxD = tile.blocks(dh_RxO @ layers[number].weights_DxO.T)
            da_PxbxD, d_before_PxA = before.unturn(u_PxbxD, du_PxbxD)
            so_far = d_layers[number]
            d_layers[number] = Layer(
                tile.add(so_far.before, d_before_PxA),
                so_far.weights_DxO + _outer(_rows(u_PxbxD, x_SxD.dtype), dh_RxO),
                tile.add(so_far.after, d_after_PxA),
                so_far.bias_O + dy_PxbxO.sum(axis=(0, 1)),
            )
            (dy_PxbxO,) = pull(da_PxbxD)
        return tile.put(dx_SxD, _rows(dy_PxbxO)), d_layers

    dx_SxD, d_layers = _each_tile(grouping, step, (jax.lax.empty(x_SxD.shape, x_SxD.dtype), _zeros(layers)))
    d_layers = [
        d._replace(weights_DxO=_upright(d.weights_DxO, layer)) for d, layer in zip(d_layers, layers, strict=True)
    ]
    return dx_SxD, jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), d_layers, layers), None


_apply.defvjp(_forward, _backward)


class _Turner(NamedTuple):
    """A rotation with the cosines and sines of a tile's blocks."""

    rotation: Rotation
    table: Table

    def turn(self, x_PxbxD: jax.Array) -> jax.Array:
        return block_rotation.turn(self.rotation.plan, x_PxbxD, self.table, self.rotation.inverse)

    def unturn(self, y_PxbxD: jax.Array, dy_PxbxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        return block_rotation.unturn(self.rotation.plan, y_PxbxD, dy_PxbxD, self.table, self.rotation.inverse)


class _Tile(NamedTuple):
    """One tile of rows."""

    grouping: Grouping
    number: jax.Array

    @property
    def expert_P(self) -> jax.Array:
        """The expert of each block."""
        blocks = self.grouping.tile // self.grouping.block
        by_block = self.grouping.expert_S[:: self.grouping.block]
        return jax.lax.dynamic_slice_in_dim(by_block, self.number * blocks, blocks)

    def get(self, whole_SxD: jax.Array) -> jax.Array:
        """Reads its rows (R, D)."""
        return jax.lax.dynamic_slice_in_dim(whole_SxD, self.number * self.grouping.tile, self.grouping.tile)

    def put(self, whole_SxD: jax.Array, rows_RxD: jax.Array) -> jax.Array:
        """Writes its rows."""
        rows_RxD = rows_RxD.astype(whole_SxD.dtype)
        return jax.lax.dynamic_update_slice_in_dim(whole_SxD, rows_RxD, self.number * self.grouping.tile, 0)

    def blocks(self, rows_RxD: jax.Array) -> jax.Array:
        """Divides rows into blocks, float32 (P, b, D)."""
        return rows_RxD.astype(jnp.float32).reshape(-1, self.grouping.block, rows_RxD.shape[-1])

    def turners(self, around: tuple[Rotation, Rotation], tables: tuple[Table, Table]) -> tuple[_Turner, _Turner]:
        """Brings the tables of its blocks' experts."""
        mine = jax.tree.map(lambda table: table.at[self.expert_P].get(mode="promise_in_bounds"), tables)
        return _Turner(around[0], mine[0]), _Turner(around[1], mine[1])

    def add(self, by_expert_ExA: jax.Array, by_block_PxA: jax.Array) -> jax.Array:
        """Adds its blocks' gradients of angles to their experts'."""
        place = by_expert_ExA.at[self.expert_P]
        return place.add(by_block_PxA, indices_are_sorted=True, mode="promise_in_bounds")


def _each_tile(grouping: Grouping, step: Callable[[jax.Array, T], T], start: T) -> T:
    """Runs `step` over the tiles in use."""
    with jax.named_scope(f"{AT_MOST_SCOPE}{grouping.row_S.shape[0] // grouping.tile}"):
        return jax.lax.fori_loop(0, grouping.sizes_E.sum() // grouping.tile, step, start)


def _activation(number: int) -> Callable[[jax.Array], jax.Array]:
    """Returns what comes before a layer: gelu, but nothing before the first."""
    return jax.nn.gelu if number else lambda x: x


def _along(bias_O: jax.Array) -> jax.Array:
    return bias_O.astype(jnp.float32).reshape(1, 1, -1)


def _rows(blocks_PxbxD: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    return blocks_PxbxD.reshape(-1, blocks_PxbxD.shape[-1]).astype(dtype)


def _outer(u_RxD: jax.Array, dh_RxO: jax.Array) -> jax.Array:
    """Returns the gradient of weights, float32, with the narrow side first: so it takes half the time on CPUs."""
    if u_RxD.shape[1] > dh_RxO.shape[1]:
        u_RxD, dh_RxO = dh_RxO, u_RxD
    return jnp.matmul(u_RxD.T, dh_RxO, preferred_element_type=jnp.float32)


def _upright(d_weights: jax.Array, layer: Layer) -> jax.Array:
    return d_weights if d_weights.shape == layer.weights_DxO.shape else d_weights.T


def _zeros(layers: list[Layer]) -> list[Layer]:
    """Returns float32 zeros for the gradients, weights with the narrow side first."""
    return [
        Layer(
            *(
                jnp.zeros(sorted(leaf.shape) if name == "weights_DxO" else leaf.shape)
                for name, leaf in layer._asdict().items()
            )
        )
        for layer in layers
    ]
