"""Digests of arrays, computed where the arrays are: equal for equal bits, whatever devices hold them.

A word w at place i of an array adds mix(w + golden * (i + 1)) to a sum modulo 2^32, twice with different mixers. Sums
do not depend on the order, so a split array is digested without being gathered. Both mixers are bijections of w, so a
change of one word always changes the digest; other changes go unseen with a probability of about 2^-64. That finds
damage; it is no protection against forgery.

References:
    The mixers are the 32-bit finalisers of MurmurHash3 (A. Appleby) and of C. Wellons's "Prospecting for hash
    functions" (lowbias32). Golden: 2^32 over the golden ratio.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp

from bvit_jax import components

_GOLDEN = 0x9E3779B9
_MIXERS = ((16, 0x85EBCA6B, 13, 0xC2B2AE35, 16), (16, 0x7FEB352D, 15, 0x846CA68B, 16))


def of_tree(tree: Any) -> dict[str, str]:
    """Returns {path of an array: its 16 hexadecimal digits}; shape and dtype count too.

    Args:
        tree: arrays of at most 32 bits an element and under 2^32 elements each. In a run of several processes all of
            them call this, and all get the same.
    """
    paths = [components.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    leaves = jax.tree.leaves(tree)
    sums = jax.device_get([_sums(leaf) for leaf in leaves])
    return {
        path: _hex(f"{leaf.shape} {leaf.dtype} {first:08x} {second:08x}")
        for path, leaf, (first, second) in zip(paths, leaves, sums, strict=True)
    }


def combined(digests: dict[str, str]) -> str:
    """Returns one digest of many."""
    return _hex("\n".join(f"{path} {digest}" for path, digest in sorted(digests.items())))


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@jax.jit
def _sums(leaf: jax.Array) -> jax.Array:
    """Returns uint32 (2,)."""
    words = _words(leaf)
    # Places are counted without reshaping, which would gather an array that is split.
    place = jnp.ones((), jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    seen = words + place * jnp.uint32(_GOLDEN)
    return jnp.stack([_mixed(seen, *constants).sum(dtype=jnp.uint32) for constants in _MIXERS])


def _words(leaf: jax.Array) -> jax.Array:
    """Returns the bits of every element as uint32."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    if leaf.dtype.itemsize > 4:
        raise ValueError(f"dtype {leaf.dtype}: it must have at most 32 bits an element")
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def _mixed(x: jax.Array, s1: int, m1: int, s2: int, m2: int, s3: int) -> jax.Array:
    x = (x ^ (x >> jnp.uint32(s1))) * jnp.uint32(m1)
    x = (x ^ (x >> jnp.uint32(s2))) * jnp.uint32(m2)
    return x ^ (x >> jnp.uint32(s3))
