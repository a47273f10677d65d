import pytest

from bvit_jax import bench_data
from tests.conftest import make_config

SMALL = {"num_layers": 1, "d_model": 16, "d_ff": 32, "num_heads": 2, "patch_size": 4}


def test_figures_are_all_there_and_fit_each_other(monkeypatch):
    monkeypatch.setattr(bench_data, "WINDOW_SECONDS", 0.02)
    repeats = []
    config = make_config("dense", **{f"model__{name}": value for name, value in SMALL.items()})
    found = bench_data.measure(config, 3, lambda: repeats.append(1))
    assert found.keys() == bench_data.COLUMNS.keys()
    assert (found["batch_size"], found["stored_size"], found["repeats"], len(repeats)) == (16, 8, 3, 3)
    assert found["step_images_s"] == pytest.approx(16e3 / found["step_ms"])
    assert found["augment_percent"] == pytest.approx(100 * found["step_images_s"] / found["augment_images_s"])
    assert found["waiting_percent_lower"] <= found["waiting_percent"] <= found["waiting_percent_upper"] < 100


def test_a_window_is_as_many_times_as_take_long_enough(monkeypatch):
    # A clock that moves by a second each time that work is done once.
    now = [0.0]
    monkeypatch.setattr(bench_data, "WINDOW_SECONDS", 35.0)
    monkeypatch.setattr(bench_data.time, "perf_counter", lambda: now[0])
    done = []

    def work(times: int) -> None:
        done.append(times)
        now[0] += times

    window = bench_data._window(work)
    assert done[0] == bench_data.WARM_UP_STEPS
    assert done[1:] == [1, 10, 42]  # ten times as many at most, then 1.2 times what is needed
    assert window() == 1.0
    assert done[-1] == 42
