"""Rotations of blocks of rows that share their angles, against dense matrices in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bvit_jax import block_rotation, butterfly
from bvit_jax.block_rotation import Pass, Plan
from bvit_jax.butterfly import Stage

BLOCKS = 3
# Compiling costs more here than running.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def plan_of(dim: int, depth: int, order: butterfly.StrideOrder) -> Plan:
    return block_rotation.make_plan(butterfly.make_stages(dim, depth, order), dim)


@functools.partial(jit, static_argnames=("plan", "inverse"))
def turn_and_unturn(
    plan: Plan, inverse: bool, x: jax.Array, angles: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turned rows and cotangents of rows and angles, all in the order of `butterfly`."""
    begin, end = (-1, 0) if inverse else (0, -1)
    arranged, pull = jax.vjp(lambda a: block_rotation.arrange_angles(plan, a), angles)
    table = butterfly.cos_sin(arranged)
    y = block_rotation.turn(plan, block_rotation.arrange(plan, x, begin), table, inverse)
    dx, d_arranged = block_rotation.unturn(plan, y, block_rotation.arrange(plan, dy, end), table, inverse)
    return block_rotation.restore(plan, y, end), block_rotation.restore(plan, dx, begin), *pull(d_arranged)


# Channels, depth, order. 12 = 4 * 3, 48 = 16 * 3, 384 = 128 * 3, 40 = 8 * 5; 7 has odd stages alone.
LAYOUTS = [
    (8, 1, "descending"),
    (8, 3, "ascending"),
    (12, 4, "descending"),
    (12, 4, "ascending"),
    (7, 3, "descending"),
    (40, 6, "ascending"),
    (48, 6, "descending"),
    (48, 5, "ascending"),
    (64, 1, "ascending"),
    (64, 2, "descending"),
    (64, 2, "ascending"),
    (64, 6, "descending"),
    (64, 6, "ascending"),
    (384, 9, "descending"),
    (384, 9, "ascending"),
]


def check(layout: tuple[int, int, butterfly.StrideOrder], inverse: bool, height: int, seed: int = 0) -> None:
    dim, depth, order = layout
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=(2, BLOCKS, height, dim)).astype(np.float32)
    angles = rng.uniform(-math.pi, math.pi, (BLOCKS, oracles.count_angles(*layout))).astype(np.float32)
    y, dx, d_angles = turn_and_unturn(plan_of(*layout), inverse, x, angles, dy)
    assert d_angles.shape == angles.shape
    for block in range(BLOCKS):
        exact = oracles.float64(angles[block])
        wanted, pull = oracles.rotate_back_propagated(oracles.float64(x[block]), depth, order, exact, inverse)
        wanted_dx, wanted_d_angles = pull(oracles.float64(dy[block]))
        np.testing.assert_allclose(y[block], wanted, atol=1e-5)
        np.testing.assert_allclose(dx[block], wanted_dx, atol=1e-5)
        np.testing.assert_allclose(d_angles[block], wanted_d_angles, atol=3e-5)
        if dim <= 48:
            matrix = oracles.rotation_matrix(dim, depth, order, exact)
            np.testing.assert_allclose(y[block], x[block] @ (matrix if inverse else matrix.T), atol=1e-5)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_gradients_equal_the_oracle(layout: tuple[int, int, butterfly.StrideOrder], inverse: bool) -> None:
    check(layout, inverse, height=4)


@pytest.mark.parametrize("height", [1, 3])
def test_blocks_of_other_heights(height: int) -> None:
    check((48, 6, "descending"), False, height)


@given(st.integers(2, 60), st.data())
@settings(max_examples=4, deadline=None, phases=(Phase.explicit, Phase.generate))  # each example compiles
def test_any_number_of_channels(dim: int, data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, math.ceil(math.log2(dim))))
    check((dim, depth, data.draw(st.sampled_from(butterfly.STRIDE_ORDERS))), data.draw(st.booleans()), height=2)


@pytest.mark.parametrize("inverse", [False, True])
def test_no_stages_are_the_identity(inverse: bool) -> None:
    plan = plan_of(6, 0, "descending")
    assert plan.passes == ()
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    y, dx, d_angles = turn_and_unturn(plan, inverse, x, np.zeros((2, 0), np.float32), x + 1)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(dx, x + 1)
    assert d_angles.shape == (2, 0)


@pytest.mark.parametrize("order", butterfly.STRIDE_ORDERS)
def test_turning_back_undoes_turning(order: butterfly.StrideOrder) -> None:
    plan = plan_of(48, 6, order)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 48)).astype(np.float32)
    angles = rng.uniform(-3, 3, (2, butterfly.num_angles(butterfly.make_stages(48, 6, order)))).astype(np.float32)
    turned, *_ = turn_and_unturn(plan, False, x, angles, x)
    np.testing.assert_allclose(turn_and_unturn(plan, True, turned, angles, x)[0], x, atol=1e-5)
    # Nor is anything lost of what is back-propagated: the cotangent turned back is turned.
    np.testing.assert_allclose(turn_and_unturn(plan, True, x, angles, x)[1], turned, atol=1e-5)


# Plans


def test_plans_by_hand() -> None:
    # 64 channels at distances 32, 16, 8: far. 4, 2, 1: near, within runs of 8; of 64 channels transposed as 8 x 8,
    # those at distance h lie 8 h apart. Two neighbouring stages make a pass.
    far = [Stage(1, 2, 1, 32), Stage(2, 2, 1, 16), Stage(4, 2, 1, 8)]
    near = [Stage(1, 2, 1, 32), Stage(2, 2, 1, 16), Stage(4, 2, 1, 8)]
    passes = Pass((far[0], far[1]), False), Pass((far[2],), False), Pass((near[0], near[1]), True)
    assert plan_of(64, 6, "descending") == Plan((*passes, Pass((near[2],), True)), 64, 8)
    assert plan_of(64, 3, "descending") == Plan(passes[:2], 64, 64)  # no near stage, no runs
    # Ascending, depth 2: distances 1 and 2, runs of 4; transposed as 16 x 4, 16 and 32 apart.
    assert plan_of(64, 2, "ascending") == Plan((Pass((Stage(2, 2, 1, 16), Stage(1, 2, 1, 32)), True),), 64, 4)
    # 12 = 4 * 3: the far pair, at distance 6, is near too; one run is all there is, and nothing is transposed.
    plan = plan_of(12, 4, "descending")
    assert (plan.run, [(len(one.stages), one.near) for one in plan.passes]) == (
        12,
        [(2, False), (1, False), (1, False)],
    )
    # 48 = 16 * 3: distances 24 and 12 far; 6 and 3, and among three neighbours, in runs of 12.
    plan = plan_of(48, 6, "descending")
    assert [(len(one.stages), one.near) for one in plan.passes] == [(2, False), (2, True), (1, True), (1, True)]
    assert (plan.run, plan.passes[2].stages) == (12, (Stage(4, 3, 2, 4),))


def test_channels_and_angles_by_hand() -> None:
    # 16 channels, pairs of neighbours: runs of 2, all first members before all second ones. Pair i keeps angle i.
    plan = plan_of(16, 1, "ascending")
    arranged = block_rotation.arrange(plan, jnp.arange(16), 0)
    np.testing.assert_array_equal(arranged, [*range(0, 16, 2), *range(1, 16, 2)])
    np.testing.assert_array_equal(block_rotation.restore(plan, arranged, 0), range(16))
    np.testing.assert_array_equal(block_rotation.arrange_angles(plan, jnp.arange(8)[None]), [range(8)])
    # Distances 1, 2: runs of 4. Of distance 2 the pairs are 0-2, 1-3, 4-6, ...: even angles before odd ones.
    plan = plan_of(16, 2, "ascending")
    angles = block_rotation.arrange_angles(plan, jnp.arange(16)[None])
    np.testing.assert_array_equal(angles, [[0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]])


@pytest.mark.parametrize("order", butterfly.STRIDE_ORDERS)
@pytest.mark.parametrize("dim", [16, 48, 64])
def test_only_ends_with_near_pairs_are_arranged_and_restoring_undoes_it(dim: int, order: butterfly.StrideOrder) -> None:
    plan, x = plan_of(dim, butterfly.max_stages(dim), order), jnp.arange(2 * dim).reshape(2, dim)
    # Full depth begins far apart and ends with neighbours, or the other way round.
    far, near = (0, -1) if order == "descending" else (-1, 0)
    np.testing.assert_array_equal(block_rotation.arrange(plan, x, far), x)
    np.testing.assert_array_equal(block_rotation.restore(plan, x, far), x)
    arranged = block_rotation.arrange(plan, x, near)
    assert (arranged != x).any()
    np.testing.assert_array_equal(block_rotation.restore(plan, arranged, near), x)
    np.testing.assert_array_equal(arranged, x.reshape(2, -1, plan.run).swapaxes(1, 2).reshape(2, dim))


def test_between_two_near_ends_nothing_is_transposed() -> None:
    # What `turn` takes and leaves, near passes alone: XLA sees slices, but no transposition.
    plan = plan_of(64, 2, "ascending")
    table = (jnp.ones((2, 64)), jnp.ones((2, 64)))
    text = str(jax.make_jaxpr(lambda x: block_rotation.turn(plan, x, table, False))(jnp.ones((2, 4, 64))))
    assert "transpose" not in text
    mixed = plan_of(64, 6, "ascending")
    table = (jnp.ones((2, 192)), jnp.ones((2, 192)))
    text = str(jax.make_jaxpr(lambda x: block_rotation.turn(mixed, x, table, False))(jnp.ones((2, 4, 64))))
    assert text.count("transpose") == 1
