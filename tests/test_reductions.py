import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import reductions
from bvit_jax.model_config import ConfigError
from bvit_jax.reductions import Factors, Merged, Pruned, Reductions

SEEDS = st.integers(0, 2**16)
SIDES = st.integers(1, 7)
ALL = Reductions(
    ranks=(("a/up/kernel", (0, 3)), ("b/up/kernel", (1,))),
    kept=(("c/kernel", 0), ("d/kernel", 17)),
    groups=(("e/ffn", ((0, 1, 0), (0, 0, 1))),),
)


def of_rank(rng: np.random.Generator, inputs: int, outputs: int, rank: int) -> np.ndarray:
    """Draws a matrix of this rank at most; float32, with its rounding."""
    return (rng.normal(size=(inputs, rank)) @ rng.normal(size=(rank, outputs))).astype(np.float32)


# Factors


@given(SEEDS, SIDES, SIDES, st.lists(st.floats(0, 1), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_factors_come_back_as_the_matrices(seed: int, inputs: int, outputs: int, shares: list[float]) -> None:
    rng = np.random.default_rng(seed)
    whole = min(inputs, outputs)
    ranks = tuple(round(share * whole) for share in shares)
    found = np.stack([of_rank(rng, inputs, outputs, rank) for rank in ranks])
    factors = Factors(ranks)
    parts = factors.split(found)
    assert [part.shape for part in parts] == list(factors.shapes((inputs, outputs)))
    assert all(part.dtype == np.float64 for part in parts)
    joined = list(factors.joined(parts, (inputs, outputs)))
    np.testing.assert_allclose(joined, found, rtol=0, atol=2e-6 * max(1, np.abs(found).max()))
    for rank, matrix, back in zip(ranks, found, joined, strict=True):
        if rank == whole:
            np.testing.assert_array_equal(back, matrix)  # kept as it is
        else:
            # The nearest matrix of this rank, by NumPy.
            values = np.linalg.svd(np.asarray(back), compute_uv=False)
            assert (values > 1e-5 * max(values.max(), 1e-9)).sum() <= rank


@given(SEEDS, st.integers(2, 6), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_factors_are_balanced(seed: int, inputs: int, outputs: int) -> None:
    # So that neither side needs scales much larger than the other: the columns of U and the rows of V are equally long,
    # sqrt(s) each.
    rank = min(inputs, outputs) - 1
    found = of_rank(np.random.default_rng(seed), inputs, outputs, rank)
    left_Ixr, right_rxO = Factors((rank,)).split(found[None])
    values = np.linalg.svd(found.astype(np.float64), compute_uv=False)[:rank]
    np.testing.assert_allclose((left_Ixr**2).sum(axis=0), values, rtol=1e-9)
    np.testing.assert_allclose((right_rxO**2).sum(axis=1), values, rtol=1e-9)


@pytest.mark.parametrize("matrix", [(5, 3), (3, 5), (4, 4), (1, 6), (6, 1)])
def test_shapes_by_hand(matrix: tuple[int, int]) -> None:
    inputs, outputs = matrix
    whole = min(matrix)
    found = Factors((0, 1, whole)).shapes(matrix)
    one = (matrix,) if whole == 1 else ((inputs, 1), (1, outputs))
    assert found == ((inputs, 0), (0, outputs), *one, matrix)


@pytest.mark.parametrize(
    ("ranks", "matrix", "numbers"),
    [
        ((0,), (5, 3), 0),
        ((1,), (5, 3), 5 + 3),
        ((2,), (5, 3), 2 * (5 + 3)),  # more than the 15 of the matrix
        ((3,), (5, 3), 15),
        ((1, 3, 0, 2), (3, 5), 8 + 15 + 0 + 16),
        ((8, 63), (64, 256), 8 * 320 + 63 * 320),
    ],
)
def test_numbers_of_factors_by_hand(ranks: tuple[int, ...], matrix: tuple[int, int], numbers: int) -> None:
    assert sum(math.prod(shape) for shape in Factors(ranks).shapes(matrix)) == numbers


def test_a_matrix_of_a_larger_rank_is_refused() -> None:
    rng = np.random.default_rng(0)
    found = np.stack([of_rank(rng, 5, 4, 2), of_rank(rng, 5, 4, 3)])
    Factors((2, 3)).split(found)
    with pytest.raises(ValueError, match="^matrix 1 is of a rank above 2$"):
        Factors((2, 2)).split(found)
    with pytest.raises(ValueError, match="^matrix 0 is of a rank above 0$"):
        Factors((0, 3)).split(found)
    # What is left beside the rank counts against the largest: a hundredth of a percent is no rounding.
    found = np.diag([1.0, 1e-4])[None].astype(np.float32)
    with pytest.raises(ValueError, match="^matrix 0 is of a rank above 1$"):
        Factors((1,)).split(found)
    Factors((1,)).split(np.diag([1.0, 1e-6])[None].astype(np.float32))


def test_a_matrix_of_zeros_has_any_rank() -> None:
    zeros = np.zeros((4, 3, 5), np.float32)
    factors = Factors((0, 1, 2, 3))
    parts = factors.split(zeros)
    assert all(np.isfinite(part).all() for part in parts)
    np.testing.assert_array_equal(list(factors.joined(parts, (3, 5))), zeros)


# Pruned


@pytest.mark.parametrize(("shape", "size"), [((3, 5), 2), ((8,), 1), ((1, 1), 1), ((2, 3, 3), 3), ((4, 4, 2), 4)])
def test_bytes_of_the_bits(shape: tuple[int, ...], size: int) -> None:
    # 15, 8, 1, 18 and 32 bits.
    assert Pruned(1).mask_bytes(shape) == size


# Merged


@given(SEEDS, st.integers(1, 3), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_merged_experts_come_back(seed: int, layers: int, experts: int, stored: int) -> None:
    rng = np.random.default_rng(seed)
    stored = min(stored, experts)
    groups = tuple(
        first_appearance([*range(stored), *rng.integers(0, stored, experts - stored)]) for _ in range(layers)
    )
    groups = tuple(first_appearance(rng.permutation(layer).tolist()) for layer in groups)
    kept = rng.normal(size=(layers, stored, 2, 3)).astype(np.float32)
    merged = Merged(groups)
    assert merged.stored == stored
    leaf = merged.spread(kept)
    assert (leaf.shape, leaf.dtype) == ((layers, experts, 2, 3), np.float32)
    for layer in range(layers):
        for expert in range(experts):
            np.testing.assert_array_equal(leaf[layer, expert], kept[layer, groups[layer][expert]])
    np.testing.assert_array_equal(merged.gathered(leaf), kept)


def first_appearance(groups: list[int]) -> tuple[int, ...]:
    """Numbers groups anew, from 0 in the order in which they come."""
    names: dict[int, int] = {}
    return tuple(names.setdefault(int(group), len(names)) for group in groups)


def test_gathered_by_hand() -> None:
    # Layer 0: experts 0 and 2 are one, 1 another; layer 1: 0 alone, 1 and 2 one.
    leaf = np.array([[[1.0], [2.0], [1.0]], [[3.0], [4.0], [4.0]]])
    merged = Merged(((0, 1, 0), (0, 1, 1)))
    np.testing.assert_array_equal(merged.gathered(leaf), [[[1], [2]], [[3], [4]]])
    np.testing.assert_array_equal(merged.spread([[[1], [2]], [[3], [4]]]), leaf)


@pytest.mark.parametrize("place", [(0, 0), (0, 2), (1, 2)])
def test_experts_of_a_group_that_differ_are_refused(place: tuple[int, int]) -> None:
    leaf = np.ones((2, 3, 4), np.float32)
    merged = Merged(((0, 1, 0), (0, 1, 1)))
    merged.gathered(leaf)
    leaf[place][3] += 1e-6
    with pytest.raises(ValueError, match="^experts of one group differ$"):
        merged.gathered(leaf)


# Which parameter


def test_reductions_of_parameters() -> None:
    assert reductions.of_param("a/up/kernel", ALL) == Factors((0, 3))
    assert reductions.of_param("c/kernel", ALL) == Pruned(0)
    for name in ("up_kernel", "up_bias", "down_kernel", "down_bias"):
        assert reductions.of_param(f"e/ffn/{name}", ALL) == Merged(((0, 1, 0), (0, 0, 1)))
    for path in (
        "e/ffn",
        "e/ffn/router/kernel",
        "e/ffn/up_left",
        "other/e/ffn/up_kernel",
        "a/up",
        "kernel",
        "head/kernel",
        "up_kernel",
    ):
        assert reductions.of_param(path, ALL) is None
    assert reductions.of_param("a/up/kernel", reductions.NONE) is None


# Plain data


def test_plain_data_by_hand() -> None:
    assert ALL.to_dict() == {
        "ranks": {"a/up/kernel": (0, 3), "b/up/kernel": (1,)},
        "kept": {"c/kernel": 0, "d/kernel": 17},
        "groups": {"e/ffn": ((0, 1, 0), (0, 0, 1))},
    }


@pytest.mark.parametrize("found", [ALL, reductions.NONE, Reductions(kept=(("a", 1),))])
def test_reductions_come_back_through_json(found: Reductions) -> None:
    text = json.dumps(found.to_dict(), sort_keys=True)
    back = reductions.from_dict(json.loads(text))
    assert (back, hash(back)) == (found, hash(found))
    assert json.dumps(back.to_dict(), sort_keys=True) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": {"a": [-1]}}, "storage.reductions of a = -1: it must be an integer, 0 or more"),
        ({"ranks": {"a": [1, True]}}, "storage.reductions of a = True: it must be an integer, 0 or more"),
        ({"ranks": {"a": "12"}}, "storage.reductions of a = '1': it must be an integer, 0 or more"),
        ({"kept": {"b": 1.0}}, "storage.reductions of b = 1.0: it must be an integer, 0 or more"),
        ({"kept": {"b": None}}, "storage.reductions of b = None: it must be an integer, 0 or more"),
        ({"groups": {"c": [[0, -2]]}}, "storage.reductions of c = -2: it must be an integer, 0 or more"),
        ({"groups": {"c": [[[0]]]}}, "storage.reductions of c = [0]: it must be an integer, 0 or more"),
        (
            {"more": {}},
            "storage.reductions = ['groups', 'kept', 'more', 'ranks']: it must be of ranks, kept and groups",
        ),
    ],
)
def test_what_is_no_reduction_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        reductions.from_dict(reductions.NONE.to_dict() | changes)
    assert str(error.value) == message


@pytest.mark.parametrize("stored", [None, 1, [], "text", {}, {"ranks": {}, "kept": {}}, {"ranks": [], "kept": {}}])
def test_what_is_something_else_is_refused(stored: Any) -> None:
    with pytest.raises((TypeError, AttributeError, KeyError)):
        reductions.from_dict(stored)


# Checks


def refused(call: Any, *arguments: Any) -> str:
    with pytest.raises(ConfigError) as error:
        call(*arguments)
    return str(error.value)


def test_reductions_that_fit_are_let_pass() -> None:
    reductions.check("a", Factors((0, 4, 2)), 3, (4, 9), packed=True)
    reductions.check("a", Pruned(0), 3, (4, 9), packed=False)
    reductions.check("a", Pruned(108), 3, (4, 9), packed=False)
    reductions.check_merged("a", Merged(((0, 1, 2), (0, 1, 2))), 2, 3)
    reductions.check_merged("a", Merged(((0,),)), 1, 1)


def test_reductions_that_do_not_fit_are_refused() -> None:
    check, merged = reductions.check, reductions.check_merged
    message = refused(check, "a", Factors((1, 1)), 3, (4, 9), True)
    assert message == "ranks of a = 2: it must be 3, one a matrix"
    # Factors of rank 3 are 3 (4 + 9) = 39 numbers, more than 4 x 9 = 36.
    for rank, matrix in ((5, (4, 9)), (5, (9, 4)), (3, (4, 9))):
        message = refused(check, "a", Factors((1, rank)), 2, matrix, False)
        assert message == f"rank of a = {rank}: it must be such that factors are fewer numbers than {matrix}, or 4"
    assert refused(check, "a", Pruned(109), 3, (4, 9), False) == "kept weights of a = 109: it must be at most 108"
    message = refused(check, "a", Pruned(1), 3, (4, 9), True)
    assert message == "format of a = 'packed': it must be floats, as it is pruned"
    for groups in ((), ((0, 1),), ((0, 1), (0,)), ((0, 1), (0, 1), (0, 1))):
        message = refused(merged, "a", Merged(groups), 2, 2)
        assert message == f"groups of a = {groups!r}: it must be 2 for each of 2 layers"
    # Not in order, a number left out, fewer in one layer, and one so large that it cannot be counted to.
    for groups in (((1, 0), (0, 1)), ((0, 2), (0, 1)), ((0, 1), (0, 0)), ((0, 10**18), (0, 10**18))):
        message = refused(merged, "a", Merged(groups), 2, 2)
        wanted = "numbered by first appearance, as many in all layers"
        assert message == f"groups of a = {groups!r}: it must be {wanted}"
