import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import butterfly

DIMS = (*range(1, 41), 48, 96)
ORDERS = st.sampled_from(butterfly.STRIDE_ORDERS)
# Compiling costs more here than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
rotate = jit(butterfly.rotate, static_argnames=("stages", "inverse"))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, butterfly.StrideOrder]:
    dim = draw(st.sampled_from(DIMS))
    return dim, draw(st.integers(0, math.ceil(math.log2(dim)))), draw(ORDERS)


def random_angles(seed: int, *shape: int, limit: float = math.pi) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-limit, limit, size=shape).astype(np.float32)


def random_rows(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def library_pairs(stages: butterfly.Stages) -> list[list[tuple[int, int]]]:
    """Reads the pairs off the stages by what `Stage` says of itself, in the order of the angles."""
    layout = []
    for stage in stages:
        channels = np.arange(stage.outer * stage.length * stage.inner).reshape(stage.outer, stage.length, stage.inner)
        first, second = channels[:, stage.first].flatten(), channels[:, stage.first + stage.stride].flatten()
        layout.append([(int(i), int(j)) for i, j in zip(first, second, strict=True)])
    return layout


# Layout


@pytest.mark.parametrize("order", butterfly.STRIDE_ORDERS)
def test_pairs_follow_the_documented_rule(order: butterfly.StrideOrder) -> None:
    for dim in (*DIMS, 64, 192, 768):
        deepest = math.ceil(math.log2(dim))
        assert butterfly.max_stages(dim) == deepest
        stages = butterfly.make_stages(dim, deepest, order)
        assert library_pairs(stages) == oracles.stage_pairs(dim, deepest, order)
        assert [stage.num_angles for stage in stages] == [len(pairs) for pairs in library_pairs(stages)]
        for depth in range(deepest):
            assert butterfly.make_stages(dim, depth, order) == stages[:depth]


# 8 = 2^3: three even stages. 6 = 2 * 3: one even stage, then two odd ones on an axis of 3, where 0 meets 2 and 0 meets
# 1 (1 XOR 2 = 3 lies beyond). 12 = 4 * 3: two even stages of 6 pairs and two odd ones of 4.
HAND = {
    (8, "descending"): [
        [(0, 4), (1, 5), (2, 6), (3, 7)],
        [(0, 2), (1, 3), (4, 6), (5, 7)],
        [(0, 1), (2, 3), (4, 5), (6, 7)],
    ],
    (8, "ascending"): [
        [(0, 1), (2, 3), (4, 5), (6, 7)],
        [(0, 2), (1, 3), (4, 6), (5, 7)],
        [(0, 4), (1, 5), (2, 6), (3, 7)],
    ],
    (6, "descending"): [[(0, 3), (1, 4), (2, 5)], [(0, 2), (3, 5)], [(0, 1), (3, 4)]],
    (6, "ascending"): [[(0, 1), (2, 3), (4, 5)], [(0, 2), (1, 3)], [(0, 4), (1, 5)]],
    (12, "descending"): [
        [(0, 6), (1, 7), (2, 8), (3, 9), (4, 10), (5, 11)],
        [(0, 3), (1, 4), (2, 5), (6, 9), (7, 10), (8, 11)],
        [(0, 2), (3, 5), (6, 8), (9, 11)],
        [(0, 1), (3, 4), (6, 7), (9, 10)],
    ],
    (12, "ascending"): [
        [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)],
        [(0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11)],
        [(0, 4), (1, 5), (2, 6), (3, 7)],
        [(0, 8), (1, 9), (2, 10), (3, 11)],
    ],
}


@pytest.mark.parametrize(("dim", "order"), HAND)
def test_pairs_and_counts_by_hand(dim: int, order: butterfly.StrideOrder) -> None:
    expected = HAND[dim, order]
    stages = butterfly.make_stages(dim, len(expected), order)
    assert butterfly.max_stages(dim) == len(expected)
    assert library_pairs(stages) == expected
    assert oracles.stage_pairs(dim, len(expected), order) == expected
    assert butterfly.num_angles(stages) == {8: 12, 6: 7, 12: 20}[dim]


@pytest.mark.parametrize("order", butterfly.STRIDE_ORDERS)
@pytest.mark.parametrize("dim", [2, 4, 8, 16, 32])
def test_full_depth_mixes_every_input_into_every_output(dim: int, order: butterfly.StrideOrder) -> None:
    stages = butterfly.make_stages(dim, butterfly.max_stages(dim), order)
    angles = 0.5 + 0.1 * random_angles(dim, butterfly.num_angles(stages))
    assert (np.abs(rotate(np.eye(dim, dtype=np.float32), angles, stages)) > 1e-6).all()


def test_fewer_stages_mix_what_the_order_says() -> None:
    angles = np.full(8, 0.7, np.float32)
    blocks, combs = (
        rotate(np.eye(8, dtype=np.float32), angles, butterfly.make_stages(8, 2, o)) != 0
        for o in ("ascending", "descending")
    )
    channel = np.arange(8)
    np.testing.assert_array_equal(blocks, channel[:, None] // 4 == channel[None] // 4)
    np.testing.assert_array_equal(combs, channel[:, None] % 2 == channel[None] % 2)


@pytest.mark.parametrize("order", butterfly.STRIDE_ORDERS)
def test_full_depth_links_every_channel_to_every_other(order: butterfly.StrideOrder) -> None:
    for dim in (*DIMS, 768):
        group = list(range(dim))
        for pairs in library_pairs(butterfly.make_stages(dim, butterfly.max_stages(dim), order)):
            for i, j in pairs:
                kept, merged = group[i], group[j]
                group = [kept if g == merged else g for g in group]
        assert len(set(group)) == 1, dim


def test_impossible_layouts() -> None:
    with pytest.raises(ValueError, match="4 stages do not fit 8 channels; choose 0 to 3"):
        butterfly.make_stages(8, 4)
    with pytest.raises(ValueError, match="-1 stages do not fit 8 channels; choose 0 to 3"):
        butterfly.make_stages(8, -1)
    with pytest.raises(ValueError, match="stride order 'random' is unknown; choose one of descending, ascending"):
        butterfly.make_stages(8, 1, "random")


# Values


def test_one_pair_by_hand() -> None:
    # A quarter turn takes (1, 0) to (0, 1); back, (1, 0) to (0, -1).
    stages, quarter = butterfly.make_stages(2, 1), jnp.array([math.pi / 2])
    np.testing.assert_allclose(butterfly.rotate(jnp.array([1.0, 0.0]), quarter, stages), [0, 1], atol=1e-7)
    back = butterfly.rotate(jnp.array([1.0, 0.0]), quarter, stages, inverse=True)
    np.testing.assert_allclose(back, [0, -1], atol=1e-7)


@given(layouts(), st.booleans(), st.booleans(), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_equals_oracle(
    layout: tuple[int, int, butterfly.StrideOrder], inverse: bool, by_expert: bool, seed: int
) -> None:
    dim, depth, order = layout
    stages = butterfly.make_stages(dim, depth, order)
    angles_ExA = random_angles(seed, 3, oracles.count_angles(dim, depth, order))
    x = random_rows(seed, 4, dim)
    expert = np.array([2, 0, 2, 1], np.int32) if by_expert else np.zeros(4, np.int32)
    if by_expert:
        y = rotate(x, angles_ExA, stages, inverse=inverse, expert=expert)
    else:
        y = rotate(x, angles_ExA[0], stages, inverse=inverse)
    matrices = [oracles.rotation_matrix(dim, depth, order, angles) for angles in angles_ExA]
    expected = [(matrices[e].T if inverse else matrices[e]) @ row for e, row in zip(expert, x, strict=True)]
    np.testing.assert_allclose(y, expected, atol=1e-5)


@given(layouts(), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_orthogonal_and_undone_by_the_inverse(layout: tuple[int, int, butterfly.StrideOrder], seed: int) -> None:
    stages = butterfly.make_stages(*layout)
    angles = random_angles(seed, butterfly.num_angles(stages), limit=100)
    identity = np.eye(layout[0], dtype=np.float32)
    turned = np.asarray(rotate(identity, angles, stages), np.float64)
    np.testing.assert_allclose(turned @ turned.T, identity, atol=2e-6)
    np.testing.assert_allclose(turned.T @ turned, identity, atol=2e-6)
    np.testing.assert_allclose(rotate(turned.astype(np.float32), angles, stages, inverse=True), identity, atol=2e-6)
    x = random_rows(seed, layout[0]).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(x @ turned), np.linalg.norm(x), rtol=1e-5)


def test_no_stages_are_the_identity() -> None:
    x, none = jnp.ones((2, 6)), butterfly.make_stages(6, 0)
    assert none == ()
    assert butterfly.num_angles(none) == 0
    np.testing.assert_array_equal(butterfly.rotate(x, jnp.zeros(0), none), x)
    gradient = jax.grad(lambda x: butterfly.rotate(x, jnp.zeros(0), none, inverse=True).sum())(x)
    np.testing.assert_array_equal(gradient, x)


@pytest.mark.parametrize("by_expert", [False, True])
def test_leading_axes(by_expert: bool) -> None:
    stages = butterfly.make_stages(6, 3)
    angles, x = random_angles(0, 2, 7), random_rows(0, 2, 3, 4, 6)
    expert = np.arange(24, dtype=np.int32).reshape(2, 3, 4) % 2 if by_expert else None
    y = np.asarray(rotate(x, angles if by_expert else angles[0], stages, expert=expert))
    assert y.shape == x.shape
    for index in np.ndindex(2, 3, 4):
        matrix = oracles.rotation_matrix(6, 3, "descending", angles[expert[index] if by_expert else 0])
        np.testing.assert_allclose(y[index], matrix @ x[index], atol=1e-5)
    one = rotate(x[0, 0, 0], angles[1], stages)
    np.testing.assert_allclose(one, oracles.rotation_matrix(6, 3, "descending", angles[1]) @ x[0, 0, 0], atol=1e-5)


def test_vmap_over_experts_equals_rows_by_expert() -> None:
    stages = butterfly.make_stages(12, 4, "ascending")
    angles, x = random_angles(1, 3, butterfly.num_angles(stages)), random_rows(1, 3, 5, 12)
    expert = np.repeat(np.arange(3, dtype=np.int32)[:, None], 5, axis=1)

    def by_vmap(x: jax.Array, angles: jax.Array) -> jax.Array:
        return jax.vmap(lambda x, a: butterfly.rotate(x, a, stages))(x, angles)

    def by_row(x: jax.Array, angles: jax.Array) -> jax.Array:
        return butterfly.rotate(x, angles, stages, expert=expert)

    first, second = (results_of(f, x, angles, random_rows(2, *x.shape)) for f in (by_vmap, by_row))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_shapes_that_do_not_fit() -> None:
    stages = butterfly.make_stages(8, 2)
    expert = jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match=r"angles have shape \(7,\); these stages need \(8,\)"):
        butterfly.rotate(jnp.ones((3, 8)), jnp.ones(7), stages)
    with pytest.raises(ValueError, match=r"angles have shape \(2, 8\); these stages need \(8,\)"):
        butterfly.rotate(jnp.ones((3, 8)), jnp.ones((2, 8)), stages)
    with pytest.raises(ValueError, match=r"angles have shape \(8,\); these stages need \(experts, 8\)"):
        butterfly.rotate(jnp.ones((3, 8)), jnp.ones(8), stages, expert=expert)
    with pytest.raises(ValueError, match="x has 9 channels; these stages turn another number"):
        butterfly.rotate(jnp.ones((3, 9)), jnp.ones(8), stages)
    with pytest.raises(ValueError, match=r"expert has shape \(3,\); x of shape \(2, 8\) needs \(2,\)"):
        butterfly.rotate(jnp.ones((2, 8)), jnp.ones((2, 8)), stages, expert=expert)


# Gradients


def plain(
    x_NxD: jax.Array, angles_NxA: jax.Array, layout: tuple[int, int, butterfly.StrideOrder], inverse: bool
) -> jax.Array:
    """Turns pair by pair, without `custom_vjp`."""
    turns = [pair for pairs in oracles.stage_pairs(*layout) for pair in pairs]
    channels = [x_NxD[:, i] for i in range(layout[0])]
    for index in reversed(range(len(turns))) if inverse else range(len(turns)):
        i, j = turns[index]
        angle_N = -angles_NxA[:, index] if inverse else angles_NxA[:, index]
        c, s = jnp.cos(angle_N), jnp.sin(angle_N)
        channels[i], channels[j] = c * channels[i] - s * channels[j], s * channels[i] + c * channels[j]
    return jnp.stack(channels, axis=1)


def results_of(
    function: Callable[..., jax.Array], x: jax.Array, angles: jax.Array, upstream: jax.Array
) -> tuple[jax.Array, ...]:
    """The rotated rows, and the gradients to rows and angles."""

    @jit
    def run(x: jax.Array, angles: jax.Array, upstream: jax.Array) -> tuple[jax.Array, ...]:
        y, vjp = jax.vjp(function, x, angles)
        return y, *vjp(upstream)

    return run(x, angles, upstream)


LAYOUTS = [(8, 3, "descending"), (6, 3, "ascending"), (7, 3, "descending")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("by_expert", [False, True])
def test_gradients_equal_plain_autodiff(
    layout: tuple[int, int, butterfly.StrideOrder], inverse: bool, by_expert: bool
) -> None:
    stages = butterfly.make_stages(*layout)
    x, upstream = random_rows(0, 5, layout[0]), random_rows(1, 5, layout[0])
    expert = np.array([3, 0, 3, 1, 0], np.int32) if by_expert else None
    angles = random_angles(2, *((4,) if by_expert else ()), butterfly.num_angles(stages))

    def fast(x: jax.Array, angles: jax.Array) -> jax.Array:
        return butterfly.rotate(x, angles, stages, inverse=inverse, expert=expert)

    def slow(x: jax.Array, angles: jax.Array) -> jax.Array:
        angles_NxA = angles[expert] if by_expert else jnp.broadcast_to(angles, (5, *angles.shape))
        return plain(x, angles_NxA, layout, inverse)

    actual, expected = (results_of(function, x, angles, upstream) for function in (fast, slow))
    for name, got, wanted in zip(("y", "dx", "d_angles"), actual, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5, err_msg=name)
    if by_expert:
        assert not np.any(actual[2][2])  # no rows
        assert np.abs(actual[2][1]).max() > 0.01


@given(layouts(), st.booleans(), st.integers(0, 2**16))
@settings(max_examples=15, deadline=None)
def test_gradients_equal_finite_differences(
    layout: tuple[int, int, butterfly.StrideOrder], inverse: bool, seed: int
) -> None:
    stages = butterfly.make_stages(*layout)
    num_angles = butterfly.num_angles(stages)
    x, upstream = random_rows(seed, 2, layout[0]), random_rows(seed + 1, 2, layout[0])
    angles = random_angles(seed, num_angles)

    def loss(x: jax.Array, angles: jax.Array) -> jax.Array:
        return (upstream * butterfly.rotate(x, angles, stages, inverse=inverse)).sum()

    d_x, d_angles = (np.asarray(g) for g in jit(jax.grad(loss, argnums=(0, 1)))(x, angles))
    exact = angles.astype(np.float64)

    def oracle() -> float:
        matrix = oracles.rotation_matrix(*layout, exact)
        return float(np.sum(upstream * (x @ (matrix if inverse else matrix.T))))

    matrix = oracles.rotation_matrix(*layout, exact)
    np.testing.assert_allclose(d_x, upstream @ (matrix.T if inverse else matrix), atol=1e-5)
    for index in sorted({0, num_angles // 2, num_angles - 1} if num_angles else ()):
        wanted = oracles.finite_difference(oracle, exact, (index,))
        np.testing.assert_allclose(d_angles[index], wanted, atol=1e-4)


@pytest.mark.parametrize(("rows", "experts"), [(1, 1), (1, 3), (5, 1)])
def test_one_row_or_one_expert(rows: int, experts: int) -> None:
    stages = butterfly.make_stages(6, 3)
    x, angles = random_rows(0, rows, 6), random_angles(0, experts, 7)
    expert = np.full(rows, experts - 1, np.int32)
    with_table = results_of(lambda x, a: butterfly.rotate(x, a, stages, expert=expert), x, angles, x[::-1] + 1)
    alone = results_of(lambda x, a: butterfly.rotate(x, a, stages), x, angles[-1], x[::-1] + 1)
    for got, wanted in zip(with_table[:2], alone[:2], strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    np.testing.assert_allclose(with_table[2][-1], alone[2], atol=1e-5)
    assert not np.any(with_table[2][:-1])


# Cosines and sines


@pytest.mark.parametrize("limit", [0.01, 0.8, math.pi, 20, 1000])
def test_cosines_and_sines_equal_numpy(limit: float) -> None:
    angles = random_angles(0, 20_000, limit=limit)
    cos, sin = jit(butterfly.cos_sin)(angles)
    assert cos.dtype == sin.dtype == jnp.float32
    exact = angles.astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(exact), rtol=0, atol=2e-7)
    np.testing.assert_allclose(sin, np.sin(exact), rtol=0, atol=2e-7)
    if limit < 0.1:  # small sines are exact in parts of themselves
        np.testing.assert_allclose(sin, np.sin(exact), rtol=2e-7)


def test_cosines_and_sines_at_the_borders_of_quadrants() -> None:
    # Multiples of pi / 4 and the float32 numbers on both sides: quadrants are chosen at odd ones, signs change at even.
    middle = (np.arange(-1200, 1201) * (math.pi / 4)).astype(np.float32)
    angles = np.concatenate(
        [np.nextafter(middle, np.float32(-np.inf)), middle, np.nextafter(middle, np.float32(np.inf))]
    )
    cos, sin = jit(butterfly.cos_sin)(angles)
    exact = angles.astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(exact), rtol=0, atol=2e-7)
    np.testing.assert_allclose(sin, np.sin(exact), rtol=0, atol=2e-7)
    np.testing.assert_allclose(np.hypot(cos, sin), 1, atol=2e-7)


def test_no_angle_is_the_identity_exactly() -> None:
    cos, sin = butterfly.cos_sin(jnp.zeros(2))
    np.testing.assert_array_equal(cos, [1, 1])
    np.testing.assert_array_equal(sin, [0, 0])


def test_cosines_and_sines_of_float64_are_float64() -> None:
    with jax.enable_x64(True):
        angles = random_angles(0, 100, limit=1000).astype(np.float64)
        cos, sin = butterfly.cos_sin(jnp.asarray(angles))
        assert cos.dtype == sin.dtype == jnp.float64
        np.testing.assert_allclose(cos, np.cos(angles), atol=1e-14)
        np.testing.assert_allclose(sin, np.sin(angles), atol=1e-14)


# Precision and memory


@pytest.mark.parametrize("by_expert", [False, True])
def test_bfloat16_is_turned_in_float32(by_expert: bool) -> None:
    stages = butterfly.make_stages(16, 4)
    x, upstream = jnp.asarray(random_rows(0, 3, 16), jnp.bfloat16), jnp.asarray(random_rows(1, 3, 16), jnp.bfloat16)
    angles = random_angles(0, 2, 32) if by_expert else random_angles(0, 32)
    expert = np.array([0, 1, 0]) if by_expert else None

    def turn(x: jax.Array, angles: jax.Array) -> jax.Array:
        return butterfly.rotate(x, angles, stages, expert=expert)

    y, d_x, d_angles = results_of(turn, x, angles, upstream)
    assert (y.dtype, d_x.dtype, d_angles.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    wide = results_of(turn, x.astype(jnp.float32), angles, upstream.astype(jnp.float32))
    # Rounded once, at the end: half a unit in the last of 8 bits.
    np.testing.assert_allclose(y.astype(jnp.float32), wide[0], rtol=1.01 * 2**-8)
    np.testing.assert_allclose(d_x.astype(jnp.float32), wide[1], rtol=1.01 * 2**-8)
    np.testing.assert_allclose(d_angles, wide[2], atol=0.05)  # from an output rounded to bfloat16


def test_float64_stays_float64() -> None:
    with jax.enable_x64(True):
        stages = butterfly.make_stages(12, 4)
        angles, x = random_angles(0, 20).astype(np.float64), random_rows(0, 3, 12).astype(np.float64)
        y = rotate(x, angles, stages)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, x @ oracles.rotation_matrix(12, 4, "descending", angles).T, atol=1e-13)


@pytest.mark.parametrize("by_expert", [False, True])
def test_backward_saves_the_output_and_the_angles_alone(by_expert: bool) -> None:
    x, expert = jnp.ones((64, 128)), jnp.zeros(64, jnp.int32) if by_expert else None
    for depth in (1, 4, 7):
        stages = butterfly.make_stages(128, depth)
        angles = jnp.ones((2, 64 * depth) if by_expert else (64 * depth,))
        _, vjp = jax.eval_shape(
            lambda x, a, s=stages: jax.vjp(lambda x, a: butterfly.rotate(x, a, s, expert=expert), x, a), x, angles
        )
        saved = sorted(leaf.shape for leaf in jax.tree.leaves(vjp))
        assert saved == sorted([x.shape, angles.shape, *([expert.shape] if by_expert else [])])
