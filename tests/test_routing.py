import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import routing

select = jax.jit(routing.select, static_argnames="top_k")


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    batch, tokens, experts = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    logits = rng.normal(scale=2, size=(batch, tokens, experts)).astype(np.float32)
    return logits, draw(st.integers(1, experts))


@given(cases())
@settings(max_examples=25, deadline=None)
def test_select_equals_oracle(case: tuple[np.ndarray, int]) -> None:
    logits, top_k = case
    routed = jax.tree.map(np.asarray, select(logits, top_k))
    assert routed.experts_BxTxK.dtype == np.int32
    for index in np.ndindex(logits.shape[:2]):
        experts, gates = oracles.route(logits[index].astype(np.float64), top_k)
        np.testing.assert_array_equal(routed.experts_BxTxK[index], experts)
        np.testing.assert_allclose(routed.gates_BxTxK[index], gates, rtol=1e-5)
        np.testing.assert_allclose(routed.probs_BxTxE[index], oracles.softmax(logits[index]), rtol=1e-5, atol=1e-7)
    if top_k > 1:
        np.testing.assert_allclose(routed.gates_BxTxK.sum(axis=-1), np.ones(logits.shape[:2]), rtol=1e-6)


def test_select_hand_computed() -> None:
    # Probabilities 1/10, 4/10, 2/10, 3/10.
    logits = jnp.log(jnp.array([1.0, 4, 2, 3]))
    two, one = routing.select(logits, 2), routing.select(logits, 1)
    np.testing.assert_array_equal(two.experts_BxTxK, [1, 3])
    np.testing.assert_allclose(two.gates_BxTxK, [4 / 7, 3 / 7], rtol=1e-6)
    np.testing.assert_array_equal(one.experts_BxTxK, [1])
    np.testing.assert_allclose(one.gates_BxTxK, [0.4], rtol=1e-6)
    np.testing.assert_allclose(one.probs_BxTxE, [0.1, 0.4, 0.2, 0.3], rtol=1e-6)


def test_single_gate_sends_a_gradient_to_the_logits() -> None:
    logits = jnp.log(jnp.array([1.0, 4, 2, 3]))
    gradient = jax.grad(lambda x: routing.select(x, 1).gates_BxTxK[0])(logits)
    # dp_1 / dlogit_e = p_1 (1[e = 1] - p_e), p_1 = 0.4
    np.testing.assert_allclose(gradient, [-0.04, 0.24, -0.08, -0.12], rtol=1e-5)


def test_gates_of_two_send_a_gradient_to_the_selected_logits() -> None:
    gradient = jax.grad(lambda x: routing.select(x, 2).gates_BxTxK[0])(jnp.log(jnp.array([1.0, 4, 2, 3])))
    # g (1 - g) with g = 4/7 for the first of the pair, minus that for the second, nothing for the others.
    np.testing.assert_allclose(gradient, [0, 12 / 49, 0, -12 / 49], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("top_k", [1, 2])
def test_noise_changes_selection_and_gates_but_not_probs(top_k: int) -> None:
    logits, noise = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[-3.0, 0.0, 2.5]])
    plain, noisy = routing.select(logits, top_k), routing.select(logits, top_k, noise)
    shifted = routing.select(logits + noise, top_k)
    np.testing.assert_array_equal(plain.experts_BxTxK[0], [0, 1][:top_k])
    np.testing.assert_array_equal(noisy.experts_BxTxK[0], [2, 1][:top_k])
    np.testing.assert_array_equal(noisy.gates_BxTxK, shifted.gates_BxTxK)
    np.testing.assert_array_equal(noisy.probs_BxTxE, plain.probs_BxTxE)


@pytest.mark.parametrize("top_k", [0, 4])
def test_impossible_top_k(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}; with 3 experts it must be 1 to 3"):
        routing.select(jnp.ones((1, 1, 3)), top_k)


def test_selection_is_in_float32_and_finite_at_extremes() -> None:
    logits = jnp.array([[[1e4, -1e4, 0.0]]])
    for top_k in (1, 2, 3):

        def total(x: jax.Array, top_k: int = top_k) -> jax.Array:
            routed = routing.select(x, top_k)
            return routed.gates_BxTxK.sum() + routed.probs_BxTxE.sum()

        chex.assert_tree_all_finite(jax.value_and_grad(total)(logits))
        routed = routing.select(logits.astype(jnp.bfloat16), top_k)
        assert routed.gates_BxTxK.dtype == routed.probs_BxTxE.dtype == jnp.float32
        np.testing.assert_array_equal(routed.experts_BxTxK[0, 0], [0, 2, 1][:top_k])


@functools.partial(jax.jit, static_argnums=(1, 2))
def report_of(logits: jax.Array, top_k: int, grid: tuple[int, int], weight: jax.Array | None) -> routing.RouterReport:
    return routing.report(logits, routing.select(logits, top_k), grid, weight)


@pytest.mark.parametrize(("top_k", "grid"), [(1, (2, 3)), (2, (3, 2)), (3, (1, 6))])
@pytest.mark.parametrize("weight", [None, (1, 0, 1, 1)])
def test_report_equals_oracle(
    top_k: int, grid: tuple[int, int], weight: tuple[int, ...] | None, key: jax.Array
) -> None:
    logits = 2 * jax.random.normal(key, (4, 7, 5))
    actual = report_of(logits, top_k, grid, None if weight is None else jnp.array(weight))
    expected = oracles.report(oracles.float64(logits), top_k, grid, np.array(weight or (1, 1, 1, 1)))
    for name, value in expected._asdict().items():
        assert getattr(actual, name).dtype == jnp.float32
        np.testing.assert_allclose(getattr(actual, name), value, rtol=1e-5, err_msg=name)


def test_report_ignores_padding(key: jax.Array) -> None:
    logits = jax.random.normal(key, (4, 5, 3)).at[2:].mul(100)
    padded = report_of(logits, 2, (2, 2), jnp.array([1.0, 1.0, 0.0, 0.0]))
    chex.assert_trees_all_close(padded, report_of(logits[:2], 2, (2, 2), None), rtol=1e-6)
    chex.assert_trees_all_close(padded.assignments_E.sum(), jnp.array(2 * 5 * 2.0))


def test_smoothness_leaves_the_class_token_out(key: jax.Array) -> None:
    logits = jax.random.normal(key, (2, 5, 3))
    moved = logits.at[:, 0].add(jnp.array([3.0, -2.0, 0.5])[None])
    before, after = report_of(logits, 2, (2, 2), None), report_of(moved, 2, (2, 2), None)
    assert before.smoothness == after.smoothness
    assert before.entropy != after.entropy
    assert (
        report_of(logits.at[:, 4].add(jnp.array([3.0, -2.0, 0.5])[None]), 2, (2, 2), None).smoothness
        != before.smoothness
    )
    with pytest.raises(ValueError, match="4 patches do not fill a grid of 1 x 5"):
        report_of(logits, 2, (1, 5), None)


def test_report_at_uniform_and_at_certainty() -> None:
    uniform = report_of(jnp.zeros((2, 5, 6)), 2, (2, 2), None)
    np.testing.assert_allclose(uniform.entropy, math.log(6), rtol=1e-6)
    np.testing.assert_allclose(uniform.load_balance, 1, rtol=1e-6)
    np.testing.assert_allclose(uniform.router_z, math.log(6) ** 2, rtol=1e-6)
    np.testing.assert_array_equal(uniform.assignments_E, [10, 10, 0, 0, 0, 0])
    certain = report_of(jnp.zeros((2, 5, 6)).at[..., 4].set(1e3), 1, (2, 2), None)
    assert certain.entropy == 0
    np.testing.assert_allclose(certain.load_balance, 6, rtol=1e-6)


def test_report_sends_gradients_to_the_logits(key: jax.Array) -> None:
    logits = jax.random.normal(key, (2, 5, 3))
    gradients = jax.jacrev(lambda x: report_of(x, 2, (2, 2), None))(logits)
    for name in ("load_balance", "router_z", "smoothness"):
        assert np.abs(getattr(gradients, name)).max() > 1e-3, name
    assert not np.any(gradients.assignments_E)
    chex.assert_tree_all_finite(jax.jacrev(lambda x: report_of(x, 2, (2, 2), None))(100 * logits))
