"""Trees of arrays as few arrays: writing costs more for each array than for each byte, and most arrays are small.

All arrays under `SMALL_BYTES` of one dtype are stored as one vector, end to end in the order of the tree, whole on
every device; larger ones stay what and where they are. What is stored depends on shapes and dtypes alone.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bvit_jax import components

SMALL_BYTES = 2**20

Stored = dict[str, Any]
"""{dtype: vector of the small arrays of that dtype, path of a large array: that array}"""


def bundle(tree: Any) -> Stored:
    """Returns what to store of a tree of arrays; in a run of several processes all of them call this."""
    stored = dict(_large(tree))
    for dtype, leaves in _small(tree).items():
        stored[dtype] = _joining(_whole(leaves[0].sharding))(leaves)
    return stored


def abstract(tree: Any) -> Stored:
    """Describes `bundle(tree)` for a tree of shapes, dtypes and shardings."""
    stored = dict(_large(tree))
    for dtype, leaves in _small(tree).items():
        size = sum(leaf.size for leaf in leaves)
        stored[dtype] = jax.ShapeDtypeStruct((size,), leaves[0].dtype, sharding=_whole(leaves[0].sharding))
    return stored


def layout(tree: Any) -> list[list[Any]]:
    """Returns path, shape, dtype and name in the bundle of every array, in order: what `unbundle` goes by."""

    def entry(path: tuple[Any, ...], leaf: Any) -> list[Any]:
        stored = str(leaf.dtype) if _is_small(leaf) else _name(path)
        return [components.path_of(path), list(leaf.shape), str(leaf.dtype), stored]

    return [entry(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def unbundle(stored: Stored, tree: Any) -> Any:
    """Returns the arrays that `abstract(tree)` describes as a tree again, each where `tree` says."""
    parts = {dtype: _split(stored[dtype], leaves) for dtype, leaves in _small(tree).items()}
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [next(parts[str(leaf.dtype)]) if _is_small(leaf) else stored[_name(path)] for path, leaf in paths]
    return jax.tree.unflatten(treedef, leaves)


def _is_small(leaf: Any) -> bool:
    return bool(leaf.size * leaf.dtype.itemsize < SMALL_BYTES)


def _name(path: tuple[Any, ...]) -> str:
    return components.path_of(path).replace("/", ".")


def _large(tree: Any) -> list[tuple[str, Any]]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [(_name(path), leaf) for path, leaf in found if not _is_small(leaf)]


def _small(tree: Any) -> dict[str, list[Any]]:
    """Returns the small leaves by dtype."""
    groups: dict[str, list[Any]] = {}
    for leaf in jax.tree.leaves(tree):
        if _is_small(leaf):
            groups.setdefault(str(leaf.dtype), []).append(leaf)
    return groups


def _whole(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Returns the sharding on the same devices that splits nothing."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding


@functools.lru_cache(maxsize=8)
def _joining(whole: jax.sharding.Sharding) -> jax.stages.Wrapped:
    return jax.jit(lambda leaves: jnp.concatenate([leaf.reshape(-1) for leaf in leaves]), out_shardings=whole)


def _split(vector: jax.Array, leaves: list[Any]) -> Iterator[jax.Array]:
    """Yields the parts of a vector; on the host, as a program with so many results takes longer to compile."""
    content = np.asarray(vector)
    end = 0
    for leaf in leaves:
        part = content[end : end + leaf.size].reshape(leaf.shape)
        end += leaf.size
        yield jax.make_array_from_callback(leaf.shape, leaf.sharding, part.__getitem__)
