"""Images of prepared sets: what is read as it is needed is what memory holds, on any number of hosts."""

import dataclasses
import itertools
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from conftest import call, environment

from bvit_jax import batches, cores, data, data_dirs, prepared, streams
from bvit_jax.data_config import DataConfig
from bvit_jax.model_config import ConfigError
from tests import made_archive

JPEGS = DataConfig(
    name="tiny_jpegs",
    reading="stream",
    test_split="validation",
    stored_size=24,
    image_size=16,
    channels=3,
    num_classes=4,
    num_train=30,
    num_validation=7,
    num_test=11,
    seed=0,
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_archive.prepare_jpegs(tmp_path_factory.mktemp("prepared"), train=40, validation=11)


@pytest.fixture(autouse=True)
def in_data_dir(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data_dirs.VARIABLE, str(data_dir))


@pytest.fixture(scope="module")
def both(data_dir: Path) -> Iterator[tuple[data.Dataset, data.Dataset]]:
    """The same images, in memory and read as they are needed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(data_dirs.VARIABLE, str(data_dir))
        yield data.load(dataclasses.replace(JPEGS, reading="memory")), data.load(JPEGS)


def assert_same(found: batches.Batch, expected: batches.Batch) -> None:
    for name in ("images", "labels", "weights"):
        here, there = getattr(found, name), getattr(expected, name)
        np.testing.assert_array_equal(here, there)
        assert here.dtype == there.dtype


def test_the_splits_are_as_asked_and_have_no_image_in_common(both):
    for dataset in both:
        assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [30, 7, 11]
    held = both[0]
    images = [image.tobytes() for split in (held.train, held.validation, held.test) for image in split.images]
    assert len(set(images)) == 48
    assert held.train.images.shape == (30, 24, 24, 3)
    assert held.train.images.dtype == np.uint8
    assert len(data.opened(JPEGS).class_names) == 4


def test_what_is_streamed_is_what_memory_holds(both):
    held, streamed = both
    rows = np.arange(8)
    for name in ("train", "validation", "test"):
        pair = [list(data.eval_batches(getattr(dataset, name), 8, rows)) for dataset in (streamed, held)]
        assert len(pair[0]) == -(-len(getattr(held, name)) // 8)
        for found, expected in zip(*pair, strict=True):
            assert_same(found, expected)
    steps = range(3, 12)  # 30 images are not quite four batches: epochs change within a batch
    pair = [data.train_batches(dataset.train, 8, 5, steps, rows) for dataset in (streamed, held)]
    for found, expected in zip(*pair, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("reading", [0, 1])
def test_the_batches_are_the_same_on_any_number_of_hosts_and_after_a_resume(both, hosts, reading):
    split = both[reading].train
    whole = list(data.train_batches(both[0].train, 8, 5, range(10), np.arange(8)))
    for first in (0, 6):
        parts = [data.train_batches(split, 8, 5, range(first, 10), rows) for rows in np.split(np.arange(8), hosts)]
        for expected, *found in zip(whole[first:], *parts, strict=True):
            for name in ("images", "labels", "weights"):
                joined = np.concatenate([getattr(part, name) for part in found])
                np.testing.assert_array_equal(joined, getattr(expected, name))


@pytest.mark.parametrize("killed_after", [None, 2])
def test_processes_that_read_give_the_same_batches_and_may_be_killed(both, monkeypatch, killed_after):
    monkeypatch.setattr(streams, "CORES_A_WORKER", max(len(cores.available()) // 2, 1))
    monkeypatch.setattr(streams, "BATCHES_A_WORKER", 1)
    flags.FLAGS.mark_as_parsed()
    try:
        pair = [data.train_batches(dataset.train, 8, 5, range(12), np.arange(8)) for dataset in reversed(both)]
        for number, (found, expected) in enumerate(zip(*pair, strict=True)):
            assert_same(found, expected)
            workers = multiprocessing.active_children()
            if number == 0:
                assert len(workers) == min(len(cores.available()), 2)
            if number == killed_after:
                for worker in workers:
                    os.kill(worker.pid, signal.SIGTERM)
    finally:
        flags.FLAGS.unparse_flags()


def read_and_tell(data_dir: str) -> None:
    """Reads with processes of its own, says which, and waits to be killed."""
    os.environ[data_dirs.VARIABLE] = data_dir
    streams.CORES_A_WORKER = max(len(cores.available()) // 2, 1)
    streams.BATCHES_A_WORKER = 1
    flags.FLAGS.mark_as_parsed()
    found = data.train_batches(data.load(JPEGS).train, 8, 5, range(100), np.arange(8))
    next(found)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(600)


def test_processes_that_read_end_with_the_one_that_is_killed(data_dir):
    command = call(read_and_tell, str(data_dir))
    with subprocess.Popen(command, env=environment(1), stdout=subprocess.PIPE, text=True) as reader:
        children = [int(word) for word in reader.stdout.readline().split()]
        reader.kill()
    assert children
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_few_batches_or_cores_are_read_without_processes(monkeypatch):
    monkeypatch.setattr(cores, "available", lambda: list(range(2 * streams.CORES_A_WORKER)))
    assert streams.workers(10**6) == 0  # nobody has parsed flags here
    assert streams.held(10**6) == streams.BATCHES_AHEAD
    flags.FLAGS.mark_as_parsed()
    try:
        assert [streams.workers(count) for count in (1, 8, 16, 10**6)] == [0, 1, 2, 2]
        assert streams.held(10**6) == 2 * 2 * streams.BATCHES_AHEAD
    finally:
        flags.FLAGS.unparse_flags()


def test_an_iterator_that_is_left_early_does_no_harm(both):
    split = both[1].train
    for _ in range(3):
        first = list(itertools.islice(data.train_batches(split, 8, 5, range(2**31 - 1), np.arange(8)), 2))
        assert_same(first[1], data.train_batch(split, 8, 5, 1, np.arange(8)))


def test_validation_does_not_depend_on_how_many_images_are_trained_on(both):
    fewer = data.load(dataclasses.replace(JPEGS, reading="memory", num_train=5))
    assert len(fewer.train) == 5
    np.testing.assert_array_equal(fewer.validation.images, both[0].validation.images)
    other = data.load(dataclasses.replace(JPEGS, reading="memory", seed=1))
    assert {i.tobytes() for i in other.validation.images} != {i.tobytes() for i in both[0].validation.images}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train": 34}, "data.num_train = 34: it must be 33 at most: split train holds 40, 7 of them are for"),
        ({"num_validation": 40}, "data.num_validation = 40: it must be under 40, the images of split train"),
        ({"num_test": 12}, "data.num_test = 12: it must be 11 at most, of validation"),
        ({"test_split": "test"}, "data.test_split = 'test': it must be train or validation"),
        ({"num_classes": 5}, "data.num_classes = 5: it must be 4, of tiny_jpegs"),
        ({"name": "tiny_pngs"}, "data.name = 'tiny_pngs': not prepared in "),
    ],
)
def test_a_set_that_is_not_as_configured_is_refused_before_an_image_is_read(changes, message, monkeypatch):
    monkeypatch.setattr(prepared.Source, "read", lambda *_: pytest.fail("an image was read"))
    config = dataclasses.replace(JPEGS, reading="memory", **changes)
    for look in (data.opened, data.load):
        with pytest.raises(ConfigError) as raised:
            look(config)
        assert str(raised.value).startswith(message)


def test_sets_that_are_always_there_are_found(monkeypatch):
    monkeypatch.setenv(data_dirs.VARIABLE, "/nowhere")
    assert data.opened(dataclasses.replace(JPEGS, name="procedural")) is None
