import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import compensation, factors
from bvit_jax.compensation import Moments, paired_moments, residual

SEED = st.integers(0, 2**16)
SIZE = st.integers(1, 12)
ROWS = st.integers(1, 20)
QUICK = settings(max_examples=40, deadline=None)


def made(seed: int, rows: int, inputs: int, outputs: int) -> tuple[np.ndarray, ...]:
    """Returns X, X^ near it, both with channels of very unequal size, a map W and what stands for it, M."""
    rng = np.random.default_rng(seed)
    mixing = np.logspace(0, -3, inputs)[:, None] * rng.normal(size=(inputs, inputs))
    x = rng.normal(size=(rows, inputs)) @ mixing
    x_given = x + 0.3 * rng.normal(size=(rows, inputs)) @ mixing
    w = rng.normal(size=(inputs, outputs))
    return x, x_given, w, w + rng.normal(size=w.shape) * rng.integers(0, 2)


def started(seed: int, rank: int, outputs: int) -> np.ndarray:
    return np.random.default_rng(seed + 1).normal(size=(min(rank, outputs), outputs))


def with_ridge(
    x: np.ndarray, x_given: np.ndarray, w: np.ndarray, base: np.ndarray, ridge: float = factors.RIDGE
) -> tuple[np.ndarray, np.ndarray]:
    """Returns X^ and X W - X^ M with rows for the ridge: an input for every channel whose output should be 0."""
    strength = math.sqrt(ridge * (x_given**2).sum() / x.shape[1])
    rows = np.concatenate([x_given, strength * np.eye(x.shape[1])])
    return rows, np.concatenate([x @ w - x_given @ base, np.zeros(w.shape)])


def objective(rows: np.ndarray, target: np.ndarray, change: np.ndarray) -> float:
    """Returns 1/2 ||X^ P Q - (X W - X^ M)||^2 with what the ridge adds, for rows of `with_ridge`."""
    return float(((rows @ change - target) ** 2).sum() / 2)


def best_for(rows: np.ndarray, target: np.ndarray, q: np.ndarray) -> float:
    """Returns the objective of the best P for a given Q."""
    p = np.linalg.lstsq(rows, target @ np.linalg.pinv(q), rcond=None)[0]
    return objective(rows, target, p @ q)


def reduced_rank_regression(rows: np.ndarray, target: np.ndarray, rank: int) -> float:
    """Returns the least objective of all: the full regression, its outputs cut to a rank (Izenman, 1975)."""
    full = np.linalg.lstsq(rows, target, rcond=None)[0]
    _, _, right = np.linalg.svd(rows @ full)
    return objective(rows, target, full @ right[:rank].T @ right[:rank])


# Moments


@given(SEED, ROWS, SIZE, SIZE)
@QUICK
def test_loss_by_moments_is_that_of_the_rows(seed: int, rows: int, inputs: int, outputs: int) -> None:
    x, x_given, w, base = made(seed, rows, inputs, outputs)
    half = rows // 2
    moments = paired_moments(x, x_given)
    if half:
        moments = paired_moments(x[:half], x_given[:half]) + paired_moments(x[half:], x_given[half:])
    energy = ((x @ w) ** 2).sum()
    direct = ((x_given @ base - x @ w) ** 2).sum() / 2
    assert moments.loss(w, base) == pytest.approx(direct, rel=1e-9, abs=1e-12 * energy)
    assert moments.relative_error(w, base) == pytest.approx(math.sqrt(2 * direct / energy), rel=1e-6)
    assert moments.rows == rows
    # With the inputs alike, this is the error of `factors`.
    alike = paired_moments(x, x)
    assert alike.relative_error(w, base) == pytest.approx(factors.output_error(w, base, x.T @ x), rel=1e-6, abs=1e-7)
    assert alike.relative_error(w, w) == pytest.approx(0, abs=1e-6)


def test_float32_rows_are_summed_in_float64() -> None:
    # 1 + 2^-30 is 1 in float32.
    x = np.array([[1.0], [2.0**-15]], np.float32)
    moments = paired_moments(x, x)
    for name in ("own_IxI", "cross_IxI", "original_IxI"):
        np.testing.assert_array_equal(getattr(moments, name), np.array([[1 + 2.0**-30]]))


def test_hand_computed_loss() -> None:
    # X = 1, 2 and X^ = 1, 1 (one channel); W = 3, M = 4: outputs 4, 4 for 3, 6, so (1 + 4) / 2 = 2.5; energy 9 + 36.
    moments = paired_moments(np.array([[1.0], [2.0]]), np.array([[1.0], [1.0]]))
    w, base = np.array([[3.0]]), np.array([[4.0]])
    assert moments.loss(w, base) == pytest.approx(2.5)
    assert moments.relative_error(w, base) == pytest.approx(math.sqrt(5 / 45))
    # X^^T (X^ M - X W) = 1 (4 - 3) + 1 (4 - 6) = -1.
    assert moments.gradient(w, base) == pytest.approx(-1)
    # The best P with Q = 1 adds 1/2: outputs 4.5, 4.5 are nearest to 3, 6. The sign of Q is free.
    p, q = residual(moments, w, base, np.array([[1.0]]), ridge=1e-12)
    assert p @ q == pytest.approx(0.5)


def test_errors_where_nothing_goes_out() -> None:
    moments = paired_moments(np.ones((3, 2)), np.ones((3, 2)))
    zero, one = np.zeros((2, 2)), np.ones((2, 2))
    assert (moments.relative_error(zero, zero), moments.relative_error(zero, one)) == (0.0, math.inf)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(9, 4, 6), (3, 7, 2)])
def test_gradient_of_the_loss(rows: int, inputs: int, outputs: int) -> None:
    x, x_given, w, base = made(1, rows, inputs, outputs)
    gradient = paired_moments(x, x_given).gradient(w, base)
    with jax.enable_x64(True):
        expected = jax.grad(lambda base: ((x_given @ base - x @ w) ** 2).sum() / 2)(jnp.asarray(base))
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    for index in np.ndindex(base.shape):
        moved = oracles.finite_difference(lambda: ((x_given @ base - x @ w) ** 2).sum() / 2, base, index, 1e-4)
        assert gradient[index] == pytest.approx(moved, rel=1e-5, abs=1e-6 * np.abs(gradient).max())


# Residual


@pytest.mark.parametrize(("rows", "inputs", "outputs", "rank"), [(30, 6, 8, 3), (4, 9, 5, 2), (12, 3, 7, 1)])
def test_gradient_by_q_is_that_of_the_rows(rows: int, inputs: int, outputs: int, rank: int) -> None:
    x, x_given, w, base = made(2, rows, inputs, outputs)
    q = started(2, rank, outputs)
    with_rows, target = with_ridge(x, x_given, w, base, 1e-2)
    p = np.linalg.lstsq(with_rows, target @ np.linalg.pinv(q), rcond=None)[0]
    with jax.enable_x64(True):
        direct = jax.grad(lambda p, q: ((with_rows @ p @ q - target) ** 2).sum() / 2, argnums=(0, 1))
        by_p, by_q = direct(jnp.asarray(p), jnp.asarray(q))
    _, t = compensation._whitened(paired_moments(x, x_given), w, base, 1e-2)
    value, gradient = compensation._objective(q.ravel(), t)
    np.testing.assert_allclose(gradient, by_q.ravel(), rtol=1e-6, atol=1e-9 * np.abs(by_q).max())
    # At the best P nothing is left to gain by P: why the gradient by Q is that of the two together.
    np.testing.assert_allclose(by_p, np.zeros(p.shape), atol=1e-9 * np.linalg.norm(with_rows.T @ target))
    # T leaves out what no map of X^ reaches, a constant.
    constant = (np.linalg.norm(target) ** 2 - np.linalg.norm(t) ** 2) / 2
    assert value + constant == pytest.approx(best_for(with_rows, target, q), rel=1e-7)


@given(SEED, SIZE, SIZE, st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_gradient_by_q_against_differences(seed: int, inputs: int, outputs: int, rank: int) -> None:
    q = started(seed, rank, outputs).ravel()
    t = np.random.default_rng(seed).normal(size=(inputs, outputs))
    _, gradient = compensation._objective(q, t)
    scale = max(1.0, float(np.linalg.norm(gradient)))
    step = 1e-6 * float(np.linalg.svd(q.reshape(-1, outputs), compute_uv=False)[-1])
    for index in range(0, q.size, 3):
        moved = oracles.finite_difference(lambda: compensation._objective(q, t)[0], q, (index,), step)
        assert gradient[index] == pytest.approx(moved, abs=1e-5 * scale)


@given(SEED, ROWS, SIZE, SIZE, st.integers(0, 14))
@QUICK
def test_residual_is_no_worse_than_its_start(seed: int, rows: int, inputs: int, outputs: int, rank: int) -> None:
    x, x_given, w, base = made(seed, rows, inputs, outputs)
    q_start = started(seed, rank, outputs)
    moments = paired_moments(x, x_given)
    p, q = residual(moments, w, base, q_start)
    assert (p.shape, q.shape) == ((inputs, len(q_start)), (len(q_start), outputs))
    np.testing.assert_allclose(q @ q.T, np.eye(len(q)), atol=1e-10)
    with_rows, target = with_ridge(x, x_given, w, base)
    reached = objective(with_rows, target, p @ q)
    rounding = 1e-9 * np.linalg.norm(x @ w) ** 2
    assert reached <= best_for(with_rows, target, q_start) * (1 + 1e-6) + rounding
    assert reached >= reduced_rank_regression(with_rows, target, len(q)) - rounding
    # Against P = 0 even without what the ridge adds.
    assert moments.loss(w, base + p @ q) <= moments.loss(w, base) * (1 + 1e-9) + rounding


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (40, 24), (30, 30)])
@pytest.mark.parametrize("rows", [20, 200])
def test_residual_nears_the_least_of_all(inputs: int, outputs: int, rows: int) -> None:
    x, x_given, w, _ = made(inputs, rows, inputs, outputs)
    base = np.zeros(w.shape)
    p, q = residual(paired_moments(x, x_given), w, base, started(0, 5, outputs))
    with_rows, target = with_ridge(x, x_given, w, base)
    least = reduced_rank_regression(with_rows, target, 5)
    assert least * (1 - 1e-9) <= objective(with_rows, target, p @ q) <= least + 1e-5 * (target**2).sum()


@given(SEED, ROWS, SIZE, SIZE)
@QUICK
def test_the_ranks_dropped_first_come_back(seed: int, rows: int, inputs: int, outputs: int) -> None:
    """With the inputs of the original map, nothing is better than the next ranks of its spectrum."""
    x, _, w, _ = made(seed, rows, inputs, outputs)
    spectrum = factors.activation_aware(w, x.T @ x)
    for rank in range(spectrum.break_even):
        q_start = spectrum.right_OxM[:, rank : rank + 1].T
        base, more = spectrum.matrix(rank), spectrum.matrix(rank + 1)
        p, q = residual(paired_moments(x, x), w, base, q_start)
        with_rows, target = with_ridge(x, x, w, base)
        assert objective(with_rows, target, p @ q) <= objective(with_rows, target, more - base) * (1 + 1e-6) + 1e-12


def test_inputs_of_the_prefix_are_made_up_for() -> None:
    # X^ has halved a channel that X has whole; P Q doubles its weights again, though W itself is kept.
    x = np.random.default_rng(0).normal(size=(50, 3))
    x_given, w = x * [1.0, 0.5, 1.0], np.array([[1.0, 0.0], [2.0, 4.0], [0.0, 1.0]])
    moments = paired_moments(x, x_given)
    p, q = residual(moments, w, w, np.array([[1.0, 0.0]]), ridge=1e-12)
    np.testing.assert_allclose(p @ q, [[0, 0], [2, 4], [0, 0]], atol=1e-5)
    assert moments.relative_error(w, w) > 0.3
    assert moments.relative_error(w, w + p @ q) < 1e-5


def test_nothing_to_make_up_for() -> None:
    x = np.random.default_rng(0).normal(size=(6, 3))
    w, zero = np.ones((3, 2)), np.zeros((3, 2))
    q_start = np.array([[0.0, 2.0]])
    for moments, kernel in ((paired_moments(x, x), zero), (paired_moments(x, 0 * x), w), (paired_moments(0 * x, x), w)):
        p, q = residual(moments, kernel, zero, q_start)
        np.testing.assert_array_equal(p, np.zeros((3, 1)))
        np.testing.assert_allclose(np.abs(q), [[0.0, 1.0]])


# Errors


def test_bad_rows_and_moments() -> None:
    eye = np.eye(2)
    with pytest.raises(
        ValueError, match=r"rows have the shapes \(3, 2\) and \(2, 2\); twice \(rows, inputs\) is right"
    ):
        paired_moments(np.ones((3, 2)), np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"cross_IxI has the shape \(2, 3\); \(2, 2\) is right"):
        Moments(eye, np.ones((2, 3)), eye, 4)
    with pytest.raises(ValueError, match=r"own_IxI has the shape \(2, 3\); \(2, 2\) is right"):
        Moments(np.ones((2, 3)), eye, eye, 4)
    with pytest.raises(ValueError, match=r"original_IxI holds values that are not finite; finite ones are right"):
        Moments(eye, eye, eye * math.nan, 4)
    with pytest.raises(ValueError, match=r"moments are of 0 rows; 1 or more is right"):
        paired_moments(np.ones((0, 2)), np.ones((0, 2)))


def test_bad_residuals() -> None:
    moments, w, q = paired_moments(np.eye(2), np.eye(2)), np.ones((2, 3)), np.eye(2, 3)
    with pytest.raises(ValueError, match=r"W has the shape \(4, 3\); \(2, 3\) is right"):
        residual(moments, np.ones((4, 3)), w, q)
    with pytest.raises(ValueError, match=r"what stands for W has the shape \(2, 2\); \(2, 3\) is right"):
        residual(moments, w, np.eye(2), q)
    with pytest.raises(ValueError, match=r"Q has the shape \(2, 2\); \(2, 3\) is right"):
        residual(moments, w, w, np.eye(2))
    with pytest.raises(ValueError, match=r"what stands for W holds values that are not finite; finite ones are right"):
        residual(moments, w, w * math.inf, q)
    with pytest.raises(ValueError, match=r"Q has 1 independent rows of 2; all of them is right"):
        residual(moments, w, w, np.ones((2, 3)))
    for ridge in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"ridge is {ridge}; above 0 is right"):
            residual(moments, w, w, q, ridge)
