import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import precision, ternary

PACKED = ("int8", "int4", "int2", "ternary")
TRITS = ("base3", "2bit")
SHAPES = ((5, 3), (2, 3, 7, 4), (3, 1, 1), (1, 9), (6, 1))
SEEDS = st.integers(0, 2**16)

levels = functools.partial(jax.jit, static_argnums=(1, 2))(precision.levels)
from_levels = functools.partial(jax.jit, static_argnums=2)(precision.from_levels)
quantise = functools.partial(jax.jit, static_argnums=1)(precision.quantise)
unpack = functools.partial(jax.jit, static_argnums=(1, 2, 3))(precision.unpack)


def random(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draws matrices whose channels differ in size."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1]))).astype(np.float32)


def test_the_precisions_by_name() -> None:
    assert precision.PRECISIONS == ("float32", "bfloat16", "int8", "int4", "int2", "ternary")
    assert [precision.is_packed(name) for name in precision.PRECISIONS] == [False, False, True, True, True, True]
    assert list(precision.PAPER_BITS.values()) == [32, 16, 8, 4, 2, 1.58]
    assert tuple(precision.PAPER_BITS) == precision.PRECISIONS


# Rounding


@given(SEEDS, st.sampled_from(PACKED), st.sampled_from(((5, 3), (1, 9), (12, 1))))
@settings(max_examples=40, deadline=None)
def test_levels_equal_oracle(seed: int, name: precision.Precision, shape: tuple[int, int]) -> None:
    w = random(seed, shape)
    found, scale = levels(w, name)
    assert (found.shape, scale.shape, found.dtype, scale.dtype) == (shape, (1, shape[1]), jnp.float32, jnp.float32)
    integers, scale_O = oracles.integers(w.astype(np.float64), name)
    np.testing.assert_array_equal(found, integers)
    np.testing.assert_allclose(scale[0], scale_O, rtol=1e-6)
    expected = oracles.round_matrix(w.astype(np.float64), name)
    np.testing.assert_allclose(from_levels(found, scale, name), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(quantise(w, name), expected, rtol=1e-6, atol=1e-9)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_bfloat16_equals_oracle(seed: int) -> None:
    w = random(seed, (6, 5))
    expected = oracles.round_matrix(w.astype(np.float64), "bfloat16")
    np.testing.assert_array_equal(quantise(w, "bfloat16"), expected.astype(np.float32))


def test_float32_is_left_as_it_is() -> None:
    w = random(0, (6, 5))
    np.testing.assert_array_equal(precision.quantise(w, "float32"), w)


@pytest.mark.parametrize(
    ("name", "column", "integers", "scale"),
    [
        # s = 254 / 127 = 2; 1 / 2 = 0.5 -> 0, 3 / 2 = 1.5 -> 2 (halves to even), -5.2 / 2 = -2.6 -> -3.
        ("int8", [254, 1, 3, -5.2, -254, 0], [127, 0, 2, -3, -127, 0], 2),
        # The largest may be negative: s = 127 / 127.
        ("int8", [-127, 126.4, 126.6], [-127, 126, 127], 1),
        # s = 14 / 7 = 2; 3 / 2 = 1.5 -> 2, 5 / 2 = 2.5 -> 2, -1 / 2 -> -0, -14 / 2 = -7.
        ("int4", [14, 3, 5, -1, -14, 0], [7, 2, 2, 0, -7, 0], 2),
        ("int4", [-3.5, 1, 0.2, 0.3], [-7, 2, 0, 1], 0.5),
        # s = 4 / 2 = 2; floor of 2, 0.5, -0.5, -1.5, 0, -2, 1, 0.99; 2 is over the top.
        ("int2", [4, 1, -1, -3, 0, -4, 2, 1.98], [1, 0, -1, -2, 0, -2, 1, 0], 2),
        # s = (0.1 + 0.2 + 0.9) / 3 = 0.4.
        ("ternary", [0.1, -0.2, 0.9], [0, 0, 1], 0.4),
    ],
)
def test_levels_by_hand(name: precision.Precision, column: list[float], integers: list[int], scale: float) -> None:
    # A column of ones beside it, and the same matrix ten times larger: each channel has its own scale.
    w = np.array([[value, 1.0] for value in column], np.float32)
    found, scales = precision.levels(jnp.stack([w, 10 * w]), name)
    np.testing.assert_array_equal(found[0, :, 0], integers)
    np.testing.assert_array_equal(found[1, :, 0], integers)
    one = {"int8": 1 / 127, "int4": 1 / 7, "int2": 1 / 2, "ternary": 1}[name]
    np.testing.assert_allclose(scales, [[[scale, one]], [[10 * scale, 10 * one]]], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "integers"),
    [
        # Over s = 2, and over s = 0.5: -600, -7, -1, -0.9, 0, 1, 3, 6, 600 by 2 are -300, -3.5, -0.5, -0.45, 0, 0.5,
        # 1.5, 3, 300; by a half -1200, -14, -2, -1.8, 0, 2, 6, 12, 1200. Halves go to even; what is too large is cut.
        ("int8", ([-127, -4, 0, 0, 0, 0, 2, 3, 127], [-127, -14, -2, -2, 0, 2, 6, 12, 127])),
        ("int4", ([-7, -4, 0, 0, 0, 0, 2, 3, 7], [-7, -7, -2, -2, 0, 2, 6, 7, 7])),
        ("int2", ([-2, -2, -1, -1, 0, 0, 1, 1, 1], [-2, -2, -2, -2, 0, 1, 1, 1, 1])),
        ("ternary", ([-1, -1, 0, 0, 0, 0, 1, 1, 1], [-1, -1, -1, -1, 0, 1, 1, 1, 1])),
    ],
)
def test_levels_at_given_scales_by_hand(name: precision.Precision, integers: tuple[list[int], list[int]]) -> None:
    w = np.array([-600, -7, -1, -0.9, 0, 1, 3, 6, 600], np.float32)[:, None].repeat(2, axis=1)
    found = precision.levels_at(jnp.asarray(w), jnp.array([[2.0, 0.5]]), name)
    assert (found.shape, found.dtype) == (w.shape, jnp.float32)
    np.testing.assert_array_equal(found, np.array(integers).T)


@pytest.mark.parametrize("name", PACKED)
def test_levels_at_their_own_scales_are_the_levels(name: precision.Precision) -> None:
    w = jnp.asarray(random(4, (2, 7, 4)))
    found, scale = precision.levels(w, name)
    np.testing.assert_array_equal(precision.levels_at(w, scale, name), found)


def test_values_by_hand() -> None:
    def values(name: precision.Precision, *integers: float) -> np.ndarray:
        return np.asarray(precision.from_levels(jnp.array([integers]).T, jnp.array([[2.0]]), name))[:, 0]

    np.testing.assert_array_equal(values("int8", -127, 0, 5), [-254, 0, 10])
    np.testing.assert_array_equal(values("int4", -7, 0, 5), [-14, 0, 10])
    np.testing.assert_array_equal(values("int2", -2, -1, 0, 1), [-3, -1, 1, 3])
    np.testing.assert_array_equal(values("ternary", -1, 0, 1), [-2, 0, 2])


def test_ternary_takes_one_scale_a_tensor() -> None:
    w = random(0, (2, 7, 4))
    found, scale = precision.levels(w, "ternary", "tensor")
    assert scale.shape == (2, 1, 1)
    trits, expected = ternary.ternarise(jnp.asarray(w), "tensor")
    np.testing.assert_array_equal(found, trits)
    np.testing.assert_array_equal(scale, expected)


def test_integers_always_have_one_scale_an_output() -> None:
    w = random(0, (7, 4))
    for name in ("int8", "int4", "int2"):
        assert precision.levels(w, name, "tensor")[1].shape == (1, 4)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_errors_are_bounded(seed: int) -> None:
    w = random(seed, (9, 5))
    largest = np.abs(w).max(axis=0)
    for name, bound in {"int8": largest / 254, "int4": largest / 14, "int2": largest / 4}.items():
        stored = np.asarray(quantise(w, name))
        assert (np.abs(stored - w) <= bound + 1e-6 * largest).all(), name
        # The largest weight of a channel is kept by int8 and int4, and loses half a step in int2.
        kept = np.abs(stored).max(axis=0)
        np.testing.assert_allclose(kept, 0.75 * largest if name == "int2" else largest, rtol=1e-6)
    stored = np.asarray(quantise(w, "bfloat16"))
    assert (np.abs(stored - w) <= np.abs(w) * 2.0**-8).all()


def test_int2_has_four_levels() -> None:
    w = random(0, (200, 3))
    stored, step = np.asarray(quantise(w, "int2")), np.abs(w).max(axis=0) / 2
    for channel in range(3):
        expected = step[channel] * np.array([-1.5, -0.5, 0.5, 1.5])
        np.testing.assert_allclose(np.unique(stored[:, channel]), expected, rtol=1e-6)


@pytest.mark.parametrize("name", PACKED)
def test_a_column_of_zeros_stays_near_zero(name: precision.Precision) -> None:
    w = jnp.array([[0.0, 2.0], [0.0, -2.0]])
    found, scale = precision.levels(w, name)
    assert (np.asarray(scale) > 0).all()
    np.testing.assert_array_equal(found[:, 0], [0, 0])
    stored = np.asarray(precision.quantise(w, name))
    assert np.isfinite(stored).all()
    # int2 has no level at 0: half a step of the floor, 1e-5 / 2.
    np.testing.assert_allclose(stored[:, 0], [2.5e-6 if name == "int2" else 0] * 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_scales_of_integers_have_a_floor(name: precision.Precision) -> None:
    top = {"int8": 127, "int4": 7, "int2": 2}[name]
    scale = precision.levels(jnp.full((3, 2), 1e-7), name)[1]
    np.testing.assert_allclose(scale, np.full((1, 2), 1e-5 / top), rtol=1e-6)


@pytest.mark.parametrize("name", PACKED)
def test_stacks_are_rounded_matrix_by_matrix(name: precision.Precision) -> None:
    stack = random(0, (2, 3, 7, 4)) * np.array([1, 10], np.float32)[:, None, None, None]
    found, scale = precision.levels(stack, name)
    assert scale.shape == (2, 3, 1, 4)
    for index in np.ndindex(2, 3):
        alone = precision.levels(stack[index], name)
        np.testing.assert_array_equal(found[index], alone[0])
        np.testing.assert_array_equal(scale[index], alone[1])


# Straight-through estimator


@pytest.mark.parametrize("name", precision.PRECISIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_is_exactly_the_upstream_gradient(name: precision.Precision, dtype: jnp.dtype, key: jax.Array) -> None:
    w, upstream = jax.random.normal(key, (2, 3, 6, 5)).astype(dtype)
    stored, vjp = jax.vjp(lambda w: precision.quantise(w, name), w)
    assert (stored.dtype, stored.shape) == (dtype, w.shape)
    (gradient,) = vjp(upstream)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, upstream)


@pytest.mark.parametrize("name", PACKED)
def test_value_is_the_stored_one_to_the_last_bit(name: precision.Precision) -> None:
    w = random(1, (40, 30))
    expected = from_levels(*levels(w, name), name)
    np.testing.assert_array_equal(quantise(w, name), expected)
    value, _ = jax.vjp(lambda w: precision.quantise(w, name), w)
    np.testing.assert_array_equal(value, precision.from_levels(*precision.levels(w, name), name))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "int4"])
def test_rounding_twice_is_rounding_once(name: precision.Precision) -> None:
    # Not so int2 and ternary, which shrink the largest weight or the mean, and the scale with it.
    once = precision.quantise(random(2, (9, 5)), name)
    np.testing.assert_allclose(precision.quantise(once, name), once, rtol=1e-6)


@pytest.mark.parametrize("name", PACKED)
def test_bfloat16_matrices_stay_bfloat16(name: precision.Precision) -> None:
    w = jnp.asarray(random(3, (7, 4))).astype(jnp.bfloat16)
    found, scale = precision.levels(w, name)
    assert (found.dtype, scale.dtype) == (jnp.bfloat16, jnp.bfloat16)
    bound = {"int8": 127, "int4": 7, "int2": 2, "ternary": 1}[name]
    integers = np.asarray(found, np.float64)
    np.testing.assert_array_equal(integers, np.round(integers))
    assert (integers >= -bound).all()
    assert (integers <= (1 if name == "int2" else bound)).all()
    stored = np.asarray(precision.from_levels(found, scale, name), np.float64)
    step = np.asarray(scale, np.float64)
    if name != "ternary":
        assert (np.abs(stored - np.asarray(w, np.float64)) <= step * (0.5 + bound * 2.0**-6)).all()


# Packing


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("trits", TRITS)
def test_integers_come_back(shape: tuple[int, ...], name: precision.Precision, trits: precision.TritPacking) -> None:
    low, top = {"int8": (-127, 127), "int4": (-7, 7), "int2": (-2, 1), "ternary": (-1, 1)}[name]
    integers = np.random.default_rng(0).integers(low, top + 1, shape).astype(np.float32)
    packed = precision.pack(jnp.asarray(integers), name, trits)
    assert (packed.dtype, packed.shape) == (np.uint8, (*shape[:-2], precision.width(*shape[-2:], name, trits)))
    back = unpack(packed, shape[-2:], name, trits)
    assert jnp.issubdtype(back.dtype, jnp.signedinteger)
    np.testing.assert_array_equal(back, integers)
    np.testing.assert_array_equal(precision.unpack(jnp.asarray(packed), shape[-2:], name, trits), integers)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_widths_count_whole_bytes_a_matrix(inputs: int, outputs: int) -> None:
    per_byte = {("int8", "base3"): 1, ("int4", "2bit"): 2, ("int2", "base3"): 4}
    per_byte |= {("ternary", "base3"): 5, ("ternary", "2bit"): 4}
    for (name, trits), count in per_byte.items():
        width = math.ceil(inputs * outputs / count)
        assert precision.width(inputs, outputs, name, trits) == width
        zeros = np.zeros((inputs, outputs))
        assert precision.pack(zeros, name, trits).shape == (width,)


def test_bytes_by_hand() -> None:
    def packed(name: precision.Precision, trits: precision.TritPacking, *rows: list[int]) -> list[int]:
        return precision.pack(np.array(rows), name, trits).tolist()

    # Along the rows: the outputs of the first input, then those of the second.
    assert packed("int8", "base3", [-127, 0], [127, 1]) == [1, 128, 255, 129]  # q + 128
    assert packed("int4", "base3", [-7, 0], [7, 1]) == [1 + 16 * 8, 15 + 16 * 9]  # q + 8
    assert packed("int2", "base3", [-2, -1, 0], [1, 0, -1]) == [0 + 4 + 2 * 16 + 3 * 64, 2 + 4]  # q + 2
    assert packed("ternary", "2bit", [-1, 0, 1], [1, 0, -1]) == [0 + 4 + 2 * 16 + 2 * 64, 1]  # q + 1
    # q + 1 = 0, 1, 2, 2, 1 and 0: 3 + 2 x 9 + 2 x 27 + 81 = 156.
    assert packed("ternary", "base3", [-1, 0, 1], [1, 0, -1]) == [156, 0]


def test_matrices_of_a_stack_do_not_share_bytes() -> None:
    # 3 trits fill one byte each, not 9 trits two bytes.
    trits = np.array([[[1, 0, -1]], [[0, 0, 0]], [[-1, -1, -1]]])
    packed = precision.pack(trits, "ternary", "base3")
    np.testing.assert_array_equal(packed, [[2 + 3], [1 + 3 + 9], [0]])


@pytest.mark.parametrize("name", PACKED)
def test_integers_out_of_range_are_not_packed(name: precision.Precision) -> None:
    over = {"int8": 128, "int4": 8, "int2": 2, "ternary": 2}[name]
    for trits in TRITS:
        with pytest.raises(ValueError, match="can be packed|are integers"):
            precision.pack(np.full((2, 2), 2 * over), name, trits)
        if trits == "base3" or name != "ternary":
            with pytest.raises(ValueError, match="can be packed|are integers"):
                precision.pack(np.full((2, 2), over), name, trits)
