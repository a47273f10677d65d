import time
import weakref

import jax
import numpy as np
import pytest

from bvit_jax import bench_data, cores, data, data_dirs, stepping, streams
from bvit_jax.prepared import Source
from bvit_jax.sharding import Placement
from tests.conftest import make_config
from tests.made_archive import prepare_jpegs

SMALL = {"num_layers": 1, "d_model": 16, "d_ff": 32, "num_heads": 2, "patch_size": 4}
JPEGS = {
    **{"name": "tiny_jpegs", "reading": "stream", "test_split": "validation", "stored_size": 16, "image_size": 16},
    **{"channels": 3, "num_classes": 4, "num_train": 30, "num_validation": 7, "num_test": 11, "seed": 0},
}


def small_config(**of_data):
    fields = {f"model__{name}": value for name, value in SMALL.items()}
    fields |= {f"model__{name}": of_data[name] for name in ("image_size", "channels", "num_classes") if name in of_data}
    return make_config("dense", **fields, **{f"data__{name}": value for name, value in of_data.items()})


@pytest.fixture(params=["memory", "stream"])
def config(request, tmp_path, monkeypatch):
    if request.param == "memory":
        return small_config(name="digits")
    monkeypatch.setenv(data_dirs.VARIABLE, str(prepare_jpegs(tmp_path, train=40, validation=11)))
    return small_config(**JPEGS)


@pytest.fixture
def readers(monkeypatch):
    """The iterators of training batches that are made, each as the numbers of the batches that were taken from it."""
    made = []
    real = data.train_batches

    def counted(split, batch_size, seed, steps, rows):
        taken = []
        made.append(taken)
        for step, batch in zip(steps, real(split, batch_size, seed, steps, rows), strict=True):
            taken.append(step)
            yield batch

    monkeypatch.setattr(data, "train_batches", counted)
    return made


def test_figures_are_all_there_and_fit_each_other(config, readers, monkeypatch):
    monkeypatch.setattr(bench_data, "WINDOW_SECONDS", 0.02)
    repeats = []
    found = bench_data.measure(config, 3, lambda: repeats.append(1))
    assert found.keys() == bench_data.COLUMNS.keys()
    assert (found["batch_size"], found["stored_size"], found["repeats"]) == (16, config.data.stored_size, 3)
    assert len(repeats) == 3
    assert found["open_seconds"] > 0
    assert found["step_images_s"] == pytest.approx(16e3 / found["step_ms"])
    assert found["augment_percent"] == pytest.approx(100 * found["step_images_s"] / found["augment_images_s"])
    assert found["waiting_percent_lower"] <= found["waiting_percent"] <= found["waiting_percent_upper"] < 100
    # One reader for the batch that stays, and one for each part that takes batches, however many windows there are.
    assert len(readers) == 4
    assert sum(taken == [0] for taken in readers) == 1
    for taken in readers:
        assert taken == list(range(len(taken)))


def test_a_window_is_as_many_times_as_take_long_enough(monkeypatch):
    # A clock that moves by a second each time that work is done once.
    now = [0.0]
    monkeypatch.setattr(bench_data, "WINDOW_SECONDS", 35.0)
    monkeypatch.setattr(bench_data.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cores, "available", lambda: [0, 1])
    done = []

    def work(times: int) -> None:
        done.append(times)
        now[0] += times

    window = bench_data._window(work)
    warm_up = streams.BATCHES_AHEAD + 1
    assert done == [warm_up, 1, 10, 42]  # ten times as many at most, then 1.2 times what is needed
    # What the reader had ready is used up first, outside the time.
    assert window() == 1.0
    assert done[4:] == [warm_up, 42]


def test_a_reader_holds_no_more_than_a_window_uses_up_before_it_is_timed(tmp_path, monkeypatch):
    monkeypatch.setenv(data_dirs.VARIABLE, str(prepare_jpegs(tmp_path, train=40, validation=11)))
    read = []
    real = Source.read
    monkeypatch.setattr(Source, "read", lambda *arguments: (read.append(1), real(*arguments))[1])
    host = bench_data._Bench(small_config(**JPEGS)).parts()["host"]
    idle = len(read)  # the batch that stays has a reader of its own, of one batch
    assert idle == 1
    for taken in (1, 4):
        host(1 if taken == 1 else 3)
        limit = time.monotonic() + 20
        while len(read) < idle + taken + streams.BATCHES_AHEAD and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.2)  # it stops there
        assert idle + taken < len(read) <= idle + taken + streams.held(stepping.MOST_STEPS)


@pytest.mark.parametrize("part", ["host", "device"])
def test_batches_are_let_go_of(part, monkeypatch):
    alive, most = [], []

    def watch(thing):
        alive.append(weakref.ref(thing))
        most.append(sum(ref() is not None for ref in alive))
        return thing

    work = bench_data._Bench(small_config(name="digits")).parts()[part]
    work(1)
    if part == "host":
        real = data.Batch
        monkeypatch.setattr(data, "Batch", lambda *arrays: watch(real(*arrays)))
    else:
        put = Placement.put_batch
        monkeypatch.setattr(Placement, "put_batch", lambda *given: tuple(map(watch, put(*given))))
    work(12)
    assert len(alive) == (12 if part == "host" else 24)
    assert max(most) <= (2 if part == "host" else 4)  # images and labels


def test_of_augmented_batches_two_are_alive_and_the_last_is_waited_for():
    bench = bench_data._Bench(small_config(name="digits"))
    alive, waited = [], []

    class Made:
        def __init__(self, number):
            self.number = number

        def block_until_ready(self):
            waited.append(self.number)

    def as_seen(key, step, *inputs):
        # The one before the last is done before another is asked for.
        assert waited == list(range(step - 1))
        made = Made(step)
        alive.append(weakref.ref(made))
        assert sum(ref() is not None for ref in alive) <= 2
        return made

    bench._as_seen = as_seen
    bench.parts()["augment"](6)
    assert waited == list(range(6))


def test_steps_are_those_of_a_run_and_only_the_last_is_waited_for(monkeypatch):
    events, given = [], []
    bench = bench_data._Bench(small_config(name="digits"))
    expected = [bench._stepper.batch(step) for step in range(4)]
    steps = bench.parts()["step"]
    put, take, wait = Placement.put_batch, stepping.Stepper.take_with, jax.block_until_ready

    def taken(stepper, state, inputs):
        events.append("take")
        given.append(inputs)
        return take(stepper, state, inputs)

    monkeypatch.setattr(Placement, "put_batch", lambda *arrays: (events.append("put"), put(*arrays))[1])
    monkeypatch.setattr(stepping.Stepper, "take_with", taken)
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: (events.append("wait"), wait(tree))[1])
    steps(3)
    steps(1)
    assert events == [*["put", "take"] * 3, "wait", "put", "take", "wait"]
    for (images, labels), batch in zip(given, expected, strict=True):
        np.testing.assert_array_equal(images, batch.images)
        np.testing.assert_array_equal(labels, batch.labels)
    assert int(bench._state.step) == 4
