import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import packing

CODE_BITS = (16, 8, 6, 4, 2)
ANGLE_BITS = (16, 8, 6, 4)
LENGTHS = range(41)
LEADS = ((), (3,), (2, 1, 3))
SEEDS = st.integers(0, 2**16)

# Compiling costs more here than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@jit
def unpack_all_trits(packed: list[jax.Array]) -> list[jax.Array]:
    return [packing.unpack_trits(array, count) for count, array in zip(LENGTHS, packed, strict=True)]


@functools.partial(jit, static_argnames="bits")
def unpack_all_codes(packed: list[jax.Array], bits: int) -> list[jax.Array]:
    return [packing.unpack_codes(array, bits, count) for count, array in zip(LENGTHS, packed, strict=True)]


# Trits


@pytest.mark.parametrize("lead", LEADS)
def test_trits_come_back_for_every_length(lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    trits = [rng.integers(-1, 2, (*lead, count)) for count in LENGTHS]
    packed = [packing.pack_trits(array) for array in trits]
    for count, array, there, back in zip(LENGTHS, trits, packed, unpack_all_trits(packed), strict=True):
        width = math.ceil(count / 5)
        assert (there.dtype, there.shape) == (np.uint8, (*lead, width))
        assert packing.trits_width(count) == width
        assert (back.dtype, back.shape) == (jnp.int8, (*lead, count))
        np.testing.assert_array_equal(back, array)


@given(st.lists(st.integers(-1, 1), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_bytes_of_trits_equal_oracle(trits: list[int]) -> None:
    assert packing.pack_trits(np.array(trits)).tolist() == oracles.pack_trits(trits)


def test_bytes_of_trits_by_hand() -> None:
    def packed(*trits: int) -> list[int]:
        return packing.pack_trits(np.array(trits)).tolist()

    assert packed(-1, -1, -1, -1, -1) == [0]
    assert packed(1, 1, 1, 1, 1) == [242]  # 2 (1 + 3 + 9 + 27 + 81)
    assert packed(0, -1, -1, -1, -1) == [1]
    assert packed(-1, -1, -1, -1, 1) == [162]  # 2 x 81
    assert packed(1, 0, -1, 1, 0) == [140]  # 2 + 1 x 3 + 0 x 9 + 2 x 27 + 1 x 81
    assert packed(0) == [1]  # filled up with the digit 0
    assert packed(1, 0, -1, 1, 0, -1, 1) == [140, 6]  # 0 + 2 x 3
    assert packed() == []


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float32, jnp.bfloat16])
def test_trits_of_any_dtype_are_packed(dtype: np.dtype) -> None:
    assert packing.pack_trits(np.array([1, 0, -1, 1, 0], dtype)).tolist() == [140]


@pytest.mark.parametrize("value", [2, -2, 0.5, -0.25, 1e9, math.inf, -math.inf])
def test_other_values_are_no_trits(value: float) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="only -1, 0 and 1 can be packed as trits"):
        packing.pack_trits(np.array([0, value, 1]))


def test_every_byte_of_trits_unpacks() -> None:
    # 243 to 255 stand for nothing; they come back as some trits, never as anything else.
    trits = np.asarray(packing.unpack_trits(jnp.arange(256, dtype=jnp.uint8)[:, None], 5))
    assert set(trits.ravel().tolist()) == {-1, 0, 1}
    np.testing.assert_array_equal(packing.pack_trits(trits[:243])[:, 0], np.arange(243))


# Codes


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("lead", LEADS)
def test_codes_come_back_for_every_length(bits: int, lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, 2**bits, (*lead, count)) for count in LENGTHS]
    packed = [packing.pack_codes(array, bits) for array in codes]
    per_group, width = oracles.GROUPS[bits]
    for count, array, there, back in zip(LENGTHS, codes, packed, unpack_all_codes(packed, bits), strict=True):
        stored = count if bits == 16 else math.ceil(count / per_group) * width
        assert (there.dtype, there.shape) == (np.uint16 if bits == 16 else np.uint8, (*lead, stored))
        assert packing.codes_width(count, bits) == stored
        assert (back.dtype, back.shape) == (jnp.int32, (*lead, count))
        np.testing.assert_array_equal(back, array)


@given(st.data(), st.sampled_from(CODE_BITS))
@settings(max_examples=60, deadline=None)
def test_bytes_of_codes_equal_oracle(data: st.DataObject, bits: int) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))
    assert list(packing.pack_codes(np.array(codes), bits).tobytes()) == oracles.pack_codes(codes, bits)


def test_bytes_of_codes_by_hand() -> None:
    def packed(bits: int, *codes: int) -> list[int]:
        return packing.pack_codes(np.array(codes), bits).tolist()

    assert packed(16, 0, 65535, 258) == [0, 65535, 258]
    assert packed(8, 0, 255, 7) == [0, 255, 7]
    # 1 + 2 x 2^6 + 3 x 2^12 + 4 x 2^18 = 1,060,993 = 16 x 65,536 + 48 x 256 + 129
    assert packed(6, 1, 2, 3, 4) == [129, 48, 16]
    assert packed(6, 63) == [63, 0, 0]
    assert packed(6, 0, 0, 0, 63, 1) == [0, 0, 252, 1, 0, 0]
    assert packed(4, 1, 15) == [241]  # 1 + 15 x 16
    assert packed(4, 5) == [5]
    assert packed(2, 3, 2, 1, 0) == [27]  # 3 + 2 x 4 + 1 x 16
    assert packed(2, 0, 0, 0, 3, 1) == [192, 1]
    assert all(packed(bits) == [] for bits in CODE_BITS)


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("excess", [1, 1000])
def test_codes_out_of_range_are_refused(bits: int, excess: int) -> None:
    top = 2**bits - 1
    message = f"codes of {bits} bits are integers, 0 to {top}; found 0 to {top + excess}"
    with pytest.raises(ValueError, match=message):
        packing.pack_codes(np.array([0, top + excess]), bits)
    with pytest.raises(ValueError, match=f"found {-excess} to {top}"):
        packing.pack_codes(np.array([-excess, top]), bits)


@pytest.mark.parametrize("bits", [-1, 0, 1, 3, 5, 7, 12, 32])
def test_other_numbers_of_bits_are_refused(bits: int) -> None:
    message = f"{bits} bits a code are not supported; choose 16, 8, 6, 4 or 2"
    with pytest.raises(ValueError, match=message):
        packing.pack_codes(np.zeros(4), bits)


def test_nan_is_no_trit() -> None:
    with pytest.raises(ValueError, match="only -1, 0 and 1 can be packed as trits"):
        packing.pack_trits(np.array([0, math.nan]))


@pytest.mark.parametrize("value", [math.nan, 0.5, -0.5, math.inf])
def test_numbers_that_are_no_integers_are_no_codes(value: float) -> None:
    with pytest.raises(ValueError, match="codes of 4 bits"):
        packing.pack_codes(np.array([0, value]), 4)


# Angles


angles_of = functools.partial(jax.jit, static_argnames="bits")(packing.angles_of)
angle_codes = functools.partial(jax.jit, static_argnames="bits")(packing.angle_codes)
quantise_angles = functools.partial(jax.jit, static_argnames="bits")(packing.quantise_angles)


@given(SEEDS, st.sampled_from(ANGLE_BITS), st.sampled_from([0.1, 3.0, 30.0, 3000.0]))
@settings(max_examples=30, deadline=None)
def test_angles_are_at_most_half_a_step_off(seed: int, bits: int, largest: float) -> None:
    angles = np.random.default_rng(seed).uniform(-largest, largest, 200).astype(np.float32)
    stored = np.asarray(angles_of(angle_codes(angles, bits), bits), np.float64)
    assert stored.min() >= -np.float32(math.pi)
    assert stored.max() < math.pi
    # A product of float32 is off by 2^-24 of itself, and so is the constant in it; angles near pi by 2^-23.
    tolerance = packing.largest_angle_error(bits) + 2.0**-22 * (np.abs(angles) + 2)
    assert (np.abs(oracles.on_circle(stored - angles)) <= tolerance).all()


def test_the_bound_on_the_error_is_half_a_step() -> None:
    for bits, steps in ((4, 16), (6, 64), (8, 256), (16, 65536)):
        assert packing.largest_angle_error(bits) == pytest.approx(2 * math.pi / steps / 2, rel=1e-12)
        # An angle in the middle between two steps is off by just that.
        middle = 1.5 * 2 * math.pi / steps
        stored = float(packing.quantise_angles(jnp.float32(middle), bits))
        assert abs(stored - middle) == pytest.approx(packing.largest_angle_error(bits), rel=1e-3)


@given(SEEDS, st.sampled_from(ANGLE_BITS))
@settings(max_examples=20, deadline=None)
def test_angles_equal_oracle(seed: int, bits: int) -> None:
    # At least 1 % of a step from the middle between two steps, where float32 may go either way.
    rng = np.random.default_rng(seed)
    step = 2 * math.pi / 2**bits
    angles = step * (rng.integers(-(2**bits), 2**bits, 50) + rng.uniform(-0.49, 0.49, 50))
    found = np.asarray(quantise_angles(angles.astype(np.float32), bits))
    np.testing.assert_allclose(found, oracles.round_angles(angles, bits), rtol=1e-6, atol=1e-7)


def test_angles_by_hand() -> None:
    # Steps of 2 pi / 16 = 22.5 degrees: 11.2 -> 0, 11.3 -> 1, -22.5 -> 15, 360 + 45 -> 2, 180 and -180 -> 8, 169 -> 8.
    degrees = jnp.array([0, 11.2, 11.3, -11.2, -11.3, -22.5, 405, 180, -180, 169, 168])
    codes = packing.angle_codes(jnp.deg2rad(degrees), 4)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, [0, 0, 1, 0, 15, 15, 2, 8, 8, 8, 7])
    back = np.rad2deg(packing.angles_of(codes, 4))
    np.testing.assert_allclose(back, [0, 0, 22.5, 0, -22.5, -22.5, 45, -180, -180, -180, 157.5], rtol=1e-6)


@pytest.mark.parametrize("bits", ANGLE_BITS)
def test_both_sides_of_the_wrap_have_one_code(bits: int) -> None:
    half, step = 2 ** (bits - 1), 2 * math.pi / 2**bits

    def codes(*angles: float) -> list[int]:
        return packing.angle_codes(jnp.array(angles, jnp.float32), bits).tolist()

    assert codes(math.pi, -math.pi, 3 * math.pi, -3 * math.pi) == [half] * 4
    assert codes(math.pi - 0.4 * step, -math.pi + 0.4 * step) == [half, half]
    assert codes(math.pi + 0.4 * step, -math.pi - 0.4 * step) == [half, half]
    assert codes(math.pi - 0.6 * step, math.pi + 0.6 * step) == [half - 1, half + 1]
    assert codes(-math.pi - 0.6 * step, -math.pi + 0.6 * step) == [half - 1, half + 1]
    assert codes(-0.4 * step, -0.6 * step, -step) == [0, 2**bits - 1, 2**bits - 1]


@pytest.mark.parametrize("bits", ANGLE_BITS)
@pytest.mark.parametrize("turns", [-20, -1, 1, 2, 30])
def test_angles_whole_turns_apart_have_one_code(bits: int, turns: int) -> None:
    # Codes up to 16 bits survive 30 turns: float32 is off by 30 x 2 pi x 2^-23 < a quarter of 2 pi / 2^16.
    codes = jnp.arange(2**bits, dtype=jnp.int32)
    angles = np.asarray(angles_of(codes, bits), np.float64) + turns * 2 * math.pi
    np.testing.assert_array_equal(angle_codes(angles.astype(np.float32), bits), codes)


@pytest.mark.parametrize("bits", ANGLE_BITS)
def test_codes_stay_as_they_are(bits: int) -> None:
    codes = jnp.arange(2**bits, dtype=jnp.int32)
    angles = angles_of(codes, bits)
    assert angles.dtype == jnp.float32
    np.testing.assert_array_equal(angle_codes(angles, bits), codes)
    np.testing.assert_array_equal(angles_of(angle_codes(angles, bits), bits), angles)
    np.testing.assert_array_equal(quantise_angles(angles, bits), angles)
    # Steps are even: from -pi by 2 pi / 2^bits.
    expected = -math.pi + 2 * math.pi / 2**bits * np.arange(2**bits)
    np.testing.assert_allclose(np.sort(angles), expected, rtol=3e-7, atol=1e-9)


def test_fewer_bits_lie_on_the_grid_of_more() -> None:
    for few, many in ((4, 6), (4, 8), (6, 8), (8, 16)):
        angles = angles_of(jnp.arange(2**few, dtype=jnp.int32), few)
        np.testing.assert_array_equal(quantise_angles(angles, many), angles)


@pytest.mark.parametrize("bits", packing.ANGLE_BITS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_of_angles_is_exactly_the_upstream_gradient(bits: int, dtype: jnp.dtype, key: jax.Array) -> None:
    angles, upstream = jax.random.normal(key, (2, 5, 7)).astype(dtype)
    stored, vjp = jax.vjp(lambda angles: packing.quantise_angles(angles, bits), 4 * angles)
    assert (stored.dtype, stored.shape) == (dtype, angles.shape)
    (gradient,) = vjp(upstream)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, upstream)


@pytest.mark.parametrize("bits", ANGLE_BITS)
def test_value_of_angles_is_the_stored_one_to_the_last_bit(bits: int, key: jax.Array) -> None:
    angles = jax.random.uniform(key, (1000,), minval=-20, maxval=20)
    stored = np.asarray(packing.angles_of(packing.angle_codes(angles, bits), bits))
    np.testing.assert_array_equal(packing.quantise_angles(angles, bits), stored)
    np.testing.assert_array_equal(quantise_angles(angles, bits), stored)
    value, _ = jax.vjp(lambda angles: packing.quantise_angles(angles, bits), angles)
    np.testing.assert_array_equal(value, stored)


def test_angles_of_32_bits_are_left_as_they_are(key: jax.Array) -> None:
    for dtype in (jnp.float32, jnp.bfloat16):
        angles = (1000 * jax.random.normal(key, (100,))).astype(dtype)
        stored = packing.quantise_angles(angles, 32)
        assert stored.dtype == dtype
        np.testing.assert_array_equal(stored, angles)


@pytest.mark.parametrize("bits", ANGLE_BITS)
def test_packed_angles_come_back(bits: int, key: jax.Array) -> None:
    angles = jax.random.uniform(key, (3, 11), minval=-4, maxval=4)
    packed = packing.pack_codes(packing.angle_codes(angles, bits), bits)
    assert packed.shape == (3, packing.codes_width(11, bits))
    back = packing.angles_of(packing.unpack_codes(jnp.asarray(packed), bits, 11), bits)
    np.testing.assert_array_equal(back, packing.quantise_angles(angles, bits))


def test_supported_bits_by_name() -> None:
    assert packing.ANGLE_BITS == (32, 16, 8, 6, 4)


@pytest.mark.parametrize("bits", [16, 8, 6, 4])
def test_angles_of_very_many_turns_keep_their_place_on_the_circle(bits: int) -> None:
    # 3e5 and 1e9 rad are 47,746 and 1.6e8 turns: the codes of all steps on the way would not fit 32 bits.
    for angle in (3e5, -3e5, 2.5e6):
        stored = float(packing.angles_of(packing.angle_codes(jnp.float32(angle), bits), bits))
        distance = abs(math.remainder(stored - angle, 2 * math.pi))
        # A float32 of that size is itself known to 2^-24 of it.
        assert distance <= packing.largest_angle_error(bits) + abs(angle) * 2**-22
    assert 0 <= int(packing.angle_codes(jnp.float32(1e30), bits)) < 2**bits


def test_no_rows_pack_to_no_rows() -> None:
    assert packing.pack_trits(np.zeros((0, 7))).shape == (0, 2)
    assert packing.unpack_trits(jnp.zeros((0, 2), jnp.uint8), 7).shape == (0, 7)
    for bits, width in ((16, 7), (8, 7), (6, 6), (4, 4), (2, 2)):
        packed = packing.pack_codes(np.zeros((3, 0, 7)), bits)
        assert packed.shape == (3, 0, width)
        assert packing.unpack_codes(jnp.asarray(packed), bits, 7).shape == (3, 0, 7)
