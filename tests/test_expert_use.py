import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import data, evaluate, expert_use, moe, sharding, vit
from bvit_jax.expert_use import ExpertUse
from bvit_jax.model_config import ModelConfig
from tests.conftest import KINDS, make_model, on_devices

apply = jax.jit(vit.apply, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Made:
    """A model with parameters far from their initial values, and images with the labels that it gives them."""

    config: ModelConfig
    params: Any
    split: data.Split

    @property
    def placement(self) -> sharding.Placement:
        return sharding.place(self.config, 8)

    def evaluated(self, params: Any) -> evaluate.Evaluation:
        return evaluate.evaluate(params, self.config, self.split, 8, self.placement)

    def measured(self, params: Any, evaluation: evaluate.Evaluation | None = None) -> ExpertUse:
        evaluation = evaluation or self.evaluated(params)
        found = expert_use.measure(params, self.config, self.split, evaluation, 8, self.placement, 3)
        assert found is not None
        return found


def random_params(config: ModelConfig) -> Any:
    rng, shapes = np.random.default_rng(0), vit.param_shapes(config)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype), shapes)


def random_split(count: int) -> data.Split:
    """Images of 16 squares, black or white."""
    squares = np.random.default_rng(1).choice(np.array([0, 255], np.uint8), (count, 4, 4, 1))
    return data.Split(squares.repeat(2, axis=1).repeat(2, axis=2), np.zeros(count, np.int32))


@pytest.fixture(scope="module", params=["standard", "butterfly", pytest.param("low_rank", marks=pytest.mark.long)])
def made(request: pytest.FixtureRequest) -> Made:
    """Mixtures in a pattern of two that is repeated, and in two segments, of which one is repeated."""
    kinds: dict[str, dict[str, Any]] = {
        "standard": {"num_layers": 4, "moe_layers": "second"},
        "butterfly": {"num_layers": 5, "moe_layers": "0,2,3", "form": "tied", "dispatch": "rows"},
        "low_rank": {"num_layers": 4, "moe_layers": "0,1,3", "rank": 3},
    }
    config = make_model(family=request.param, **kinds[request.param])
    params, images = random_params(config), random_split(80).images
    logits = np.array(apply(config, params, images)[0])
    # What the logits of all images have in common is taken away, so that labels differ.
    params["head"]["bias"] -= logits.mean(axis=0)
    return Made(config, params, data.Split(images, (logits - logits.mean(axis=0)).argmax(axis=1).astype(np.int32)))


@pytest.fixture(scope="module")
def whole(made: Made) -> ExpertUse:
    return made.measured(made.params)


def mixtures_of(config: ModelConfig) -> list[tuple[str, str, int]]:
    """Segment, block and repeat of the mixture layers in order, counted one by one."""
    return [
        (f"segment_{number}", f"block_{index}", repeat)
        for number, (pattern, repeats) in enumerate(vit.layer_segments(config.is_moe_by_layer))
        for repeat in range(repeats)
        for index, is_moe in enumerate(pattern)
        if is_moe
    ]


def ffn_of(params: Any, config: ModelConfig) -> list[Any]:
    """The parameters of the mixture layers, one by one in order, NumPy."""
    return [
        jax.tree.map(lambda leaf, repeat=repeat: np.array(leaf[repeat]), params[segment][block]["ffn"])
        for segment, block, repeat in mixtures_of(config)
    ]


def inputs_of(made: Made, images: np.ndarray) -> list[np.ndarray]:
    seen = jax.jit(vit.ffn_inputs, static_argnums=0)(made.config, made.params, images)
    return [np.array(seen[segment][block][repeat]) for segment, block, repeat in mixtures_of(made.config)]


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


def test_what_mixtures_see_is_what_their_routers_saw(made):
    _, report = apply(made.config, made.params, made.split.images)
    ffns, inputs = ffn_of(made.params, made.config), inputs_of(made, made.split.images)
    for x, ffn, assignments_E in zip(inputs, ffns, report.assignments_E, strict=True):
        chosen = np.argsort(-(x @ ffn["router"]["kernel"]), axis=-1)[..., : made.config.top_k]
        np.testing.assert_array_equal(np.bincount(chosen.reshape(-1), minlength=4), assignments_E)


@pytest.mark.parametrize(
    ("family", "form", "layers"), [(*kind, "second") for kind in KINDS[1:]] + [("butterfly", "separate", "0,1,3,4,6")]
)
def test_experts_are_moved_layer_by_layer_and_nothing_else(family, form, layers):
    # Of 7: one of two, three times; two of three, twice, and one more.
    config = make_model(family=family, form=form, num_layers=7, moe_layers=layers)
    params = random_params(config)
    source = np.random.default_rng(2).integers(0, 4, (sum(config.is_moe_by_layer), 4))
    moved = expert_use.rearranged(params, config, source, sharding.place(config, 8))
    own = ("up_kernel", "up_bias", "down_kernel", "down_bias") if config.stores_experts else ()
    for before, after, from_E in zip(ffn_of(params, config), ffn_of(moved, config), source, strict=True):
        for name, leaf in before.items():
            expected = leaf[from_E] if name in own or name.endswith(("angles", "left", "right")) else leaf
            jax.tree.map(np.testing.assert_array_equal, after[name], expected)
    kept = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), (_, after) in zip(kept, jax.tree_util.tree_leaves_with_path(moved), strict=True):
        assert "ffn" in str(path) or leaf is after


def test_experts_that_take_their_routes_along_are_the_same_model(made):
    config, images = made.config, made.split.images
    source = expert_use.derangements(sum(config.is_moe_by_layer), 4, 0)
    moved = expert_use.rearranged(made.params, config, source, made.placement)
    logits, _ = apply(config, made.params, images)
    assert jnp.abs(apply(config, moved, images)[0] - logits).max() > 1e-2
    moved = jax.tree.map(np.array, moved)
    for (segment, block, repeat), from_E in zip(mixtures_of(config), source, strict=True):
        kernel = moved[segment][block]["ffn"]["router"]["kernel"]
        kernel[repeat] = kernel[repeat][:, from_E]
    np.testing.assert_allclose(apply(config, moved, images)[0], logits, atol=1e-4)


def test_alike_experts_have_cosine_1_and_lose_nothing_to_the_bit(made):
    layers = sum(made.config.is_moe_by_layer)
    alike = expert_use.rearranged(made.params, made.config, np.full((layers, 4), 2), made.placement)
    found = made.measured(alike)
    assert 0 < found.accuracy < 1  # labels are of the experts that differ
    assert found.cosine_M == pytest.approx([1] * layers, abs=1e-5)
    assert (found.lost_shuffled, found.lost_one) == (0.0, 0.0)
    assert found.accuracy_shuffled == found.accuracy_one == found.accuracy


def test_experts_that_differ_lose_what_their_places_and_number_give(made, whole):
    layers = sum(made.config.is_moe_by_layer)

    def accuracy(source_MxE: np.ndarray) -> float:
        changed = expert_use.rearranged(made.params, made.config, source_MxE, made.placement)
        return float((apply(made.config, changed, made.split.images)[0].argmax(axis=1) == made.split.labels).mean())

    evaluation = made.evaluated(made.params)
    assert whole.accuracy == evaluation.accuracy
    assert whole.accuracy_shuffled == pytest.approx(accuracy(expert_use.derangements(layers, 4, 3)), abs=0.02)
    # Loads that say what the most used are, whatever they are; the first of equals.
    loads = ((0.0, 0.0, 1.0, 0.0), (0.0, 0.5, 0.0, 0.5), (0.2, 0.2, 0.2, 0.4))[:layers]
    told = made.measured(made.params, dataclasses.replace(evaluation, load_MxE=loads))
    most_used = np.array([[2], [1], [3]][:layers])
    assert told.accuracy_one == pytest.approx(accuracy(most_used.repeat(4, axis=1)), abs=0.02)
    assert told.experts_used_M[:2] == pytest.approx((1, 2))
    assert whole.accuracy_shuffled < 0.9 * whole.accuracy
    assert told.accuracy_one < 0.9 * told.accuracy


def test_cosines_are_those_of_the_experts_on_what_the_layers_see(made, whole):
    config = made.config
    # 64 images of 17 tokens with 4 experts are fewer pairs than there may be: all their tokens count.
    inputs = inputs_of(made, made.split.images[np.arange(64) * 80 // 64])
    outputs = jax.jit(moe.expert_outputs, static_argnums=0)
    expected = []
    for x, ffn in zip(inputs, ffn_of(made.params, config), strict=True):
        y_IxTxExD = np.array(outputs(config, ffn, x), np.float64)
        expected.append(slow_cosine(y_IxTxExD.reshape(-1, 4, config.d_model)))
    assert whole.cosine_M == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3  # layers that are mixed up would show


def test_what_between_raises_ends_the_measurement(made):
    class ToldToStop(Exception):
        pass

    def stop() -> None:
        raise ToldToStop

    evaluation = made.evaluated(made.params)
    with pytest.raises(ToldToStop):
        expert_use.measure(made.params, made.config, made.split, evaluation, 8, made.placement, 0, stop)


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
    evaluation = evaluate.Evaluation(0.75, 1.0, 8, ((1.0,), (1.0,)), (0.0, 0.0))
    found = expert_use.measure({}, config, random_split(8), evaluation, 8, sharding.place(config, 8), 0)
    assert found == ExpertUse(0.75, (1.0, 1.0))
    assert (found.lost_shuffled, found.lost_one) == (None, None)
    assert found.to_dict()["output_cosine"] is None
    assert expert_use.means(found.to_dict()) == expert_use.Means(experts_used=1.0)


def test_of_a_model_without_mixtures_there_is_nothing_to_say():
    config, evaluation = make_model(family="dense"), evaluate.Evaluation(0.75, 1.0, 8)
    assert expert_use.measure({}, config, random_split(8), evaluation, 8, sharding.place(config, 8), 0) is None
    assert expert_use.means(None) == expert_use.Means(None, None, None, None)


def test_plain_data_and_means_over_layers():
    use = ExpertUse(0.75, (2.0, 4.0), (0.5, 1.0), 0.5, 0.875)
    assert use.to_dict() == {
        "output_cosine": [0.5, 1.0],
        "experts_used": [2.0, 4.0],
        "accuracy_shuffled": 0.5,
        "accuracy_one": 0.875,
        "lost_shuffled": 0.25,
        "lost_one": -0.125,
    }
    assert expert_use.means(use.to_dict()) == expert_use.Means(0.75, 3.0, 0.25, -0.125)


def of_families(*families: str) -> dict[str, Any]:
    """Moves experts and measures them on as many devices as there are, parameters split as in training."""
    found = {}
    for family in families:
        config = make_model(family=family, num_experts=8, dispatch="rows")
        placement = sharding.place(config, 8)
        places = placement.params(vit.param_axes(config), vit.param_shapes(config))
        params = jax.device_put(random_params(config), places)
        moved = expert_use.rearranged(params, config, expert_use.derangements(2, 8, 0), placement)
        assert jax.tree.map(lambda leaf: leaf.sharding, moved) == places
        cosine_M = expert_use.output_cosines(moved, config, random_split(8), placement)
        found[family] = jax.tree.map(np.array, moved), cosine_M
    return found


@pytest.mark.long
def test_several_devices_give_what_one_does():
    families = ("standard", "butterfly", "low_rank")
    one, four = of_families(*families), on_devices(4, of_families, *families)
    for family, (moved, cosine_M) in one.items():
        jax.tree.map(np.testing.assert_array_equal, four[family][0], moved)
        assert four[family][1] == pytest.approx(cosine_M, abs=1e-5)
