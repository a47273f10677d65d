import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bvit_jax import files, intervals, sweep, sweep_results, workdir
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError
from tests.conftest import make_config

KNOWN_LATER = [
    *("test_accuracy", "val_accuracy", "images_per_second", "wall_seconds", "test_nll"),
    *("output_cosine", "experts_used", "lost_shuffled", "lost_one"),
]
"""Columns that a run has no values for until it has a result."""


def row(**changes: Any) -> dict[str, Any]:
    """A row of a trial that has not finished."""
    usual: dict[str, Any] = {
        "family": "butterfly",
        "num_experts": 4,
        "seed": 0,
        "form": "separate",
        "params": 1000,
        "bytes_paper": 250.5,
        "bytes_full": 4000,
        "compression_paper": 4.0,
        "compression_full": 2.0,
        "steps": 6,
        "status": "unfinished",
        "bytes_full_ffn": 3000,
        "compression_full_ffn": 3.0,
        "data_seed": 0,
        "settings": "",
        "trial": "0123456789ab",
        "error": "",
    }
    return dataclasses.asdict(sweep.ResultRow(**dict.fromkeys(KNOWN_LATER) | usual | changes))


def finished(accuracy: float, **changes: Any) -> dict[str, Any]:
    """A row of a trial with a result."""
    result = dict.fromkeys(KNOWN_LATER, 0.25) | {"test_accuracy": accuracy, "test_nll": 1 - accuracy, "status": "ok"}
    return row(**result | changes)


def make_sweep(path: Path, rows: Any = None) -> Path:
    path.mkdir(parents=True)
    files.write_json(path / "sweep.json", {"base": {}})
    if rows is not None:
        files.write_json(path / "results.json", rows)
    return path


def begin(path: Path, config: Config) -> Path:
    """Makes the directory of a trial that starts, without doing anything."""
    directory = path / "trials" / config.digest()
    workdir.claim(directory, "config.json", config.to_dict(), ())
    return directory


def test_results_of_one_sweep_come_back_row_by_row(tmp_path):
    rows = [
        finished(0.5, trial="a", settings="optimizer.ema_decay=0.9"),
        finished(0.75, trial="b", family="standard", form="-", num_experts=16, seed=2),
        row(trial="c", status="failed", error="ValueError: loss is nan", form="tied"),
    ]
    found = sweep_results.read(make_sweep(tmp_path / "small", rows))
    assert list(found) == ["sweep", *(field.name for field in dataclasses.fields(sweep.ResultRow)), "series"]
    assert found["sweep"].tolist() == ["small"] * 3
    assert found["series"].tolist() == [
        "butterfly separate optimizer.ema_decay=0.9",
        "standard",
        "butterfly tied",
    ]
    for name in rows[0]:
        values = found[name].tolist()
        expected = [one[name] for one in rows]
        assert values[:2] == expected[:2]
        assert values[2] == expected[2] if expected[2] is not None else math.isnan(values[2]), name


def test_series_of_several_sweeps_have_their_names_before(tmp_path):
    first = make_sweep(tmp_path / "first", [finished(0.5)])
    second = make_sweep(tmp_path / "second", [finished(0.75), row(family="dense", form="-")])
    found = sweep_results.read(first, str(second))
    assert found.index.tolist() == [0, 1, 2]
    assert found["sweep"].tolist() == ["first", "second", "second"]
    expected = ["first: butterfly separate", "second: butterfly separate", "second: dense"]
    assert found["series"].tolist() == expected


def test_a_sweep_may_be_named_from_within(tmp_path, monkeypatch):
    monkeypatch.chdir(make_sweep(tmp_path / "small", [row()]))
    assert sweep_results.read(".")["sweep"].tolist() == ["small"]


@pytest.mark.parametrize("beside", [None, [], [row(status="failed")]])
def test_what_is_not_known_is_nan_among_numbers(tmp_path, beside):
    # However little another sweep has got done: columns of numbers stay such, and can be counted with.
    finished_one = make_sweep(tmp_path / "a", [finished(0.5), row()])
    for paths in ([finished_one], [finished_one, make_sweep(tmp_path / "b", beside)]):
        found = sweep_results.read(*paths)
        for name in KNOWN_LATER:
            assert found[name].dtype == np.float64, name
        for name in ("num_experts", "seed", "bytes_full", "bytes_full_ffn"):
            assert found[name].dtype == np.int64, name
        assert sweep_results.means(found)["accuracy"].dtype == np.float64


def test_where_no_run_has_got_that_far_all_is_nan(tmp_path):
    found = sweep_results.read(make_sweep(tmp_path / "a", [row(), row(trial="b")]))
    for name in KNOWN_LATER:
        assert found[name].dtype == np.float64, name
        assert found[name].isna().all()


def test_trials_that_have_begun_are_listed_while_none_has_ended(tmp_path):
    path = make_sweep(tmp_path / "new")
    configs = [make_config("butterfly,4,tied", seed=1), make_config("standard,2")]
    for config in configs:
        begin(path, config)
    (path / "trials" / "just_made").mkdir()
    (path / "trials" / "damaged").mkdir()
    (path / "trials" / "damaged" / "config.json").write_text("{")
    found = sweep_results.read(path)
    assert found["trial"].tolist() == sorted(config.digest() for config in configs)
    found = found.set_index("trial").loc[[config.digest() for config in configs]]
    assert found["series"].tolist() == ["butterfly tied", "standard"]
    assert found["num_experts"].tolist() == [4, 2]
    assert found["seed"].tolist() == [1, 0]
    assert found["status"].tolist() == ["unfinished"] * 2
    assert found["test_accuracy"].isna().all()
    assert (found["bytes_full"] > 0).all()


def test_a_result_of_a_case_that_is_not_known_yet_does_not_count(tmp_path):
    path = make_sweep(tmp_path / "new")
    directory = begin(path, make_config("standard,2"))
    files.write_json(directory / "result.json", {"test_accuracy": 0.5, "test_nll": 1.5})
    found = sweep_results.read(path)
    assert found["status"].tolist() == ["unfinished"]
    assert found[["test_accuracy", "test_nll"]].isna().all(axis=None)


@pytest.mark.parametrize("rows", [None, []])
def test_a_sweep_of_which_nothing_has_begun_has_no_rows(tmp_path, rows):
    found = sweep_results.read(make_sweep(tmp_path / "new", rows))
    assert len(found) == 0
    assert {"sweep", "series", "status", "test_accuracy"} <= set(found)
    assert len(sweep_results.means(found)) == 0


@pytest.mark.parametrize("has_table", [False, True])
def test_a_trial_that_a_process_works_on_is_going_on(tmp_path, has_table):
    path = make_sweep(tmp_path / "small")
    configs = [make_config("standard,2", seed=seed) for seed in (0, 1)]
    held, _ = (begin(path, config) for config in configs)
    if has_table:
        files.write_json(path / "results.json", [row(trial=config.digest()) for config in configs])
    with workdir.locked(held, 0):
        found = sweep_results.read(path).set_index("trial")["status"]
    assert found[configs[0].digest()] == "going on"
    assert found[configs[1].digest()] == "unfinished"
    assert sweep_results.read(path)["status"].tolist() == ["unfinished"] * 2


@pytest.mark.parametrize(("status", "shown"), [("ok", "ok"), ("failed", "going on")])
def test_a_finished_trial_stays_so_and_one_that_is_tried_again_goes_on(tmp_path, status, shown):
    config = make_config("standard,2")
    path = make_sweep(tmp_path / "small", [row(trial=config.digest(), status=status)])
    directory = begin(path, config)
    assert sweep_results.read(path)["status"].tolist() == [status]
    with workdir.locked(directory, 0):
        assert sweep_results.read(path)["status"].tolist() == [shown]


def test_a_trial_whose_directory_is_gone_keeps_its_status(tmp_path):
    path = make_sweep(tmp_path / "small", [row(trial="b"), row(status="failed"), finished(0.5)])
    assert sweep_results.read(path)["status"].tolist() == ["unfinished", "failed", "ok"]


def test_reading_writes_nothing(tmp_path):
    path = make_sweep(tmp_path / "small", [row(), finished(0.5)])
    begin(path, make_config("standard,2"))
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    sweep_results.means(sweep_results.read(path))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in row().items() if key != name}


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[{", b"\xff\xfe", b"null", b"3", b"{}", b'{"family": "dense"}', b"[1]", b"[[]]", b"[{}]"),
        *(json.dumps([row(), without(name)]).encode() for name in ("family", "trial", "status", "form", "settings")),
    ],
)
def test_damaged_results_are_named(tmp_path, content):
    path = make_sweep(tmp_path / "small")
    (path / "results.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"small/results\.json is damaged \(.+\); the sweep's own command writes it"):
        sweep_results.read(path)


def test_results_that_cannot_be_read_are_named(tmp_path):
    path = make_sweep(tmp_path / "small")
    (path / "results.json").mkdir()
    with pytest.raises(ConfigError, match=r"results\.json is damaged \(.*directory"):
        sweep_results.read(path)


def test_results_of_an_older_version_lack_columns_and_are_read(tmp_path):
    found = sweep_results.read(make_sweep(tmp_path / "old", [without("lost_one"), without("data_seed")]))
    assert found["lost_one"].isna().all()
    assert found["data_seed"].isna().tolist() == [False, True]


def test_what_is_no_sweep_is_refused(tmp_path):
    (tmp_path / "sweep.json").mkdir()
    for path in (tmp_path, tmp_path / "absent"):
        assert not sweep_results.is_sweep(path)
        with pytest.raises(ConfigError, match=f"^'{path}' is not the directory of a sweep: it has no sweep.json$"):
            sweep_results.read(path)
    assert sweep_results.is_sweep(make_sweep(tmp_path / "small"))


def test_sweeps_of_one_name_and_no_sweeps_are_refused(tmp_path):
    first, second = (make_sweep(tmp_path / folder / "small", [row()]) for folder in "ab")
    for paths in ((first, second), (first, first / ".." / "small")):
        with pytest.raises(ConfigError, match=r"^sweeps = \['small', 'small'\]: it must be one or more, each of"):
            sweep_results.read(*paths)
    with pytest.raises(ConfigError, match=r"^sweeps = \[\]: it must be one or more"):
        sweep_results.read()


def test_means_over_one_and_three_seeds(tmp_path):
    rows = [
        finished(0.5, seed=0, num_experts=8, bytes_full=5000, bytes_full_ffn=3500, bytes_paper=300.5),
        finished(0.25, seed=0, output_cosine=0.5, experts_used=2.0),
        finished(0.5, seed=1, output_cosine=0.25, experts_used=3.0),
        finished(1.0, seed=0, family="dense", form="-", num_experts=1, output_cosine=None, experts_used=None),
        finished(0.75, seed=2, output_cosine=0.0, experts_used=4.0),
        row(seed=3),
        row(num_experts=16, status="failed"),
    ]
    means = sweep_results.means(sweep_results.read(make_sweep(tmp_path / "small", rows)))
    assert list(means) == [
        *("sweep", "series", "family", "num_experts", "seeds", "accuracy", "accuracy_interval", "nll", "nll_interval"),
        *("bytes_full", "bytes_full_ffn", "bytes_paper", "output_cosine", "output_cosine_interval"),
        *("experts_used", "experts_used_interval"),
    ]
    # In the order of the results; what has no result is left out.
    assert means["series"].tolist() == ["butterfly separate"] * 2 + ["dense"]
    assert means["num_experts"].tolist() == [8, 4, 1]
    assert means["seeds"].tolist() == [1, 3, 1]
    assert means["accuracy"].tolist() == [0.5, 0.5, 1.0]
    assert means["nll"].tolist() == [0.5, 0.5, 0.0]
    # Deviation of 1/4, 1/2 and 3/4: 1/4; t(0.975, 2) = 4.30265.
    half = 4.30265 * 0.25 / math.sqrt(3)
    np.testing.assert_allclose(means["accuracy_interval"], [np.nan, half, np.nan], rtol=1e-5)
    np.testing.assert_allclose(means["nll_interval"], [np.nan, half, np.nan], rtol=1e-5)
    assert half == pytest.approx(intervals.half_interval([0.25, 0.5, 0.75]), rel=1e-5)
    assert means["bytes_full"].tolist() == [5000, 4000, 4000]
    assert means["bytes_full_ffn"].tolist() == [3500, 3000, 3000]
    assert means["bytes_paper"].tolist() == [300.5, 250.5, 250.5]
    np.testing.assert_array_equal(means["output_cosine"], [0.25, 0.25, np.nan])
    np.testing.assert_array_equal(means["experts_used"], [0.25, 3, np.nan])
    np.testing.assert_allclose(means["output_cosine_interval"], [np.nan, half, np.nan], rtol=1e-5)
    np.testing.assert_allclose(means["experts_used_interval"], [np.nan, 4 * half, np.nan], rtol=1e-5)


def test_an_interval_is_of_the_seeds_that_are_known(tmp_path):
    rows = [finished(0.5, seed=seed, output_cosine=cosine) for seed, cosine in enumerate((0.25, 0.75, None))]
    means = sweep_results.means(sweep_results.read(make_sweep(tmp_path / "small", rows)))
    assert means["output_cosine"].tolist() == [0.5]
    # Of two: deviation sqrt(2) / 4, t(0.975, 1) = 12.7062.
    np.testing.assert_allclose(means["output_cosine_interval"], 12.7062 / 4, rtol=1e-5)


def test_means_keep_settings_forms_and_sweeps_apart(tmp_path):
    kinds = [{}, {"settings": "a=1"}, {"form": "tied"}, {"family": "low_rank", "form": "-"}]
    rows = [finished(0.5, **kind) for kind in kinds]
    found = sweep_results.read(make_sweep(tmp_path / "a", rows), make_sweep(tmp_path / "b", rows[:1]))
    means = sweep_results.means(found)
    kinds_of_a = ["butterfly separate", "butterfly separate a=1", "butterfly tied", "low_rank"]
    assert means["series"].tolist() == [f"a: {kind}" for kind in kinds_of_a] + ["b: butterfly separate"]
    assert means["sweep"].tolist() == ["a"] * 4 + ["b"]
    assert means["seeds"].tolist() == [1] * 5


def test_where_no_run_has_a_result_there_are_no_means(tmp_path):
    found = sweep_results.read(make_sweep(tmp_path / "small", [row(), row(status="failed")]))
    means = sweep_results.means(found)
    assert isinstance(means, pd.DataFrame)
    assert (len(means), "accuracy" in means) == (0, True)


def test_of_dense_runs_alone_nothing_is_known_of_experts(tmp_path):
    dense = {"family": "dense", "form": "-", "output_cosine": None, "experts_used": None}
    rows = [finished(0.5, seed=seed, **dense) for seed in (0, 1)]
    means = sweep_results.means(sweep_results.read(make_sweep(tmp_path / "small", rows)))
    assert means[["seeds", "accuracy", "accuracy_interval"]].to_numpy().tolist() == [[2, 0.5, 0]]
    assert means[["output_cosine", "experts_used"]].isna().all(axis=None)
