import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bvit_jax import batches
from bvit_jax.batches import PADDING, EvalPlan, SpreadPlan, TrainPlan


@given(
    num_images=st.integers(1, 40),
    batch_size=st.integers(1, 100),
    seed=st.integers(0, 2**31),
    skipped=st.integers(0, 1000),
)
def test_every_epoch_sees_every_image_once(num_images, batch_size, seed, skipped):
    steps = range(skipped, skipped + 2 * num_images // batch_size + 3)
    row = np.concatenate([batches.batch_indices(num_images, batch_size, seed, step) for step in steps])
    assert len(row) == len(steps) * batch_size
    row = row[-(skipped * batch_size) % num_images :]  # from the start of an epoch
    epochs = row[: len(row) // num_images * num_images].reshape(-1, num_images)
    assert len(epochs) >= 1
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(num_images), epochs.shape))


def test_the_order_is_a_pure_function_of_seed_and_step():
    first = [batches.batch_indices(100, 32, 7, step) for step in (0, 5, 3)]
    again = [batches.batch_indices(100, 32, 7, step) for step in (3, 0, 5)]
    np.testing.assert_array_equal(first, [again[1], again[2], again[0]])


def test_the_order_differs_by_seed_and_by_epoch():
    orders = [batches.batch_indices(100, 100, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    assert list(range(100)) not in orders


def test_neighbouring_seeds_do_not_share_epochs_shifted():
    assert batches.batch_indices(50, 50, 0, 1).tolist() != batches.batch_indices(50, 50, 1, 0).tolist()


def test_a_training_plan_gives_the_places_that_are_wanted():
    plan = TrainPlan(num_images=10, batch_size=4, seed=3, rows=np.array([1, 3]))
    np.testing.assert_array_equal(plan(6), batches.batch_indices(10, 4, 3, 6)[[1, 3]])


def test_an_evaluation_plan_by_hand():
    # Seven images, three a batch: 0 1 2, 3 4 5, 6 and two places that are empty.
    plan = EvalPlan(num_images=7, batch_size=3, rows=np.arange(3))
    assert [plan(number).tolist() for number in plan.numbers] == [[0, 1, 2], [3, 4, 5], [6, PADDING, PADDING]]
    last = EvalPlan(num_images=7, batch_size=3, rows=np.array([2]))
    assert [last(number).tolist() for number in last.numbers] == [[2], [5], [PADDING]]


def test_images_are_spread_evenly_over_a_split_by_hand():
    assert SpreadPlan(10, 4, np.arange(4))(0).tolist() == [0, 2, 5, 7]
    assert SpreadPlan(10, 4, np.array([1, 3]))(0).tolist() == [2, 7]  # one of two processes
    assert SpreadPlan(3, 6, np.arange(6))(0).tolist() == [0, 0, 1, 1, 2, 2]
