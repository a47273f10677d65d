"""Kernels run by the interpreter, which fills what nobody writes with NaN, against dense matrices in float64."""

import dataclasses
import functools
from typing import Any

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from bvit_jax import butterfly, dispatch
from bvit_jax.kernels import cut as cutting
from bvit_jax.kernels import ffn, fused
from bvit_jax.kernels.cut import Cut, Side
from bvit_jax.kernels.ffn import Weights

# Compiling costs more here than running.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}
"""Largest error, in parts of the largest value of an array; bfloat16 rounds by up to 2^-9."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """An FFN and how it is divided."""

    d_model: int = 128
    d_ff: int = 256
    experts: int = 4
    stages: int = 2
    order: butterfly.StrideOrder = "descending"
    tied: bool = False
    strips: int = 1
    tile: int = 16
    chunk: int = 0
    dtype: str = "float32"

    @property
    def sides(self) -> tuple[Side, Side, Side, Side]:
        narrow, wide = (
            butterfly.make_stages(dim, min(self.stages, butterfly.max_stages(dim)), self.order)
            for dim in (self.d_model, self.d_ff)
        )
        last = ("phi", "theta") if self.tied else ("down_theta", "down_phi")
        return (
            Side("theta", narrow, True),
            Side("phi", wide, False),
            Side(last[0], wide, True),
            Side(last[1], narrow, False),
        )

    @property
    def cut(self) -> Cut:
        sides = cutting._narrow(self.sides, self.d_ff // self.strips) if self.strips > 1 else self.sides
        plan = ffn.Plan(cutting._turns(sides), self.tile, self.chunk or self.experts, 2**24, 0, interpret=True)
        return Cut(sides, self.strips, plan)


class Case:
    """Random tokens and weights; `experts` of each token, (T, K)."""

    def __init__(self, shape: Shape, expert_TxK: np.ndarray, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.shape, self.expert_TxK, d_model, d_ff = shape, expert_TxK.astype(np.int32), shape.d_model, shape.d_ff

        def normal(*size: int, scale: float = 1.0) -> np.ndarray:
            return np.asarray(jnp.asarray(scale * rng.normal(size=size), shape.dtype))

        self.x = normal(expert_TxK.shape[0], d_model)
        self.dy = normal(*expert_TxK.shape, d_model)
        up = normal(d_model, d_ff, scale=d_model**-0.5)
        down = up.T if shape.tied else normal(d_ff, d_model, scale=d_ff**-0.5)
        self.weights = Weights(up, normal(d_ff), down)
        self.bias = normal(d_model)
        self.angles = {
            side.name: rng.uniform(-3, 3, (shape.experts, butterfly.num_angles(side.stages))).astype(np.float32)
            for side in shape.sides
        }

    def expected(self) -> Any:
        shape = self.shape
        sides = [oracles.Side(side.name, len(side.stages), shape.order, side.inverse) for side in shape.sides]
        weights = [self.weights.up_DxF, self.weights.up_bias, self.weights.down_FxD, self.bias]
        x, dy, angles, weights = jax.tree.map(oracles.float64, (self.x, self.dy, self.angles, weights))
        y, dx, d_angles, d_weights = oracles.rotated_ffn(sides, x, self.expert_TxK, angles, weights, dy)
        return y, dx, d_angles, Weights(*d_weights[:3]), d_weights[3]


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def output_and_gradients(
    cut: Cut,
    x: jax.Array,
    expert_TxK: jax.Array,
    angles: cutting.Angles,
    weights: Weights,
    bias: jax.Array,
    dy: jax.Array,
) -> tuple[jax.Array, ...]:
    def outputs(x: jax.Array, *rest: Any) -> jax.Array:
        return fused.apply(cut, x, expert_TxK, *rest)

    y, pull = jax.vjp(outputs, x, angles, weights, bias)
    return y, *pull(dy)


def run(case: Case, cut: Cut | None = None) -> Any:
    return output_and_gradients(
        cut or case.shape.cut, case.x, case.expert_TxK, case.angles, case.weights, case.bias, case.dy
    )


def compare(found: Any, expected: Any, tolerance: float) -> None:
    """Compares all arrays; what is zero, as of experts without rows, must be so exactly."""
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, name = np.asarray(a, np.float64), jax.tree_util.keystr(path)
        assert a.shape == b.shape, name
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-30), err_msg=name)
        if len(b):
            idle = ~b.reshape(b.shape[0], -1).any(axis=1)
            assert not a[idle].any(), name


def check(shape: Shape, expert_TxK: np.ndarray, seed: int = 0) -> None:
    case = Case(shape, expert_TxK, seed)
    found = run(case)
    assert {leaf.dtype for leaf in jax.tree.leaves((found[0], found[1], found[3]))} == {jnp.dtype(shape.dtype)}
    compare(found, case.expected(), TOLERANCE[shape.dtype])


def distinct(tokens: int, top_k: int, experts: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])


@pytest.mark.parametrize("tied", [False, True])
def test_the_oracle_is_the_documented_ffn_and_its_gradients_are_slopes(tied: bool) -> None:
    rng = np.random.default_rng(0)
    dims = {"theta": 8, "phi": 12} | ({} if tied else {"down_theta": 12, "down_phi": 8})
    names = ("theta", "phi", "phi", "theta") if tied else tuple(dims)
    sides = [
        oracles.Side(name, 3, "descending", name.endswith("theta") != (tied and i > 1)) for i, name in enumerate(names)
    ]
    angles = {name: rng.uniform(-3, 3, (2, oracles.count_angles(dim, 3, "descending"))) for name, dim in dims.items()}
    up, up_bias, down, down_bias = weights = [rng.normal(size=size) for size in ((8, 12), (12,), (12, 8), (8,))]
    if tied:
        down = weights[2] = up.T.copy()
    x, expert, dy = rng.normal(size=(3, 8)), np.array([[0], [1], [1]]), rng.normal(size=(3, 1, 8))

    def matrix(name: str, of: int) -> np.ndarray:
        return oracles.rotation_matrix(dims[name], 3, "descending", angles[name][of])

    y, dx, d_angles, d_weights = oracles.rotated_ffn(sides, x, expert, angles, weights, dy)
    for token, (of,) in enumerate(expert):
        w_up = matrix("phi", of) @ up.T @ matrix("theta", of).T
        w_down = w_up.T if tied else matrix("down_phi", of) @ down.T @ matrix("down_theta", of).T
        expected = w_down @ oracles.gelu(w_up @ x[token] + up_bias) + down_bias
        np.testing.assert_allclose(y[token, 0], expected, atol=1e-12)

    def loss() -> float:
        return float((oracles.rotated_ffn(sides, x, expert, angles, weights, dy)[0] * dy).sum())

    moved = [(x, dx), *zip(angles.values(), d_angles.values(), strict=True), *zip(weights, d_weights, strict=True)]
    for array, gradient in moved:
        for index in {tuple(int(rng.integers(size)) for size in array.shape) for _ in range(4)}:
            slope = oracles.finite_difference(loss, array, index)
            np.testing.assert_allclose(gradient[index], slope, atol=1e-7)


SHAPES = {
    "separate": (Shape(), distinct(20, 2, 4)),
    "tied": (Shape(tied=True), distinct(20, 2, 4)),
    "bfloat16": (Shape(dtype="bfloat16", tile=32), distinct(20, 2, 4)),
    "tied, bfloat16": (Shape(dtype="bfloat16", tied=True, tile=32), distinct(20, 2, 4)),
    "whole depth": (Shape(stages=9), distinct(9, 2, 4)),
    "ascending, tied": (Shape(stages=8, order="ascending", tied=True), distinct(9, 2, 4)),
    "odd factors": (Shape(d_model=384, d_ff=640, stages=3, experts=3), distinct(7, 1, 3)),
    "chunks, the last one short": (Shape(experts=7, chunk=3, tile=32), distinct(30, 2, 7)),
    "strips": (Shape(d_ff=1024, strips=2), distinct(20, 2, 4)),
    "strips, bfloat16": (Shape(d_ff=512, stages=1, strips=2, dtype="bfloat16"), distinct(20, 2, 4)),
    "tied strips of one stage and chunks": (
        Shape(d_ff=768, stages=1, strips=3, experts=5, chunk=2, tied=True),
        distinct(20, 3, 5),
    ),
}


FEW = ["separate", "tied", "bfloat16", "chunks, the last one short", "tied strips of one stage and chunks"]


@pytest.mark.parametrize("name", conftest.long_but(FEW, SHAPES))
def test_outputs_and_all_gradients_equal_the_oracle(name: str) -> None:
    check(*SHAPES[name])


# Rows of 5 experts in chunks of 2 (0 1, 2 3, 4) and tiles of 32 rows.
ROUTES = {
    "one token": [[3]],
    "all rows to one expert": [[1]] * 40,
    "a whole tile, and a row more": [[2]] * 32 + [[3]],
    "the first chunk without rows": [[2], [4], [3], [4]] * 5,
    "the middle chunk without rows": [[0], [4], [1], [0]] * 5,
    "the last chunk without rows": [[0], [2], [3], [2]] * 9,
    "only the last chunk has rows": [[4]] * 3,
    "all experts of a token": [[4, 1, 0, 2, 3], [0, 1, 2, 3, 4]],
    "three of five": [[4, 0, 2], [1, 3, 0], [0, 2, 1]] * 3,
    "the same expert twice": [[1, 1], [3, 1]],
}


FALLS = ["one token", "all rows to one expert", "the middle chunk without rows", "the same expert twice"]


@pytest.mark.parametrize("name", conftest.long_but(FALLS, ROUTES))
def test_however_rows_fall(name: str) -> None:
    check(Shape(experts=5, chunk=2, tile=32, stages=1), np.array(ROUTES[name]))


def test_one_expert() -> None:
    check(Shape(experts=1, stages=1), np.zeros((5, 1), int))


def test_more_experts_than_rows() -> None:
    check(Shape(experts=40, chunk=8, stages=1), distinct(5, 2, 40))


@pytest.mark.parametrize("seed", conftest.long_but([2], range(3)))
def test_random_shapes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    d_model, d_ff = (128 * int(rng.integers(1, 4)) for _ in range(2))
    experts = int(rng.integers(1, 12))
    shape = Shape(
        *(d_model, d_ff, experts, int(rng.integers(1, 4))),
        order=butterfly.STRIDE_ORDERS[rng.integers(2)],
        tied=bool(rng.integers(2)),
        tile=16 * int(rng.integers(1, 4)),
        chunk=int(rng.integers(1, experts + 1)),
    )
    check(shape, rng.integers(experts, size=(int(rng.integers(1, 30)), int(rng.integers(1, 4)))), seed)


def test_as_chosen() -> None:
    case = Case(Shape(), distinct(20, 2, 4))
    cut = cutting.choose(case.shape.sides, 128, 256, 40, 4, jnp.dtype("float32")).interpreted
    assert (cut.strips, cut.plan.tile, cut.plan.chunk) == (1, 64, 4)  # 40 rows: the next power of two
    compare(run(case, cut), case.expected(), 1e-5)


def test_strips_are_summed_in_float32() -> None:
    # Nothing is turned, and gelu(16) = 16 times 16, 1/16 and 1/16 in one channel of each strip: 256 + 1 + 1. In
    # bfloat16, with steps of 2, nothing would be added to 256.
    shape = Shape(d_ff=768, stages=1, strips=3, experts=1, dtype="bfloat16")
    case = Case(shape, np.zeros((2, 1), int))
    angles = {name: np.zeros_like(table) for name, table in case.angles.items()}
    up, up_bias, down, bias = (np.zeros_like(leaf) for leaf in jax.tree.leaves((case.weights, case.bias)))
    up_bias[:] = 16
    down[[0, 128, 256]] = np.array([16, 1 / 16, 1 / 16], down.dtype)[:, None]
    y, *_ = output_and_gradients(shape.cut, case.x, case.expert_TxK, angles, Weights(up, up_bias, down), bias, case.dy)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.full(y.shape, 258))


# Tiles and chunks that are not in use


def raw(case: Case) -> tuple[dispatch.Grouping, tuple[jax.Array, ...]]:
    """What the kernels leave in the slots and the tables, unmasked."""
    cut = case.shape.cut

    @functools.partial(jax.jit, compiler_options=QUICK)
    def leave(case_: Any) -> Any:
        x, dy, expert_TxK, angles, weights = case_
        grouping = dispatch.group(expert_TxK.reshape(-1), case.shape.experts, ffn.BLOCK, cut.plan.tile, cut.plan.chunk)
        rows = (fused._tiles(grouping), dispatch.to_slots(x, grouping, expert_TxK.shape[1]))
        fixed = (fused._table(cut, angles), fused._as_rows(weights))
        y = ffn.forward(cut.plan, *rows, *fixed)
        dx, d_columns, _ = ffn.backward(
            cut.plan, *rows, *fixed, y, dispatch.to_slots(dy.reshape(-1, dy.shape[-1]), grouping)
        )
        return grouping, (y, dx, d_columns)

    return leave((case.x, case.dy, case.expert_TxK, case.angles, case.weights))


def test_tiles_and_chunks_not_in_use_are_left_unwritten_and_reach_no_result() -> None:
    # Chunk 0 (experts 0, 1) alone has rows: one of its tiles of 32 is in use, and the sixth expert's tables are read
    # by no block.
    case = Case(Shape(experts=6, chunk=2, tile=32, stages=1), np.zeros((3, 2), int))
    grouping, (y, dx, d_columns) = raw(case)
    assert int(grouping.sizes_E.sum()) == 32 < len(y)
    for slots in (y, dx):
        assert np.isfinite(slots[:32]).all()
        assert np.isnan(slots[32:]).all(), "the interpreter's garbage is not NaN: this test would notice nothing"
    assert np.isfinite(d_columns[:2]).all()
    assert np.isnan(d_columns[2:4]).all()
    compare(run(case), case.expected(), 1e-5)


def test_garbage_in_tables_of_experts_without_slots_reaches_no_result() -> None:
    # Expert 1, the last of its chunk, takes what fills up a tile; no slot is of expert 2.
    case = Case(Shape(experts=4, chunk=2, tile=32, stages=1), np.array([[0], [3], [0]]))
    expected = case.expected()
    for table in case.angles.values():
        table[2] = np.nan
    compare(run(case), expected, 1e-5)


def test_in_the_simulator_of_tpu_memory() -> None:
    """Blocks are brought and taken away as a TPU does it: what is revisited later is not there any more."""
    case = Case(Shape(experts=5, chunk=2, tile=32, stages=1), np.array([[0, 4], [4, 1], [0, 4]] * 9))
    cut = case.shape.cut
    simulator = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
    cut = dataclasses.replace(cut, plan=dataclasses.replace(cut.plan, interpret=simulator))
    compare(run(case, cut), case.expected(), 1e-5)


# Programs


def test_gradients_do_not_depend_on_what_is_differentiated() -> None:
    case = Case(Shape(stages=1), distinct(6, 2, 4))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def d_angles(angles: Any) -> Any:
        _, pull = jax.vjp(
            lambda a: fused.apply(case.shape.cut, case.x, case.expert_TxK, a, case.weights, case.bias), angles
        )
        return pull(jnp.asarray(case.dy))[0]

    compare(d_angles(case.angles), case.expected()[2], 1e-5)


def shards() -> list[Any]:
    """Results on one device, and with the tokens shared out over two: outputs and gradients."""
    case = Case(Shape(experts=5, chunk=2, tile=32, stages=1), distinct(10, 2, 5))

    def one(angles: Any, weights: Any, x: Any, expert_TxK: Any) -> Any:
        *leaves, bias = weights
        return fused.apply(case.shape.cut, x, expert_TxK, angles, Weights(*leaves), bias)

    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    many = jax.shard_map(one, mesh=mesh, in_specs=(whole, whole, rows, rows), out_specs=rows, check_vma=False)
    results = []
    for function in (one, many):

        @jax.jit
        def all_of(function: Any = function) -> Any:
            weights = (*jax.tree.leaves(case.weights), case.bias)
            y, pull = jax.vjp(lambda *a: function(*a, case.expert_TxK), case.angles, weights, case.x)
            return y, *pull(jnp.asarray(case.dy))

        results.append(jax.tree.map(np.asarray, jax.tree.leaves(all_of())))
    return results


def test_shards_of_two_devices_give_what_one_gives() -> None:
    one, two = conftest.on_devices(2, shards)
    assert len(one) == 1 + 4 + 4 + 1
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())


def test_a_large_bias_does_not_round_away_the_gradients_of_the_last_rotation() -> None:
    case = Case(Shape(experts=3, stages=1, dtype="bfloat16"), distinct(10, 2, 3))
    small = run(case)
    case.bias = case.bias + np.asarray(1000, case.bias.dtype)
    for a, b in zip(jax.tree.leaves(run(case)[1:]), jax.tree.leaves(small[1:]), strict=True):
        np.testing.assert_array_equal(a, b)
