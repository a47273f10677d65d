import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import long_but
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import dispatch

# Compiling costs more here than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
group = jit(dispatch.group, static_argnames=("num_experts", "block", "tile", "chunk"))
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


# Tiles and chunks


def check_chunks(expert_N: np.ndarray, num_experts: int, block: int, tile: int, chunk: int) -> None:
    grouping = jax.tree.map(np.asarray, group(expert_N, num_experts, block, tile, chunk))
    slot_N, row_S, expert_S, sizes_E = grouping.slot_N, grouping.row_S, grouping.expert_S, grouping.sizes_E
    num_rows, num_slots = len(expert_N), len(row_S)
    assert (grouping.block, grouping.tile, grouping.chunk) == (block, tile, chunk or num_experts)
    chunk = chunk or num_experts
    # No row overflows the slots, shares a slot or is lost; experts in order, and rows in order within each.
    used = sizes_E.sum()
    assert 0 <= slot_N.min() <= slot_N.max() < used <= num_slots
    np.testing.assert_array_equal(row_S[slot_N], np.arange(num_rows))
    assert (row_S == num_rows).sum() == num_slots - num_rows
    np.testing.assert_array_equal(np.argsort(slot_N), np.argsort(expert_N, kind="stable"))
    # Slots are of the experts that `sizes_E` says, and of the rows' experts.
    np.testing.assert_array_equal(expert_S[:used], np.repeat(np.arange(num_experts), sizes_E))
    np.testing.assert_array_equal(expert_S[used:], num_experts - 1)
    np.testing.assert_array_equal(expert_S[slot_N], expert_N)
    # Every block belongs to one expert, every tile to one chunk, and whole tiles fill the slots.
    assert num_slots % tile == used % tile == 0
    assert (sizes_E % block == 0).all()
    assert (expert_S.reshape(-1, block) == expert_S[::block, None]).all()
    chunk_S = expert_S // chunk
    assert (chunk_S.reshape(-1, tile) == chunk_S[::tile, None]).all()
    # No slot is wasted: a chunk without rows has none, another the blocks of its experts to the next tile.
    blocks = np.ceil(np.bincount(expert_N, minlength=num_experts) / block) * block
    for start in range(0, num_experts, chunk):
        own = slice(start, start + chunk)
        assert sizes_E[own].sum() == np.ceil(blocks[own].sum() / tile) * tile
        np.testing.assert_array_equal(sizes_E[own][:-1], blocks[own][:-1])


@given(assignments(), st.sampled_from([(1, 4), (2, 4), (4, 4), (2, 6)]), st.integers(0, 9))
@settings(max_examples=12, deadline=None)
def test_chunks_fill_whole_tiles(case: tuple[np.ndarray, int], heights: tuple[int, int], chunk: int) -> None:
    check_chunks(*case, *heights, min(chunk, case[1]))


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [1, 5, 12])
def test_worst_cases_of_chunks_fit(num_rows: int, chunk: int) -> None:
    # As many chunks as can have rows, each with one row more than fills its tiles.
    spread = np.arange(num_rows, dtype=np.int32) * max(chunk, 1) % 4
    for expert_N in (spread, np.sort(spread)[::-1], np.minimum(np.arange(num_rows), 3), np.zeros(num_rows, int)):
        check_chunks(expert_N.astype(np.int32), 4, 2, 6, chunk)


def test_chunks_hand_computed() -> None:
    # Experts 0 1 | 2 3 | 4, blocks of 2, tiles of 4. Expert 1 has rows 1, 3, 4: 4 slots, a tile. Expert 4 has rows 0
    # and 2: 2 slots, and 2 more to fill its tile. Slots: (5 + 5 * (2 - 1) + 3 * (4 - 2)) // 4 * 4 = 16.
    grouping = dispatch.group(jnp.array([4, 1, 4, 1, 1]), 5, block=2, tile=4, chunk=2)
    np.testing.assert_array_equal(grouping.sizes_E, [0, 4, 0, 0, 4])
    np.testing.assert_array_equal(grouping.slot_N, [4, 0, 5, 1, 2])
    np.testing.assert_array_equal(grouping.row_S, [1, 3, 4, 5, 0, 2] + [5] * 10)
    np.testing.assert_array_equal(grouping.expert_S, [1] * 4 + [4] * 12)
    # A tile is not filled by the rows of the next chunk: expert 0's row has one of its own, filled by expert 1.
    grouping = dispatch.group(jnp.array([0, 2]), 4, block=2, tile=4, chunk=2)
    np.testing.assert_array_equal(grouping.sizes_E, [2, 2, 2, 2])
    np.testing.assert_array_equal(grouping.slot_N, [0, 4])


# Rows and slots


@pytest.mark.parametrize("block", BLOCKS)
def test_rows_go_to_slots_and_back(block: int, key: jax.Array) -> None:
    grouping = group(jnp.array([3, 1, 1, 3, 0, 3, 1]), 5, block)
    rows = 1 + jax.random.uniform(key, (7, 2))
    slots = np.asarray(dispatch.to_slots(rows, grouping))
    row_S = np.asarray(grouping.row_S)
    held = row_S < 7
    np.testing.assert_array_equal(slots[held], np.asarray(rows)[row_S[held]])
    back, pull = jax.vjp(lambda slots: dispatch.to_rows(slots, grouping), jnp.asarray(slots))
    np.testing.assert_array_equal(back, rows)
    # A slot without a row holds any row's values, never what is not a number; none of them comes back, nor a gradient.
    assert (slots[~held, None] == np.asarray(rows)).all(axis=-1).any(axis=-1).all()
    (d_slots,) = pull(rows)
    np.testing.assert_array_equal(np.asarray(d_slots)[~held], np.zeros(((~held).sum(), 2)))
    assert np.count_nonzero(d_slots) == rows.size


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_copies_of_a_token_go_to_the_slots_of_its_experts(copies: int, key: jax.Array) -> None:
    expert_N = jnp.array([3, 1, 1, 3, 0, 3, 1, 2, 0, 4, 3, 0][: 4 * copies])
    grouping = group(expert_N, 5, 2, 4, 2)
    tokens = jax.random.normal(key, (4, 3))
    slots = dispatch.to_slots(tokens, grouping, copies)
    row_S = np.asarray(grouping.row_S)
    held = row_S < 4 * copies
    np.testing.assert_array_equal(np.asarray(slots)[held], np.asarray(tokens)[row_S[held] // copies])
    np.testing.assert_array_equal(dispatch.to_rows(slots, grouping), jnp.repeat(tokens, copies, axis=0))


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("heights", [(0, 0, 0), (4, 0, 0), (2, 4, 2)])
def test_gradients_of_moves_equal_those_of_indexing(heights: tuple[int, int, int], copies: int, key: jax.Array) -> None:
    grouping = group(jnp.array([3, 1, 1, 3, 0, 3, 1, 2, 0, 4, 3, 0][: 4 * copies]), 5, *heights)
    num_rows, num_slots = 4 * copies, grouping.row_S.shape[0]
    tokens, slots, d_slots = (jax.random.normal(key, (n, 3)) for n in (4, num_slots, num_slots))
    token_S = np.minimum(np.asarray(grouping.row_S) // copies, 3)
    holds = (np.asarray(grouping.row_S) < num_rows)[:, None].astype(np.float32)
    expected = jax.vjp(lambda x: x[token_S] * holds, tokens)[1](d_slots)[0]
    np.testing.assert_allclose(
        jax.vjp(lambda x: dispatch.to_slots(x, grouping, copies), tokens)[1](d_slots)[0], expected, atol=1e-6
    )
    expected = jax.vjp(lambda x: x[grouping.slot_N], slots)[1](d_slots[:num_rows])[0]
    moved = jax.vjp(lambda x: dispatch.to_rows(x, grouping), slots)[1](d_slots[:num_rows])[0]
    np.testing.assert_array_equal(moved, expected)


def test_gradients_of_copies_are_summed_in_float32() -> None:
    grouping = group(jnp.array([0, 1, 2, 3]), 4, 2)
    values = jnp.array([256, 1, 1, 1], jnp.bfloat16)  # steps of 2 at 256: rounded each time, nothing would be added
    d_slots = jnp.zeros((grouping.row_S.shape[0], 1), jnp.bfloat16).at[grouping.slot_N, 0].set(values)
    (d_tokens,) = jax.vjp(lambda x: dispatch.to_slots(x, grouping, 4), jnp.zeros((1, 1), jnp.bfloat16))[1](d_slots)
    assert d_tokens.dtype == jnp.bfloat16
    assert float(d_tokens[0, 0]) == 260  # 259, halves to even


def test_moves_and_their_gradients_scatter_nothing() -> None:
    grouping = group(jnp.array([3, 1, 1, 3, 0, 3]), 5, 2, 4, 2)

    def there_and_back(x: jax.Array) -> jax.Array:
        return (dispatch.to_rows(dispatch.to_slots(x, grouping, 2), grouping) ** 2).sum()

    text = str(jax.make_jaxpr(jax.value_and_grad(there_and_back))(jnp.ones((3, 2))))
    assert "scatter" not in text
    assert text.count("gather[") == 4
    # Plain indexing does, so the word is the right one to look for.
    assert "scatter" in str(jax.make_jaxpr(jax.grad(lambda x: (x[grouping.slot_N] ** 2).sum()))(jnp.ones((16, 2))))


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


@pytest.mark.parametrize("case", long_but(["uneven", "experts without rows", "more experts than rows"], CASES))
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
