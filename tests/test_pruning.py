import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import pruning

SEEDS = st.integers(0, 2**16)
SHAPES = st.lists(st.sampled_from([(), (1,), (5,), (0, 3), (1, 4), (3, 1), (2, 3, 2)]), max_size=4)


def by_sorting(weights: list[np.ndarray], kept: int) -> list[np.ndarray]:
    """The masks when all weights are sorted by falling magnitude, and equal ones by their place."""
    places = [(number, place) for number, w in enumerate(weights) for place in range(w.size)]
    falling = sorted(places, key=lambda at: -abs(float(weights[at[0]].flat[at[1]])))  # sorts are stable
    masks = [np.zeros(w.shape, bool) for w in weights]
    for number, place in falling[:kept]:
        masks[number].flat[place] = True
    return masks


@given(SEEDS, SHAPES, st.floats(0, 1), st.sampled_from(["float32", "float64", "int8", "bfloat16"]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_equals_sorting(seed: int, shapes: list[tuple[int, ...]], density: float, dtype: str, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(-2, 3, shape) if ties else 50 * rng.normal(size=shape) for shape in shapes]
    weights = [np.asarray(w).clip(-128, 127).astype(jnp.dtype(dtype)) for w in drawn]
    kept = round(density * sum(w.size for w in weights))
    found = pruning.masks(weights, kept)
    assert sum(mask.sum() for mask in found) == kept
    assert [(mask.shape, mask.dtype) for mask in found] == [(shape, bool) for shape in shapes]
    for mask, expected in zip(found, by_sorting(weights, kept), strict=True):
        np.testing.assert_array_equal(mask, expected)


def test_masks_by_hand() -> None:
    # Magnitudes 3 1 2 | 2 5 2: the two greatest are 5 and 3, and of three 2s the first stays.
    weights = [np.array([[3.0, -1.0, 2.0]]), np.array([-2.0, -5.0, 2.0])]
    first, second = pruning.masks(weights, 3)
    np.testing.assert_array_equal(first, [[True, False, True]])
    np.testing.assert_array_equal(second, [False, True, False])
    for mask in pruning.masks(weights, 0):
        assert not mask.any()
    for mask in pruning.masks(weights, 6):
        assert mask.all()


def test_arrays_of_different_dtypes() -> None:
    # |-128| is the greatest, though int8 has no 128; 0.1 as float64 is under 0.1 as float32, by 1.5e-9.
    weights = [np.array([-128, 1], np.int8), np.array([0.1], np.float64), np.array([0.1], np.float32)]
    assert [mask.tolist() for mask in pruning.masks(weights, 3)] == [[True, True], [False], [True]]


def test_nothing_is_left_of_nothing() -> None:
    assert pruning.masks([], 0) == []


@pytest.mark.parametrize("kept", [-1, 7])
def test_more_than_there_are(kept: int) -> None:
    with pytest.raises(ValueError, match=f"between 0 and all 6 weights can be kept; found {kept}"):
        pruning.masks([np.zeros((2, 2)), np.zeros(2)], kept)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="weights to be pruned are finite; found nan or inf"):
        pruning.masks([np.zeros(2), np.array([value])], 1)


# Packed masks


@given(SEEDS, st.integers(0, 70))
@settings(max_examples=50, deadline=None)
def test_masks_come_back(seed: int, count: int) -> None:
    mask = np.random.default_rng(seed).random(count) < 0.5
    packed = pruning.pack_mask(mask)
    assert (packed.dtype, packed.shape) == (np.uint8, (pruning.mask_bytes(count),))
    bits = [int(packed[place // 8]) >> (place % 8) & 1 for place in range(count)]
    np.testing.assert_array_equal(bits, mask)
    back = pruning.unpack_mask(packed, count)
    assert back.dtype == bool
    np.testing.assert_array_equal(back, mask)


def test_packed_by_hand() -> None:
    # Along the rows, first comes lowest: 1 + 4 + 8 + 64, then 1 of the second byte.
    mask = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 1]], bool)
    np.testing.assert_array_equal(pruning.pack_mask(mask), [1 + 4 + 8 + 64, 1])
    np.testing.assert_array_equal(pruning.unpack_mask(np.array([77, 1], np.uint8), 9), mask.reshape(-1))
    assert [pruning.mask_bytes(count) for count in (0, 1, 8, 9, 1024)] == [0, 1, 1, 2, 128]


def test_masks_that_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="a mask is bool; found int64"):
        pruning.pack_mask(np.ones(3, np.int64))
    with pytest.raises(ValueError, match=r"the mask of 9 weights has shape \(2,\); found \(1,\)"):
        pruning.unpack_mask(np.zeros(1, np.uint8), 9)


@pytest.mark.parametrize(
    ("count", "bits", "least"),
    [
        (86_000_000, 32, 0.031),  # 1 / 32 = 3.125 %
        (86_000_000, 27, 0.037),  # 2^26 = 67 million are too few: 1 / 27 = 3.70 %
        (65_536, 16, 0.063),  # 1 / 16 = 6.25 %
    ],
)
def test_when_a_mask_is_smaller_than_a_list(count: int, bits: int, least: float) -> None:
    assert bits in (32, math.ceil(math.log2(count)))

    def smallest_list(density: float) -> float:
        kept = round(density * count)
        return min(kept, count - kept) * bits / 8

    for density in (least + 0.001, 0.1, 0.5, 0.9, 1 - least - 0.001):
        assert pruning.mask_bytes(count) < smallest_list(density)
    for density in (0, least - 0.001, 1 - least + 0.001, 1):
        assert pruning.mask_bytes(count) > smallest_list(density)


@pytest.mark.parametrize(("density", "bits"), [(0.5, 1), (0.1, 0.47), (0.9, 0.47), (0.05, 0.29), (0.95, 0.29)])
def test_what_a_mask_takes_above_the_entropy(density: float, bits: float) -> None:
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    assert entropy == pytest.approx(bits, abs=0.005)
    count = 1_000_000
    assert pruning.mask_bytes(count) * 8 == count
    assert count * entropy <= pruning.mask_bytes(count) * 8
