import dataclasses
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import outliers
from bvit_jax.intervals import half_interval
from bvit_jax.opened import Opened
from bvit_jax.outliers import measures, outlier_table, turned
from bvit_jax.seen_routing import SeenRouting
from tests.conftest import make_model
from tests.test_expert_maps import SMALL, depth_of, opened_of
from tests.test_weight_tables import with_ffn

COLUMNS = ["layer", "where", "crest", "crest_interval", "kurtosis", "kurtosis_interval", "channels"]
# The rotation of an expert's inputs, and whether it turns back.
BEFORE = {"separate": ("up_theta", True), "tied": ("theta", True), "reference": ("phi", False)}


def seen_of(opened: Opened, x_MxBxTxD: np.ndarray, experts_MxBxTxK: np.ndarray) -> SeenRouting:
    """What routers saw and chose; with which probabilities is of no interest here."""
    gates = np.ones(experts_MxBxTxK.shape, np.float32)
    probs = np.zeros((*x_MxBxTxD.shape[:3], opened.model.num_experts), np.float32)
    layers = tuple(layer.index for layer in opened.mixtures)
    labels = np.zeros(x_MxBxTxD.shape[1], np.int32)
    x = x_MxBxTxD.astype(np.float32)
    return SeenRouting(layers, opened.model.grid, x, probs, gates, experts_MxBxTxK.astype(np.int32), labels)


def random_seen(opened: Opened, images: int = 2, tokens: int = 5) -> SeenRouting:
    rng, m = np.random.default_rng(1), opened.model
    shape = (len(opened.mixtures), images, tokens)
    experts = rng.permuted(np.broadcast_to(np.arange(m.num_experts), (*shape, m.num_experts)), axis=-1)
    return seen_of(opened, rng.normal(size=(*shape, m.d_model)), experts[..., : m.top_k])


def slow(x_NxD: np.ndarray) -> dict[str, float]:
    """The measures by their formulas, token by token and channel by channel."""
    crests, kurtoses = [], []
    for x in x_NxD.astype(np.float64):
        crests.append(max(abs(x)) / (sum(x**2) / len(x)) ** 0.5)
        mean = sum(x) / len(x)
        variance = sum((x - mean) ** 2) / len(x)
        kurtoses.append(sum((x - mean) ** 4) / len(x) / variance**2 - 3)
    rms = sorted((sum(channel**2) / len(channel)) ** 0.5 for channel in x_NxD.T.astype(np.float64))
    middle = (rms[(len(rms) - 1) // 2] + rms[len(rms) // 2]) / 2
    return {
        "crest": sum(crests) / len(crests),
        "kurtosis": sum(kurtoses) / len(kurtoses),
        "channels": rms[-1] / middle,
    }


def test_measures_by_hand():
    # One channel of 16 alone: crest sqrt(16). Mean 1/16, variance 15/256; the fourth moment is
    # (15^4 + 15) / 16^5 = 50640 / 16^5, over (15/256)^2 = 225 / 16^4: 50640 / 3600 = 14.0667. Each channel comes once.
    found = measures(5 * np.eye(16))
    assert found == pytest.approx({"crest": 4, "kurtosis": 50_640 / 3600 - 3, "channels": 1}, rel=1e-12)
    # All as large, of either sign: crest 1, and (x - m)^4 is s^4.
    assert measures(np.array([[3.0, -3, -3, 3]])) == pytest.approx({"crest": 1, "kurtosis": -2, "channels": 1})
    # Crests 3 / sqrt(11 / 3) and 3 / sqrt(14 / 3); root mean squares of the channels are 3, 1 and sqrt(2.5). Of three
    # numbers the kurtosis is -1.5 whatever they are.
    found = measures(np.array([[3.0, 1, 1], [3, -1, 2]]))
    crest = (3 / (11 / 3) ** 0.5 + 3 / (14 / 3) ** 0.5) / 2
    assert found == pytest.approx({"crest": crest, "kurtosis": -1.5, "channels": 3 / 2.5**0.5})


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(3, 9), st.integers(0, 2**31))
def test_measures_are_those_of_the_formulas(tokens, channels, seed):
    x = np.random.default_rng(seed).standard_t(3, (tokens, channels))
    expected = slow(x)
    assert measures(x) == pytest.approx(expected)
    # The size of a token is no matter, but to the channels.
    scaled = measures(x * np.arange(1, tokens + 1)[:, None])
    assert (scaled["crest"], scaled["kurtosis"]) == pytest.approx((expected["crest"], expected["kurtosis"]))
    assert measures(-2 * x) == pytest.approx(expected)


def test_tokens_of_zeros_are_left_out():
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    with_zeros = np.insert(x, [0, 2, 4], 0, axis=0)
    assert len(with_zeros) == 7
    assert measures(with_zeros) == measures(x)
    for nothing in (np.zeros((3, 6), np.float32), np.zeros((0, 6), np.float32)):
        found = measures(nothing)
        assert list(found) == ["crest", "kurtosis", "channels"]
        assert np.isnan(list(found.values())).all()


def test_tokens_whose_channels_are_all_the_same_have_no_kurtosis():
    x = np.array([[2.0, 2, 2, 2], [1, -1, 1, -1]], np.float32)
    assert measures(x) == pytest.approx({"crest": 1, "kurtosis": -2, "channels": 1})
    for alone in (x[:1], np.array([[3.0], [-5.0]])):
        found = measures(alone)
        assert (found["crest"], found["channels"]) == (1, 1)
        assert np.isnan(found["kurtosis"])


@pytest.mark.parametrize("order", ["descending", "ascending"])
@pytest.mark.parametrize("form", BEFORE)
def test_tokens_are_turned_as_the_layer_turns_them(form, order, monkeypatch):
    monkeypatch.setattr(outliers, "_ROWS", 4)  # ten tokens are four, four and two
    opened = opened_of(form=form, stride_order=order, num_layers=2, num_stages=5)
    seen, (name, inverse) = random_seen(opened), BEFORE[form]
    for index, layer in enumerate(opened.mixtures):
        x_NxD = seen.x_MxBxTxD[index].reshape(10, 12)
        experts_NxK = seen.experts_MxBxTxK[index].reshape(10, 2)
        found = turned(opened, layer, x_NxD, experts_NxK)
        assert (found.shape, found.dtype) == ((10, 2, 12), np.float32)
        angles_ExA = np.array(opened.ffn(layer)[f"{name}_angles"], np.float64)
        for n in range(10):
            for k in range(2):
                matrix = oracles.rotation_matrix(12, depth_of(12), order, angles_ExA[experts_NxK[n, k]])
                expected = (matrix.T if inverse else matrix) @ x_NxD[n]
                np.testing.assert_allclose(found[n, k], expected, rtol=0, atol=1e-5)


def test_a_single_channel_is_not_turned():
    opened = opened_of(d_model=1, num_heads=1)
    x_NxD, experts_NxK = np.array([[2.0], [-3.0]], np.float32), np.array([[0, 1], [2, 0]])
    found = turned(opened, opened.mixtures[0], x_NxD, experts_NxK)
    np.testing.assert_array_equal(found, [[[2.0], [2.0]], [[-3.0], [-3.0]]])


def test_the_table_measures_tokens_before_and_once_for_each_expert_after():
    opened = opened_of(form="tied", num_layers=3, moe_layers="0,2")
    seen = random_seen(opened)
    table = outlier_table(opened, seen)
    assert list(table.columns) == COLUMNS
    rows = table.to_dict("records")
    halves = [[row.pop(f"{name}_interval") for name in ("crest", "kurtosis")] for row in rows]
    wheres = [(layer, where) for layer in (0, 2) for where in ("before", "after")]
    assert [(row.pop("layer"), row.pop("where")) for row in rows] == wheres
    for index, layer in enumerate(opened.mixtures):
        x_NxD = seen.x_MxBxTxD[index].reshape(10, 12)
        assert rows[2 * index] == pytest.approx(slow(x_NxD), rel=1e-6)
        by_image = [slow(x_TxD) for x_TxD in seen.x_MxBxTxD[index]]
        expected = [half_interval([image[name] for image in by_image]) for name in ("crest", "kurtosis")]
        assert halves[2 * index] == pytest.approx(expected, rel=1e-5)
        after = []
        for x, experts in zip(x_NxD, seen.experts_MxBxTxK[index].reshape(10, 2), strict=True):
            for expert in experts:
                theta = np.array(opened.ffn(layer)["theta_angles"], np.float64)[expert]
                after.append(oracles.rotation_matrix(12, 3, "descending", theta).T @ x)
        assert rows[2 * index + 1] == pytest.approx(slow(np.array(after)), rel=1e-4)
    # Layers that are mixed up would show.
    assert abs(rows[0]["crest"] - rows[2]["crest"]) > 1e-3
    assert abs(rows[1]["crest"] - rows[3]["crest"]) > 1e-3


@pytest.mark.parametrize("form", BEFORE)
def test_an_eighth_of_a_turn_spreads_one_channel_over_two(form):
    opened = opened_of(form=form, num_stages=1)
    name = f"{BEFORE[form][0]}_angles"
    every = with_ffn(opened, **{name: np.full((3, 6), np.pi / 4)})
    one_hot = np.eye(12)[None, None]  # one image of twelve tokens
    experts = np.stack([np.arange(12) % 3, (np.arange(12) + 1) % 3], axis=-1)[None, None]
    before, after = outlier_table(every, seen_of(every, one_hot, experts)).to_dict("records")
    assert (before["crest"], after["crest"]) == pytest.approx((12**0.5, 6**0.5), rel=1e-6)
    # Expert 0 does not turn: of the 24 choices 8 are its own.
    some = with_ffn(opened, **{name: np.full((3, 6), np.pi / 4) * [[0], [1], [1]]})
    before, after = outlier_table(some, seen_of(some, one_hot, experts)).to_dict("records")
    assert after["crest"] == pytest.approx((8 * 12**0.5 + 16 * 6**0.5) / 24, rel=1e-6)
    # Expert 0 alone leaves all as it was.
    before, after = outlier_table(some, seen_of(some, one_hot, 0 * experts)).to_dict("records")
    assert (before.pop("where"), after.pop("where")) == ("before", "after")
    assert after == pytest.approx(before, rel=1e-6, nan_ok=True)  # one image has no interval


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (3, 3), (3, 1)])
def test_one_token_of_one_image(num_experts, top_k):
    opened = opened_of(num_experts=num_experts, top_k=top_k)
    seen = random_seen(opened, images=1, tokens=1)
    _, after = outlier_table(opened, seen).to_dict("records")
    theta = np.array(opened.ffn(opened.mixtures[0])["up_theta_angles"], np.float64)
    x, experts = seen.x_MxBxTxD[0, 0, 0], seen.experts_MxBxTxK[0, 0, 0]
    expected = slow(np.array([oracles.rotation_matrix(12, 3, "descending", theta[e]).T @ x for e in experts]))
    assert {name: after[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_models_without_rotations_have_no_rows():
    kinds: list[dict[str, Any]] = [{"family": family} for family in ("standard", "ternary", "low_rank")]
    dense = dataclasses.replace(opened_of(), model=make_model(**SMALL | {"family": "dense"}).deployed())
    for opened in (*(opened_of(**kind) for kind in kinds), dense):
        table = outlier_table(opened, random_seen(opened))
        assert len(table) == 0
        assert list(table.columns) == COLUMNS
