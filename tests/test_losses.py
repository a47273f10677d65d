import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import losses

load_balance = jax.jit(losses.load_balance)
router_z = jax.jit(losses.router_z)
cross_entropy = jax.jit(losses.cross_entropy)
spatial_smoothness = jax.jit(losses.spatial_smoothness, static_argnames="grid")

SEEDS = st.integers(0, 2**16)


def random_probs(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.dirichlet(np.ones(shape[-1]), size=shape[:-1]).astype(np.float32)


def test_weighted_mean() -> None:
    # (1 * 1 + 3 * 0.5) / 1.5 = 5 / 3
    assert losses.weighted_mean(jnp.array([1.0, 3.0, 100.0]), jnp.array([1.0, 0.5, 0.0])) == pytest.approx(5 / 3)
    assert losses.weighted_mean(jnp.array([1.0, 3.0]), jnp.zeros(2)) == 0


@given(SEEDS, st.integers(1, 4), st.integers(2, 6), st.sampled_from([0.0, 0.1, 0.9]))
@settings(max_examples=20, deadline=None)
def test_cross_entropy_equals_oracle(seed: int, batch: int, classes: int, smoothing: float) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(scale=3, size=(batch, classes)), rng.integers(classes, size=batch)
    actual = cross_entropy(logits.astype(np.float32), labels.astype(np.int32), smoothing)
    np.testing.assert_allclose(actual, oracles.cross_entropy(logits, labels, smoothing), rtol=1e-5, atol=1e-6)


def test_cross_entropy_hand_computed() -> None:
    # Probabilities 1/4, 3/4: -log(3/4) for class 1; with smoothing 0.2, 0.9 of class 1 and 0.1 of class 0.
    logits, labels = jnp.array([[0.0, math.log(3)], [0.0, math.log(3)]]), jnp.array([1, 0])
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), [math.log(4 / 3), math.log(4)], rtol=1e-6)
    expected = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    np.testing.assert_allclose(losses.cross_entropy(logits, labels, 0.2)[0], expected, rtol=1e-6)


def test_cross_entropy_is_float32_and_finite_at_extremes() -> None:
    logits, labels = jnp.array([[1e4, -1e4, 0.0]], jnp.bfloat16), jnp.array([1])
    loss, gradient = jax.value_and_grad(lambda x: losses.cross_entropy(x, labels, 0.1)[0])(logits)
    assert loss.dtype == jnp.float32
    # The log-probabilities are 0, -20,000 and -10,000: 0.9 * 20,000 + 0.1 / 3 * 30,000 = 19,000 (bfloat16 logits).
    assert loss == pytest.approx(19_000, rel=0.01)
    assert jnp.isfinite(gradient).all()


@given(SEEDS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_load_balance_equals_oracle(seed: int, batch: int, tokens: int, experts: int, top_k: int) -> None:
    rng = np.random.default_rng(seed)
    probs = random_probs(rng, batch, tokens, experts)
    chosen = rng.integers(experts, size=(batch, tokens, top_k))
    weight = rng.integers(2, size=batch).astype(np.float32)
    weight[0] = 1
    counts = np.zeros(experts, np.float32)
    for b in range(batch):
        for e in chosen[b].flatten():
            counts[e] += weight[b]
    actual = load_balance(probs, counts, np.repeat(weight[:, None], tokens, axis=1))
    np.testing.assert_allclose(actual, oracles.load_balance(probs, chosen, weight), rtol=1e-5)


def test_load_balance_hand_computed() -> None:
    probs = jnp.array([[[0.9, 0.1], [0.5, 0.5]]])
    # P = 0.7, 0.3 and f = 3/4, 1/4: 2 * (0.525 + 0.075) = 1.2
    assert losses.load_balance(probs, jnp.array([3.0, 1.0]), jnp.ones((1, 2))) == pytest.approx(1.2)
    assert losses.load_balance(jnp.full((2, 3, 4), 0.25), jnp.full(4, 5.0), jnp.ones((2, 3))) == pytest.approx(1)
    # All to one expert, with certainty: E.
    one = jax.nn.one_hot(jnp.zeros((2, 3), jnp.int32), 4)
    assert losses.load_balance(one, jnp.array([6.0, 0, 0, 0]), jnp.ones((2, 3))) == pytest.approx(4)


def test_load_balance_gradient_flows_through_probs_alone() -> None:
    probs, counts = jnp.array([[[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.8], [0.3, 0.7]]]), jnp.array([3.0, 1.0])
    weight = jnp.array([[1.0, 1.0], [0.0, 0.0]])
    to_probs, to_counts = jax.grad(losses.load_balance, argnums=(0, 1))(probs, counts, weight)
    # E * f_e / (number of tokens that count) = 2 * (3/4, 1/4) / 2
    np.testing.assert_allclose(to_probs[0], [[0.75, 0.25]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(to_probs[1], np.zeros((2, 2)))
    np.testing.assert_array_equal(to_counts, np.zeros(2))


def test_losses_of_no_examples_are_zero() -> None:
    logits = jnp.ones((2, 4, 3))
    assert losses.load_balance(logits / 3, jnp.zeros(3), jnp.zeros((2, 4))) == 0
    assert losses.router_z(logits, jnp.zeros((2, 4))) == 0
    assert losses.spatial_smoothness(logits.at[0, 0].set(0.0), (2, 2), jnp.zeros(2)) == 0


@given(SEEDS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_router_z_equals_oracle(seed: int, batch: int, tokens: int, experts: int) -> None:
    rng = np.random.default_rng(seed)
    logits, weight = rng.normal(scale=2, size=(batch, tokens, experts)), rng.integers(2, size=batch)
    weight[-1] = 1
    weight_BxT = np.repeat(weight[:, None], tokens, axis=1).astype(np.float32)
    actual = router_z(logits.astype(np.float32), weight_BxT)
    np.testing.assert_allclose(actual, oracles.router_z(logits, weight), rtol=1e-4, atol=1e-6)


def test_router_z_hand_computed() -> None:
    # logsumexp(0, 0, 0, 0) = log 4, logsumexp(log 1, log 2, log 3, log 4) = log 10
    logits = jnp.log(jnp.array([[[1.0, 1, 1, 1], [1, 2, 3, 4]]]))
    expected = (math.log(4) ** 2 + math.log(10) ** 2) / 2
    assert losses.router_z(logits, jnp.ones((1, 2))) == pytest.approx(expected)
    assert losses.router_z(logits, jnp.array([[1.0, 0.0]])) == pytest.approx(math.log(4) ** 2)
    assert losses.router_z(logits.astype(jnp.bfloat16), jnp.ones((1, 2))).dtype == jnp.float32


GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(SEEDS, st.integers(1, 3), GRIDS, st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_smoothness_equals_oracle(seed: int, batch: int, grid: tuple[int, int], experts: int) -> None:
    rng = np.random.default_rng(seed)
    probs = random_probs(rng, batch, grid[0] * grid[1], experts)
    weight = rng.integers(2, size=batch).astype(np.float32)
    weight[0] = 1
    actual = spatial_smoothness(probs, grid, weight)
    np.testing.assert_allclose(actual, oracles.spatial_smoothness(probs, grid, weight), rtol=1e-5, atol=1e-7)


def test_smoothness_hand_computed() -> None:
    # Grid  (1, 0) (1, 0)   across: 0 above, ||(1, -1)||^2 = 2 below
    #       (0, 1) (1, 0)   down: 2 on the left, 0 on the right;     (0 + 2 + 2 + 0) / 4 = 1
    probs = jnp.array([[[1.0, 0], [1, 0], [0, 1], [1, 0]]])
    assert losses.spatial_smoothness(probs, (2, 2), jnp.ones(1)) == pytest.approx(1)
    # As one row there are three neighbours: (0 + 2 + 2) / 3; as one column the same.
    for grid in ((1, 4), (4, 1)):
        assert losses.spatial_smoothness(probs, grid, jnp.ones(1)) == pytest.approx(4 / 3)


def test_smoothness_without_neighbours_is_zero() -> None:
    value, gradient = jax.value_and_grad(losses.spatial_smoothness)(jnp.ones((2, 1, 3)), (1, 1), jnp.ones(2))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((2, 1, 3)))


def test_smoothness_of_another_grid_is_an_error() -> None:
    with pytest.raises(ValueError, match="5 patches do not fill a grid of 2 x 2"):
        losses.spatial_smoothness(jnp.ones((1, 5, 3)), (2, 2), jnp.ones(1))


def test_examples_of_weight_zero_are_ignored() -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 6, 4)), jnp.float32)
    weight_B = jnp.array([1.0, 0.0, 1.0])
    weight_BxT = jnp.repeat(weight_B[:, None], 6, axis=1)

    @jax.jit
    def all_losses(logits: jax.Array, weight_B: jax.Array, weight_BxT: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(logits)
        balance = losses.load_balance(probs, jnp.array([5.0, 1, 2, 4]), weight_BxT)
        return jnp.stack(
            [balance, losses.router_z(logits, weight_BxT), losses.spatial_smoothness(probs, (2, 3), weight_B)]
        )

    alone = all_losses(logits[::2], jnp.ones(2), jnp.ones((2, 6)))
    np.testing.assert_allclose(all_losses(logits, weight_B, weight_BxT), alone, rtol=1e-6)
    gradients = np.asarray(jax.jacrev(all_losses)(logits, weight_B, weight_BxT))
    assert not np.any(gradients[:, 1])
    assert (np.abs(gradients[:, ::2]).max(axis=(1, 2, 3)) > 1e-4).all()
