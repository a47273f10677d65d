import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import ternary

ternarise = jax.jit(ternary.ternarise, static_argnames="kind")
quantise = jax.jit(ternary.quantise, static_argnames="kind")
KINDS = st.sampled_from(ternary.SCALE_KINDS)


@given(st.integers(0, 2**16), st.integers(1, 12), st.integers(1, 12), KINDS)
@settings(max_examples=20, deadline=None)
def test_equals_oracle(seed: int, inputs: int, outputs: int, kind: ternary.ScaleKind) -> None:
    w = np.random.default_rng(seed).normal(size=(inputs, outputs)).astype(np.float32)
    trits, scale = (np.asarray(a) for a in ternarise(w, kind))
    expected_trits, expected_scale = oracles.ternarise(w.astype(np.float64), kind)
    assert scale.shape == ((1, outputs) if kind == "row" else (1, 1))
    np.testing.assert_array_equal(trits, expected_trits)
    np.testing.assert_allclose(np.broadcast_to(scale[0], outputs), expected_scale, rtol=1e-6)
    np.testing.assert_array_equal(quantise(w, kind), trits * scale)


# Column 0: mean |w| = (0.1 + 0.2 + 0.9) / 3 = 0.4; w / 0.4 = 0.25, -0.5, 2.25; rounded (halves to even) 0, -0, 2.
# Column 1: mean |w| = (3 + 1 + 2) / 3 = 2;         w / 2   = 1.5, 0.5, -1;   rounded 2, 0, -1.
# Both:     mean |w| = (1.2 + 6) / 6 = 1.2;         w / 1.2 = 0.08, -0.17, 0.75 and 2.5, 0.83, -1.67.
HAND = np.array([[0.1, 3.0], [-0.2, 1.0], [0.9, -2.0]], np.float32)


def test_hand_computed_per_row() -> None:
    trits, scale = ternary.ternarise(HAND, "row")
    np.testing.assert_array_equal(trits, [[0, 1], [0, 0], [1, -1]])
    np.testing.assert_allclose(scale, [[0.4, 2.0]], rtol=1e-6)
    np.testing.assert_allclose(ternary.quantise(HAND), [[0, 2], [0, 0], [0.4, -2]], rtol=1e-6)


def test_hand_computed_per_tensor() -> None:
    trits, scale = ternary.ternarise(HAND, "tensor")
    np.testing.assert_array_equal(trits, [[0, 1], [0, 1], [1, -1]])
    np.testing.assert_allclose(scale, [[1.2]], rtol=1e-6)


def test_stack_is_quantised_matrix_by_matrix() -> None:
    stack = jnp.stack([HAND, 10 * HAND[::-1], -HAND])
    for kind in ternary.SCALE_KINDS:
        trits, scale = ternary.ternarise(stack, kind)
        for index, matrix in enumerate(stack):
            alone = ternary.ternarise(matrix, kind)
            np.testing.assert_array_equal(trits[index], alone[0])
            np.testing.assert_array_equal(scale[index], alone[1])


@pytest.mark.parametrize("kind", ternary.SCALE_KINDS)
def test_scale_has_a_floor(kind: ternary.ScaleKind) -> None:
    trits, scale = ternary.ternarise(jnp.zeros((4, 3)), kind)
    np.testing.assert_array_equal(scale, np.full(scale.shape, np.float32(1e-5)))
    np.testing.assert_array_equal(trits, np.zeros((4, 3)))
    # Under the floor, 1e-6 / 1e-5 rounds to 0; without it the trit would be 1.
    np.testing.assert_array_equal(ternary.quantise(jnp.full((4, 3), 1e-6), kind), np.zeros((4, 3)))


def test_floor_holds_output_by_output() -> None:
    w = jnp.array([[0.0, 2.0], [0.0, 2.0]])
    np.testing.assert_array_equal(ternary.ternarise(w)[1], np.array([[1e-5, 2.0]], np.float32))
    gradient = jax.grad(lambda w: ternary.quantise(w).sum())(w)
    np.testing.assert_array_equal(gradient, np.ones((2, 2)))


@pytest.mark.parametrize("kind", ternary.SCALE_KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_is_exactly_the_upstream_gradient(kind: ternary.ScaleKind, dtype: jnp.dtype, key: jax.Array) -> None:
    w, upstream = jax.random.normal(key, (2, 6, 5)).astype(dtype)
    w_q, vjp = jax.vjp(lambda w: ternary.quantise(w, kind), w)
    assert w_q.dtype == dtype
    np.testing.assert_array_equal(vjp(upstream)[0], upstream)


def test_unknown_kind() -> None:
    for function in (ternary.ternarise, ternary.quantise, ternary.statistics):
        with pytest.raises(ValueError, match=r"ternary scale 'column' is unknown; choose one of row, tensor"):
            function(HAND, "column")


def test_statistics() -> None:
    stats = ternary.statistics(HAND)  # trits 0, 0, 1 and 1, 0, -1; scales 0.4 and 2
    np.testing.assert_allclose([stats.zeros, stats.scale], [3 / 6, 1.2], rtol=1e-6)
    stats = ternary.statistics(HAND, "tensor")
    np.testing.assert_allclose([stats.zeros, stats.scale], [2 / 6, 1.2], rtol=1e-6)
    stack = ternary.statistics(jnp.stack([HAND, jnp.zeros((3, 2))]).astype(jnp.bfloat16))
    assert (stack.zeros.dtype, stack.scale.dtype, stack.zeros.shape) == (jnp.float32, jnp.float32, ())
    np.testing.assert_allclose([stack.zeros, stack.scale], [9 / 12, 0.6], rtol=1e-2)
