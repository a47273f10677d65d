from typing import Any

import jax
import numpy as np
import pytest

from bvit_jax import batches, data, sharding, train_step
from bvit_jax.stepping import Stepper
from tests.conftest import make_config

CONFIG = make_config(
    "dense",
    seed=3,
    augment__noise=0.2,
    model__num_layers=1,
    model__d_model=16,
    model__d_ff=32,
    model__num_heads=2,
    model__patch_size=4,
)


@pytest.fixture(scope="module")
def stepper() -> Stepper:
    return Stepper(CONFIG, sharding.place(CONFIG.model, CONFIG.batch_size))


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_the_first_state_is_that_of_the_seed_and_as_described(stepper):
    state, described = stepper.first_state(), stepper.abstract_state()
    expected = jax.jit(train_step.init_state, static_argnums=0)(CONFIG)
    assert bits(state) == bits(expected)
    shardings = train_step.state_shardings(CONFIG, sharding.place(CONFIG.model, CONFIG.batch_size))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    assert described == train_step.abstract_state(state, shardings)


def test_steps_are_the_compiled_ones_on_the_batches_of_their_numbers(stepper):
    step = train_step.make_train_step(CONFIG, sharding.place(CONFIG.model, CONFIG.batch_size))
    split, rows = data.load(CONFIG.data).train, np.arange(CONFIG.batch_size)
    found, expected = stepper.first_state(), stepper.first_state()
    for number in range(3):
        batch = data.train_batch(split, CONFIG.batch_size, CONFIG.seed, number, rows)
        expected, values = step(expected, jax.random.key(CONFIG.seed), batch.images, batch.labels)
        given = found
        found, told = stepper.take(found, number)
        assert bits((found, told)) == bits((expected, values))
        assert given.params["head"]["kernel"].is_deleted()
    assert int(found.step) == 3


def test_a_step_depends_on_its_state_and_number_alone(stepper):
    state = stepper.first_state()
    kept, _ = stepper.take(state, 0)
    kept = jax.device_get(kept)
    described = stepper.abstract_state()

    def from_kept(number: int) -> list[bytes]:
        placed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), kept, described)
        return bits(stepper.take(placed, number))

    first = from_kept(1)
    assert from_kept(2) != first
    assert from_kept(1) == first


def test_the_whole_batch_is_the_one_that_the_step_takes(stepper):
    split = stepper.dataset.train
    for number in (0, 1, 74, 75):  # 75 batches of 16 are an epoch of 1,200
        batch, indices = stepper.whole_batch(number)
        assert indices.shape == (16,)
        np.testing.assert_array_equal(indices, batches.batch_indices(1200, 16, 3, number))
        np.testing.assert_array_equal(batch.images, split.images[indices])
        np.testing.assert_array_equal(batch.labels, split.labels[indices])
    assert (len(stepper.dataset.train), len(stepper.dataset.validation), len(stepper.dataset.test)) == (1200, 197, 400)
