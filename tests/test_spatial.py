import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import losses, spatial
from bvit_jax.seen_routing import SeenRouting
from tests.test_seen_routing import made_of, routings

COLUMNS = [
    *("layer", "direction", "pairs", "agreement", "shuffled", "excess", "excess_interval", "kappa"),
    *("distance", "distance_shuffled"),
]


def by_map(map_hxw: np.ndarray, images: int = 1) -> SeenRouting:
    """One layer that sends each patch surely to one expert, alike in all images; class tokens go to the last."""
    probs_hxwxE = np.eye(map_hxw.max() + 1)[map_hxw]
    experts = probs_hxwxE.shape[-1]
    probs_TxE = np.concatenate([np.eye(experts)[-1:], probs_hxwxE.reshape(-1, experts)])
    return made_of(np.tile(probs_TxE, (1, images, 1, 1)), map_hxw.shape)


@pytest.mark.parametrize("grid", [(2, 2), (3, 4), (5, 2)])
def test_routing_by_column_agrees_down_the_columns(grid: tuple[int, int]) -> None:
    rows, columns = grid
    table = spatial.agreement_table(by_map(np.tile(np.arange(columns), (rows, 1)), images=2))
    across, down, pairs = rows * (columns - 1), (rows - 1) * columns, (rows * columns) * (rows * columns - 1)
    assert table["direction"].tolist() == ["across", "down", "both"]
    assert table["pairs"].tolist() == [across, down, across + down]
    np.testing.assert_allclose(table["agreement"], [0, 1, down / (across + down)])
    # Each of the columns has rows x (rows - 1) ordered pairs that agree.
    chance = columns * rows * (rows - 1) / pairs
    np.testing.assert_allclose(table["shuffled"], chance)
    np.testing.assert_allclose(table["kappa"].iloc[:2], [-chance / (1 - chance), 1])
    # Sure routers that differ are sqrt(2) apart.
    np.testing.assert_allclose(table["distance"], [2, 0, 2 * across / (across + down)])
    np.testing.assert_allclose(table["distance_shuffled"], 2 * (1 - chance))


def test_routing_by_row_agrees_across_the_rows() -> None:
    table = spatial.agreement_table(by_map(np.repeat([[0], [1], [2]], 4, axis=1)))
    np.testing.assert_array_equal(table["agreement"].iloc[:2], [1, 0])
    np.testing.assert_array_equal(table["distance"].iloc[:2], [0, 2])


@pytest.mark.parametrize(("experts", "top_k"), [(3, 1), (3, 2), (3, 3), (1, 1)])
def test_where_all_patches_are_alike_shuffled_ones_agree_too(experts: int, top_k: int) -> None:
    probs = np.arange(experts, 0, -1) / np.arange(experts, 0, -1).sum()
    table = spatial.agreement_table(made_of(np.tile(probs, (2, 3, 7, 1)), (2, 3), top_k))
    assert len(table) == 2 * 3
    np.testing.assert_array_equal(table[["agreement", "shuffled"]], 1)
    np.testing.assert_array_equal(table[["excess", "excess_interval"]], 0)
    np.testing.assert_allclose(table[["distance", "distance_shuffled"]], 0, atol=1e-12)
    assert table["kappa"].isna().all()


def test_all_experts_for_every_token_agree_whatever_the_probabilities() -> None:
    probs = np.random.default_rng(0).dirichlet(np.ones(3), (1, 2, 5))
    table = spatial.agreement_table(made_of(probs, (2, 2), top_k=3))
    np.testing.assert_array_equal(table[["agreement", "shuffled"]], 1)
    assert table["kappa"].isna().all()
    assert (table["distance"] > 0).all()


def test_two_by_two_patches_by_hand() -> None:
    # Two of three experts a patch. The first image: {0, 1} {0, 1} over {0, 2} {1, 2}; the second: {0, 1} everywhere.
    half = {"01": [1 / 2, 1 / 2, 0], "02": [1 / 2, 0, 1 / 2], "12": [0, 1 / 2, 1 / 2]}
    names = [["12", "01", "01", "02", "12"], ["02", "01", "01", "01", "01"]]  # class tokens first
    seen = made_of([[[half[name] for name in image] for image in names]], (2, 2), top_k=2, layers=(5,))
    table = spatial.agreement_table(seen)
    assert list(table) == COLUMNS
    assert table["layer"].tolist() == [5] * 3
    assert table["direction"].tolist() == ["across", "down", "both"]
    assert table["pairs"].tolist() == [2, 2, 4]
    # First image: across 2/2 and 1/2 in common, down 1/2 and 1/2. Second: all.
    np.testing.assert_allclose(table["agreement"], [(3 / 4 + 1) / 2, (1 / 2 + 1) / 2, (5 / 8 + 1) / 2])
    # First image: 3, 3 and 2 patches have the experts: (3 x 2 + 3 x 2 + 2 x 1) / (4 x 3 x 2) = 7/12. Second: 1.
    np.testing.assert_allclose(table["shuffled"], (7 / 12 + 1) / 2)
    # First image: 9/12 - 7/12, 6/12 - 7/12, 15/24 - 14/24. Second: 0.
    np.testing.assert_allclose(table["excess"], [1 / 12, -1 / 24, 1 / 48])
    # Of two values d and 0 the deviation over sqrt(2) is |d| / 2; t(0.975, 1) = 12.7062.
    np.testing.assert_allclose(table["excess_interval"], 12.7062 * np.array([1 / 12, 1 / 24, 1 / 48]), rtol=1e-5)
    # What chance leaves over: 1 - 19/24 = 5/24.
    np.testing.assert_allclose(table["kappa"], [2 / 5, -1 / 5, 1 / 10])
    # Patches with one expert in common are 1/4 + 1/4 apart: 1 of 2 pairs across, 2 of 2 down, 5 of all 6.
    np.testing.assert_allclose(table["distance"], [1 / 4 / 2, 1 / 2 / 2, 3 / 8 / 2])
    np.testing.assert_allclose(table["distance_shuffled"], 5 / 12 / 2)


def test_the_class_token_is_left_out() -> None:
    seen = made_of(np.random.default_rng(2).dirichlet(np.ones(4), (2, 3, 7)), (3, 2), top_k=2)
    moved_probs, moved_experts = seen.probs_MxBxTxE.copy(), seen.experts_MxBxTxK.copy()
    moved_probs[:, :, 0] = moved_probs[:, :, 0, ::-1]
    moved_experts[:, :, 0] = 3 - moved_experts[:, :, 0]
    moved = dataclasses.replace(seen, probs_MxBxTxE=moved_probs, experts_MxBxTxK=moved_experts)
    assert spatial.agreement_table(moved).equals(spatial.agreement_table(seen))


def test_one_image_has_no_interval() -> None:
    table = spatial.agreement_table(made_of(np.random.default_rng(0).dirichlet(np.ones(3), (1, 1, 5)), (2, 2)))
    assert table["excess_interval"].isna().all()
    assert table.drop(columns=["excess_interval", "kappa"]).notna().all(axis=None)


@pytest.mark.parametrize(("grid", "direction"), [((1, 3), "across"), ((3, 1), "down")])
def test_a_direction_without_neighbours_has_no_row(grid: tuple[int, int], direction: str) -> None:
    table = spatial.agreement_table(by_map(np.array([0, 0, 1]).reshape(grid)))
    assert table["direction"].tolist() == [direction, "both"]
    assert table["pairs"].tolist() == [2, 2]
    np.testing.assert_array_equal(table["agreement"], 1 / 2)
    np.testing.assert_allclose(table["shuffled"], 2 * 1 / (3 * 2))


def test_a_single_patch_has_no_neighbours_at_all() -> None:
    table = spatial.agreement_table(made_of(np.full((2, 3, 2, 2), 0.5), (1, 1)))
    assert (len(table), list(table)) == (0, COLUMNS)


def pairs_of(grid: tuple[int, int]) -> dict[str, list[tuple[int, int]]]:
    """Neighbours, patch by patch."""
    rows, columns = grid
    places = list(itertools.product(range(rows), range(columns)))
    across = [(r * columns + c, r * columns + c + 1) for r, c in places if c + 1 < columns]
    down = [(r * columns + c, (r + 1) * columns + c) for r, c in places if r + 1 < rows]
    return {"across": across, "down": down, "both": across + down}


def slow_agreement(experts_PxK: np.ndarray, pairs: list[tuple[int, int]]) -> float:
    top_k = experts_PxK.shape[-1]
    return float(np.mean([len(set(experts_PxK[a]) & set(experts_PxK[b])) / top_k for a, b in pairs]))


def slow_distance(probs_PxE: np.ndarray, pairs: list[tuple[int, int]]) -> float:
    return float(np.mean([((probs_PxE[a] - probs_PxE[b]) ** 2).sum() for a, b in pairs]))


@given(routings())
@settings(max_examples=25, deadline=None)
def test_the_table_equals_one_made_pair_by_pair(seen: SeenRouting) -> None:
    rows = spatial.agreement_table(seen).to_dict("records")
    patches = seen.grid[0] * seen.grid[1]
    anywhere = list(itertools.permutations(range(patches), 2))
    expected = [
        (index, layer, direction, pairs)
        for index, layer in enumerate(seen.layers)
        for direction, pairs in pairs_of(seen.grid).items()
        if pairs
    ]
    for row, (index, layer, direction, pairs) in zip(rows, expected, strict=True):
        experts, probs = seen.experts_MxBxTxK[index, :, 1:], seen.probs_MxBxTxE[index, :, 1:].astype(np.float64)
        agreement = np.array([slow_agreement(image, pairs) for image in experts])
        shuffled = np.array([slow_agreement(image, anywhere) for image in experts])
        assert (row["layer"], row["direction"], row["pairs"]) == (layer, direction, len(pairs))
        values = {
            "agreement": agreement.mean(),
            "shuffled": shuffled.mean(),
            "excess": (agreement - shuffled).mean(),
            "distance": np.mean([slow_distance(image, pairs) for image in probs]),
            "distance_shuffled": np.mean([slow_distance(image, anywhere) for image in probs]),
        }
        for name, value in values.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
        if shuffled.mean() < 1 - 1e-9:
            np.testing.assert_allclose(row["kappa"], values["excess"] / (1 - values["shuffled"]), atol=1e-9)
        else:
            assert math.isnan(row["kappa"])


@given(st.integers(1, 3), st.integers(2, 9), st.integers(1, 6), st.data())
@settings(max_examples=25, deadline=None)
def test_what_is_expected_is_the_mean_over_all_pairs(images: int, patches: int, experts: int, data: st.DataObject):
    top_k, rng = data.draw(st.integers(1, experts)), np.random.default_rng(data.draw(st.integers(0, 2**16)))
    chosen = np.array([[rng.permutation(experts)[:top_k] for _ in range(patches)] for _ in range(images)])
    probs = rng.normal(size=(images, patches, experts))
    anywhere = list(itertools.permutations(range(patches), 2))
    agreement, distance = spatial.expected_agreement(chosen, experts), spatial.expected_distance(probs)
    assert agreement.shape == distance.shape == (images,)
    assert agreement.dtype == distance.dtype == np.float64
    np.testing.assert_allclose(agreement, [slow_agreement(image, anywhere) for image in chosen], rtol=1e-9)
    np.testing.assert_allclose(distance, [slow_distance(image, anywhere) for image in probs], rtol=1e-9)


def test_what_is_expected_is_what_shuffled_patches_do() -> None:
    rng, grid, shuffles = np.random.default_rng(4), (3, 3), 600
    # Two experts that most patches want, so that chance alone agrees often.
    probs = rng.dirichlet([4, 3, 1, 0.5], 9)
    experts = np.argsort(-probs, axis=-1)[:, :2]
    pairs = pairs_of(grid)["both"]
    agreement, distance = np.empty(shuffles), np.empty(shuffles)
    for shuffle in range(shuffles):
        order = rng.permutation(9)
        agreement[shuffle] = slow_agreement(experts[order], pairs)
        distance[shuffle] = slow_distance(probs[order], pairs)
    for drawn, expected in (
        (agreement, spatial.expected_agreement(experts[None], 4)),
        (distance, spatial.expected_distance(probs[None])),
    ):
        error = drawn.std(ddof=1) / math.sqrt(shuffles)
        assert 0 < error < 0.03 * expected[0]
        assert abs(drawn.mean() - expected[0]) < 3 * error


@pytest.mark.parametrize("grid", [(2, 2), (2, 5), (1, 4), (4, 1)])
def test_the_distance_of_neighbours_is_the_smoothness_loss(grid: tuple[int, int]) -> None:
    probs = np.random.default_rng(1).dirichlet(np.ones(5), (3, 4, grid[0] * grid[1] + 1))
    seen = made_of(probs, grid, top_k=2)
    table = spatial.agreement_table(seen)
    both = table[table["direction"] == "both"]["distance"]
    expected = [losses.spatial_smoothness(p[:, 1:], grid, np.ones(4, np.float32)) for p in seen.probs_MxBxTxE]
    np.testing.assert_allclose(both, np.array(expected), rtol=1e-5)
