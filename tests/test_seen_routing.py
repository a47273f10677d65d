import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import opened, routing, seen_routing, vit
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError
from bvit_jax.opened import Images, Opened
from bvit_jax.seen_routing import SeenRouting
from tests.conftest import make_config
from tests.test_expert_use import random_params

apply = jax.jit(vit.apply, static_argnums=0)
TWO = {"num_layers": 2, "patch_size": 4, "d_model": 8, "d_ff": 16, "num_heads": 2}
"""Two layers, in one segment where both hold a mixture, and four patches."""
MODELS: dict[str, dict[str, Any]] = {
    # A pattern of two layers that is repeated.
    "standard": TWO | {"family": "standard", "num_layers": 4, "moe_layers": "second"},
    "ternary": TWO | {"family": "ternary"},
    "butterfly": TWO | {"angle_bits": 8, "router_precision": "bfloat16"},
    "reference, one expert, one patch": TWO | {"form": "reference", "num_experts": 1, "top_k": 1, "patch_size": 8},
    # Three segments, of which the middle one is dense.
    "low_rank, all experts": TWO
    | {"family": "low_rank", "rank": 2, "num_experts": 3, "top_k": 3, "num_layers": 3, "moe_layers": "0,2"},
}
MIXTURES = {"standard": (1, 3), "low_rank, all experts": (0, 2)}
"""Layers that hold one; of other models both."""


def config_of(**changes: Any) -> Config:
    return make_config("butterfly,4", **{f"model__{name}": value for name, value in changes.items()})


def opened_of(config: Config, params: Any) -> Opened:
    model = dataclasses.replace(config.model.deployed(), compute_dtype="float32")
    return Opened(Path("run"), config, None, model, opened.as_used(params, config.model))


def sharp(params: Any) -> Any:
    """Routers that are far surer than those drawn at random."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: 8 * leaf if "router" in str(path) else leaf, params)


def random_images(count: int, size: int = 8) -> Images:
    rng = np.random.default_rng(3)
    return Images(rng.integers(0, 256, (count, size, size, 1), np.uint8), rng.integers(0, 10, count))


@dataclasses.dataclass(frozen=True)
class Routed:
    """A model with parameters far from their initial values, and how it routes some images."""

    opened: Opened
    images: Images
    report: routing.RouterReport
    seen: SeenRouting


@functools.cache
def routed(kind: str) -> Routed:
    config, images = config_of(**MODELS[kind]), random_images(1 if "one" in kind else 6)
    params = sharp(random_params(config.model))
    model = opened_of(config, params)
    seen = seen_routing.route(model, images)
    _, report = apply(config.model, params, images.pixels)  # as it is trained, rounding as it goes
    return Routed(model, images, jax.tree.map(np.asarray, report), seen)


def made_of(
    probs_MxBxTxE: Any,
    grid: tuple[int, int],
    top_k: int = 1,
    labels_B: Any = None,
    layers: tuple[int, ...] | None = None,
) -> SeenRouting:
    """What was seen of a model that routes with these probabilities."""
    probs = np.array(probs_MxBxTxE, np.float32)
    experts = np.argsort(-probs, axis=-1, kind="stable")[..., :top_k].astype(np.int32)
    selected = np.take_along_axis(probs, experts, axis=-1)
    return SeenRouting(
        layers=layers or tuple(range(len(probs))),
        grid=grid,
        x_MxBxTxD=np.zeros((*probs.shape[:3], 1), np.float32),
        probs_MxBxTxE=probs,
        gates_MxBxTxK=selected if top_k == 1 else selected / selected.sum(axis=-1, keepdims=True),
        experts_MxBxTxK=experts,
        labels_B=np.zeros(probs.shape[1], np.int64) if labels_B is None else np.array(labels_B),
    )


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_seen_is_what_the_report_of_the_model_says(kind: str) -> None:
    made = routed(kind)
    seen, report = made.seen, made.report
    assert seen.layers == MIXTURES.get(kind, (0, 1))
    assert report.entropy.shape == (len(seen.layers),)
    for index in range(len(seen.layers)):
        counts_E = np.bincount(seen.experts_MxBxTxK[index].reshape(-1), minlength=seen.num_experts)
        np.testing.assert_array_equal(counts_E, report.assignments_E[index])
        probs = seen.probs_MxBxTxE[index].astype(np.float64)
        entropy = oracles.entropy(probs, np.ones(len(probs)))
        smoothness = oracles.spatial_smoothness(probs[:, 1:], seen.grid, np.ones(len(probs)))
        np.testing.assert_allclose(entropy, report.entropy[index], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(smoothness, report.smoothness[index], rtol=1e-4, atol=1e-6)
    table = seen_routing.layer_table(seen)
    np.testing.assert_allclose(table["entropy"], report.entropy, rtol=1e-4, atol=1e-6)
    shares = seen_routing.load_table(seen)["share"].to_numpy().reshape(len(seen.layers), -1)
    np.testing.assert_allclose(shares, report.assignments_E / report.assignments_E.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("kind", MODELS)
def test_each_router_routes_what_it_was_given(kind: str) -> None:
    made = routed(kind)
    seen = made.seen
    for index, layer in enumerate(made.opened.mixtures):
        kernel_DxE = oracles.float64(made.opened.ffn(layer))["router"]["kernel"]
        for image, token in np.ndindex(seen.x_MxBxTxD.shape[1:3]):
            logits_E = seen.x_MxBxTxD[index, image, token].astype(np.float64) @ kernel_DxE
            experts, gates = oracles.route(logits_E, seen.top_k)
            place = index, image, token
            np.testing.assert_array_equal(seen.experts_MxBxTxK[place], experts)
            np.testing.assert_allclose(seen.gates_MxBxTxK[place], gates, rtol=1e-4)
            np.testing.assert_allclose(seen.probs_MxBxTxE[place], oracles.softmax(logits_E), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", MODELS)
def test_shapes_and_dtypes(kind: str) -> None:
    made = routed(kind)
    seen, model = made.seen, made.opened.model
    rows, columns = model.grid
    shape = len(seen.layers), len(made.images), rows * columns + 1
    assert seen.grid == model.grid
    assert (seen.num_experts, seen.top_k) == (model.num_experts, model.top_k)
    for leaf, last, dtype in (
        (seen.x_MxBxTxD, model.d_model, np.float32),
        (seen.probs_MxBxTxE, model.num_experts, np.float32),
        (seen.gates_MxBxTxK, model.top_k, np.float32),
        (seen.experts_MxBxTxK, model.top_k, np.int32),
    ):
        assert (leaf.shape, leaf.dtype) == ((*shape, last), dtype)
    assert (seen.maps().shape, seen.maps().dtype) == ((*shape[:2], rows, columns), np.int32)
    np.testing.assert_array_equal(seen.labels_B, made.images.labels)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if "one expert" not in kind])
def test_no_two_layers_route_alike(kind: str) -> None:
    # Or the tests above would not tell of the order of the layers.
    first, second = routed(kind).report.entropy
    assert abs(first - second) > 0.01 * first


def test_how_many_images_go_at_a_time_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    made = routed("ternary")  # six at once
    monkeypatch.setattr(seen_routing, "BATCH", 4)
    found = seen_routing.route(made.opened, made.images)
    for name in ("x_MxBxTxD", "probs_MxBxTxE", "gates_MxBxTxK"):
        np.testing.assert_allclose(getattr(found, name), getattr(made.seen, name), rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(found.experts_MxBxTxK, made.seen.experts_MxBxTxK)
    np.testing.assert_array_equal(found.labels_B, made.images.labels)


def test_a_dense_model_is_refused() -> None:
    config = config_of(**TWO, family="dense")
    dense = Opened(Path("runs/plain"), config, 5, config.model, {})
    with pytest.raises(ConfigError, match="^'runs/plain' is a dense model: it routes nothing; open a mixture"):
        seen_routing.route(dense, random_images(2))


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images have shape \(2, 4, 4, 1\); this model needs \(batch, 8, 8, 1\)"):
        seen_routing.route(routed("ternary").opened, random_images(2, size=4))


def test_maps_show_the_first_choice_of_each_patch_where_it_lies() -> None:
    # Second choices and the class token, both of expert 5, are not on the map.
    first = [[0, 1, 2], [3, 4, 0]]
    probs = np.zeros((2, 1, 7, 6))
    probs[..., 5] = 0.25
    probs[0, 0, np.arange(1, 7), np.ravel(first)] = 0.75
    probs[1, 0, 1:, 1] = 0.75
    seen = made_of(probs, (2, 3), top_k=2)
    np.testing.assert_array_equal(seen.maps(), [[first], [[[1, 1, 1], [1, 1, 1]]]])


def hand_made() -> SeenRouting:
    """Layer 3 of four experts, of which a token gets two: the class token and the one patch of two images."""
    first = [[1 / 2, 1 / 4, 1 / 4, 0], [1, 0, 0, 0]]  # to 0 and 1 by 2/3 and 1/3; to 0 and 1 by 1 and 0
    second = [[1 / 4, 1 / 2, 1 / 4, 0], [1 / 2, 0, 1 / 2, 0]]  # to 1 and 0 by 2/3 and 1/3; to 0 and 2 by 1/2 each
    return made_of([[first, second]], (1, 1), top_k=2, labels_B=[0, 1], layers=(3,))


def test_loads_by_hand() -> None:
    table = seen_routing.load_table(hand_made())
    assert list(table) == ["layer", "expert", "share", "probability", "gate", "entropy", "labels"]
    assert table["layer"].tolist() == [3] * 4
    assert table["expert"].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(table["share"], [4 / 8, 3 / 8, 1 / 8, 0])
    # (1/2 + 1 + 1/4 + 1/2) / 4 and so on.
    np.testing.assert_allclose(table["probability"], [9 / 16, 3 / 16, 1 / 4, 0])
    # (2/3 + 1 + 1/3 + 1/2) / 4; (1/3 + 0 + 2/3) / 3; 1/2 once.
    np.testing.assert_allclose(table["gate"], [5 / 8, 1 / 3, 1 / 2, np.nan], rtol=1e-6)
    # First choice of tokens of 1.5, 0 and 1 bits, and of one of 1.5.
    np.testing.assert_allclose(table["entropy"], [2.5 / 3 * math.log(2), 1.5 * math.log(2), np.nan, np.nan])
    # Two tokens of one class and one of the other; one token.
    mixed = math.log(3) - 2 / 3 * math.log(2)
    np.testing.assert_allclose(table["labels"], [mixed, 0, np.nan, np.nan], atol=1e-12)


def test_layers_by_hand() -> None:
    table = seen_routing.layer_table(hand_made())
    assert list(table) == ["layer", "experts_used", "unused", "entropy"]
    assert (table["layer"].tolist(), table["unused"].tolist()) == ([3], [1])
    # Shares of 4/8, 3/8, 1/8 and 0.
    entropy = 4 / 8 * math.log(2) + 3 / 8 * math.log(8 / 3) + 1 / 8 * math.log(8)
    np.testing.assert_allclose(table["experts_used"], [math.exp(entropy)])
    np.testing.assert_allclose(table["entropy"], [(1.5 + 0 + 1.5 + 1) / 4 * math.log(2)])


def test_shares_of_labels_by_hand() -> None:
    found = seen_routing.label_shares(hand_made())
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, [[[1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0]]])


def test_a_class_without_an_image_has_no_shares() -> None:
    seen = made_of(np.eye(2)[[[[0, 0], [0, 1], [1, 1]]]], (1, 1), labels_B=[2, 0, 2])
    found = seen_routing.label_shares(seen)
    np.testing.assert_array_equal(found, [[[1 / 2, 1 / 2], [np.nan] * 2, [1 / 2, 1 / 2]]])


def test_a_load_in_balance_and_one_expert_for_all() -> None:
    # Every class goes to every expert alike, all probabilities being equal but for a hair; then all to expert 2.
    even = np.full((4, 4, 4), 0.25) + 1e-6 * np.eye(4)
    certain = np.broadcast_to(np.eye(4)[2], (4, 4, 4))
    seen = made_of([even, certain], (1, 3), labels_B=[0, 1, 2, 3])
    loads, layers = seen_routing.load_table(seen), seen_routing.layer_table(seen)
    np.testing.assert_allclose(loads["share"], [0.25] * 4 + [0, 0, 1, 0])
    np.testing.assert_allclose(loads["labels"], [math.log(4)] * 4 + [np.nan, np.nan, math.log(4), np.nan])
    np.testing.assert_allclose(loads["entropy"], [math.log(4)] * 4 + [np.nan, np.nan, 0, np.nan], atol=1e-6)
    np.testing.assert_allclose(layers["experts_used"], [4, 1])
    assert layers["unused"].tolist() == [0, 3]
    np.testing.assert_allclose(layers["entropy"], [math.log(4), 0], atol=1e-6)


@st.composite
def routings(draw: st.DrawFn, most_images: int = 4) -> SeenRouting:
    layers, images = draw(st.integers(1, 3)), draw(st.integers(1, most_images))
    grid, experts = (draw(st.integers(1, 4)), draw(st.integers(1, 4))), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    # Few distinct values, so that some probabilities are 0 and some are equal.
    weights = rng.integers(0, 4, (layers, images, grid[0] * grid[1] + 1, experts)) + 1e-3 * rng.integers(0, 2, experts)
    weights[weights.sum(axis=-1) == 0] = 1
    probs = weights / weights.sum(axis=-1, keepdims=True)
    numbers = tuple(sorted(rng.choice(9, layers, replace=False).tolist()))
    return made_of(probs, grid, draw(st.integers(1, experts)), rng.integers(0, 4, images), numbers)


def slow_entropy(shares: list[float]) -> float:
    return -sum(p * math.log(p) for p in shares if p > 0)


@given(routings())
@settings(max_examples=25, deadline=None)
def test_tables_equal_counts_token_by_token(seen: SeenRouting) -> None:
    loads, layers = seen_routing.load_table(seen), seen_routing.layer_table(seen)
    shares = seen_routing.label_shares(seen)
    assert len(loads) == len(seen.layers) * seen.num_experts
    assert layers["layer"].tolist() == list(seen.layers)
    assert shares.shape == (len(seen.layers), max(seen.labels_B) + 1, seen.num_experts)
    tokens = list(np.ndindex(seen.probs_MxBxTxE.shape[1:3]))
    for index, layer in enumerate(seen.layers):
        probs, gates = oracles.float64(seen.probs_MxBxTxE[index]), oracles.float64(seen.gates_MxBxTxK[index])
        experts = seen.experts_MxBxTxK[index].tolist()
        entropies = {token: slow_entropy(probs[token].tolist()) for token in tokens}
        load = []
        for expert in range(seen.num_experts):
            given_by = [(b, t, k) for b, t in tokens for k in range(seen.top_k) if experts[b][t][k] == expert]
            first = [(b, t) for b, t in tokens if experts[b][t][0] == expert]
            labels = [int(seen.labels_B[b]) for b, _ in first]
            of_labels = [labels.count(label) / len(labels) for label in set(labels)]
            load.append(len(given_by) / (len(tokens) * seen.top_k))
            row = loads.iloc[index * seen.num_experts + expert]
            assert (row["layer"], row["expert"]) == (layer, expert)
            expected = {
                "share": load[-1],
                "probability": np.mean([probs[token][expert] for token in tokens]),
                "gate": np.mean([gates[place] for place in given_by]) if given_by else np.nan,
                "entropy": np.mean([entropies[token] for token in first]) if first else np.nan,
                "labels": slow_entropy(of_labels) if first else np.nan,
            }
            for name, value in expected.items():
                np.testing.assert_allclose(row[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
            for label in range(shares.shape[1]):
                own = [token for token in tokens if seen.labels_B[token[0]] == label]
                share = sum(token in first for token in own) / len(own) if own else np.nan
                np.testing.assert_allclose(shares[index, label, expert], share)
        row = layers.iloc[index]
        assert row["unused"] == load.count(0)
        np.testing.assert_allclose(row["experts_used"], math.exp(slow_entropy(load)))
        np.testing.assert_allclose(row["entropy"], np.mean(list(entropies.values())), rtol=1e-5, atol=1e-7)
