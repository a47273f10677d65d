import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import dispatch

# Compiling costs more here than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
group = jit(dispatch.group, static_argnames=("num_experts", "block"))
BLOCKS = (0, 1, 4, 16)


@st.composite
def assignments(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    num_experts = draw(st.integers(1, 9))
    used = draw(st.lists(st.integers(0, num_experts - 1), min_size=1, max_size=num_experts, unique=True))
    expert_N = draw(st.lists(st.sampled_from(used), min_size=1, max_size=24))
    return np.array(expert_N, np.int32), num_experts


def check_grouping(expert_N: np.ndarray, num_experts: int, block: int) -> None:
    grouping = jax.tree.map(np.asarray, group(expert_N, num_experts, block))
    slot_N, row_S, expert_S = grouping.slot_N, grouping.row_S, grouping.expert_S
    num_rows, num_slots, height = len(expert_N), len(row_S), block or 1
    assert grouping.block == block
    assert {a.dtype for a in (grouping.slot_N, grouping.row_S, grouping.expert_S, grouping.sizes_E)} == {np.dtype("i4")}
    assert expert_S.shape == (num_slots,)
    # No row overflows the slots, shares a slot or is lost.
    assert slot_N.min() >= 0
    assert slot_N.max() < num_slots
    np.testing.assert_array_equal(row_S[slot_N], np.arange(num_rows))
    assert (row_S == num_rows).sum() == num_slots - num_rows
    np.testing.assert_array_equal(expert_S[slot_N], expert_N)
    # Experts in order, and rows in order within each expert.
    by_slot = np.argsort(slot_N)
    np.testing.assert_array_equal(by_slot, np.argsort(expert_N, kind="stable"))
    # Every block belongs to one expert, and whole blocks fill the slots.
    assert num_slots % height == 0
    np.testing.assert_array_equal(np.repeat(expert_S[::height], height)[slot_N], expert_N)
    counts = np.bincount(expert_N, minlength=num_experts)
    np.testing.assert_array_equal(grouping.sizes_E, np.ceil(counts / height) * height)
    assert grouping.sizes_E.sum() <= num_slots
    if height == 1:
        assert num_slots == num_rows


@given(assignments(), st.sampled_from(BLOCKS))
@settings(max_examples=25, deadline=None)
def test_grouping(case: tuple[np.ndarray, int], block: int) -> None:
    check_grouping(*case, block)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("num_rows", [1, 8, 17])
def test_worst_cases_of_padding_fit(num_rows: int, block: int) -> None:
    num_experts = 4
    spread = np.minimum(np.arange(num_rows), num_experts - 1).astype(np.int32)  # one row each, the rest to the last
    for expert_N in (spread, spread[::-1], np.zeros(num_rows, np.int32), np.arange(num_rows, dtype=np.int32) % 4):
        check_grouping(expert_N, num_experts, block)


def test_grouping_hand_computed() -> None:
    # Sorted: expert 0 has rows 1, 4; expert 2 rows 0, 2, 3. Blocks of 2: 0 | 2 2; slots (5 + 3 * 1) // 2 * 2 = 8.
    grouping = dispatch.group(jnp.array([2, 0, 2, 2, 0]), 3, block=2)
    np.testing.assert_array_equal(grouping.sizes_E, [2, 0, 4])
    np.testing.assert_array_equal(grouping.slot_N, [2, 0, 3, 4, 1])
    np.testing.assert_array_equal(grouping.row_S, [1, 4, 0, 2, 3, 5, 5, 5])
    np.testing.assert_array_equal(grouping.expert_S[:6], [0, 0, 2, 2, 2, 2])
    np.testing.assert_array_equal(dispatch.group(jnp.array([2, 0, 2, 2, 0]), 3).slot_N, [2, 0, 3, 4, 1])


@pytest.mark.parametrize("block", BLOCKS)
def test_rows_go_to_slots_and_back(block: int, key: jax.Array) -> None:
    grouping = group(jnp.array([3, 1, 1, 3, 0, 3, 1]), 5, block)
    rows = 1 + jax.random.uniform(key, (7, 2))
    slots = np.asarray(dispatch.to_slots(rows, grouping))
    np.testing.assert_array_equal(dispatch.to_rows(jnp.asarray(slots), grouping), rows)
    empty = np.asarray(grouping.row_S) == 7
    np.testing.assert_array_equal(slots[empty], np.zeros((empty.sum(), 2)))
    assert np.count_nonzero(slots) == rows.size


CASES = {
    "uneven": ([1, 0, 1, 1, 2, 1, 0], 3),
    "experts without rows": ([4, 1, 1, 4, 1, 4, 4], 6),
    "one row": ([2], 4),
    "one expert": ([0] * 7, 1),
    "more experts than rows": ([7, 0, 9], 10),
    "all rows to one of several": ([1] * 7, 3),
    "more rows than a block of the largest": ([1] * 19 + [0] * 16 + [2], 3),
}


@functools.partial(jit, static_argnames=("block", "tile"))
def product_and_gradients(
    rows: jax.Array, kernels: jax.Array, expert_N: jax.Array, upstream: jax.Array, block: int, tile: int
) -> tuple[jax.Array, ...]:
    def product(rows: jax.Array, kernels: jax.Array) -> jax.Array:
        grouping = dispatch.group(expert_N, kernels.shape[0], block, tile)
        slots = dispatch.grouped_matmul(dispatch.to_slots(rows, grouping), kernels, grouping, interpret=True)
        return dispatch.to_rows(slots, grouping)

    y, vjp = jax.vjp(product, rows, kernels)
    return y, *vjp(upstream)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("block", "tile"), [*[(block, 0) for block in BLOCKS], (0, 8)])
def test_grouped_matmul_equals_row_by_row(case: str, block: int, tile: int) -> None:
    expert_N, num_experts = CASES[case]
    rng = np.random.default_rng(0)
    rows, upstream = rng.normal(size=(len(expert_N), 3)), rng.normal(size=(len(expert_N), 5))
    kernels = rng.normal(size=(num_experts, 3, 5))
    arguments = (
        jnp.asarray(rows, jnp.float32),
        jnp.asarray(kernels, jnp.float32),
        jnp.asarray(expert_N, jnp.int32),
        jnp.asarray(upstream, jnp.float32),
    )
    y, d_rows, d_kernels = (np.asarray(a) for a in product_and_gradients(*arguments, block, tile))
    expected = np.zeros_like(kernels)
    for n, expert in enumerate(expert_N):
        np.testing.assert_allclose(y[n], rows[n] @ kernels[expert], atol=1e-5)
        np.testing.assert_allclose(d_rows[n], kernels[expert] @ upstream[n], atol=1e-5)
        expected[expert] += np.outer(rows[n], upstream[n])
    np.testing.assert_allclose(d_kernels, expected, atol=2e-5)
    idle = sorted(set(range(num_experts)) - set(expert_N))
    assert not d_kernels[idle].any()


def test_default_block() -> None:
    # 320 rows of 8 experts are 40 each: 2^5 is nearest in log2 (5.32). 368 are 46 each: 2^6 (5.52).
    hand = {(320, 8): 32, (368, 8): 64, (256, 8): 32, (2048, 8): 128, (1 << 20, 2): 128, (5, 64): 16, (1, 1): 16}
    assert {case: dispatch.default_block(*case) for case in hand} == hand


@given(st.integers(1, 10**6), st.integers(1, 4096))
def test_default_block_is_a_power_of_two_from_16_to_128(num_rows: int, num_experts: int) -> None:
    assert dispatch.default_block(num_rows, num_experts) in (16, 32, 64, 128)
