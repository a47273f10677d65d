"""Number formats of stored matrices: floats, integers with a scale per output channel, ternary.

    int8, int4    w ~ s q, q = round(w / s) in -(2^(b-1) - 1) .. 2^(b-1) - 1, s = max |w| / (2^(b-1) - 1)
    int2          w ~ s (q + 1/2), q in -2 .. 1: four levels, s = max |w| / 2
    ternary       w ~ s q, q in -1 .. 1, s = mean |w| (`bvit_jax.ternary`)

The maximum and the mean run over the inputs of an output channel, and are 1e-5 at least; scales may also be given.
Integers and trits are packed per matrix (`bvit_jax.packing`). Axes: I inputs, O outputs, n stored elements a matrix;
`...` any leading axes.
"""

from typing import Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np

from bvit_jax import packing, ternary

Array = TypeVar("Array", np.ndarray, jax.Array)
Precision = Literal["float32", "bfloat16", "int8", "int4", "int2", "ternary"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
RouterPrecision = Literal["float32", "bfloat16", "int8", "int4"]
TritPacking = Literal["base3", "2bit"]
PAPER_BITS: dict[Precision, float] = {
    "float32": 32,
    "bfloat16": 16,
    "int8": 8,
    "int4": 4,
    "int2": 2,
    "ternary": 1.58,
}
"""Bits a weight in the paper's accounting."""
_INT_BITS: dict[Precision, int] = {"int8": 8, "int4": 4, "int2": 2}


def width(inputs: int, outputs: int, precision: Precision, trits: TritPacking) -> int:
    """Stored elements of one matrix of a packed precision: bytes."""
    count = inputs * outputs
    if precision == "ternary":
        return packing.trits_width(count) if trits == "base3" else packing.codes_width(count, 2)
    return packing.codes_width(count, _INT_BITS[precision])


def numbers_a_byte(precision: Precision, trits: TritPacking) -> int:
    """Numbers that a byte of a packed precision holds."""
    if precision == "ternary":
        return packing.TRITS_PER_BYTE if trits == "base3" else 4
    return 8 // _INT_BITS[precision]


def is_packed(precision: Precision) -> bool:
    """Whether matrices are stored as packed integers with scales, not as floats."""
    return precision not in ("float32", "bfloat16")


def levels(w_IxO: jax.Array, precision: Precision, kind: ternary.ScaleKind = "row") -> tuple[jax.Array, jax.Array]:
    """Rounds matrices to the integers q of a packed precision; not differentiable.

    Args:
        w_IxO: (..., I, O), floating.
        precision: a packed one.
        kind: scales of `ternary`; integers always have one an output channel.

    Returns:
        q, of the shape and dtype of `w_IxO`, and scales s, (..., 1, O), or (..., 1, 1) for one a tensor.
    """
    if precision == "ternary":
        return ternary.ternarise(w_IxO, kind)
    bits = _INT_BITS[precision]
    largest = jnp.maximum(jnp.abs(w_IxO).max(axis=-2, keepdims=True), ternary.SCALE_FLOOR)
    scale = largest / (2 if bits == 2 else 2 ** (bits - 1) - 1)
    return levels_at(w_IxO, scale, precision), scale


def levels_at(w_IxO: jax.Array, scale: jax.Array, precision: Precision) -> jax.Array:
    """Rounds matrices to the integers of a packed precision at scales that are given, (..., 1, O) or (..., 1, 1).

    Returns:
        q, of the shape and dtype of `w_IxO`.
    """
    if precision == "ternary":
        return jnp.clip(jnp.round(w_IxO / scale), -1, 1)
    bits = _INT_BITS[precision]
    if bits == 2:
        return jnp.clip(jnp.floor(w_IxO / scale), -2, 1)
    top = 2 ** (bits - 1) - 1
    return jnp.clip(jnp.round(w_IxO / scale), -top, top)


def from_levels(q_IxO: Array, scale: Array, precision: Precision) -> Array:
    """Returns the matrices that `levels` stand for, dtype of `scale`."""
    q_IxO = q_IxO.astype(scale.dtype)
    return scale * (q_IxO + 0.5 if precision == "int2" else q_IxO)


def pack(q_IxO: jax.Array | np.ndarray, precision: Precision, trits: TritPacking) -> np.ndarray:
    """Packs the integers of `levels`, (..., I, O), matrix by matrix: uint8 (..., n)."""
    flat = np.asarray(q_IxO).reshape(*q_IxO.shape[:-2], -1)
    if precision == "ternary":
        return packing.pack_trits(flat) if trits == "base3" else packing.pack_codes(flat + 1, 2)
    bits = _INT_BITS[precision]
    return packing.pack_codes(flat + 2 ** (bits - 1), bits)


def unpack(packed: jax.Array, shape: tuple[int, int], precision: Precision, trits: TritPacking) -> jax.Array:
    """Undoes `pack`: integers (..., I, O) from uint8 (..., n); runs inside compiled programs."""
    count = shape[0] * shape[1]
    if precision == "ternary":
        flat = packing.unpack_trits(packed, count) if trits == "base3" else packing.unpack_codes(packed, 2, count) - 1
    else:
        bits = _INT_BITS[precision]
        flat = packing.unpack_codes(packed, bits, count) - 2 ** (bits - 1)
    return flat.reshape(*packed.shape[:-1], *shape)


def quantise(w_IxO: jax.Array, precision: Precision) -> jax.Array:
    """Returns matrices as they would be stored, with the gradient of the identity (straight-through)."""
    if precision == "float32":
        return w_IxO
    fixed = jax.lax.stop_gradient(w_IxO)
    if precision == "bfloat16":
        stored = fixed.astype(jnp.bfloat16).astype(w_IxO.dtype)
    else:
        stored = from_levels(*levels(fixed, precision), precision)
    return ternary.straight_through(stored, w_IxO)
