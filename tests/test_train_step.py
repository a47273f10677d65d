import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bvit_jax import data, evaluate, mixing, sentinels, sharding, train_step, vit
from bvit_jax.config import Config, LossConfig
from bvit_jax.model_config import ModelConfig
from bvit_jax.optimizer import make_optimizer
from bvit_jax.routing import RouterReport
from bvit_jax.sharding import Placement
from bvit_jax.train_step import TrainState
from tests.conftest import long_but, make_config, on_devices

KINDS = ["dense,4", "standard,4", "butterfly,4,separate", "butterfly,4,tied", "butterfly,4,reference", "low_rank,4"]
SMALL = {"num_layers": 2, "d_model": 16, "d_ff": 32, "num_heads": 2, "patch_size": 4, "top_k": 2, "num_stages": 2}
BATCH = 8


def small_config(kind: str, **changes: object) -> Config:
    """A small model of two layers and a plain run: no augmentation, nothing random."""
    plain = {
        **{f"model__{name}": value for name, value in SMALL.items()},
        "batch_size": BATCH,
        "total_steps": 100,
        "optimizer__warmup_steps": 0,
        "optimizer__learning_rate": 3e-3,
        "augment__max_shift": 0,
        "augment__noise": 0.0,
        "model__router_noise": 0.0,
    }
    return make_config(kind, **plain | changes)


def one_layer(kind: str, **changes: object) -> Config:
    """As `small_config`, but quicker to compile."""
    return small_config(kind, model__num_layers=1, optimizer__clip_norm=0.5, **changes)


@pytest.fixture(scope="module")
def placement() -> Placement:
    return sharding.place(small_config("standard,4").model, BATCH)


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    split = data.load(make_config().data).train
    return split.images[:BATCH], split.labels[:BATCH]


def make_state(config: Config) -> TrainState:
    """A first state with parameters drawn by NumPy, which compiles nothing; no head of zeros."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(0.2 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale"), leaf.dtype)

    shapes = jax.eval_shape(lambda: train_step.init_state(config))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    params = jax.tree_util.tree_map_with_path(draw, shapes.params)
    return zeros.replace(params=params, average=None if shapes.average is None else copy_of(params))


def copy_of(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def assert_equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def report(**fields: object) -> RouterReport:
    plain = dict.fromkeys(("load_balance", "router_z", "smoothness", "assignments_E", "entropy"), jnp.zeros(2))
    return RouterReport(**plain | fields)


@pytest.mark.parametrize(
    ("name", "weight"), [("load_balance", 0.5), ("router_z", 0.25), ("smoothness", 2.0), ("none", 0.0)]
)
def test_each_part_of_the_loss_is_weighted_by_hand(name, weight):
    # Cross-entropy of even logits over 4 classes is log 4. Parts are means over layers: 4, 6 and 2.
    weights = {"load_balance": 0.0, "router_z": 0.0, "smoothness": 0.0} | ({name: weight} if weight else {})
    parts = {
        "load_balance": jnp.array([3.0, 5.0]),
        "router_z": jnp.array([4.0, 8.0]),
        "smoothness": jnp.array([1.0, 3.0]),
    }
    config = LossConfig(label_smoothing=0.0, **weights)
    total, found = train_step.total_loss(config, jnp.zeros((3, 4)), jnp.array([0, 1, 3]), report(**parts))
    means = {"load_balance": 4.0, "router_z": 6.0, "smoothness": 2.0}
    assert float(total) == pytest.approx(math.log(4) + weight * means.get(name, 0), rel=1e-6)
    assert {key: float(value) for key, value in found.items()} == pytest.approx(
        {"cross_entropy": math.log(4)} | means, rel=1e-6
    )


def test_the_loss_without_mixtures_is_the_smoothed_cross_entropy():
    # Logits (log 3, 0): probabilities 3/4, 1/4. Smoothing by 0.2 puts 0.9 on the label and 0.1 on the other.
    config = LossConfig(label_smoothing=0.2, load_balance=9.0, router_z=9.0, smoothness=9.0)
    logits = jnp.array([[math.log(3), 0.0], [0.0, 0.0]])
    total, parts = train_step.total_loss(config, logits, jnp.array([0, 1]), None)
    first, second = -0.9 * math.log(0.75) - 0.1 * math.log(0.25), math.log(2)
    assert float(total) == pytest.approx((first + second) / 2, rel=1e-6)
    assert parts.keys() == {"cross_entropy"}


@pytest.mark.parametrize("kind", ["dense,4", "butterfly,4,tied"])
def test_a_step_is_the_gradient_step_of_the_whole_loss(kind, batch, placement, key):
    config = one_layer(kind, loss__load_balance=0.3, loss__router_z=0.2, loss__smoothness=0.4)
    state, (images, labels) = make_state(config), batch

    @jax.jit
    def by_hand(params: Any) -> Any:
        def loss_of(params: Any) -> Any:
            logits, report = vit.apply(config.model, params, images, train_key=key)
            return train_step.total_loss(config.loss, logits, labels, report)[0], logits

        (loss, logits), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        optimizer = make_optimizer(config.optimizer, config.total_steps)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return loss, logits, optax.tree.norm(gradients), optax.apply_updates(params, updates)

    loss, logits, norm, params = by_hand(state.params)
    after, metrics = train_step.make_train_step(config, placement)(state, key, images, labels)
    assert int(after.step) == 1
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert float(norm) > 0.5  # above the clip: the norm reported is the one before it
    assert float(metrics["accuracy"]) == np.mean(np.asarray(logits).argmax(axis=1) == labels)
    assert float(metrics["learning_rate"]) == pytest.approx(3e-3)
    # Adam's first update is about the sign of the gradient, so tiny gradients may differ by rounding.
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (after.params, params)]
    assert np.mean(np.abs(flat[0] - flat[1]) < 1e-5) > 0.99
    names = {"cross_entropy"} | (set() if kind.startswith("dense") else {"load_balance", "router_z", "smoothness"})
    assert metrics.keys() == names | {"loss", "accuracy", "grad_norm", "learning_rate"}
    total = metrics["cross_entropy"] + sum(
        getattr(config.loss, name) * metrics[name] for name in names - {"cross_entropy"}
    )
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)


@pytest.mark.parametrize("kind", long_but(["butterfly,4,tied"], KINDS))
def test_the_loss_of_a_fixed_batch_falls_and_states_stay_finite_at_extremes(kind, batch, placement, key):
    config = one_layer(kind)
    step = train_step.make_train_step(config, placement)
    state = make_state(config)
    extreme = copy_of(state)
    found = []
    for _ in range(30):
        state, metrics = step(state, key, *batch)
        found.append(float(metrics["cross_entropy"]))
    assert found[-1] < 0.6 * found[0]
    assert int(state.step) == 30

    # Logits of about 1e6 in the head, of about 1e4 in the routers.
    extreme.params["head"]["kernel"] *= 1e6
    block = extreme.params["segment_0"]["block_0"]["ffn"]
    if "router" in block:
        block["router"]["kernel"] *= 1e6
    after, metrics = step(extreme, key, *batch)
    for leaf in jax.tree.leaves((after, metrics)):
        assert np.isfinite(leaf).all()
    assert float(metrics["grad_norm"]) > 0


@pytest.fixture(scope="module")
def noisy() -> Config:
    return one_layer("dense,4", augment__max_shift=1, augment__noise=0.2)


def test_a_step_is_deterministic_and_leaves_no_trace(noisy, batch, placement, key):
    step = train_step.make_train_step(noisy, placement)
    state = make_state(noisy)
    first = step(copy_of(state), key, *batch)
    step(copy_of(state), jax.random.key(5), *batch)
    assert_equal(step(copy_of(state), key, *batch), first)


def test_the_state_passed_in_is_donated_and_donating_changes_nothing(noisy, batch, placement, key):
    step = train_step.make_train_step(noisy, placement)
    state = make_state(noisy)
    kept = jax.jit(step.__wrapped__)(state, key, *batch)
    given = copy_of(state)
    after, metrics = step(given, key, *batch)
    assert given.params["head"]["kernel"].is_deleted()
    assert not state.params["head"]["kernel"].is_deleted()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), (after, metrics), kept)


def test_randomness_comes_of_the_key_and_the_step(noisy, batch, placement, key):
    step = train_step.make_train_step(noisy, placement)
    state = make_state(noisy)

    def loss(number: int, key: jax.Array) -> float:
        at = dataclasses.replace(copy_of(state), step=jnp.int32(number))
        return float(step(at, key, *batch)[1]["cross_entropy"])

    assert len({loss(0, key), loss(1, key), loss(2, key), loss(0, jax.random.key(1))}) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"augment__noise": 0.2},
        {"augment__max_shift": 1, "augment__shift_probability": 1.0},
        {"augment__crop": "resized", "augment__min_area": 0.5},
        pytest.param({"augment__flip_probability": 0.5}, marks=pytest.mark.long),
        pytest.param({"augment__erase_probability": 0.9}, marks=pytest.mark.long),
        {"augment__mixup": 1.0},
        pytest.param({"augment__cutmix": 1.0}, marks=pytest.mark.long),
        {"augment__randaugment_ops": 2, "augment__randaugment_magnitude": 9.0, "augment__randaugment_probability": 1.0},
        {"model__router_noise": 1.0},
        {"model__attention_dropout": 0.5},
        {"model__stochastic_depth": 0.5, "model__num_layers": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_source_of_randomness_is_on_when_asked_for(change, batch, placement, key):
    kind = "butterfly,4,tied" if "model__router_noise" in change else "dense,4"
    config = small_config(kind, **{"model__num_layers": 1} | change)
    step, state = train_step.make_train_step(config, placement), make_state(config)
    found = {float(step(copy_of(state), jax.random.key(seed), *batch)[1]["cross_entropy"]) for seed in range(3)}
    assert len(found) == 3


def test_without_noise_the_key_does_not_matter(batch, placement, key):
    config = one_layer("dense,4")
    step, state = train_step.make_train_step(config, placement), make_state(config)
    assert_equal(step(copy_of(state), key, *batch), step(copy_of(state), jax.random.key(1), *batch))


def test_runs_that_differ_in_their_seed_share_one_program(placement):
    step = train_step.make_train_step(one_layer("butterfly,4,tied", seed=0), placement)
    assert train_step.make_train_step(one_layer("butterfly,4,tied", seed=7), placement) is step
    assert train_step.make_train_step(one_layer("butterfly,4,tied", loss__smoothness=0.5), placement) is not step
    model = one_layer("butterfly,4,tied").model
    assert train_step.make_eval_step(model, placement) is train_step.make_eval_step(model, placement)


def test_the_first_state_is_settled_by_the_seed():
    first, again, other = (train_step.init_state(one_layer("dense,4", seed=seed)) for seed in (3, 3, 4))
    assert int(first.step) == 0
    assert first.step.dtype == jnp.int32
    assert_equal(first, again)
    kernels = [state.params["patch_embedding"]["kernel"] for state in (first, other)]
    assert not np.array_equal(*kernels)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


LENIENT = {"augment__noise": 0.2, "max_skipped_steps": 1, "optimizer__warmup_steps": 4}


def spoilt(batch: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The batch with one pixel that is no number, which no uint8 is: floating pixels pass as they are."""
    images = batch[0] / np.float32(255)
    images[2, 3, 3] = np.nan
    return images, batch[1]


def kept(state: TrainState) -> TrainState:
    """A copy on the host, which no later step can reach."""
    return jax.tree.map(np.array, state)


def taken(config: Config, placement: Placement, key: jax.Array, batches: list[Any]) -> list[TrainState]:
    """Returns the first state and those after each step, on the host."""
    step, state = train_step.make_train_step(config, placement), make_state(config)
    states = [kept(state)]
    for batch in batches:
        state, _ = step(state, key, *batch)
        states.append(kept(state))
    return states


def moved(state: TrainState) -> list[bytes]:
    return bits((state.params, state.average, state.opt_state))


def test_a_step_that_is_not_finite_moves_nothing_and_says_where(batch, placement, key):
    # In a mixture a token that is not finite spoils the router and the experts as well.
    config = one_layer("standard,4")
    step, state = train_step.make_train_step(config, placement), make_state(config)
    before, groups = moved(state), set(state.sentinel.squared_norms)
    state, metrics = step(state, key, *spoilt(batch))
    assert not np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert moved(state) == before
    assert (int(state.step), int(state.sentinel.step), int(state.sentinel.skipped)) == (1, 1, 1)
    assert not np.isfinite(state.sentinel.loss)
    assert set(state.sentinel.squared_norms) == groups
    named = set(sentinels.bad_groups(state.sentinel))
    assert {"head", "attention", "embeddings", "router", "experts"} <= named <= groups
    for number in range(2, 4):  # none may be left out: nothing moves any more
        state, metrics = step(state, key, *batch)
        assert np.isfinite(metrics["loss"])
        assert moved(state) == before
        assert (int(state.step), int(state.sentinel.step)) == (number, 1)


def test_a_step_left_out_is_as_if_its_update_had_not_been(batch, placement, key):
    config = one_layer("dense,4", **LENIENT)
    step = train_step.make_train_step(config, placement)
    other = batch[0][::-1].copy(), batch[1]
    states = taken(config, placement, key, [batch, spoilt(batch), other, batch, spoilt(batch), other])
    assert [int(state.sentinel.skipped) for state in states] == [0, 0, 1, 1, 1, 2, 2]
    assert [int(state.sentinel.step) for state in states] == [0, 0, 2, 2, 2, 5, 5]
    assert [int(state.step) for state in states] == list(range(7))
    # By hand: the second step only counts.
    expected = states[1].replace(step=jnp.int32(2))
    for number, good in ((3, other), (4, batch)):
        expected, _ = step(expected, key, *good)
        assert moved(states[number]) == moved(expected)
        assert moved(states[number]) != moved(states[number - 1])
    # One more than allowed: what is there stays there.
    assert moved(states[4]) == moved(states[5]) == moved(states[6])


def test_the_learning_rate_told_is_the_one_of_the_optimiser(batch, placement, key):
    # Warm-up over 4 steps: rates 0, 1/4, 2/4 of the peak; a step left out does not count.
    config = one_layer("dense,4", **LENIENT)
    step, state = train_step.make_train_step(config, placement), make_state(config)
    rates = []
    for given in (batch, spoilt(batch), batch, batch):
        state, metrics = step(state, key, *given)
        rates.append(float(metrics["learning_rate"]))
    assert rates == pytest.approx([0, 0.25 * 3e-3, 0.25 * 3e-3, 0.5 * 3e-3])


def test_the_loss_of_mixed_images_is_that_of_both_labels_by_their_shares():
    # Logits (log 3, 0): probabilities 3/4, 1/4. The first image is a quarter its neighbour, and so is the second.
    config = LossConfig(label_smoothing=0.0, load_balance=0.0, router_z=0.0, smoothness=0.0)
    logits = jnp.array([[math.log(3), 0.0], [math.log(3), 0.0]])
    mixed = mixing.Mixed(labels_B=jnp.array([1, 0]), share=jnp.float32(0.75))
    total, _ = train_step.total_loss(config, logits, jnp.array([0, 1]), None, mixed)
    first = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    second = -0.75 * math.log(0.25) - 0.25 * math.log(0.75)
    assert float(total) == pytest.approx((first + second) / 2, rel=1e-6)


def test_the_accuracy_of_mixed_images_counts_both_labels(batch, placement, key):
    config = one_layer("dense,4", augment__mixup=1.0, optimizer__learning_rate=1e-9)
    state, (images, _) = make_state(config), batch
    labels = np.arange(BATCH, dtype=np.int32) % 2  # neighbours are of both classes
    state.params["head"]["bias"] = state.params["head"]["bias"].at[0].set(1e6)  # it always says 0
    _, metrics = train_step.make_train_step(config, placement)(state, key, images, labels)
    # Every image is 0 by its share or by one less its share; the mean of a pair is a half.
    assert float(metrics["accuracy"]) == pytest.approx(0.5, abs=1e-6)


def test_what_is_seen_is_what_is_trained_on(batch, placement, key):
    # The loss of a step is that of the images that `as_seen` gives for its keys.
    strong = {"flip_probability": 0.5, "erase_probability": 0.5, "noise": 0.1, "mixup": 0.5, "cutmix": 0.5}
    config = one_layer("dense,4", **{f"augment__{name}": value for name, value in strong.items()})
    state, (images, labels) = make_state(config), batch
    for step in (0, 3):
        image_key, _ = train_step.step_keys(key, step)
        seen, mixed = jax.jit(functools.partial(train_step.as_seen, config, placement))(image_key, images, labels)
        logits, report = jax.jit(vit.apply, static_argnums=0)(config.model, state.params, seen)
        expected, _ = train_step.total_loss(config.loss, logits, labels, report, mixed)
        given = dataclasses.replace(copy_of(state), step=jnp.int32(step))
        _, metrics = train_step.make_train_step(config, placement)(given, key, images, labels)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def seen_on(*counts: int) -> dict[int, list[Any]]:
    names = ("flip_probability", "erase_probability", "noise", "mixup", "cutmix", "randaugment_probability")
    changes = dict.fromkeys(names, 0.5) | {"crop": "resized", "min_area": 0.5, "randaugment_ops": 2}
    changes |= {"randaugment_magnitude": 9.0}
    config = small_config("dense,4", **{f"augment__{name}": value for name, value in changes.items()})
    split = data.load(config.data).train
    found = {}
    for count in counts:
        place = sharding.place(config.model, BATCH, devices=jax.devices()[:count])
        arrays = place.put_batch((split.images[:BATCH], split.labels[:BATCH]), np.arange(BATCH), BATCH)
        key = jax.device_put(jax.random.key(0), place.replicated)
        seen, mixed = jax.jit(functools.partial(train_step.as_seen, config, place))(key, *arrays)
        assert len(seen.sharding.device_set) == count
        found[count] = [np.round(1e5 * np.asarray(leaf)).astype(int).tolist() for leaf in (seen, mixed.share)]
        found[count].append(np.asarray(mixed.labels_B).tolist())
    return found


@pytest.mark.parametrize("counts", [(4,), pytest.param((2, 8), marks=pytest.mark.long)], ids=str)
def test_what_is_seen_does_not_depend_on_the_devices(counts):
    found = on_devices(8, seen_on, 1, *counts)
    for count in counts:
        for here, alone in zip(found[count], found[1], strict=True):
            np.testing.assert_allclose(here, alone, atol=2)  # in units of 1e-5


AVERAGED = {"optimizer__ema_decay": 0.25, "max_skipped_steps": 1}


def test_the_average_of_the_parameters_by_hand(batch, placement, key):
    # Decays (1 + steps) / (10 + steps), 0.25 at most: 1/10, 2/11, 3/12 = 0.25, 0.25. The third step is left out.
    states = taken(one_layer("dense,4", **AVERAGED), placement, key, [batch, batch, spoilt(batch), batch, batch])
    kernels = [np.float64(state.params["head"]["kernel"]) for state in states]
    average = kernels[0]
    for number, decay in ((1, 1 / 10), (2, 2 / 11), (4, 3 / 12), (5, 0.25)):
        average = decay * average + (1 - decay) * kernels[number]
        np.testing.assert_allclose(states[number].average["head"]["kernel"], average, rtol=1e-5)
    assert moved(states[3]) == moved(states[2])
    assert states[5].evaluated is states[5].average
    without = taken(one_layer("dense,4"), placement, key, [batch])[1]
    assert without.average is None
    assert without.evaluated is without.params


def test_the_average_starts_as_the_parameters_and_lies_where_they_do():
    config = one_layer("dense,4", **AVERAGED)
    state = train_step.init_state(config)
    assert_equal(state.average, state.params)
    shardings = train_step.state_shardings(config, sharding.place(config.model, BATCH))
    assert shardings.average == shardings.params


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def split_of(number: int) -> data.Split:
    split = data.load(make_config().data).test
    return data.Split(split.images[:number], split.labels[:number])


def by_hand(config: ModelConfig, params: Any, split: data.Split) -> tuple[np.ndarray, RouterReport | None]:
    logits, report = jax.jit(lambda p, x: vit.apply(config, p, x))(params, split.images)
    return np.asarray(logits), report


@pytest.mark.parametrize(
    ("kind", "number"), [("dense,4", 11), ("standard,4", 11), ("butterfly,4,tied", 11), ("dense,4", 8), ("dense,4", 3)]
)
def test_evaluation_equals_a_sum_over_images(kind, number, placement):
    config = small_config(kind)
    params, split = make_state(config).params, split_of(number)
    logits, report = by_hand(config.model, params, split)
    expected = -log_softmax(logits)[np.arange(number), split.labels]
    found = evaluate.evaluate(params, config.model, split, 4, placement)
    assert found.count == number
    assert found.accuracy == pytest.approx(np.mean(logits.argmax(axis=1) == split.labels), abs=1e-9)
    assert found.nll == pytest.approx(expected.mean(), rel=1e-5)
    if kind.startswith("dense"):
        assert (report, found.load_MxE, found.entropy_M) == (None, (), ())
        assert found.to_dict().keys() == {"accuracy", "nll", "count"}
        return
    # 5 tokens an image, 2 choices a token.
    assignments = np.asarray(report.assignments_E)
    np.testing.assert_array_equal(assignments.sum(axis=1), [number * 5 * 2] * 2)
    np.testing.assert_allclose(found.load_MxE, assignments / (number * 5 * 2), atol=1e-9)
    np.testing.assert_allclose(np.sum(found.load_MxE, axis=1), [1, 1], rtol=1e-12)
    np.testing.assert_allclose(found.entropy_M, report.entropy, rtol=1e-5)


def test_accuracy_is_exact_where_some_are_right(placement):
    config = small_config("dense,4")
    params, split = make_state(config).params, split_of(13)
    predicted = by_hand(config.model, params, split)[0].argmax(axis=1)
    labels = np.where(np.arange(13) < 9, predicted, (predicted + 1) % 10).astype(np.int32)
    found = evaluate.evaluate(params, config.model, data.Split(split.images, labels), 5, placement)
    assert found.accuracy == 9 / 13


def test_padding_counts_nowhere(batch, placement):
    config = small_config("standard,4")
    params, (images, labels) = make_state(config).params, batch
    step = train_step.make_eval_step(config.model, placement)
    weights = np.array([1, 1, 1, 0, 0, 0, 0, 0], np.float32)
    found = step(params, images, labels, weights)
    others = images.copy()
    others[3:] = np.random.default_rng(0).integers(0, 256, others[3:].shape)
    assert_equal(step(params, others, (labels + np.where(weights, 0, 1)) % 10, weights), found)
    assert float(found.count) == 3
    np.testing.assert_array_equal(found.assignments_MxE.sum(axis=1), [3 * 5 * 2] * 2)
    nothing = step(params, images, labels, np.zeros(8, np.float32))
    for leaf in jax.tree.leaves(nothing):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_evaluation_knows_no_noise(placement):
    still, noisy = (small_config("butterfly,4,tied", model__router_noise=noise).model for noise in (0.0, 1.0))
    params, split = make_state(small_config("butterfly,4,tied")).params, split_of(6)
    found = evaluate.evaluate(params, noisy, split, 4, placement)
    assert found == evaluate.evaluate(params, still, split, 4, placement)


def test_experts_that_receive_nothing_are_dead(placement):
    # A router of zeros ties all experts, and a tie goes to the first two.
    config = small_config("butterfly,4,tied")
    params = make_state(config).params
    router = params["segment_0"]["block_0"]["ffn"]["router"]
    router["kernel"] = router["kernel"].at[1].set(0)  # of the second layer alone
    found = evaluate.evaluate(params, config.model, split_of(5), 4, placement)
    assert found.load_MxE[1] == (0.5, 0.5, 0, 0)
    assert found.dead_experts_M == (sum(share == 0 for share in found.load_MxE[0]), 2)
    assert found.entropy_M[1] == pytest.approx(math.log(4), rel=1e-6)
    row = found.to_dict()
    assert row["dead_experts"] == list(found.dead_experts_M)
    assert row["expert_load"][1] == [0.5, 0.5, 0, 0]
    assert row["router_entropy"] == list(found.entropy_M)


def test_dead_experts_by_hand():
    loads = ((0.5, 0.5, 0.0, 0.0), (0.25, 0.25, 0.25, 0.25), (1.0, 0.0, 0.0, 0.0))
    assert evaluate.Evaluation(0.5, 1.0, 4, loads, (0.0, 0.0, 0.0)).dead_experts_M == (2, 0, 3)


def ternary_by_hand(layers_LxIxO: np.ndarray, scale_kind: str) -> dict[str, float]:
    zeros, scales = [], []
    for weights in np.asarray(layers_LxIxO, np.float64):
        magnitude = np.abs(weights)
        scale = magnitude.mean(axis=0) if scale_kind == "row" else np.array([magnitude.mean()])
        zeros.append(np.mean(magnitude < scale / 2))
        scales.append(scale.mean())
    return {"zeros": float(np.mean(zeros)), "scale": float(np.mean(scales))}


@pytest.mark.parametrize("scale_kind", ["row", "tensor"])
@pytest.mark.parametrize(
    ("form", "names"), [("separate", ("up_prototype", "down_prototype")), ("tied", ("prototype",))]
)
def test_ternary_statistics_by_hand(form, names, scale_kind):
    config = small_config(f"butterfly,4,{form}", model__ternary_scale=scale_kind)
    params = make_state(config).params
    ffn = params["segment_0"]["block_0"]["ffn"]
    for name in names:
        # Columns of different sizes and a second layer of another size tell the two kinds of scale apart.
        cubes = np.asarray(ffn[name]) ** 3
        ffn[name] = jnp.asarray(cubes * np.arange(1, cubes.shape[-1] + 1) * np.array([[[1]], [[3]]]), jnp.float32)
    found = evaluate.ternary_statistics(params, config.model)
    assert found.keys() == {f"segment_0/block_0/ffn/{name}" for name in names}
    for name in names:
        expected = ternary_by_hand(ffn[name], scale_kind)
        assert found[f"segment_0/block_0/ffn/{name}"] == pytest.approx(expected, rel=1e-4)
        assert 0 < expected["zeros"] < 1


def test_models_without_prototypes_have_no_ternary_statistics():
    for kind in ("dense,4", "standard,4"):
        config = small_config(kind)
        assert evaluate.ternary_statistics(make_state(config).params, config.model) == {}


def test_a_mixture_in_some_layers_reports_those_alone(placement):
    config = small_config("butterfly,4,tied", model__moe_layers="second")
    params = make_state(config).params
    found = evaluate.evaluate(params, config.model, split_of(5), 4, placement)
    assert (len(found.load_MxE), len(found.entropy_M)) == (1, 1)
