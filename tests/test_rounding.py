import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import precision, rounding
from bvit_jax.rounding import Rounded

NAMES = tuple(rounding.LIMITS)
SEEDS = st.integers(0, 2**16)
# Inputs, outputs and rows: one of each, fewer rows than inputs (C singular), none.
SIZES = ((1, 1, 1), (1, 5, 3), (6, 1, 20), (7, 4, 3), (7, 4, 30), (5, 3, 0))


def weights(seed: int, inputs: int, outputs: int) -> np.ndarray:
    """Draws weights whose channels differ in size, some of them all 0 or all equal."""
    rng = np.random.default_rng(seed)
    w_IxO = rng.normal(size=(inputs, outputs)) * np.exp(rng.normal(size=outputs))
    kind_O = rng.integers(0, 6, outputs)
    w_IxO[:, kind_O == 0] = 0
    w_IxO[:, kind_O == 1] = 0.7
    return w_IxO.astype(np.float32)


def moments(seed: int, inputs: int, rows: int) -> np.ndarray:
    """Returns X^T X of correlated inputs that differ in size, some of them always 0."""
    rng = np.random.default_rng(seed + 1)
    x_NxI = rng.normal(size=(rows, inputs)) @ rng.normal(size=(inputs, inputs)) * np.exp(rng.normal(size=inputs))
    x_NxI[:, rng.random(inputs) < 0.2] = 0
    return x_NxI.T @ x_NxI


def errors(w_IxO: np.ndarray, rounded: Rounded, c_IxI: np.ndarray) -> np.ndarray:
    """Squared error of the outputs, channel by channel."""
    error_IxO = w_IxO.astype(np.float64) - rounded.matrix.astype(np.float64)
    return np.array([e_I @ c_IxI @ e_I for e_I in error_IxO.T])


def check_stored(rounded: Rounded, shape: tuple[int, int], name: precision.Precision) -> None:
    """Checks shapes, dtypes and that integers are in range."""
    low, top = {"int8": (-127, 127), "int4": (-7, 7), "int2": (-2, 1)}[name]
    assert (rounded.levels_IxO.dtype, rounded.levels_IxO.shape) == (np.int8, shape)
    assert (rounded.scale_1xO.dtype, rounded.scale_1xO.shape) == (np.float32, (1, shape[1]))
    assert (rounded.matrix.dtype, rounded.matrix.shape) == (np.float32, shape)
    assert rounded.precision == name
    assert rounded.levels_IxO.min() >= low
    assert rounded.levels_IxO.max() <= top


# To nearest


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (6, 1), (7, 4)])
def test_nearest_is_that_of_the_number_format(shape: tuple[int, int], name: precision.Precision) -> None:
    w_IxO = weights(2, *shape)
    found = rounding.nearest(w_IxO, name)
    check_stored(found, shape, name)
    levels_IxO, scale_1xO = precision.levels(w_IxO, name)
    np.testing.assert_array_equal(found.levels_IxO, levels_IxO)
    np.testing.assert_array_equal(found.scale_1xO, scale_1xO)
    np.testing.assert_array_equal(found.matrix, precision.quantise(w_IxO, name))


@pytest.mark.parametrize("name", NAMES)
def test_the_matrix_is_what_a_file_gives_back(name: precision.Precision) -> None:
    shape = (7, 4)
    found = rounding.calibrated(weights(2, *shape), moments(2, 7, 30), name)
    packed = precision.pack(found.levels_IxO.astype(np.int32), name, "base3")
    read = precision.from_levels(precision.unpack(packed, shape, name, "base3"), found.scale_1xO, name)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(found.matrix, read)


def test_matrix_by_hand() -> None:
    levels_IxO, scale_1xO = np.array([[-2, 1], [0, -1]], np.int8), np.array([[2, 0.5]], np.float32)
    np.testing.assert_array_equal(Rounded(levels_IxO, scale_1xO, "int4").matrix, [[-4, 0.5], [0, -0.5]])
    # (-2 + 1/2) x 2, (1 + 1/2) x 0.5, (0 + 1/2) x 2, (-1 + 1/2) x 0.5
    np.testing.assert_array_equal(Rounded(levels_IxO, scale_1xO, "int2").matrix, [[-3, 0.75], [1, -0.25]])


# OPTQ


def sequential(
    w_IxO: np.ndarray, scale_O: np.ndarray, c_IxI: np.ndarray, name: precision.Precision, ridge: float
) -> np.ndarray:
    """The integers when all weights not yet rounded are solved for anew, by least squares, after each that is."""
    inputs, outputs = w_IxO.shape
    levels_IxO = np.zeros((inputs, outputs))
    energy_I = np.diag(c_IxI)
    live = sorted((i for i in range(inputs) if energy_I[i] > 0), key=lambda i: -energy_I[i])
    dead = [i for i in range(inputs) if energy_I[i] == 0]
    mean = sum(energy_I[i] for i in live) / max(len(live), 1)
    h_IxI = c_IxI + ridge * mean * np.eye(inputs)
    low, top = rounding.LIMITS[name]
    for o in range(outputs):
        free_I, stored_I = w_IxO[:, o].astype(np.float64), np.zeros(inputs)
        for step, index in enumerate(live + dead):
            ratio = free_I[index] / scale_O[o]
            levels_IxO[index, o] = np.clip(np.floor(ratio) if name == "int2" else np.round(ratio), low, top)
            stored_I[index] = scale_O[o] * (levels_IxO[index, o] + 0.5 * (name == "int2"))
            done, left = live[: step + 1], live[step + 1 :]
            if index in live and left:
                # Minimises e^T H e over the e of the weights left: H_ll e_l = -H_ld e_d.
                error_d = w_IxO[done, o] - stored_I[done]
                error_l = np.linalg.solve(h_IxI[np.ix_(left, left)], -h_IxI[np.ix_(left, done)] @ error_d)
                free_I[left] = w_IxO[left, o] - error_l
    return levels_IxO


@given(SEEDS, st.sampled_from(NAMES), st.integers(1, 9), st.integers(1, 4), st.integers(0, 20), st.floats(0.3, 1))
@settings(max_examples=60, deadline=None)
def test_optq_equals_solving_anew_at_every_step(
    seed: int, name: precision.Precision, inputs: int, outputs: int, rows: int, shrink: float
) -> None:
    w_IxO, c_IxI = weights(seed, inputs, outputs), moments(seed, inputs, rows)
    top = {"int8": 127, "int4": 7, "int2": 2}[name]
    scale_1xO = (shrink * np.maximum(np.abs(w_IxO).max(axis=0, keepdims=True), 1e-5) / top).astype(np.float32)
    found = rounding.optq(w_IxO, scale_1xO, c_IxI, name)
    check_stored(found, (inputs, outputs), name)
    np.testing.assert_array_equal(found.scale_1xO, scale_1xO)
    expected = sequential(w_IxO, scale_1xO[0].astype(np.float64), c_IxI, name, 0.01)
    np.testing.assert_array_equal(found.levels_IxO, expected)


@pytest.mark.parametrize("inputs", [128, 140])
def test_optq_of_many_inputs(inputs: int) -> None:
    w_IxO, c_IxI = weights(3, inputs, 1), moments(3, inputs, 2 * inputs)
    scale_1xO = rounding.nearest(w_IxO, "int4").scale_1xO
    found = rounding.optq(w_IxO, scale_1xO, c_IxI, "int4")
    expected = sequential(w_IxO, scale_1xO[0].astype(np.float64), c_IxI, "int4", 0.01)
    np.testing.assert_array_equal(found.levels_IxO, expected)


def test_optq_by_hand() -> None:
    # Scale 1. C = [[2, 1], [1, 1]], mean of the diagonal 1.5, ridge 1/3 x 1.5 = 0.5: H = [[2.5, 1], [1, 1.5]].
    # Input 0 has more energy and goes first: 0.4 -> 0, error 0.4. Input 1 makes up for it: it minimises
    # 2.5 x 0.16 + 2 x 0.4 e + 1.5 e^2 at e = -0.4 / 1.5 = -0.267, from 0.3 to 0.567 -> 1. To nearest it were 0.
    w_IxO, c_IxI, one = np.array([[0.4], [0.3]]), np.array([[2.0, 1.0], [1.0, 1.0]]), np.ones((1, 1), np.float32)
    np.testing.assert_array_equal(rounding.optq(w_IxO, one, c_IxI, "int4", 1 / 3).levels_IxO, [[0], [1]])
    # With the energies exchanged input 1 goes first: 0.3 -> 0; input 0 minimises at e = -0.3 / 1.5 = -0.2, from 0.4 to
    # 0.6 -> 1.
    np.testing.assert_array_equal(rounding.optq(w_IxO, one, c_IxI[::-1, ::-1], "int4", 1 / 3).levels_IxO, [[1], [0]])
    # A ridge of 1.5 a mean of 1.5: e = -0.4 / 3.25 = -0.123, from 0.3 to 0.423 -> 0.
    np.testing.assert_array_equal(rounding.optq(w_IxO, one, c_IxI, "int4", 1.5).levels_IxO, [[0], [0]])


@pytest.mark.parametrize("name", NAMES)
def test_optq_of_unrelated_inputs_is_to_nearest(name: precision.Precision) -> None:
    w_IxO = weights(3, 8, 5)
    plain = rounding.nearest(w_IxO, name)
    found = rounding.optq(w_IxO, plain.scale_1xO, np.diag(np.arange(8.0)), name)
    np.testing.assert_array_equal(found.levels_IxO, plain.levels_IxO)


# By calibration inputs


@given(SEEDS, st.sampled_from(NAMES), st.sampled_from(SIZES))
@settings(max_examples=80, deadline=None)
def test_never_worse_than_nearest(seed: int, name: precision.Precision, size: tuple[int, int, int]) -> None:
    inputs, outputs, rows = size
    w_IxO, c_IxI = weights(seed, inputs, outputs), moments(seed, inputs, rows)
    found = rounding.calibrated(w_IxO, c_IxI, name)
    check_stored(found, (inputs, outputs), name)
    plain = errors(w_IxO, rounding.nearest(w_IxO, name), c_IxI)
    energy_O = np.einsum("io,ij,jo->o", w_IxO, c_IxI, w_IxO)
    assert (errors(w_IxO, found, c_IxI) <= plain + 1e-12 * energy_O).all()


@given(SEEDS, st.sampled_from(NAMES))
@settings(max_examples=30, deadline=None)
def test_each_channel_takes_the_best_of_three_ways(seed: int, name: precision.Precision) -> None:
    w_IxO, c_IxI = weights(seed, 7, 4), moments(seed, 7, 30)
    plain = rounding.nearest(w_IxO, name)
    tried = [plain]
    for shrink in np.linspace(0.3, 1, 29):
        scale_1xO = np.float32(shrink) * plain.scale_1xO
        # Nothing is fed forward between inputs of a diagonal C.
        tried.append(rounding.optq(w_IxO, scale_1xO, np.eye(7), name))
    channels = range(4)
    tried_errors = np.array([errors(w_IxO, one, c_IxI) for one in tried])
    best_O = tried_errors[1:].argmin(axis=0) + 1
    scale_1xO = np.array([[tried[best_O[o]].scale_1xO[0, o] for o in channels]])
    least_O = np.minimum(tried_errors.min(axis=0), errors(w_IxO, rounding.optq(w_IxO, scale_1xO, c_IxI, name), c_IxI))
    energy_O = np.einsum("io,ij,jo->o", w_IxO, c_IxI, w_IxO)
    found = errors(w_IxO, rounding.calibrated(w_IxO, c_IxI, name), c_IxI)
    np.testing.assert_allclose(found, least_O, rtol=1e-9, atol=1e-12 * energy_O.max() + 1e-30)


def relative_error(w_IxO: np.ndarray, rounded: Rounded, c_IxI: np.ndarray) -> float:
    return float(np.sqrt(errors(w_IxO, rounded, c_IxI).sum() / np.trace(w_IxO.T @ c_IxI @ w_IxO)))


@pytest.mark.parametrize(("name", "most"), [("int8", 0.004), ("int4", 0.07), ("int2", 0.25)])
def test_much_better_than_nearest_for_correlated_inputs(name: precision.Precision, most: float) -> None:
    plain, found = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        w_IxO = rng.normal(size=(64, 24)).astype(np.float32)
        x_NxI = rng.normal(size=(512, 64)) @ (rng.normal(size=(64, 64)) * np.linspace(0, 1, 64)[:, None] ** 2)
        c_IxI = x_NxI.T @ x_NxI
        plain.append(relative_error(w_IxO, rounding.nearest(w_IxO, name), c_IxI))
        found.append(relative_error(w_IxO, rounding.calibrated(w_IxO, c_IxI, name), c_IxI))
    assert np.mean(found) < 0.6 * np.mean(plain)
    assert np.mean(found) < most


def test_outputs_by_their_rows() -> None:
    """The error that is made small is that of the outputs themselves."""
    rng = np.random.default_rng(0)
    w_IxO, x_NxI = weights(0, 7, 4), rng.normal(size=(30, 7))
    found = rounding.calibrated(w_IxO, x_NxI.T @ x_NxI, "int4")
    direct_O = ((x_NxI @ found.matrix - x_NxI @ w_IxO) ** 2).sum(axis=0)
    np.testing.assert_allclose(direct_O, errors(w_IxO, found, x_NxI.T @ x_NxI), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_without_any_inputs_it_is_nearest(name: precision.Precision) -> None:
    w_IxO = weights(5, 6, 4)
    found, plain = rounding.calibrated(w_IxO, np.zeros((6, 6)), name), rounding.nearest(w_IxO, name)
    np.testing.assert_array_equal(found.levels_IxO, plain.levels_IxO)
    np.testing.assert_array_equal(found.scale_1xO, plain.scale_1xO)


def test_only_proportions_of_the_moments_matter() -> None:
    w_IxO, c_IxI = weights(6, 7, 4), moments(6, 7, 30)
    one, other = rounding.calibrated(w_IxO, c_IxI, "int4"), rounding.calibrated(w_IxO, c_IxI * 2.0**40, "int4")
    np.testing.assert_array_equal(one.levels_IxO, other.levels_IxO)
    np.testing.assert_array_equal(one.scale_1xO, other.scale_1xO)


# Bad input


@pytest.mark.parametrize("name", ["float32", "bfloat16", "ternary", "int3"])
def test_other_precisions(name: precision.Precision) -> None:
    w_IxO, c_IxI = weights(0, 3, 2), np.eye(3)
    message = f"weights are not rounded to '{name}' here; choose one of int8, int4, int2"
    with pytest.raises(ValueError, match=message):
        rounding.nearest(w_IxO, name)
    with pytest.raises(ValueError, match=message):
        rounding.calibrated(w_IxO, c_IxI, name)
    with pytest.raises(ValueError, match=message):
        rounding.optq(w_IxO, np.ones((1, 2), np.float32), c_IxI, name)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 2), (0, 2), (3, 0)])
def test_weights_that_are_no_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a matrix \(inputs, outputs\) with one of each at least; found \(.*\)"):
        rounding.nearest(np.zeros(shape, np.float32), "int4")
    with pytest.raises(ValueError, match=r"a matrix \(inputs, outputs\) with one of each at least; found \(.*\)"):
        rounding.calibrated(np.zeros(shape, np.float32), np.eye(3), "int4")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(value: float) -> None:
    bad = np.eye(3)
    bad[1, 1] = value
    with pytest.raises(ValueError, match="weights to be rounded are finite; found nan or inf"):
        rounding.nearest(bad, "int8")
    with pytest.raises(ValueError, match="second moments are finite; found nan or inf"):
        rounding.calibrated(np.eye(3), bad, "int8")


@pytest.mark.parametrize(
    ("c_IxI", "message"),
    [
        (np.eye(2), r"second moments of 3 inputs are \(3, 3\); found \(2, 2\)"),
        (np.ones(3), r"second moments of 3 inputs are \(3, 3\); found \(3,\)"),
        (np.triu(np.ones((3, 3))), r"second moments X\^T X are symmetric"),
        (np.diag([1.0, -1.0, 1.0]), r"symmetric, with nothing negative on the diagonal"),
    ],
)
def test_moments_that_do_not_fit(c_IxI: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rounding.calibrated(weights(0, 3, 2), c_IxI, "int4")


@pytest.mark.parametrize("ridge", [0, -0.01, 1e-7, np.nan, np.inf])
def test_ridges_out_of_range(ridge: float) -> None:
    with pytest.raises(ValueError, match=rf"the ridge is a number from 1e-06 on; found {ridge}"):
        rounding.calibrated(weights(0, 3, 2), np.eye(3), "int4", ridge)


@pytest.mark.parametrize("rows", [1, 2, 12])
def test_the_least_ridge_is_enough(rows: int) -> None:
    w_IxO, x_NxI = weights(1, 40, 3), np.random.default_rng(0).normal(size=(rows, 40))
    found = rounding.calibrated(w_IxO, x_NxI.T @ x_NxI, "int4", rounding.LEAST_RIDGE)
    check_stored(found, (40, 3), "int4")


@pytest.mark.parametrize("scale", [np.ones(2), np.ones((1, 3)), np.zeros((1, 2)), np.full((1, 2), np.nan)])
def test_scales_that_do_not_fit(scale: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"scales are positive, \(1, 2\); found \("):
        rounding.optq(weights(0, 3, 2), scale.astype(np.float32), np.eye(3), "int4")
