import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import data, evaluate, expert_use, sharding, train, trained, vit
from bvit_jax.expert_use import ExpertUse
from bvit_jax.model_config import ModelConfig
from tests.conftest import make_config, make_model, on_devices

LAYERS = ("every", "second", "0,2,3")
"""Of five: one segment, one of patterns of two and a rest, three segments with mixtures."""


def seen_params(config: ModelConfig) -> Any:
    """Parameters far from their initial values: the head too, so that logits tell experts apart."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype), vit.param_shapes(config))


def ffn_of(params: Any, config: ModelConfig) -> list[Any]:
    """The parameters of the mixture layers, one by one in order, NumPy."""
    found = []
    for number, (pattern, repeats) in enumerate(vit.layer_segments(config.is_moe_by_layer)):
        for repeat in range(repeats):
            for index, is_moe in enumerate(pattern):
                if is_moe:
                    block = params[f"segment_{number}"][f"block_{index}"]["ffn"]
                    found.append(jax.tree.map(lambda leaf, repeat=repeat: np.array(leaf[repeat]), block))
    return found


def make_split(config: ModelConfig, params: Any, count: int = 40) -> data.Split:
    """Random images, with the labels that the model itself gives them."""
    shape = (count, config.image_size, config.image_size, config.channels)
    images = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    return data.Split(images, np.array(vit.apply(config, params, images)[0].argmax(axis=1), np.int32))


def measured(config: ModelConfig, params: Any, split: data.Split) -> ExpertUse | None:
    placement = sharding.place(config, 8)
    found = evaluate.evaluate(params, config, split, 8, placement)
    return expert_use.measure(params, config, split, found, 8, placement, 3)


def test_effective_numbers_by_hand():
    # Shares of 1/2, 1/4, 1/4 and 0 have 1.5 bits of entropy.
    load = np.array([[0.25] * 4, [0.0, 1.0, 0.0, 0.0], [0.5, 0.25, 0.0, 0.25]])
    assert expert_use.effective_numbers(load) == pytest.approx((4, 1, 2**1.5), rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(2, 40), st.integers(0, 2**31))
def test_derangements_move_every_expert_and_lose_none(layers, num_experts, seed):
    found = expert_use.derangements(layers, num_experts, seed)
    assert np.array_equal(np.sort(found, axis=1), np.tile(np.arange(num_experts), (layers, 1)))
    assert (found != np.arange(num_experts)).all()
    assert np.array_equal(found, expert_use.derangements(layers, num_experts, seed))


def test_derangements_differ_between_layers_and_seeds():
    first, second = (expert_use.derangements(2, 32, seed) for seed in (0, 1))
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], second[0])


def test_mean_cosines_by_hand():
    x, y = [3.0, 0, 0], [0, 0.5, 0]
    # Three vectors at 120 degrees of each other: cosine -1/2.
    star = [[1, 0, 0], [-0.5, 0.75**0.5, 0], [-0.5, -(0.75**0.5), 0]]
    cases = [([x, x], 1), ([x, y], 0), ([x, [-6.0, 0, 0]], -1), ([x, x, y], 1 / 3), (star, -1 / 2), ([x, [0] * 3], 0)]
    for vectors, expected in cases:
        assert expert_use.mean_cosine(jnp.array(vectors)[None, None]) == pytest.approx(expected, abs=1e-6)
    of_two_tokens = jnp.array([[[x, x]], [[x, y]]])
    assert expert_use.mean_cosine(of_two_tokens) == pytest.approx(0.5, abs=1e-6)


def slow_cosine(y_NxExD: np.ndarray) -> float:
    """Pair by pair."""
    pairs = [(a, b) for a in range(y_NxExD.shape[1]) for b in range(a)]
    return float(
        np.mean([y[a] @ y[b] / np.linalg.norm(y[a]) / np.linalg.norm(y[b]) for y in y_NxExD for a, b in pairs])
    )


def test_mean_cosine_equals_that_over_pairs():
    y = np.random.default_rng(0).normal(0.3, 1, (3, 5, 7, 6))
    found = expert_use.mean_cosine(jnp.asarray(y, jnp.float32))
    assert found == pytest.approx(slow_cosine(y.reshape(15, 7, 6)), abs=1e-6)
    assert expert_use.mean_cosine(jnp.asarray(y, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("layers", LAYERS)
def test_what_mixtures_see_is_what_their_routers_saw(layers):
    config = make_model(num_layers=5, moe_layers=layers, num_experts=8)
    params = seen_params(config)
    images = make_split(config, params).images
    seen = jax.jit(vit.ffn_inputs, static_argnums=0)(config, params, images)
    _, report = vit.apply(config, params, images)
    inputs = []
    for number, (pattern, repeats) in enumerate(vit.layer_segments(config.is_moe_by_layer)):
        blocks = [f"block_{index}" for index, is_moe in enumerate(pattern) if is_moe]
        assert list(seen.get(f"segment_{number}", {})) == blocks
        inputs += [seen[f"segment_{number}"][block][repeat] for repeat in range(repeats) for block in blocks]
    for x, ffn, assignments_E in zip(inputs, ffn_of(params, config), report.assignments_E, strict=True):
        chosen = np.argsort(-(x @ ffn["router"]["kernel"]), axis=-1)[..., : config.top_k]
        np.testing.assert_array_equal(np.bincount(chosen.reshape(-1), minlength=8), assignments_E)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", ["standard", "butterfly"])
def test_experts_are_moved_layer_by_layer_and_nothing_else(kind, layers):
    config = make_model(family=kind, num_layers=5, moe_layers=layers)
    params = seen_params(config)
    source = np.random.default_rng(2).integers(0, 4, (sum(config.is_moe_by_layer), 4))
    moved = expert_use.with_experts(params, config, source, sharding.place(config, 8))
    own = ("up_kernel", "up_bias", "down_kernel", "down_bias") if kind == "standard" else ()
    for before, after, from_E in zip(ffn_of(params, config), ffn_of(moved, config), source, strict=True):
        for name, leaf in before.items():
            expected = leaf[from_E] if name in own or name.endswith("angles") else leaf
            jax.tree.map(np.testing.assert_array_equal, after[name], expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
        if "ffn" not in str(path):
            assert leaf is next(kept for at, kept in jax.tree_util.tree_leaves_with_path(params) if at == path)


@pytest.mark.parametrize(
    ("family", "form"), [("ternary", "separate"), ("butterfly", "tied"), ("butterfly", "reference")]
)
def test_experts_that_take_their_routes_along_are_the_same_model(family, form):
    config = make_model(family=family, form=form, num_experts=8)
    params = seen_params(config)
    split = make_split(config, params)
    source = expert_use.derangements(2, 8, 0)
    moved = expert_use.with_experts(params, config, source, sharding.place(config, 8))
    logits, _ = vit.apply(config, params, split.images)
    assert jnp.abs(vit.apply(config, moved, split.images)[0] - logits).max() > 1e-2
    ffn = moved["segment_0"]["block_0"]["ffn"]
    kernel = ffn["router"]["kernel"]
    ffn["router"] = {"kernel": jnp.stack([kernel[layer][:, source[layer]] for layer in range(2)])}
    np.testing.assert_allclose(vit.apply(config, moved, split.images)[0], logits, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "form"), [("standard", "separate"), ("butterfly", "separate"), ("butterfly", "tied")]
)
def test_alike_experts_have_cosine_1_and_lose_nothing_to_the_bit(family, form):
    config = make_model(family=family, form=form)
    placement, params = sharding.place(config, 8), seen_params(config)
    alike = expert_use.with_experts(params, config, np.full((2, 4), 2), placement)
    found = measured(config, alike, make_split(config, params))
    assert 0 < found.accuracy < 1  # labels are of the experts that differ
    assert found.cosine_M == pytest.approx((1, 1), abs=1e-5)
    assert (found.lost_shuffled, found.lost_one) == (0.0, 0.0)
    assert found.accuracy_shuffled == found.accuracy_one == found.accuracy


def test_experts_that_differ_lose_what_they_lose_by_hand():
    config = make_model(family="standard", moe_layers="second", num_layers=4)
    params = seen_params(config)
    split = make_split(config, params)
    placement = sharding.place(config, 8)
    evaluation = evaluate.evaluate(params, config, split, 8, placement)
    # Loads that say what the most used are, whatever they are.
    evaluation = dataclasses.replace(evaluation, load_MxE=((0.1, 0.2, 0.6, 0.1), (0.0, 0.5, 0.0, 0.5)))
    found = expert_use.measure(params, config, split, evaluation, 8, placement, 3)
    assert found.accuracy == evaluation.accuracy == 1

    def accuracy(source_MxE: Any) -> float:
        changed = jax.tree.map(np.array, params)
        ffn = changed["segment_0"]["block_1"]["ffn"]
        for name in ("up_kernel", "up_bias", "down_kernel", "down_bias"):
            ffn[name] = np.stack([ffn[name][layer][source_MxE[layer]] for layer in range(2)])
        return float((vit.apply(config, changed, split.images)[0].argmax(axis=1) == split.labels).mean())

    assert found.accuracy_shuffled == pytest.approx(accuracy(expert_use.derangements(2, 4, 3)))
    assert found.accuracy_one == pytest.approx(accuracy(np.array([[2] * 4, [1] * 4])))
    assert 0 < found.accuracy_shuffled != found.accuracy_one > 0
    assert (found.lost_shuffled, found.lost_one) == (1 - found.accuracy_shuffled, 1 - found.accuracy_one)
    # Five ninths of a bit more or less do not matter: 1 bit is two experts.
    assert found.experts_used_M[1] == pytest.approx(2)
    assert found.to_dict() == {
        "output_cosine": list(found.cosine_M),
        "experts_used": list(found.experts_used_M),
        "accuracy_shuffled": found.accuracy_shuffled,
        "accuracy_one": found.accuracy_one,
        "lost_shuffled": found.lost_shuffled,
        "lost_one": found.lost_one,
    }


def test_opposite_experts_have_cosine_minus_1():
    config = make_model(family="standard", num_experts=2)
    params = seen_params(config)
    ffn = params["segment_0"]["block_0"]["ffn"]
    for name, sign in (("up_kernel", 1), ("up_bias", 1), ("down_kernel", -1), ("down_bias", -1)):
        ffn[name] = jnp.stack([ffn[name][:, 0], sign * ffn[name][:, 0]], axis=1)
    found = expert_use.output_cosines(params, config, make_split(config, params), sharding.place(config, 8))
    assert found == pytest.approx((-1, -1), abs=1e-6)


def test_cosines_are_those_of_the_experts_on_what_the_layers_see():
    config = make_model(family="standard", moe_layers="second", num_layers=4)
    params = seen_params(config)
    split = make_split(config, params, 100)
    spread = split.images[np.arange(64) * 100 // 64]
    # 64 images of 17 tokens with 4 experts are fewer pairs than there may be: all tokens count.
    inputs = vit.ffn_inputs(config, params, spread)["segment_0"]["block_1"]
    expected = []
    for x, ffn in zip(np.array(inputs, np.float64), ffn_of(params, config), strict=True):
        x_NxD, ffn = x.reshape(-1, x.shape[-1]), oracles.float64(ffn)
        h = oracles.gelu(np.einsum("nd,edf->nef", x_NxD, ffn["up_kernel"]) + ffn["up_bias"])
        expected.append(slow_cosine(np.einsum("nef,efd->ned", h, ffn["down_kernel"]) + ffn["down_bias"]))
    found = expert_use.output_cosines(params, config, split, sharding.place(config, 8))
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(found[0] - found[1]) > 1e-3  # an order that is wrong would show


@pytest.mark.parametrize("num_experts", [2, 64, 300, 5000, 50_000])
@pytest.mark.parametrize("devices", [1, 4, 96])
def test_few_tokens_are_measured_and_some_on_each_device(num_experts, devices):
    config = make_model(num_experts=num_experts)
    images, places = expert_use._sample(config, devices)
    assert images % devices == 0
    assert 1 <= places <= 17
    assert images <= max(64, devices)
    pairs = images * places * num_experts
    assert pairs <= max(expert_use.PAIRS, devices * num_experts)
    assert places == 17 or devices == 96 or 2 * pairs > expert_use.PAIRS or images == 1


@pytest.mark.parametrize("places", [1, 3, 17])
def test_tokens_are_of_all_places_each_once_an_image(places):
    x = jnp.arange(40 * 17.0).reshape(40, 17, 1)
    found = np.array(expert_use._thinned(x, places)[..., 0], int)
    assert found.shape == (40, places)
    assert (found // 17 == np.arange(40)[:, None]).all()
    assert all(len(set(row)) == places for row in found)
    counts = np.bincount(found.reshape(-1) % 17, minlength=17)
    assert counts.min() >= counts.max() - 2 * places
    assert counts.min() >= 1


def test_of_one_expert_there_is_little_to_say():
    config = make_model(num_experts=1, top_k=1)
    params = seen_params(config)
    found = measured(config, params, make_split(config, params))
    assert found == ExpertUse(1.0, (1.0, 1.0))
    assert (found.lost_shuffled, found.lost_one) == (None, None)
    assert found.to_dict()["output_cosine"] is None
    assert expert_use.means(found.to_dict()) == expert_use.Means(experts_used=1.0)


def test_of_a_model_without_mixtures_there_is_nothing_to_say():
    config = make_model(family="dense")
    params = seen_params(config)
    assert measured(config, params, make_split(config, params)) is None
    assert expert_use.means(None) == expert_use.Means(None, None, None, None)


def test_means_are_over_layers():
    use = ExpertUse(0.75, (2.0, 4.0), (0.5, 1.0), 0.5, 0.875)
    assert expert_use.means(use.to_dict()) == expert_use.Means(0.75, 3.0, 0.25, -0.125)


def test_what_between_raises_ends_the_measurement():
    config = make_model()
    params = seen_params(config)
    split, placement = make_split(config, params), sharding.place(config, 8)
    evaluation = evaluate.evaluate(params, config, split, 8, placement)

    class ToldToStop(Exception):
        pass

    def stop() -> None:
        raise ToldToStop

    with pytest.raises(ToldToStop):
        expert_use.measure(params, config, split, evaluation, 8, placement, 0, stop)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train.run(make_config("standard,4", seed=2), workdir, show_progress=False)


def test_the_result_of_a_run_says_it_of_the_test_split_and_best_checkpoint(finished):
    workdir, result = finished
    config, _, params = trained.best_params(workdir)
    placement, split = sharding.place(config.model, 16), data.load_split(config.data, "test")
    found = evaluate.evaluate(params, config.model, split, 16, placement)
    use = expert_use.measure(params, config.model, split, found, 16, placement, config.seed)
    assert use.accuracy == result["test_accuracy"]
    assert result["experts"] == use.to_dict()
    assert json.loads((workdir / "result.json").read_text())["experts"] == use.to_dict()


def test_the_result_of_a_dense_run_says_nothing_of_experts(tmp_path):
    assert "experts" not in train.run(make_config("dense", total_steps=1), tmp_path, show_progress=False)


def of_families() -> dict[str, Any]:
    """Measures with as many devices as there are, parameters split as in training."""
    found = {}
    for family in ("standard", "butterfly"):
        config = make_model(family=family, num_experts=8)
        params = seen_params(config)
        split, placement = make_split(config, params), sharding.place(config, 8)
        places = placement.params(vit.param_axes(config), params)
        params = jax.device_put(params, places)
        moved = expert_use.with_experts(params, config, expert_use.derangements(2, 8, 0), placement)
        assert jax.tree.map(lambda leaf: leaf.sharding, moved) == places
        evaluation = evaluate.evaluate(params, config, split, 8, placement)
        found[family] = expert_use.measure(params, config, split, evaluation, 8, placement, 0).to_dict()
    return found


def test_several_devices_measure_what_one_does():
    one, four = of_families(), on_devices(4, of_families)
    for family, use in one.items():
        for name, value in use.items():
            assert four[family][name] == pytest.approx(value, abs=1e-4), (family, name)
