import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from bvit_jax import digests
from tests.conftest import on_devices

DTYPES = ["float32", "bfloat16", "float16", "int8", "int32", "uint32", "bool"]
SHAPES = [(), (1,), (7,), (0,), (3, 0, 2), (2, 3), (3, 2), (2, 3, 4, 2)]


def mixed(x: np.ndarray, s1: int, m1: int, s2: int, m2: int, s3: int) -> np.ndarray:
    x = (x ^ (x >> np.uint64(s1))) * np.uint64(m1) & np.uint64(0xFFFFFFFF)
    x = (x ^ (x >> np.uint64(s2))) * np.uint64(m2) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(s3))


def bits_of(array: np.ndarray) -> np.ndarray:
    return array.view(f"uint{8 * array.dtype.itemsize}") if array.ndim else bits_of(array[None])[0]


def oracle(array: np.ndarray) -> str:
    """The formula of the module's docstring in 64 bits, place by place in row-major order."""
    words = np.ravel(bits_of(array)).astype(np.uint64)
    places = np.arange(1, len(words) + 1, dtype=np.uint64)
    seen = (words + np.uint64(0x9E3779B9) * places) % np.uint64(2**32)
    murmur = mixed(seen, 16, 0x85EBCA6B, 13, 0xC2B2AE35, 16)
    lowbias = mixed(seen, 16, 0x7FEB352D, 15, 0x846CA68B, 16)
    first, second = (sum(int(term) for term in terms) % 2**32 for terms in (murmur, lowbias))
    return hashlib.sha256(f"{array.shape} {array.dtype} {first:08x} {second:08x}".encode()).hexdigest()[:16]


def random_bits(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Any bits at all: NaNs of every kind among them."""
    rng = np.random.default_rng(seed)
    kind = jnp.dtype(dtype)
    if dtype == "bool":
        return np.asarray(rng.integers(0, 2, shape), np.bool_)
    drawn = rng.integers(0, 256, math.prod(shape) * kind.itemsize, np.uint8)
    return drawn.view(kind).reshape(shape)


def digest(array: np.ndarray) -> str:
    return digests.of_tree({"a": jnp.asarray(array)})["a"]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
def test_digests_are_those_of_the_formula(shape, dtype, seed):
    array = random_bits(shape, dtype, seed)
    assert digest(array) == oracle(array)


def test_a_digest_by_hand():
    # One word 0 at place 1: golden = 0x9E3779B9 through both mixers, worked out with Python's integers.
    def mix(x: int, s1: int, m1: int, s2: int, m2: int, s3: int) -> int:
        x = (x ^ x >> s1) * m1 % 2**32
        x = (x ^ x >> s2) * m2 % 2**32
        return x ^ x >> s3

    first = mix(0x9E3779B9, 16, 0x85EBCA6B, 13, 0xC2B2AE35, 16)
    second = mix(0x9E3779B9, 16, 0x7FEB352D, 15, 0x846CA68B, 16)
    text = f"(1,) float32 {first:08x} {second:08x}"
    assert digest(np.zeros(1, np.float32)) == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_the_digest(dtype):
    array = random_bits((2, 3), dtype, 1)
    width = 1 if dtype == "bool" else 8 * array.dtype.itemsize
    found = {digest(array)}
    for place in np.ndindex(array.shape):
        for bit in range(width):
            flipped = array.copy()
            flipped.view(f"uint{8 * array.dtype.itemsize}")[place] ^= 1 << bit
            found.add(digest(flipped))
    assert len(found) == 1 + array.size * width


@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_that_change_places_change_the_digest(dtype):
    array = random_bits((3, 3), dtype, 2)
    bits, before = np.ravel(bits_of(array)), digest(array)
    for a in range(9):
        for b in range(a):
            swapped = np.ravel(array).copy()
            swapped[[a, b]] = swapped[[b, a]]
            assert (digest(swapped.reshape(3, 3)) == before) == (bits[a] == bits[b])


def test_shape_and_dtype_count():
    zeros = [np.zeros(shape, dtype) for shape in SHAPES for dtype in ("float32", "int32", "int8", "bool")]
    assert len({digest(array) for array in zeros}) == len(zeros)


def test_zeros_of_both_signs_and_nans_of_every_payload_differ():
    patterns = np.array([0, 0x80000000, 0x7FC00000, 0x7FC00001, 0xFFC00000, 0x7F800001, 0x7F800000], np.uint32)
    found = {digest(pattern[None].view(np.float32)) for pattern in patterns}
    assert len(found) == len(patterns)


def test_every_array_of_a_tree_is_named_by_its_path():
    tree = {"layer": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}, "head": [jnp.ones((2, 2))]}
    found = digests.of_tree(tree)
    assert found.keys() == {"layer/kernel", "layer/bias", "head/0"}
    assert found["layer/kernel"] == found["head/0"] == oracle(np.ones((2, 2), np.float32))
    assert digests.of_tree({}) == {}


def test_the_digest_of_many_depends_on_all_and_on_no_order():
    found = {"a": "0" * 16, "b": "1" * 16}
    whole = digests.combined(found)
    assert len(whole) == 16
    assert digests.combined(dict(reversed(found.items()))) == whole
    swapped = {"a": found["b"], "b": found["a"]}
    others = [swapped, {"a": found["a"]}, {"a": found["a"], "c": found["b"]}, {}]
    assert len({whole, *map(digests.combined, others)}) == 5


SPLITS = [("x", None), (None, "x"), (("x", "y"), None), ("x", "y"), ("y", "x"), (None, ("y", "x")), (None, None)]


def big() -> np.ndarray:
    return random_bits((8, 16), "float32", 3)


def split_digests() -> Any:
    """Digests of one array, split in every way over two shapes of mesh, and the programs that formed them."""
    found, programs = [], []
    for shape in ((4, 2), (2, 4)):
        mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        for axes in SPLITS:
            array = jax.device_put(big(), NamedSharding(mesh, PartitionSpec(*axes)))
            found.append(digests.of_tree({"a": array})["a"])
            if any(axes):
                programs.append(digests._sums.lower(array).compile().as_text())
    reordered = jax.make_mesh((8,), ("x",), devices=jax.devices()[::-1], axis_types=(jax.sharding.AxisType.Auto,))
    found.append(digests.of_tree({"a": jax.device_put(big(), NamedSharding(reordered, PartitionSpec("x")))})["a"])
    return found, programs


@pytest.fixture(scope="module")
def split() -> Any:
    return on_devices(8, split_digests)


def test_digests_do_not_depend_on_how_devices_hold_an_array(split):
    found, _ = split
    assert len(found) == 2 * len(SPLITS) + 1
    assert set(found) == {oracle(big())} == {digest(big())}


def test_a_split_array_is_not_gathered(split):
    _, programs = split
    for program in programs:
        assert "all-reduce" in program  # the sums of the parts meet, and nothing else does
        for gathering in ("all-gather", "all-to-all", "collective-permute", "f32[8,16]", "u32[8,16]", "u32[128]"):
            assert gathering not in program
