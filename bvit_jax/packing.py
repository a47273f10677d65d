"""Packing of small integers into bytes, and angles as integers on the circle. Pure functions, exact both ways.

Everything is packed along the last axis, which is filled up with zeros to whole bytes; leading axes are kept. First
comes lowest: a byte of trits t_0 .. t_4 (0 to 2 each) has the value sum t_i 3^i, and of bit fields the first code has
the lowest bits.

    base 3    5 trits a byte, 3^5 = 243 <= 256: 1.6 bits a trit against an entropy of log2 3 = 1.585
    16 bits   one uint16            8 bits   one byte
     6 bits   4 codes in 3 bytes    4 bits   2 codes in a byte    2 bits   4 codes in a byte

An angle is rounded to the nearest of 2^bits equal steps of the whole circle; it comes back between -pi and pi, up to a
whole number of turns, with an error of at most pi / 2^bits (`largest_angle_error`) and the rounding of float32.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from bvit_jax import ternary

AngleBits = Literal[32, 16, 8, 6, 4]
"""Bits an angle; 32 is a float32, not rounded to the circle."""
ANGLE_BITS: tuple[AngleBits, ...] = get_args(AngleBits)
TRITS_PER_BYTE = 5
_CODES_AND_BYTES = {8: (1, 1), 6: (4, 3), 4: (2, 1), 2: (4, 1)}
_POWERS_OF_3 = tuple(3**place for place in range(TRITS_PER_BYTE))


def trits_width(count: int) -> int:
    """Bytes of `count` trits in base 3."""
    return -(-count // TRITS_PER_BYTE)


def pack_trits(trits: jax.Array | np.ndarray) -> np.ndarray:
    """Packs trits in {-1, 0, 1}, any dtype (..., n), to uint8 (..., ceil(n / 5)).

    Raises:
        ValueError: for any other value.
    """
    values = np.asarray(trits)
    if not np.isin(values, (-1, 0, 1)).all():
        raise ValueError("only -1, 0 and 1 can be packed as trits")
    groups = _in_groups(values.astype(np.int32) + 1, TRITS_PER_BYTE)
    return (groups * np.array(_POWERS_OF_3)).sum(axis=-1).astype(np.uint8)


def unpack_trits(packed: jax.Array, count: int) -> jax.Array:
    """Undoes `pack_trits`: int8 (..., count) from uint8 (..., bytes); runs inside compiled programs."""
    powers = jnp.array(_POWERS_OF_3, jnp.uint8)
    digits = packed[..., None] // powers.reshape(*(1,) * packed.ndim, -1) % jnp.uint8(3)
    return digits.reshape(*packed.shape[:-1], packed.shape[-1] * TRITS_PER_BYTE)[..., :count].astype(
        jnp.int8
    ) - jnp.int8(1)


def codes_width(count: int, bits: int) -> int:
    """Stored elements of `count` codes: uint16 for 16 bits, bytes for fewer."""
    if bits == 16:
        return count
    codes, width = _CODES_AND_BYTES[bits]
    return -(-count // codes) * width


def pack_codes(codes: jax.Array | np.ndarray, bits: int) -> np.ndarray:
    """Packs integers from 0 to 2^bits - 1, (..., n), to uint16 (16 bits) or uint8 (8, 6, 4 or 2 bits).

    Raises:
        ValueError: for a value out of range, or another number of bits.
    """
    if bits not in (16, *_CODES_AND_BYTES):
        raise ValueError(f"{bits} bits a code are not supported; choose 16, 8, 6, 4 or 2")
    given = np.asarray(codes)
    if not ((given >= 0) & (given < 2**bits) & (given == np.floor(given))).all():
        raise ValueError(f"codes of {bits} bits are integers, 0 to {2**bits - 1}; found {given.min()} to {given.max()}")
    values = given.astype(np.int64)
    if bits == 16:
        return values.astype(np.uint16)
    per_group, width = _CODES_AND_BYTES[bits]
    groups = _in_groups(values, per_group)
    words = (groups << (bits * np.arange(per_group))).sum(axis=-1, keepdims=True)
    stored = words >> (8 * np.arange(width)) & 255
    return stored.reshape(*values.shape[:-1], groups.shape[-2] * width).astype(np.uint8)


def unpack_codes(packed: jax.Array, bits: int, count: int) -> jax.Array:
    """Undoes `pack_codes`: int32 (..., count); runs inside compiled programs."""
    values = packed.astype(jnp.int32)
    if bits == 16:
        return values
    per_group, width = _CODES_AND_BYTES[bits]
    groups = values.reshape(*values.shape[:-1], values.shape[-1] // width, width)
    words = sum((groups[..., byte] << (8 * byte) for byte in range(1, width)), groups[..., 0])
    fields = jnp.stack([words >> (bits * place) for place in range(per_group)], axis=-1) & (2**bits - 1)
    return fields.reshape(*values.shape[:-1], fields.shape[-2] * per_group)[..., :count]


def _in_groups(values: np.ndarray, size: int) -> np.ndarray:
    """Splits the last axis into groups, (..., groups, size), the last one filled up with zeros."""
    groups = -(-values.shape[-1] // size)
    missing = groups * size - values.shape[-1]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)]).reshape(*values.shape[:-1], groups, size)


def angle_codes(angles: jax.Array, bits: int) -> jax.Array:
    """Rounds angles, radians, to the nearest of 2^bits steps of the circle: int32, 0 to 2^bits - 1.

    -pi and pi have the same code, and so have any two angles a whole number of turns apart.
    """
    turns = angles * (1 / (2 * math.pi))
    steps = jnp.round((turns - jnp.round(turns)) * 2**bits)  # whole turns off first, or many would overflow
    return steps.astype(jnp.int32) & (2**bits - 1)


def angles_of(codes: jax.Array, bits: int) -> jax.Array:
    """Returns the angles of `angle_codes`: float32, from -pi to under pi."""
    half = 2 ** (bits - 1)
    signed = ((codes + half) & (2**bits - 1)) - half
    return signed.astype(jnp.float32) * jnp.float32(2 * math.pi / 2**bits)


def largest_angle_error(bits: int) -> float:
    """Half a step: the largest distance on the circle between an angle and its code, radians."""
    return math.pi / 2**bits


def quantise_angles(angles: jax.Array, bits: int) -> jax.Array:
    """Returns the angles as stored, with the gradient of the identity (straight-through); unchanged for 32 bits."""
    if bits == 32:
        return angles
    stored = angles_of(angle_codes(jax.lax.stop_gradient(angles), bits), bits)
    return ternary.straight_through(stored.astype(angles.dtype), angles)
