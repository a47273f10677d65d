"""Products with rotated matrices over slots, tile by tile, against dense matrices in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import long_but

from bvit_jax import block_rotation, blocks, butterfly, dispatch, hlo
from bvit_jax.blocks import Layer, Rotation

# Compiling costs more here than running; and roundings that the program asks for are not to be left out.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_allow_excess_precision": False,
}
jit = functools.partial(jax.jit, compiler_options=QUICK)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6}
"""Largest error, in parts of the largest value of an array; bfloat16 rounds by up to 2^-9, several times."""
ROUTES = {
    # Rows of each of five experts; blocks of 4 rows and tiles of 8.
    "uneven": [9, 0, 1, 4, 5],
    "all to one": [0, 17, 0, 0, 0],
    "one row": [0, 0, 0, 1, 0],
}
EXPERTS = 5


@dataclasses.dataclass(frozen=True)
class Shape:
    """Layers from widths[0] channels to widths[1], and so on."""

    widths: tuple[int, ...] = (8, 16, 8)
    stages: int = 2
    order: butterfly.StrideOrder = "descending"
    inverse: tuple[bool, bool] = (True, False)
    route: str = "uneven"
    block: int = 4
    tile: int = 8
    dtype: str = "float32"

    @property
    def sides(self) -> list[oracles.Side]:
        """Before and after the first product, and so on."""
        return [
            oracles.Side(f"{layer} {way}", min(self.stages, butterfly.max_stages(dim)), self.order, inverse)
            for layer, dims in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True))
            for way, dim, inverse in zip(("before", "after"), dims, self.inverse, strict=True)
        ]

    @property
    def rotations(self) -> blocks.Rotations:
        dims = [dim for around in zip(self.widths[:-1], self.widths[1:], strict=True) for dim in around]
        made = [
            Rotation(
                block_rotation.make_plan(butterfly.make_stages(dim, side.num_stages, side.order), dim), side.inverse
            )
            for dim, side in zip(dims, self.sides, strict=True)
        ]
        return tuple(zip(made[::2], made[1::2], strict=True))


class Case:
    """Rows in slots, with NaN in what no tile in use holds, and parameters; the slots that pad an expert hold rows."""

    def __init__(self, shape: Shape) -> None:
        rng = np.random.default_rng(0)
        self.shape = shape
        expert_N = np.repeat(np.arange(EXPERTS), ROUTES[shape.route]).astype(np.int32)
        self.grouping = dispatch.group(jnp.asarray(expert_N), EXPERTS, shape.block, shape.tile)
        self.used, slots = int(self.grouping.sizes_E.sum()), len(self.grouping.row_S)

        def normal(*size: int, scale: float = 1.0) -> np.ndarray:
            return np.array(jnp.asarray(scale * rng.normal(size=size), shape.dtype))

        self.x, self.dy = normal(slots, shape.widths[0]), normal(slots, shape.widths[-1])
        self.x[self.used :] = self.dy[self.used :] = np.nan
        around = zip(shape.rotations, zip(shape.widths[:-1], shape.widths[1:], strict=True), strict=True)
        self.layers = [
            Layer(
                *(
                    rng.uniform(-3, 3, (EXPERTS, sum(one.num_angles for one in before.plan.passes))).astype(np.float32),
                    normal(inputs, outputs, scale=inputs**-0.5),
                    rng.uniform(-3, 3, (EXPERTS, sum(one.num_angles for one in after.plan.passes))).astype(np.float32),
                    normal(outputs),
                )
            )
            for (before, after), (inputs, outputs) in around
        ]

    def expected(self) -> Any:
        x, dy, layers = jax.tree.map(oracles.float64, (self.x[: self.used], self.dy[: self.used], self.layers))
        expert_S, sides = np.asarray(self.grouping.expert_S)[: self.used], self.shape.sides
        tables = [table for layer in layers for table in (layer.before, layer.after)]
        angles = dict(zip((side.name for side in sides), tables, strict=True))
        weights = [leaf for layer in layers for leaf in (layer.weights_DxO, layer.bias_O)]
        if len(layers) == 1:
            y, dx, d_angles, d = oracles.rotated_product(sides, x, expert_S, angles, weights, dy)
        else:
            y, dx, d_angles, d = oracles.rotated_ffn(sides, x, expert_S[:, None], angles, weights, dy[:, None])
        tables = [d_angles[side.name] for side in sides]
        return (
            y.reshape(dy.shape),
            dx,
            [Layer(tables[i], d[i], tables[i + 1], d[i + 1]) for i in range(0, len(tables), 2)],
        )


@functools.partial(jit, static_argnums=0)
def output_and_gradients(
    rotations: blocks.Rotations, x: jax.Array, layers: list[Layer], grouping: dispatch.Grouping, dy: jax.Array
) -> tuple[jax.Array, ...]:
    y, pull = jax.vjp(lambda x, layers: blocks.apply(rotations, x, layers, grouping), x, layers)
    return y, *pull(dy)


def check(shape: Shape) -> None:
    case = Case(shape)
    y, dx, d_layers = output_and_gradients(shape.rotations, case.x, case.layers, case.grouping, case.dy)
    assert y.dtype == dx.dtype == jnp.dtype(shape.dtype)
    found = y[: case.used], dx[: case.used], d_layers
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(case.expected()), strict=True):
        name, wide = jax.tree_util.keystr(path), np.asarray(a, np.float64)
        assert a.shape == b.shape, name
        tolerance = TOLERANCE[shape.dtype] * np.abs(b).max(initial=0)
        np.testing.assert_allclose(wide, b, rtol=0, atol=tolerance, err_msg=name)
        if name.endswith((".before", ".after")):
            assert a.dtype == jnp.float32
            idle = [expert for expert in range(EXPERTS) if not (case.grouping.expert_S[: case.used] == expert).any()]
            assert not np.any(wide[idle]), name
        else:
            assert a.dtype == jnp.dtype(shape.dtype)


SHAPES = {
    "wider within": Shape(),
    "narrower within": Shape(widths=(24, 12, 24), stages=3),
    "bfloat16": Shape(dtype="bfloat16", widths=(16, 32, 16)),
    "bfloat16, narrower within": Shape(dtype="bfloat16", widths=(32, 16, 32)),
    "near pairs at every end": Shape(widths=(16, 64, 32), order="ascending"),
    "one layer": Shape(widths=(8, 24), inverse=(False, False)),
    "one layer, to fewer channels": Shape(widths=(24, 8), inverse=(False, False), stages=5, order="ascending"),
    "one layer, near pairs at every end": Shape(widths=(16, 32), inverse=(False, False), stages=5),
    "one layer of equal widths": Shape(widths=(16, 16), inverse=(False, True)),
    "channels that nothing turns": Shape(widths=(1, 4, 1)),
    "one block a tile": Shape(tile=4),
    "blocks of one row": Shape(block=1, tile=4),
    "all to one": Shape(route="all to one"),
    "one row": Shape(route="one row"),
}


LONG = {"bfloat16, narrower within", "one layer, near pairs at every end", "one block a tile", "one row"}


@pytest.mark.parametrize("name", long_but(set(SHAPES) - LONG, SHAPES))
def test_outputs_and_all_gradients_equal_the_oracle(name: str) -> None:
    check(SHAPES[name])


def test_some_tiles_are_in_use_and_some_are_not() -> None:
    # 9, 0, 1, 4 and 5 rows in blocks of 4: 12 + 0 + 4 + 4 + 8 = 28, so 4 tiles of 8. There may be up to
    # 19 + 5 * 3 + 4 = 38, 4 tiles. All 17 to one expert: 20, so 3 tiles of (17 + 5 * 3 + 4) // 8 = 4.
    assert [(Case(Shape(route=route)).used, len(Case(Shape(route=route)).x)) for route in ROUTES] == [
        (32, 32),
        (24, 32),
        (8, 8),
    ]


def test_gradients_are_summed_in_float32() -> None:
    # Tiles of 256 and 1, and of 1 and 0. In bfloat16, with steps of 2, 257 is 256, and 1 more too.
    ones = jnp.ones((4, 1), jnp.bfloat16)
    grouping = dispatch.group(jnp.zeros(4, jnp.int32), 1, 1, 2)
    rotation = Rotation(block_rotation.make_plan((), 1), False)
    layer = Layer(jnp.zeros((1, 0)), ones[:1], jnp.zeros((1, 0)), ones[0])
    dy = jnp.array([[256], [1], [1], [0]], jnp.bfloat16)
    y, _, (d_layer,) = output_and_gradients(((rotation, rotation),), ones, [layer], grouping, dy)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.full((4, 1), 2))
    assert float(d_layer.weights_DxO[0, 0]) == float(d_layer.bias_O[0]) == 258


def test_rows_between_a_product_and_its_bias_are_float32() -> None:
    # An eighth of a turn makes of (256, 0) twice 256 / sqrt(2) = 181.019; in bfloat16 that is 181.
    bf16 = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    grouping = dispatch.group(jnp.zeros(1, jnp.int32), 1, 1, 1)
    nothing, eighth = (Rotation(block_rotation.make_plan(butterfly.make_stages(2, n), 2), False) for n in (0, 1))
    layer = Layer(jnp.zeros((1, 0)), bf16(np.eye(2)), jnp.full((1, 1), np.pi / 4), bf16([-181, -181]))
    y, *_ = output_and_gradients(((nothing, eighth),), bf16([[256, 0]]), [layer], grouping, bf16([[1, 1]]))
    np.testing.assert_allclose(np.asarray(y, np.float32), [[0.01934, 0.01934]], rtol=0.01)


def test_rows_between_a_product_and_the_next_are_float32() -> None:
    # Turned by nothing, 256 plus a bias of 1 would be 256 again in bfloat16; gelu leaves both, and 257 - 256 = 1.
    bf16 = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    grouping = dispatch.group(jnp.zeros(1, jnp.int32), 1, 1, 1)
    nothing, quarter = (Rotation(block_rotation.make_plan(butterfly.make_stages(2, n), 2), False) for n in (0, 1))
    none = jnp.zeros((1, 0))
    up = Layer(none, bf16(np.eye(2)), none, bf16([1, 0]))
    # An eighth of a turn makes of (257, 256) (257 - 256) / sqrt(2) = 0.707 and 362.7.
    down = Layer(jnp.full((1, 1), np.pi / 4), bf16(np.eye(2)), none, bf16([0, 0]))
    y, *_ = output_and_gradients(
        ((nothing, nothing), (quarter, nothing)), bf16([[256, 256]]), [up, down], grouping, bf16([[1, 1]])
    )
    np.testing.assert_allclose(np.asarray(y, np.float32), [[0.707, 362.7]], rtol=0.01)


def test_loops_run_over_the_tiles_in_use_and_say_how_many_there_may_be() -> None:
    case = Case(Shape(widths=(8, 16, 8), route="all to one"))
    arguments = case.shape.rotations, case.x, case.layers, case.grouping, case.dy
    forward = jax.jit(blocks.apply, static_argnums=0).lower(*arguments[:-1]).compile().as_text()
    both = output_and_gradients.lower(*arguments).compile().as_text()
    # A tile: two products of 8 rows by 8 x 16; back, two more each.
    product = 2 * 8 * 8 * 16
    for text, products, loops in ((forward, 2, 1), (both, 6, 2)):
        found = hlo.read(text, at_most=blocks.AT_MOST_SCOPE)
        assert found.matmul_flops == 4 * products * product
        # On CPUs sums by expert are loops of their own within.
        assert found.open_loops == hlo.read(text).open_loops - loops


def test_saved_are_rows_and_products_alone() -> None:
    case = Case(Shape(widths=(8, 32, 16)))
    _, pull = jax.eval_shape(
        lambda x, layers: jax.vjp(
            lambda x, layers: blocks.apply(case.shape.rotations, x, layers, case.grouping), x, layers
        ),
        case.x,
        case.layers,
    )
    saved = sorted(leaf.shape for leaf in jax.tree.leaves(pull) if leaf.shape[:1] == (32,) and leaf.ndim == 2)
    # x, the two products, and the prototype (32, 16).
    assert saved == [(32, 8), (32, 16), (32, 16), (32, 32)]
