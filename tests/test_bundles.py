from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from bvit_jax import bundles
from tests.conftest import on_devices

DTYPES = ("float32", "bfloat16", "int32", "int8", "bool")


def place() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def described(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place()), tree)


def drawn(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> jax.Array:
    return jnp.asarray(rng.integers(-100, 100, shape)).astype(dtype)


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


shapes = st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(0, 9))
def test_a_tree_comes_back_from_its_bundle(shapes, seed):
    rng = np.random.default_rng(seed)
    tree = {f"a{number}": [drawn(tuple(shape), dtype, rng)] for number, (shape, dtype) in enumerate(shapes)}
    stored = bundles.bundle(tree)
    assert stored.keys() == {dtype for _, dtype in shapes}
    for dtype, vector in stored.items():
        expected = [np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree) if leaf.dtype == dtype]
        np.testing.assert_array_equal(vector, np.concatenate(expected))
    abstract = bundles.abstract(described(tree))
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in abstract.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in stored.items()
    }
    assert_same(bundles.unbundle(stored, described(tree)), tree)


def test_large_arrays_are_stored_as_they_are(monkeypatch):
    monkeypatch.setattr(bundles, "SMALL_BYTES", 24)
    large, small = jnp.arange(6, dtype=jnp.float32).reshape(2, 3), jnp.arange(5, dtype=jnp.float32)
    tree = {"outer": {"large": large, "small": small}, "half": jnp.ones((2, 3), jnp.bfloat16)}
    stored = bundles.bundle(tree)
    assert stored["outer.large"] is large  # 24 bytes are not under 24
    np.testing.assert_array_equal(stored["float32"], small)
    assert stored.keys() == {"outer.large", "float32", "bfloat16"}
    assert_same(bundles.unbundle(stored, described(tree)), tree)


def split_and_whole() -> dict[str, Any]:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"split": PartitionSpec("a", "b"), "half": PartitionSpec(None, "a"), "whole": PartitionSpec()}
    tree = {
        name: jax.device_put(jnp.arange(32, dtype=jnp.float32).reshape(4, 8) + number, NamedSharding(mesh, spec))
        for number, (name, spec) in enumerate(specs.items())
    }
    stored = bundles.bundle(tree)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
    back = bundles.unbundle(stored, abstract)
    return {
        "stored": np.asarray(stored["float32"]),
        "is_whole": stored["float32"].is_fully_replicated
        and bundles.abstract(abstract)["float32"].sharding.is_fully_replicated,
        "equal": all(np.array_equal(back[name], tree[name]) for name in tree),
        "places": all(back[name].sharding == tree[name].sharding for name in tree),
    }


def test_split_arrays_are_stored_whole_and_come_back_split():
    found = on_devices(8, split_and_whole)
    count = np.arange(32, dtype=np.float32)
    # In the order of the tree: "half", "split", "whole".
    np.testing.assert_array_equal(found.pop("stored"), np.concatenate([count + 1, count, count + 2]))
    assert found == {"is_whole": True, "equal": True, "places": True}


@pytest.mark.parametrize("size", [0, 1, 2])
def test_what_is_stored_depends_on_shapes_alone(size):
    tree = {"a": jnp.ones(size), "b": jnp.zeros((size, 2))}
    assert {name: leaf.shape for name, leaf in bundles.bundle(tree).items()} == {"float32": (3 * size,)}
