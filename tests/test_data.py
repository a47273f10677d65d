import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from bvit_jax import batches, data
from bvit_jax.data_config import DataConfig
from tests.conftest import make_config

PROCEDURAL = DataConfig(
    name="procedural",
    reading="memory",
    test_split="test",
    stored_size=16,
    image_size=16,
    channels=3,
    num_classes=6,
    num_train=300,
    num_validation=60,
    num_test=90,
    seed=0,
)


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load(make_config().data)


@pytest.fixture(scope="module")
def gratings() -> data.Dataset:
    return data.load(PROCEDURAL)


def splits(dataset: data.Dataset) -> tuple[data.Split, ...]:
    return dataset.train, dataset.validation, dataset.test


def as_rows(split: data.Split) -> list[tuple[bytes, int]]:
    return [(image.tobytes(), int(label)) for image, label in zip(split.images, split.labels, strict=True)]


def small_split(number: int) -> data.Split:
    """Every pixel of image i is i + 1, so that no image looks like padding; its label is i + 10."""
    images = np.broadcast_to(np.arange(1, number + 1, dtype=np.uint8)[:, None, None, None], (number, 2, 2, 1))
    return data.Split(images, np.arange(10, number + 10, dtype=np.int32))


def test_the_digits_are_split_as_documented(digits):
    assert [len(split) for split in splits(digits)] == [1200, 197, 400]
    for split in splits(digits):
        assert split.images.shape == (len(split), 8, 8, 1)
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)


def test_the_splits_are_the_digits_of_scikit_learn_each_once(digits):
    # No two of the 1,797 images are equal, so equal lists say that the splits are disjoint and complete.
    original = load_digits()
    expected = [
        ((255 * image / 16).round().astype(np.uint8)[..., None].tobytes(), int(label))
        for image, label in zip(original.images, original.target, strict=True)
    ]
    assert len(set(expected)) == 1797
    assert sorted(row for split in splits(digits) for row in as_rows(split)) == sorted(expected)


def test_pixels_use_the_whole_range(digits):
    for split in splits(digits):
        assert (split.images.min(), split.images.max()) == (0, 255)


def test_every_class_is_in_every_split(digits, gratings):
    for dataset, classes in ((digits, 10), (gratings, 6)):
        for split in splits(dataset):
            assert set(split.labels.tolist()) == set(range(classes))


def test_the_splits_do_not_depend_on_the_seed_of_the_run():
    for seed in (0, 5):
        assert as_rows(data.load(make_config(seed=seed).data).test) == as_rows(data.load(make_config().data).test)


def test_the_splits_are_shuffled(digits):
    original = load_digits().target[:1200]
    assert np.mean(digits.train.labels == original) < 0.3  # chance is 0.1


def test_splits_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="1797 of digits"):
        data.load(dataclasses.replace(make_config().data, num_train=1199))


def test_a_training_batch_holds_the_images_of_its_indices():
    split = small_split(10)
    batch = data.train_batch(split, 4, 3, 6, np.arange(4))
    index = batches.batch_indices(10, 4, 3, 6)
    np.testing.assert_array_equal(batch.images, split.images[index])
    np.testing.assert_array_equal(batch.labels, index + 10)
    np.testing.assert_array_equal(batch.weights, np.ones(4))
    assert (batch.images.dtype, batch.labels.dtype, batch.weights.dtype) == (np.uint8, np.int32, np.float32)


@given(number=st.integers(1, 30), batch_size=st.integers(1, 24), step=st.integers(0, 50), places=st.data())
def test_some_places_of_a_batch_are_those_of_the_whole(number, batch_size, step, places):
    rows = np.array(sorted(places.draw(st.sets(st.integers(0, batch_size - 1)))), np.int64)
    split, every = small_split(number), np.arange(batch_size)
    pairs = [(data.train_batch(split, batch_size, 3, step, rows), data.train_batch(split, batch_size, 3, step, every))]
    some, whole = (list(data.eval_batches(split, batch_size, wanted)) for wanted in (rows, every))
    for part, batch in [*pairs, *zip(some, whole, strict=True)]:
        for name in ("images", "labels", "weights"):
            found, expected = getattr(part, name), getattr(batch, name)[rows]
            np.testing.assert_array_equal(found, expected)
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize(("number", "batch_size", "batches"), [(7, 3, 3), (6, 3, 2), (2, 5, 1), (1, 1, 1), (5, 5, 1)])
def test_evaluation_covers_every_image_once_in_order(number, batch_size, batches):
    split = small_split(number)
    found = list(data.eval_batches(split, batch_size, np.arange(batch_size)))
    assert [batch.images.shape for batch in found] == [(batch_size, 2, 2, 1)] * batches
    weights = np.concatenate([batch.weights for batch in found])
    np.testing.assert_array_equal(weights, [1] * number + [0] * (batches * batch_size - number))
    np.testing.assert_array_equal(np.concatenate([b.images for b in found])[weights == 1], split.images)
    np.testing.assert_array_equal(np.concatenate([b.labels for b in found])[weights == 1], split.labels)
    assert {(b.images.dtype, b.labels.dtype, b.weights.dtype) for b in found} == {
        (np.dtype("uint8"), np.dtype("int32"), np.dtype("float32"))
    }
    assert not np.concatenate([b.images for b in found])[weights == 0].any()


def test_gratings_are_as_asked(gratings):
    assert [len(split) for split in splits(gratings)] == [300, 60, 90]
    for split in splits(gratings):
        assert split.images.shape == (len(split), 16, 16, 3)
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        assert split.images.std() > 0.1 * 255


def test_gratings_have_no_image_twice(gratings):
    assert len({row for split in splits(gratings) for row in as_rows(split)}) == 450


def test_gratings_are_deterministic_and_differ_by_their_seed(gratings):
    assert as_rows(data.load(PROCEDURAL).test) == as_rows(gratings.test)
    other = data.load(dataclasses.replace(PROCEDURAL, seed=1))
    assert not set(as_rows(other.test)) & set(as_rows(gratings.test))


def test_gratings_classes_are_balanced(gratings):
    labels = np.concatenate([split.labels for split in splits(gratings)])
    assert np.bincount(labels).tolist() == [75] * 6


def spectrum(split: data.Split) -> np.ndarray:
    """Magnitudes of the spectrum, which do not see the random phase: (n, features)."""
    return np.abs(np.fft.fft2(split.images, axes=(1, 2))).reshape(len(split), -1)


def nearest_mean_accuracy(dataset: data.Dataset) -> float:
    """Classifies the test images by the nearest class mean of the training images' spectra."""
    train, labels = spectrum(dataset.train), dataset.train.labels
    centroids = np.stack([train[labels == c].mean(axis=0) for c in range(labels.max() + 1)])
    distances = ((spectrum(dataset.test)[:, None] - centroids) ** 2).sum(axis=-1)
    return np.mean(distances.argmin(axis=1) == dataset.test.labels)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("num_classes", [6, 20])
def test_classes_of_gratings_can_be_told_apart(channels, num_classes):
    dataset = data.load(dataclasses.replace(PROCEDURAL, channels=channels, num_classes=num_classes))
    assert dataset.train.images.shape[-1] == channels
    assert nearest_mean_accuracy(dataset) > 0.7  # chance is 0.17 and 0.05


def test_classes_of_gratings_differ_in_colour(gratings):
    # The share of each channel in an image's contrast, averaged over a class.
    contrast = (gratings.train.images / 255).std(axis=(1, 2))
    share = contrast / contrast.sum(axis=1, keepdims=True)
    by_class = np.stack([share[gratings.train.labels == c].mean(axis=0) for c in range(6)])
    apart = [np.abs(by_class[a] - by_class[b]).max() for a in range(6) for b in range(a)]
    assert min(apart) > 0.03


def test_gratings_beyond_one_chunk_are_drawn_as_well():
    # Images are drawn 1,024 at a time.
    sizes = {"image_size": 8, "stored_size": 8, "channels": 1, "num_train": 2000, "num_test": 1000}
    dataset = data.load(dataclasses.replace(PROCEDURAL, **sizes))
    assert nearest_mean_accuracy(dataset) > 0.7
    assert len({row[0] for split in splits(dataset) for row in as_rows(split)}) == 3060
