import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_config
from test_metrics import scalars

from bvit_jax import device_memory, memory, metrics, train, train_step
from bvit_jax.config import Config
from bvit_jax.train_step import TrainState


def parts(**sizes: int) -> Any:
    """A stand-in for an array: the bytes of its part on each device of this process."""
    shards = [SimpleNamespace(device=name, data=np.zeros(size, np.uint8)) for name, size in sizes.items()]
    return SimpleNamespace(addressable_shards=shards)


def first_state(config: Config) -> TrainState:
    return jax.jit(train_step.init_state, static_argnums=0)(config)


def test_bytes_of_a_state_are_those_of_the_fullest_device():
    params = {"whole": parts(a=100, b=100), "split": parts(a=10, b=30), "on one": parts(c=120)}
    opt_state = ({"mu": parts(a=7), "nu": parts(a=7, c=8)}, parts(a=1, b=1, c=1))
    state = TrainState(parts(a=4, b=4, c=4), params, None, opt_state, parts(a=400, b=400, c=400))
    # a: 100 + 10, b: 100 + 30, c: 120; then a: 7 + 7 + 1, b: 1, c: 8 + 1.
    assert device_memory.of_state(state) == {"params_bytes": 130, "optimizer_bytes": 15}
    # An average counts with the optimiser: a: 15 + 50, b: 1 + 70.
    averaged = state.replace(average=parts(a=50, b=70))
    assert device_memory.of_state(averaged) == {"params_bytes": 130, "optimizer_bytes": 71}


def test_bytes_of_real_arrays_by_hand():
    params = {"a": jnp.zeros((3, 5)), "b": jnp.zeros(7, jnp.bfloat16)}
    state = TrainState(jnp.int32(0), params, None, (jnp.zeros(2, jnp.int32), ()), jnp.zeros(50))
    assert device_memory.of_state(state) == {"params_bytes": 4 * 15 + 2 * 7, "optimizer_bytes": 8}
    assert device_memory.of_state(state.replace(opt_state=())) == {"params_bytes": 74, "optimizer_bytes": 0}


def test_a_state_on_one_device_holds_its_parameters_and_twice_that():
    state = first_state(make_config("standard,4", model__num_layers=1))
    counted = memory.count_params(state.params)
    found = device_memory.of_state(state)
    assert found == {"params_bytes": 4 * counted, "optimizer_bytes": 8 * counted + 8}  # and two counters


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([None], {}),
        ([{}], {}),
        ([{"peak_bytes_in_use": 5, "bytes_limit": 16, "bytes_in_use": 3}], {"peak_bytes": 5, "limit_bytes": 16}),
        (
            [{"peak_bytes_in_use": 5, "bytes_limit": 16}, {"peak_bytes_in_use": 9, "bytes_limit": 16}],
            {"peak_bytes": 9, "limit_bytes": 16},
        ),
        ([{"peak_bytes_in_use": 5, "bytes_limit": 16}, None], {}),
        ([{"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 4, "bytes_limit": 16}], {"peak_bytes": 5}),
    ],
)
def test_what_devices_tell_is_passed_on_where_all_tell_it(monkeypatch, told, expected):
    devices = [SimpleNamespace(memory_stats=lambda stats=stats: stats) for stats in told]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert device_memory.peak() == expected


def test_cpus_tell_nothing():
    assert device_memory.peak() == {}


PEAK = {"peak_bytes": 300, "limit_bytes": 1000}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A run on a device that tells its bytes, and those that it should report."""
    config = make_config("dense", model__num_layers=1)
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_memory, "peak", lambda: PEAK)
        train.run(config, workdir, show_progress=False)
    return workdir, device_memory.of_state(first_state(config)) | PEAK


def test_a_run_reports_its_bytes(run):
    workdir, expected = run
    result = json.loads((workdir / "result.json").read_text())
    # The peak is that of a process, and a run may have had several.
    assert {name: value for name, value in result["timing"].items() if "bytes" in name} == PEAK
    assert result["memory"] | PEAK == expected
    assert not result["memory"].keys() & PEAK.keys()
    timing = metrics.read_rows(workdir / "timing.jsonl")
    assert [row["step"] for row in timing] == [2, 4, 6, 6]
    for row in timing[:3]:
        assert {name: value for name, value in row.items() if name.endswith("_bytes")} == expected
    # What may differ from run to run stays out of the metrics.
    assert "_bytes" not in (workdir / "metrics.jsonl").read_text()


def test_bytes_are_shown_beside_the_times_and_change_nothing_else(run):
    workdir, expected = run
    shown = scalars(workdir / "tensorboard")
    assert {tag.removeprefix("timing/") for tag, _, _ in shown if tag.startswith("timing/")} == {
        *expected,
        *("wall_seconds", "images_per_second"),
    }
    assert {value for tag, _, value in shown if tag == "timing/params_bytes"} == {float(expected["params_bytes"])}
    rows = metrics.read_rows(workdir / "metrics.jsonl")
    numbers = {
        (f"{row['split']}/{name}", row["step"]): value
        for row in rows
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }
    others = {(tag, step): value for tag, step, value in shown if not tag.startswith("timing/")}
    assert others == pytest.approx(numbers, rel=1e-6)
