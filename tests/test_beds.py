import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from bvit_jax import beds, data, data_config, drawn
from bvit_jax.data_config import DataConfig, with_fixed
from bvit_jax.model_config import ConfigError
from tests.conftest import ROOT, make_config

NAMES = ("few_digits", "digit_pairs", "photo_patches")
SMALL = {"few_digits": 100, "digit_pairs": 200, "photo_patches": 120}
LABELS = load_digits().target


def made(name: str, **changes: int) -> data.Dataset:
    return data.load(DataConfig(**with_fixed({"name": name, "num_train": SMALL[name]} | changes)))


def splits(dataset: data.Dataset) -> tuple[data.Split, ...]:
    return dataset.train, dataset.validation, dataset.test


def same(one: data.Split, other: data.Split) -> bool:
    return np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels)


@pytest.fixture
def numbered(monkeypatch):
    """Puts the number of each digit, 0 to 1,796, in the place of its first two pixels; the others are 0."""
    images = np.zeros((1797, 8, 8, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.divmod(np.arange(1797), 256)
    monkeypatch.setattr(drawn, "digits", lambda: (images, LABELS.astype(np.int32)))


def numbers(split: data.Split) -> np.ndarray:
    return split.images[:, 0, 0, 0] * np.int64(256) + split.images[:, 0, 1, 0]


@pytest.mark.parametrize("name", NAMES)
def test_a_bed_has_the_sizes_that_its_configuration_says(name):
    config = DataConfig(**with_fixed({"name": name, "num_train": SMALL[name]}))
    found = splits(data.load(config))
    assert [len(split) for split in found] == [SMALL[name], config.num_validation, config.num_test]
    for split in found:
        assert split.images.shape == (len(split), config.image_size, config.image_size, 1)
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        assert set(split.labels.tolist()) == set(range(config.num_classes))


@pytest.mark.parametrize("name", NAMES)
def test_a_bed_is_a_function_of_its_seed(name):
    first, again, other = made(name, seed=3), made(name, seed=3), made(name, seed=4)
    assert all(same(*pair) for pair in zip(splits(first), splits(again), strict=True))
    assert not any(same(*pair) for pair in zip(splits(first), splits(other), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_more_training_images_are_the_same_with_others_behind_and_leave_the_rest(name):
    few, many = made(name), made(name, num_train=3 * SMALL[name])
    assert len(many.train) == 3 * len(few.train)
    assert same(few.train, data.Split(many.train.images[: len(few.train)], many.train.labels[: len(few.train)]))
    assert same(few.validation, many.validation)
    assert same(few.test, many.test)


@pytest.mark.parametrize("name", NAMES)
def test_every_class_has_as_many_images_to_train_and_test_on(name):
    dataset = made(name)
    for split in (dataset.train, dataset.test):
        assert len(set(np.bincount(split.labels).tolist())) == 1


@pytest.mark.parametrize("name", NAMES)
def test_no_image_is_used_twice(name):
    images = [image.tobytes() for split in splits(made(name)) for image in split.images]
    assert len(set(images)) == len(images)


def test_few_digits_are_digits_with_their_labels_and_no_digit_is_in_two_splits(numbered):
    used = [numbers(split) for split in splits(made("few_digits", num_train=1000))]
    assert sorted(np.concatenate(used)) == list(range(1797))
    for split, places in zip(splits(made("few_digits", num_train=1000)), used, strict=True):
        np.testing.assert_array_equal(split.labels, LABELS[places])
        assert np.mean(np.diff(places[split.labels == 5]) > 0) < 0.7  # shuffled: half of the steps go up


def test_few_digits_look_as_the_digits_do():
    known = {image.tobytes() for image in drawn.digits()[0]}
    assert {image.tobytes() for split in splits(made("few_digits")) for image in split.images} <= known


def test_pairs_are_made_of_digits_of_their_own_split_alone_fragments_too(numbered, monkeypatch):
    sources = [numbers(split) for split in splits(made("few_digits", num_train=1000, seed=5))]
    for own, places in enumerate(sources):
        white = np.zeros((1797, 8, 8, 1), np.uint8)
        white[places] = 255
        monkeypatch.setattr(drawn, "digits", lambda white=white: (white, LABELS.astype(np.int32)))
        found = splits(made("digit_pairs", seed=5))
        # With its own digits white, a split shows both in every image; with those of others, nothing at all.
        for number, split in enumerate(found):
            shown = (split.images > 0).sum(axis=(1, 2, 3))
            assert shown.min() >= 2 * 16**2 if number == own else shown.max() == 0


def test_the_label_of_a_pair_is_its_left_and_then_its_right_digit(monkeypatch):
    # A digit has the brightness of its class, and each lies in its half, above all fragments.
    images = np.broadcast_to(25 * (1 + LABELS)[:, None, None, None], (1797, 8, 8, 1)).astype(np.uint8)
    monkeypatch.setattr(drawn, "digits", lambda: (images, LABELS.astype(np.int32)))
    monkeypatch.setattr(beds, "_CLUTTER_CONTRAST", (0.0, 0.0))
    monkeypatch.setattr(beds, "_DIGIT_CONTRAST", (1.0, 1.0))
    for split in splits(made("digit_pairs")):
        left, right = (split.images[:, :, half].max(axis=(1, 2, 3)) // 25 - 1 for half in (slice(16), slice(16, 32)))
        np.testing.assert_array_equal(split.labels, 10 * left.astype(int) + right)


def test_digits_of_a_pair_lie_side_by_side_in_the_middle(monkeypatch):
    monkeypatch.setattr(drawn, "digits", lambda: (np.full((1797, 8, 8, 1), 255, np.uint8), LABELS.astype(np.int32)))
    monkeypatch.setattr(beds, "_FRAGMENTS", (0, 0))
    for image in made("digit_pairs").test.images[..., 0]:
        y, x = np.nonzero(image)
        assert (len(y), y.min(), y.max(), x.min(), x.max()) == (2 * 16**2, 8, 23, 0, 31)


def test_places_in_a_pair_change_with_the_seed_and_the_split_not_the_digits_alone(monkeypatch):
    monkeypatch.setattr(drawn, "digits", lambda: (np.full((1797, 8, 8, 1), 255, np.uint8), LABELS.astype(np.int32)))
    first, other = made("digit_pairs", seed=3), made("digit_pairs", seed=4)
    assert not any(same(*pair) for pair in zip(splits(first), splits(other), strict=True))
    assert not np.array_equal(first.train.images, first.validation.images[: len(first.train)])


def test_clutter_has_the_fewest_and_the_most_fragments(monkeypatch):
    laid = []
    monkeypatch.setattr(beds, "_lay", lambda canvas, image, contrast, top, left: laid.append(len(image)))
    of_class = beds.dealt_digits(LABELS, 0)[0]
    enlarged = np.zeros((1797, 16, 16), np.uint8)
    counts = set()
    for seed in range(60):
        laid.clear()
        beds._pair(47, enlarged, of_class, np.random.default_rng(seed))
        counts.add(len(laid) - 2)
    fewest, most = beds._FRAGMENTS
    assert counts == set(range(fewest, most + 1))


@pytest.fixture
def noise(monkeypatch):
    """Puts noise in the place of the photographs, in which every patch is at one place alone; returns it."""
    rng = np.random.default_rng(0)
    found = [rng.integers(0, 256, (200, 150), np.uint8) for _ in range(12)]
    for grey in found[::2]:
        grey[64:96, :] = rng.integers(100, 106, (32, 150))  # a band of blocks that show next to nothing
    monkeypatch.setattr(beds, "photographs", lambda: found)
    return found


def places(split: data.Split, photographs: list[np.ndarray]) -> list[tuple[int, int, int]]:
    """Returns photograph, top and left of each patch, by looking at all places of all photographs."""
    known = {}
    for number, grey in enumerate(photographs):
        for y in range(grey.shape[0] - 15):
            for x in range(grey.shape[1] - 15):
                known[grey[y : y + 16, x : x + 16].tobytes()] = (number, y, x)
    return [known[image.tobytes()] for image in split.images]


def test_patches_lie_in_blocks_of_their_split_and_are_labelled_with_their_photograph(noise):
    # 6 x 4 whole blocks of 32 pixels, and some pixels beyond them, which are not used.
    dataset = made("photo_patches", num_train=1200)
    blocks = []
    for split in splits(dataset):
        found = places(split, noise)
        assert [number for number, _, _ in found] == split.labels.tolist()
        assert all(y % 32 <= 16 and x % 32 <= 16 and y < 192 and x < 128 for _, y, x in found)
        assert not any(number % 2 == 0 and y // 32 == 2 for number, y, _ in found)  # the band
        assert len({y % 32 for _, y, _ in found}) == len({x % 32 for _, _, x in found}) == 17
        blocks.append({(number, y // 32, x // 32) for number, y, x in found})
    assert not blocks[0] & blocks[1]
    assert not blocks[0] & blocks[2]
    assert not blocks[1] & blocks[2]


def test_blocks_are_dealt_60_15_25_and_all_of_them():
    dealt = beds._dealt_blocks(np.zeros((200, 330), np.uint8), np.random.default_rng(0))
    assert [len(part) for part in dealt] == [36, 9, 15]  # of 6 x 10
    assert sorted(map(tuple, np.concatenate(dealt).tolist())) == [(y, x) for y in range(6) for x in range(10)]


def test_a_photograph_with_too_little_to_see_is_refused(monkeypatch):
    monkeypatch.setattr(beds, "photographs", lambda: [np.zeros((64, 64), np.uint8)] * 12)
    with pytest.raises(ConfigError, match="a photograph has 0 places for 10 patches"):
        made("photo_patches")


def test_deviations_are_those_of_the_patches():
    grey = np.random.default_rng(0).integers(0, 256, (20, 23), np.uint8)
    expected = [[grey[y : y + 16, x : x + 16].std() for x in range(8)] for y in range(5)]
    np.testing.assert_allclose(beds._deviation(grey), expected, rtol=1e-12)
    np.testing.assert_array_equal(beds._deviation(np.full((16, 16), 77, np.uint8)), [[0.0]])


def test_every_embedded_set_has_its_maker():
    assert set(data._MAKERS) == set(data_config.EMBEDDED)


def test_the_photographs_are_grey_and_as_many_as_the_classes():
    found = beds.photographs()
    assert len(found) == with_fixed({"name": "photo_patches"})["num_classes"]
    assert all(grey.ndim == 2 and grey.dtype == np.uint8 for grey in found)
    assert len({grey.tobytes() for grey in found}) == len(found)


def test_the_largest_sets_of_patches_can_be_cut():
    most = data_config.TRAIN_SIZES["photo_patches"][-1]
    for seed in range(3):
        assert len(made("photo_patches", num_train=most, seed=seed).train) == most


def test_no_home_and_no_network_are_needed(tmp_path):
    code = "import socket; from bvit_jax import beds; socket.socket = None; print(len(beds.photographs()))"
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "12", run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "num_train", "right"),
    [
        ("few_digits", 90, "a multiple of 10 from 100 to 1000"),
        ("few_digits", 305, "a multiple of 10 from 100 to 1000"),
        ("few_digits", 1010, "a multiple of 10 from 100 to 1000"),
        ("digit_pairs", 150, "a multiple of 100 from 100 to 100000"),
        ("digit_pairs", 100_100, "a multiple of 100 from 100 to 100000"),
        ("photo_patches", 100, "a multiple of 12 from 12 to 24000"),
        ("photo_patches", 24_012, "a multiple of 12 from 12 to 24000"),
    ],
)
def test_an_impossible_number_of_training_images_is_refused(name, num_train, right):
    with pytest.raises(ConfigError, match=f"^data.num_train = {num_train}: it must be {right}$"):
        made(name, num_train=num_train)


@pytest.mark.parametrize(("name", "patch_size"), [("few_digits", 2), ("digit_pairs", 8), ("photo_patches", 4)])
def test_the_name_and_a_patch_size_make_a_configuration_of_another_one_a_bed(name, patch_size):
    config = make_config(data__name=name, model__patch_size=patch_size)
    assert config.model.image_size == config.data.image_size
    assert config.model.num_classes == config.data.num_classes
    assert config.model.grid == (4, 4)
    assert config.data.num_train == {"few_digits": 300, "digit_pairs": 4000, "photo_patches": 3996}[name]
    other = make_config(data__name=name, model__patch_size=patch_size, data__num_train=600, data__seed=7)
    assert (other.data.num_train, other.data.seed) == (600, 7)


@pytest.mark.parametrize("field", ["num_validation", "num_test", "image_size", "num_classes", "channels"])
def test_what_a_bed_fixes_cannot_be_changed(field):
    with pytest.raises(ConfigError, match=f"^data.{field} = 7: it must be .*, which digit_pairs fixes$"):
        made("digit_pairs", **{field: 7})


@pytest.mark.parametrize(
    ("name", "digest"),
    [("few_digits", "da9c0a25d0b6df62"), ("digit_pairs", "cfa9a9de60f59014"), ("photo_patches", "503238a65f937f66")],
)
def test_the_images_are_those_that_accuracies_were_reported_of(name, digest):
    """Whoever changes them makes older runs of the same configuration incomparable: give the bed another name."""
    hashed = hashlib.sha256()
    for split in splits(made(name)):
        hashed.update(split.images.tobytes() + split.labels.tobytes())
    assert hashed.hexdigest()[:16] == digest
