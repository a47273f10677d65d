import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax import diversity, expert_maps, expert_use, moe
from bvit_jax.diversity import Diversity, diversity_table, output_diversity, weight_diversity
from bvit_jax.opened import Opened
from bvit_jax.seen_routing import SeenRouting
from tests.conftest import make_model
from tests.test_expert_maps import SMALL, dense_maps, opened_of

KINDS: dict[str, dict[str, Any]] = {
    "standard": {"family": "standard"},
    "separate": {"form": "separate"},
    "reference": {"form": "reference"},
    "low_rank": {"family": "low_rank"},
}


def seen_of(opened: Opened, x_MxBxTxD: np.ndarray) -> SeenRouting:
    """What routers saw; how they chose is of no interest here."""
    e, k = opened.model.num_experts, opened.model.top_k
    probs, gates = (np.zeros((*x_MxBxTxD.shape[:3], size), np.float32) for size in (e, k))
    layers = tuple(layer.index for layer in opened.mixtures)
    labels = np.zeros(x_MxBxTxD.shape[1], np.int32)
    return SeenRouting(
        layers, opened.model.grid, x_MxBxTxD.astype(np.float32), probs, gates, gates.astype(np.int32), labels
    )


def random_seen(opened: Opened) -> SeenRouting:
    """Two images of five tokens."""
    return seen_of(opened, np.random.default_rng(1).normal(size=(len(opened.mixtures), 2, 5, opened.model.d_model)))


def with_ffn(opened: Opened, **changes: np.ndarray) -> Opened:
    """A model of one layer with some of its parameters replaced."""
    ffn = opened.params["segment_0"]["block_0"]["ffn"]
    ffn = ffn | {name: jnp.asarray(array, jnp.float32)[None] for name, array in changes.items()}
    return dataclasses.replace(opened, params={"segment_0": {"block_0": {"ffn": ffn}}})


def rearranged(opened: Opened, source: list[int]) -> Opened:
    """The same model with these experts in the place of its own."""
    e = opened.model.num_experts
    own = jax.tree.map(
        lambda leaf: leaf[:, np.array(source)] if leaf.ndim > 2 and leaf.shape[1] == e else leaf, opened.params
    )
    return dataclasses.replace(opened, params=own)


def outputs(opened: Opened, layer: Any, x_NxD: np.ndarray) -> np.ndarray:
    """What every expert gives for every token, float64 (N, E, D)."""
    apply = jax.jit(moe.expert_outputs, static_argnums=0)
    return np.array(apply(opened.model, opened.ffn(layer), jnp.asarray(x_NxD, jnp.float32)[None])[0], np.float64)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a.ravel() @ b.ravel() / size) if size else 0.0


def slow(experts: list[list[np.ndarray]]) -> np.ndarray:
    """1 - cosine pair by pair, mean over the vectors that each expert has."""
    values = np.zeros((len(experts), len(experts)))
    for i, of_one in enumerate(experts):
        for j, of_other in enumerate(experts):
            if i != j:
                values[i, j] = 1 - np.mean([cosine(a, b) for a, b in zip(of_one, of_other, strict=True)])
    return values


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest) -> Opened:
    """Three layers, of which the last two hold a mixture."""
    return opened_of(num_layers=3, moe_layers="1,2", **KINDS[request.param])


def test_diversity_by_weights_is_that_of_the_matrices_layer_by_layer(made):
    found = weight_diversity(made)
    maps = expert_maps.names(made.model)
    assert [(one.layer, one.of) for one in found] == [(index, f"{name} weights") for index in (1, 2) for name in maps]
    expected = [matrices for layer in made.mixtures for matrices in dense_maps(made.model, made.ffn(layer)).values()]
    for one, matrices in zip(found, expected, strict=True):
        assert one.experts_n.tolist() == [0, 1, 2]
        assert one.values_nxn.dtype == np.float64
        np.testing.assert_allclose(one.values_nxn, slow([[matrix] for matrix in matrices]), rtol=0, atol=1e-6)
        assert (np.diag(one.values_nxn) == 0).all()
    # Layers that are mixed up would show.
    assert np.abs(found[0].values_nxn - found[len(maps)].values_nxn).max() > 1e-3


def test_diversity_by_outputs_is_that_over_tokens_layer_by_layer(made):
    seen = random_seen(made)
    found = output_diversity(made, seen)
    assert [(one.layer, one.of) for one in found] == [(1, "outputs"), (2, "outputs")]
    for one, layer, x_BxTxD in zip(found, made.mixtures, seen.x_MxBxTxD, strict=True):
        y_NxExD = outputs(made, layer, x_BxTxD.reshape(10, 12))
        np.testing.assert_allclose(one.values_nxn, slow(list(y_NxExD.swapaxes(0, 1))), rtol=0, atol=1e-6)
        assert (np.diag(one.values_nxn) == 0).all()
        assert one.pairs.mean() == pytest.approx(1 - float(expert_use.mean_cosine(jnp.asarray(y_NxExD))), abs=1e-5)
    assert np.abs(found[0].values_nxn - found[1].values_nxn).max() > 1e-3


def test_experts_that_are_alike_have_diversity_0(made):
    alike = rearranged(made, [1, 1, 1])
    for one in (*weight_diversity(alike), *output_diversity(alike, random_seen(alike))):
        np.testing.assert_allclose(one.values_nxn, np.zeros((3, 3)), rtol=0, atol=1e-6)


def test_values_lie_in_range_and_move_with_the_experts(made):
    order = np.array([2, 0, 1])
    moved, seen = rearranged(made, order.tolist()), random_seen(made)
    before = (*weight_diversity(made), *output_diversity(made, seen))
    after = (*weight_diversity(moved), *output_diversity(moved, seen))
    for one, other in zip(before, after, strict=True):
        assert 0 <= one.values_nxn.min() <= one.values_nxn.max() <= 2
        np.testing.assert_allclose(one.values_nxn, one.values_nxn.T, rtol=0, atol=1e-12)
        np.testing.assert_allclose(other.values_nxn, one.values_nxn[np.ix_(order, order)], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def stored() -> Opened:
    return opened_of(family="standard", num_experts=5, d_model=2, d_ff=3, num_heads=1, num_stages=1)


BETWEEN = 1 - 0.5**0.5  # at 45 degrees
BY_HAND = [
    [0, 0, 1, 2, BETWEEN],
    [0, 0, 1, 2, BETWEEN],
    [1, 1, 0, 1, BETWEEN],
    [2, 2, 1, 0, 2 - BETWEEN],
    [BETWEEN, BETWEEN, BETWEEN, 2 - BETWEEN, 0],
]
"""Diversity of five experts: one, its multiple, one at right angles to it, its opposite, one half way to the third."""


def test_scaled_orthogonal_and_opposite_experts_by_hand(stored):
    # A, three times A, at right angles to A, A turned around, and half way between the first and the third.
    first, other = np.eye(3)[None, 0, :] * [[1.0], [0.0]], np.eye(3)[None, 1, :] * [[0.0], [2.0]]
    up = np.array([first, 3 * first, other, -first, first + other / 2])
    down = np.array([matrix.T for matrix in up])
    by_up, by_down = weight_diversity(with_ffn(stored, up_kernel=up, down_kernel=down))
    np.testing.assert_allclose(by_up.values_nxn, BY_HAND, rtol=0, atol=1e-6)
    np.testing.assert_allclose(by_down.values_nxn, BY_HAND, rtol=0, atol=1e-6)
    pairs = [0, 1, 2, BETWEEN, 1, 2, BETWEEN, 1, BETWEEN, 2 - BETWEEN]
    np.testing.assert_allclose(by_up.pairs, pairs, rtol=0, atol=1e-6)


def test_outputs_that_are_scaled_orthogonal_and_opposite_by_hand(stored):
    # Hidden channels are the same for all; each expert's second matrix makes of them one output channel, or both.
    down = np.array([[1.0, 0], [4, 0], [0, 1], [-2, 0], [1, 1]])[:, None, :] * np.ones((1, 3, 1))
    same = {"up_kernel": np.ones((5, 2, 3)), "up_bias": np.ones((5, 3)), "down_bias": np.zeros((5, 2))}
    changed = with_ffn(stored, **same, down_kernel=down)
    [found] = output_diversity(changed, seen_of(stored, np.array([[[[0.5, 0.25], [1.0, 2.0]]]])))
    np.testing.assert_allclose(found.values_nxn, BY_HAND, rtol=0, atol=1e-6)


def test_an_expert_that_does_nothing_has_nothing_to_do_with_the_others(stored):
    none = {name: np.array(leaf[0]) for name, leaf in stored.params["segment_0"]["block_0"]["ffn"].items()}
    for leaf in none.values():
        leaf[2] = 0
    changed = with_ffn(stored, **none)
    for one in (*weight_diversity(changed), *output_diversity(changed, random_seen(changed))):
        np.testing.assert_array_equal(one.values_nxn[2], [1, 1, 0, 1, 1])
        np.testing.assert_array_equal(one.values_nxn[:, 2], [1, 1, 0, 1, 1])
        assert np.isfinite(one.values_nxn).all()


def test_tokens_that_experts_make_nothing_of_count_with_cosine_0(stored):
    # Without biases nothing comes of a token of zeros: its cosines are 0, as `expert_use.mean_cosine` counts them.
    changed = with_ffn(stored, up_bias=np.zeros((5, 3)), down_bias=np.zeros((5, 2)))
    x_BxTxD = random_seen(stored).x_MxBxTxD[0]
    x_BxTxD[0, 1:4] = 0
    [found] = output_diversity(changed, seen_of(changed, x_BxTxD[None]))
    y_NxExD = outputs(changed, changed.mixtures[0], x_BxTxD.reshape(10, 2))
    np.testing.assert_allclose(found.values_nxn, slow(list(y_NxExD.swapaxes(0, 1))), rtol=0, atol=1e-6)
    assert found.pairs.mean() == pytest.approx(1 - float(expert_use.mean_cosine(jnp.asarray(y_NxExD))), abs=1e-5)


@pytest.mark.parametrize("numbers", [1, 3 * 20 * 5])
def test_matrices_made_in_several_parts_give_the_same(monkeypatch, numbers):
    tied = opened_of(form="tied")
    [whole] = weight_diversity(tied)
    parts, true = [], expert_maps.rows

    def rows(*arguments: Any, count: int) -> jax.Array:
        parts.append((arguments[-1], count))
        return true(*arguments, count=count)

    monkeypatch.setattr(diversity, "_NUMBERS", numbers)
    monkeypatch.setattr(expert_maps, "rows", rows)
    [found] = weight_diversity(tied)
    # Of 12 rows of 20 numbers, for 3 experts: one at a time at the least, or five, and two in the last part.
    assert parts == ([(row, 1) for row in range(12)] if numbers == 1 else [(0, 5), (5, 5), (10, 5)])
    np.testing.assert_allclose(found.values_nxn, whole.values_nxn, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("most", "compared"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (5, range(5)), (9, range(5))]
)
def test_of_many_experts_some_are_compared_spread_evenly(stored, most, compared):
    compared, seen = list(compared), random_seen(stored)
    every = (*weight_diversity(stored), *output_diversity(stored, seen))
    some = (*weight_diversity(stored, most), *output_diversity(stored, seen, most))
    for one, of_all in zip(some, every, strict=True):
        assert one.experts_n.tolist() == compared
        np.testing.assert_allclose(one.values_nxn, of_all.values_nxn[np.ix_(compared, compared)], rtol=0, atol=1e-6)


def test_by_default_64_experts_are_compared():
    many = opened_of(family="standard", num_experts=96, d_model=2, d_ff=1, num_heads=1, num_stages=1)
    found = weight_diversity(many)[0]
    # 96 / 64 = 1.5 apart.
    assert found.experts_n.tolist() == [expert for expert in range(96) if expert % 3 != 2]
    assert found.values_nxn.shape == (64, 64)


@pytest.mark.parametrize(("pairs", "tokens"), [(1, 1), (15, 3), (19, 3), (1000, 10)])
def test_outputs_are_compared_over_some_tokens(stored, monkeypatch, pairs, tokens):
    # Five experts: 15 rows are three tokens with all of them, and one token is the least.
    monkeypatch.setattr(expert_use, "PAIRS", pairs)
    seen = random_seen(stored)
    [found], [again] = output_diversity(stored, seen), output_diversity(stored, seen)
    np.testing.assert_array_equal(found.values_nxn, again.values_nxn)
    x_NxD = seen.x_MxBxTxD[0].reshape(10, 2)
    choices = itertools.combinations(range(10), tokens)
    of_choices = (slow(list(outputs(stored, stored.mixtures[0], x_NxD[list(each)]).swapaxes(0, 1))) for each in choices)
    assert any(np.allclose(found.values_nxn, expected, rtol=0, atol=1e-6) for expected in of_choices)


def test_few_tokens_of_many_images_are_of_all_places(monkeypatch):
    # Of 64 images of 17 tokens 64 are taken, with two experts: one at the same place in each would be no sample.
    monkeypatch.setattr(expert_use, "PAIRS", 128)
    two = opened_of(family="standard", num_experts=2, top_k=1, d_model=2, d_ff=1, num_heads=1, num_stages=1)
    seen = seen_of(two, np.random.default_rng(1).normal(size=(1, 64, 17, 2)))
    taken = []
    monkeypatch.setattr(
        diversity, "_outputs", lambda model, ffn, x: taken.append(np.asarray(x[0])) or x[:, :, None].repeat(2, 2)
    )
    output_diversity(two, seen)
    places = [np.flatnonzero((seen.x_MxBxTxD[0] == x_D).all(axis=-1).any(axis=0)) for x_D in taken[0]]
    assert len(places) == 64
    assert len(set(np.concatenate(places).tolist())) > 10


def test_a_single_expert_differs_from_none():
    one = opened_of(family="standard", num_experts=1, d_model=2, d_ff=3, num_heads=1, num_stages=1)
    found = [*weight_diversity(one), *output_diversity(one, random_seen(one))]
    assert [part.of for part in found] == ["up weights", "down weights", "outputs"]
    for part in found:
        np.testing.assert_array_equal(part.values_nxn, [[0.0]])
        assert part.pairs.shape == (0,)
    table = diversity_table(found)
    assert len(table) == 0
    assert list(table.columns) == ["layer", "of", "experts", "mean", "least", "most"]


def test_a_model_without_mixtures_has_nothing_to_compare():
    dense = dataclasses.replace(opened_of(), model=make_model(**SMALL | {"family": "dense"}).deployed())
    assert weight_diversity(dense) == []
    assert output_diversity(dense, seen_of(dense, np.zeros((0, 2, 5, 12)))) == []


def test_the_table_sums_up_each_pair_once():
    values = np.array([[0.0, 0.25, 0.5], [0.25, 0.0, 1.5], [0.5, 1.5, 0.0]])
    found = [
        Diversity(3, "outputs", np.arange(3), values),
        Diversity(4, "up weights", np.array([5]), np.zeros((1, 1))),
        Diversity(7, "up weights", np.array([0, 4]), np.array([[0.0, 0.125], [0.125, 0.0]])),
    ]
    # (0.25 + 0.5 + 1.5) / 3 = 0.75; a layer with a single expert has no pair, and no row.
    assert diversity_table(found).to_dict("records") == [
        {"layer": 3, "of": "outputs", "experts": 3, "mean": 0.75, "least": 0.25, "most": 1.5},
        {"layer": 7, "of": "up weights", "experts": 2, "mean": 0.125, "least": 0.125, "most": 0.125},
    ]
    assert found[0].pairs.tolist() == [0.25, 0.5, 1.5]
    assert len(diversity_table([])) == 0
