"""Rotations inside a Pallas kernel; `pltpu.roll` has no meaning outside one, so each runs in a small kernel."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.experimental import pallas as pl

from bvit_jax import butterfly
from bvit_jax.kernels import rotation

ROWS, EXPERTS, START = 5, 3, 2
# Compiling costs more here than running.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
jit = functools.partial(jax.jit, compiler_options=QUICK)
tables = jit(rotation.tables, static_argnames="stages")
angle_gradients = jit(rotation.angle_gradients, static_argnames="stages")

# Channels, depth, order. 384 = 128 * 3 and 640 = 128 * 5 have odd stages: inside runs of 3 and 5 neighbours
# (descending), or between runs of 128 (ascending). 128 has whole registers in no stage.
LAYOUTS = [
    (128, 1, "descending"),
    (128, 7, "descending"),
    (128, 7, "ascending"),
    (256, 2, "descending"),
    (256, 2, "ascending"),
    pytest.param((512, 9, "descending"), marks=pytest.mark.long),
    pytest.param((512, 9, "ascending"), marks=pytest.mark.long),
    (384, 2, "descending"),
    (384, 9, "descending"),
    (384, 9, "ascending"),
    (640, 10, "descending"),
    pytest.param((640, 10, "ascending"), marks=pytest.mark.long),
    (768, 2, "descending"),
]


@functools.partial(jit, static_argnames=("turn", "expert"))
def turned(turn: rotation.Turn, expert: int, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    def kernel(x: Any, cos: Any, sin: Any, y: Any) -> None:
        row = pl.ds(expert, 1)
        y[:] = rotation.turn(turn, x[:], cos.at[row], sin.at[row])

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x, cos, sin)


@functools.partial(jit, static_argnames=("turn", "expert"))
def unturned(
    turn: rotation.Turn, expert: int, y: jax.Array, dy: jax.Array, cos: jax.Array, sin: jax.Array, before: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows, cotangents, and `before` with the gradients of the columns added."""

    def kernel(y: Any, dy: Any, cos: Any, sin: Any, before: Any, x: Any, dx: Any, gradient: Any) -> None:
        gradient[:] = before[:]
        row = pl.ds(expert, 1)
        x[:], dx[:] = rotation.unturn(turn, y[:], dy[:], cos.at[row], sin.at[row], gradient.at[row])

    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (y, dy, before)]
    return pl.pallas_call(kernel, out_shape=shapes, interpret=True)(y, dy, cos, sin, before)


def beside(table: jax.Array) -> np.ndarray:
    """Sets columns of another rotation before a table's and after it; they must change nothing."""
    return np.pad(np.asarray(table), ((0, 0), (START, 1)), constant_values=9)


class Case:
    """A random rotation of random rows, in float32 and by the oracle in float64."""

    def __init__(self, dim: int, depth: int, order: butterfly.StrideOrder, inverse: bool, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.stages = butterfly.make_stages(dim, depth, order)
        self.turn = rotation.Turn(self.stages, START, inverse)
        self.angles = rng.uniform(-math.pi, math.pi, (EXPERTS, butterfly.num_angles(self.stages))).astype(np.float32)
        self.x, self.dy = rng.normal(size=(2, ROWS, dim)).astype(np.float32)
        self.expert = int(rng.integers(EXPERTS))
        self.cos, self.sin = (beside(table) for table in tables(self.angles, self.stages))
        angles = oracles.float64(self.angles[self.expert])
        self.y, pull = oracles.rotate_back_propagated(oracles.float64(self.x), depth, order, angles, inverse)
        self.dx, self.d_angles = pull(oracles.float64(self.dy))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_turn_and_unturn_equal_the_oracle(layout: tuple[int, int, butterfly.StrideOrder], inverse: bool) -> None:
    case = Case(*layout, inverse)
    y = turned(case.turn, case.expert, case.x, case.cos, case.sin)
    np.testing.assert_allclose(y, case.y, atol=1e-5)
    before = np.full(case.cos.shape, 0.5, np.float32)
    x, dx, after = unturned(case.turn, case.expert, y, case.dy, case.cos, case.sin, before)
    np.testing.assert_allclose(x, case.x, atol=1e-5)
    np.testing.assert_allclose(dx, case.dx, atol=1e-5)
    columns = np.asarray(after) - before
    gradients = np.asarray(angle_gradients(columns[:, START:-1], case.stages))
    np.testing.assert_allclose(gradients[case.expert], case.d_angles, atol=5e-5)
    # Nothing else is added to: neither other experts' rows, nor other rotations' columns.
    columns[case.expert, START:-1] = 0
    np.testing.assert_array_equal(columns, np.zeros_like(columns))


def test_the_oracle_equals_the_product_of_givens_matrices() -> None:
    for dim, depth, order in ((8, 3, "descending"), (12, 4, "ascending"), (12, 4, "descending"), (6, 2, "ascending")):
        rng = np.random.default_rng(dim)
        angles, x = rng.uniform(-3, 3, oracles.count_angles(dim, depth, order)), rng.normal(size=(2, dim))
        matrix = oracles.rotation_matrix(dim, depth, order, angles)
        for inverse in (False, True):
            y, _ = oracles.rotate_back_propagated(x, depth, order, angles, inverse)
            np.testing.assert_allclose(y, x @ (matrix if inverse else matrix.T), atol=1e-12)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("order", butterfly.STRIDE_ORDERS)
def test_the_gradients_of_the_oracle_are_slopes(order: butterfly.StrideOrder, inverse: bool) -> None:
    rng = np.random.default_rng(0)
    angles, x, dy = rng.uniform(-3, 3, oracles.count_angles(12, 4, order)), *rng.normal(size=(2, 3, 12))

    def loss() -> float:
        return float((oracles.rotate_back_propagated(x, 4, order, angles, inverse)[0] * dy).sum())

    dx, d_angles = oracles.rotate_back_propagated(x, 4, order, angles, inverse)[1](dy)
    slopes = [oracles.finite_difference(loss, angles, (i,)) for i in range(len(angles))]
    np.testing.assert_allclose(d_angles, slopes, atol=1e-8)
    slopes = [oracles.finite_difference(loss, x, (row, 5)) for row in range(3)]
    np.testing.assert_allclose(dx[:, 5], slopes, atol=1e-8)


def test_columns_by_hand() -> None:
    # 512 descending: distances 256 and 128 are whole registers, a column per pair (256 each); 64 is not, one per
    # channel (512).
    stages = butterfly.make_stages(512, 3)
    assert [rotation.num_columns(stages[:depth]) for depth in (1, 2, 3)] == [256, 512, 1024]
    # 384 descending: distance 192 is one register and a half; an odd stage has columns for who is left alone too.
    assert rotation.num_columns(butterfly.make_stages(384, 1)) == 384
    assert rotation.num_columns(butterfly.make_stages(384, 9)) == 9 * 384
    walk = rotation.Turn(stages, 10, inverse=False).walk
    assert [columns for _, columns in walk] == [slice(10, 266), slice(266, 522), slice(522, 1034)]
    assert rotation.Turn(stages, 10, inverse=True).walk == walk[::-1]


def test_tables_by_hand() -> None:
    # One pair of registers: a column per pair, c and s as they are.
    angle = jnp.linspace(0, 1, 128)[None]
    cos, sin = tables(angle, butterfly.make_stages(256, 1))
    np.testing.assert_array_equal(cos, jnp.cos(angle))
    np.testing.assert_array_equal(sin, jnp.sin(angle))
    # Half a register: y1 = c x1 - s x2, y2 = c x2 + s x1. So the first of a pair has -s, the second +s.
    angle = jnp.linspace(0, 1, 64)[None]
    cos, sin = tables(angle, butterfly.make_stages(128, 1))
    np.testing.assert_array_equal(cos, jnp.cos(jnp.concatenate([angle, angle], axis=-1)))
    np.testing.assert_array_equal(sin, jnp.concatenate([-jnp.sin(angle), jnp.sin(angle)], axis=-1))
    # Alone channels stay: runs of 3, where 1 has no partner at distance 2.
    stage = butterfly.make_stages(384, 8)[-1]
    assert (stage.length, stage.stride) == (3, 2)
    cos, sin = tables(jnp.full((1, 128), math.pi / 2), (stage,))
    np.testing.assert_allclose(cos[0, :6], [0, 1, 0] * 2, atol=1e-7)
    np.testing.assert_allclose(sin[0, :6], [-1, 0, 1] * 2, atol=1e-7)


def test_tables_are_float32_and_small_angles_keep_their_sines() -> None:
    angles = jnp.full((2, 128), 1e-3, jnp.bfloat16)
    cos, sin = tables(angles, butterfly.make_stages(256, 1))
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(sin, np.sin(np.asarray(angles, np.float64)), rtol=1e-6)
