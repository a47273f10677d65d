import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import merging, moe
from tests.conftest import make_model

SEEDS = st.integers(0, 2**16)
NAMES = ("up_kernel", "up_bias", "down_kernel", "down_bias")
Params = dict[str, np.ndarray]


def experts(seed: int, count: int, d_model: int, d_ff: int) -> Params:
    rng = np.random.default_rng(seed)
    shapes = ((count, d_model, d_ff), (count, d_ff), (count, d_ff, d_model), (count, d_model))
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in zip(NAMES, shapes, strict=True)}


def permuted(params: Params, order_ExF: np.ndarray) -> Params:
    """Hidden unit f of expert e becomes the one that was `order_ExF[e, f]`."""
    return {
        "up_kernel": np.stack([w[:, order] for w, order in zip(params["up_kernel"], order_ExF, strict=True)]),
        "up_bias": np.stack([b[order] for b, order in zip(params["up_bias"], order_ExF, strict=True)]),
        "down_kernel": np.stack([w[order] for w, order in zip(params["down_kernel"], order_ExF, strict=True)]),
        "down_bias": params["down_bias"],
    }


def chosen(params: Params, indices: list[int]) -> Params:
    return {name: leaf[indices] for name, leaf in params.items()}


def assert_same(found: Params, expected: Params) -> None:
    assert set(found) == set(NAMES)
    for name in NAMES:
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


# Groups


def by_average_linkage(outputs_ExNxD: np.ndarray, number: int) -> list[int]:
    """Groups when the two with the least mean distance between their experts are joined, again and again."""

    def distance(a: int, b: int) -> float:
        difference = np.sum((outputs_ExNxD[a] - outputs_ExNxD[b]) ** 2)
        return float(difference / (np.sum(outputs_ExNxD[a] ** 2) + np.sum(outputs_ExNxD[b] ** 2)))

    clusters = [[expert] for expert in range(len(outputs_ExNxD))]
    while len(clusters) > number:
        pairs = itertools.combinations(range(len(clusters)), 2)

        def apart(pair: tuple[int, int]) -> float:
            return float(np.mean([distance(a, b) for a in clusters[pair[0]] for b in clusters[pair[1]]]))

        first, second = min(pairs, key=apart)
        clusters[first] += clusters.pop(second)
    clusters.sort(key=min)
    return [next(n for n, members in enumerate(clusters) if e in members) for e in range(len(outputs_ExNxD))]


@given(SEEDS, st.integers(1, 7), st.data())
@settings(max_examples=40, deadline=None)
def test_groups_equal_oracle(seed: int, count: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(1, count))
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(count, rng.integers(1, 5), rng.integers(1, 4))) * np.exp(rng.normal(size=(count, 1, 1)))
    found = merging.groups(outputs, number)
    assert (found.shape, found.dtype) == ((count,), np.int64)
    assert found.tolist() == by_average_linkage(outputs, number)
    assert list(dict.fromkeys(found.tolist())) == list(range(number))


@pytest.mark.parametrize("number", [2, 3, 5])
def test_linkage_is_average(number: int) -> None:
    # Many experts, where the farthest or the closest pair of two groups would join others.
    outputs = np.random.default_rng(0).normal(size=(14, 3, 2))
    assert merging.groups(outputs, number).tolist() == by_average_linkage(outputs, number)


def test_obvious_groups_are_found() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(3, 10, 4))
    kind_E = np.array([2, 0, 2, 1, 0, 2])
    outputs = kinds[kind_E] + 0.05 * rng.normal(size=(6, 10, 4))
    # In order of first appearance 2, 0, 1 become 0, 1, 2.
    np.testing.assert_array_equal(merging.groups(outputs, 3), [0, 1, 0, 2, 1, 0])
    np.testing.assert_array_equal(merging.groups(outputs, 6), np.arange(6))
    np.testing.assert_array_equal(merging.groups(outputs, 1), np.zeros(6))


def test_groups_by_hand() -> None:
    # One token, outputs (10, 0), (1, 0), (0, 1), (0, 1.1). Distances: 0 and 1 have 81 / 101 = 0.80, all others with 0
    # at least 1; 2 and 3 have 0.01 / 2.21 = 0.005; 1 and 2 have 2 / 2 = 1, 1 and 3 2.21 / 2.21 = 1. So 2 and 3 go
    # together first, then 0 and 1, though the plain distance of 0 and 1, 9, is the greatest but two.
    outputs = np.array([[[10, 0]], [[1, 0]], [[0, 1]], [[0, 1.1]]])
    np.testing.assert_array_equal(merging.groups(outputs, 3), [0, 1, 2, 2])
    np.testing.assert_array_equal(merging.groups(outputs, 2), [0, 0, 1, 1])


def test_experts_that_put_out_nothing_are_alike() -> None:
    outputs = np.random.default_rng(0).normal(size=(4, 5, 3))
    outputs[[0, 2]] = 0
    np.testing.assert_array_equal(merging.groups(outputs, 3), [0, 1, 0, 2])


def test_the_scale_of_all_outputs_does_not_matter() -> None:
    outputs = np.random.default_rng(1).normal(size=(8, 5, 3)).astype(np.float32)
    np.testing.assert_array_equal(merging.groups(outputs, 3), merging.groups(outputs * np.float32(2.0**-60), 3))


@pytest.mark.parametrize("number", [0, -1, 4])
def test_numbers_of_groups_out_of_range(number: int) -> None:
    with pytest.raises(ValueError, match=f"3 experts make from 1 to 3 groups; found {number}"):
        merging.groups(np.zeros((3, 2, 2)), number)


def test_outputs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"outputs have axes \(experts, tokens, d_model\); found shape \(3, 2\)"):
        merging.groups(np.zeros((3, 2)), 1)
    with pytest.raises(ValueError, match=r"found shape \(0, 2, 2\)"):
        merging.groups(np.zeros((0, 2, 2)), 1)
    with pytest.raises(ValueError, match="outputs of experts are finite; found nan or inf"):
        merging.groups(np.full((3, 2, 2), np.nan), 1)


# Merging


def nearest_order(expert: Params, onto: Params) -> list[int]:
    """The order of hidden units with the least squared distance to those of `onto`, of all orders there are."""

    def distance(order: tuple[int, ...]) -> float:
        changed = permuted(chosen(expert, [0]), np.array([order]))
        return sum(float(np.sum((changed[name][0].astype(np.float64) - onto[name][0]) ** 2)) for name in NAMES)

    return list(min(itertools.permutations(range(expert["up_bias"].shape[1])), key=distance))


@given(SEEDS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.data())
@settings(max_examples=40, deadline=None)
def test_merged_equals_oracle(seed: int, count: int, d_model: int, d_ff: int, data: st.DataObject) -> None:
    params = experts(seed, count, d_model, d_ff)
    labels = data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
    groups = np.unique(labels, return_inverse=True)[1]
    weights = np.array(data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)))
    found = merging.merged(params, groups, weights)
    for group in range(groups.max() + 1):
        members = [e for e in range(count) if groups[e] == group]
        shares = [weights[e] if any(weights[m] for m in members) else 1 for e in members]
        most_used = max(members, key=lambda e: weights[e])  # the first of them
        ordered = []
        for e in members:
            order = nearest_order(chosen(params, [e]), chosen(params, [most_used]))
            ordered.append(permuted(chosen(params, [e]), np.array([order])))
        for name in NAMES:
            expected = sum(share * own[name][0] for share, own in zip(shares, ordered, strict=True)) / sum(shares)
            np.testing.assert_allclose(found[name][group], expected, rtol=1e-5, atol=1e-6)
            assert found[name].dtype == np.float32


def test_averages_by_hand() -> None:
    # One hidden unit, so that no order has to be found. Tokens 3 and 1: (3 x 4 + 1 x 8) / 4 = 5 and so on.
    params = {
        "up_kernel": np.array([[[4.0]], [[7.0]], [[8.0]]]),
        "up_bias": np.array([[0.0], [7.0], [4.0]]),
        "down_kernel": np.array([[[-4.0]], [[7.0]], [[4.0]]]),
        "down_bias": np.array([[1.0], [7.0], [-3.0]]),
    }
    found = merging.merged(params, np.array([0, 1, 0]), np.array([3, 5, 1]))
    expected = {"up_kernel": [[[5]], [[7]]], "up_bias": [[1], [7]], "down_kernel": [[[-2]], [[7]]]}
    for name, values in {**expected, "down_bias": [[0], [7]]}.items():
        np.testing.assert_array_equal(found[name], values)
    # Nobody used: (4 + 8) / 2 = 6. Only the third: as it is.
    assert merging.merged(params, np.array([0, 1, 0]), np.array([0, 5, 0]))["up_kernel"][0] == 6
    assert merging.merged(params, np.array([0, 1, 0]), np.array([0, 5, 2]))["up_kernel"][0] == 8


def test_hidden_units_follow_the_most_used_expert() -> None:
    # Unit weights (in, bias, out): expert 0 (1, 0, 0), (9, 0, 0); expert 1 (8, 0, 4), (2, 0, 0), which is the other way
    # round: 1 x 2 + 9 x 8 = 74 against 1 x 8 + 9 x 2 = 26. Means (1.5, 0, 0) and (8.5, 0, 2) in the order of expert 0;
    # with expert 1 the most used, in its order, shares 1/4 and 3/4: (9 + 24) / 4 = 8.25 and (1 + 6) / 4 = 1.75.
    params = {
        "up_kernel": np.array([[[1.0, 9.0]], [[8.0, 2.0]]]),
        "up_bias": np.zeros((2, 2)),
        "down_kernel": np.array([[[0.0], [0.0]], [[4.0], [0.0]]]),
        "down_bias": np.zeros((2, 1)),
    }
    found = merging.merged(params, np.array([0, 0]), np.array([1, 1]))
    np.testing.assert_array_equal(found["up_kernel"], [[[1.5, 8.5]]])
    np.testing.assert_array_equal(found["down_kernel"], [[[0], [2]]])
    found = merging.merged(params, np.array([0, 0]), np.array([1, 3]))
    np.testing.assert_array_equal(found["up_kernel"], [[[8.25, 1.75]]])
    np.testing.assert_array_equal(found["down_kernel"], [[[3], [0]]])


@given(SEEDS, st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.sampled_from([np.float32, np.float64]))
@settings(max_examples=40, deadline=None)
def test_copies_in_another_order_merge_back(seed: int, count: int, d_model: int, d_ff: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    one = {name: leaf.astype(dtype) for name, leaf in experts(seed, 1, d_model, d_ff).items()}
    order_ExF = np.stack([rng.permutation(d_ff) for _ in range(count)])
    copies = permuted(chosen(one, [0] * count), order_ExF)
    weights = rng.integers(0, 4, count)
    found = merging.merged(copies, np.zeros(count, np.int64), weights)
    assert_same(found, chosen(copies, [int(weights.argmax())]))


def test_equal_experts_merge_to_themselves() -> None:
    one = experts(0, 1, 5, 7)
    weights = np.array([0.1, 0.3, 0.7])
    assert_same(merging.merged(chosen(one, [0, 0, 0]), np.zeros(3, np.int64), weights), one)


def test_an_expert_alone_stays_as_it_is() -> None:
    params = experts(0, 4, 5, 7)
    found = merging.merged(params, np.array([0, 1, 0, 2]), np.array([3, 0, 1, 7]))
    assert_same(chosen(found, [1, 2]), chosen(params, [1, 3]))
    assert_same(merging.merged(params, np.arange(4), np.zeros(4)), params)


def test_inputs_are_left_as_they_are() -> None:
    params = experts(0, 3, 4, 5)
    before = {name: leaf.copy() for name, leaf in params.items()}
    merging.merged(params, np.zeros(3, np.int64), np.arange(3))
    assert_same(params, before)


def test_merged_copies_put_out_the_same_in_the_model() -> None:
    config = make_model(family="standard", num_experts=3)
    one = experts(0, 1, config.d_model, config.d_ff)
    rng = np.random.default_rng(0)
    copies = permuted(chosen(one, [0, 0, 0]), np.stack([rng.permutation(config.d_ff) for _ in range(3)]))
    found = merging.merged(copies, np.zeros(3, np.int64), np.array([1, 2, 4]))
    x_BxTxD = rng.normal(size=(1, 5, config.d_model)).astype(np.float32)
    before = jax.jit(moe.expert_outputs, static_argnums=0)(config, copies, x_BxTxD)
    after = jax.jit(moe.expert_outputs, static_argnums=0)(config, chosen(found, [0, 0, 0]), x_BxTxD)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-3 * float(np.abs(before).max()))


# Bad input


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (np.array([0, 1]), r"groups of 3 experts are \(3,\), numbered from 0 without gaps; found \[0 1\]"),
        (np.array([0, 2, 2]), r"numbered from 0 without gaps; found \[0 2 2\]"),
        (np.array([1, 2, 3]), r"numbered from 0 without gaps; found \[1 2 3\]"),
        (np.array([0, -1, 1]), r"numbered from 0 without gaps; found \[ 0 -1  1\]"),
        (np.array([0.0, 1.0, 1.0]), r"numbered from 0 without gaps; found \[0. 1. 1.\]"),
    ],
)
def test_groups_that_do_not_fit(groups: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merging.merged(experts(0, 3, 2, 2), groups, np.ones(3))


@pytest.mark.parametrize("weights", [np.ones(2), np.array([1, -1, 1]), np.array([1, np.nan, 1]), np.ones((3, 1))])
def test_weights_that_do_not_fit(weights: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"weights of 3 experts are \(3,\), finite and not negative; found \["):
        merging.merged(experts(0, 3, 2, 2), np.zeros(3, np.int64), weights)


def test_parameters_that_do_not_fit() -> None:
    params, groups = experts(0, 3, 2, 4), np.zeros(3, np.int64)

    def fails(changed: Params, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            merging.merged(changed, groups, np.ones(3))

    named = r"stored experts have parameters up_kernel, up_bias, down_kernel, down_bias; found "
    fails({name: params[name] for name in NAMES[:2]}, named + "up_bias, up_kernel")
    fails(params | {"router": np.zeros(3)}, named + ".*router")
    fails(params | {"up_kernel": np.zeros((3, 8))}, r"up_kernel has axes .* found shape \(3, 8\)")
    fails(params | {"up_kernel": np.zeros((0, 2, 4))}, r"up_kernel has axes .* found shape \(0, 2, 4\)")
    shape = r"down_kernel beside up_kernel \(3, 2, 4\) is \(3, 4, 2\); found \(3, 2, 4\)"
    fails(params | {"down_kernel": np.zeros((3, 2, 4))}, shape)
    fails(params | {"up_bias": np.full((3, 4), np.nan)}, "parameters are finite; found nan or inf in up_bias")
