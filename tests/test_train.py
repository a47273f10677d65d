import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bvit_jax import data, evaluate, memory, metrics, sharding, train, train_step
from bvit_jax.checkpoints import Checkpoints, abstract_state
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError
from tests.conftest import make_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, dict[str, Any]]:
    """A short run, left alone."""
    config, workdir = make_config(total_steps=7), tmp_path_factory.mktemp("run")
    return config, workdir, train.run(config, workdir, show_progress=False)


def without_timing(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "timing"}


def test_a_run_leaves_its_result_metrics_and_configuration(finished):
    config, workdir, result = finished
    assert json.loads((workdir / "result.json").read_text()) == result
    assert json.loads((workdir / "config.json").read_text()) == config.to_dict()
    assert result["config_digest"] == config.digest()
    assert (result["steps"], result["seed"]) == (7, 0)
    rows = metrics.read_rows(workdir / "metrics.jsonl")
    where = [(row["step"], row["split"]) for row in rows]
    train_rows = [(2, "train"), (4, "train"), (6, "train"), (7, "train")]
    assert [place for place in where if place[1] == "train"] == train_rows
    assert [place for place in where if place[1] != "train"] == [
        *[(3, "validation"), (6, "validation"), (7, "validation")],
        (7, "test"),
    ]
    assert {"loss", "cross_entropy", "load_balance", "router_z", "smoothness", "accuracy", "grad_norm"} <= rows[
        0
    ].keys()
    validation = next(row for row in rows if row["split"] == "validation")
    assert np.shape(validation["expert_load"]) == (2, 4)
    assert len(validation["router_entropy"]) == len(validation["dead_experts"]) == 2
    assert set(validation["ternary"]) == {f"segment_0/block_0/ffn/{side}_prototype" for side in ("up", "down")}
    assert result["timing"]["wall_seconds"] > 0
    assert list((workdir / "tensorboard").iterdir())


def test_the_logged_loss_is_the_weighted_sum_of_its_parts(finished):
    config, workdir, _ = finished
    row = metrics.read_rows(workdir / "metrics.jsonl")[0]
    router = sum(getattr(config.loss, name) * row[name] for name in ("load_balance", "router_z", "smoothness"))
    assert row["loss"] == pytest.approx(row["cross_entropy"] + router, rel=1e-6)


def test_same_configuration_same_numbers(finished, tmp_path):
    config, workdir, result = finished
    again = train.run(config, tmp_path, show_progress=False)
    assert without_timing(again) == without_timing(result)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()


def test_another_seed_gives_other_numbers(finished, tmp_path):
    _, workdir, _ = finished
    train.run(make_config(total_steps=7, seed=1), tmp_path, show_progress=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() != (workdir / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("stop_at", [1, 4, 5, 7])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(finished, tmp_path, monkeypatch, stop_at):
    config, workdir, result = finished
    batch = data.train_batch

    def cut(split: data.Split, batch_size: int, seed: int, step: int) -> data.Batch:
        if step + 1 == stop_at:
            raise KeyboardInterrupt
        return batch(split, batch_size, seed, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "train_batch", cut)
        train.run(config, tmp_path, show_progress=False)
    assert not (tmp_path / "result.json").exists()
    assert without_timing(train.run(config, tmp_path, show_progress=False)) == without_timing(result)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    config, workdir, result = finished
    monkeypatch.setattr(data, "load", lambda config: pytest.fail("a finished run was started"))
    assert train.run(config, workdir, show_progress=False) == result


def test_the_test_split_is_reported_for_the_best_checkpoint_on_validation(tmp_path, monkeypatch):
    config = make_config(total_steps=6)
    validation = len(data.load(config.data).validation)
    accuracies = iter([0.9, 0.1])
    true_evaluate = evaluate.evaluate

    def staged(params: Any, model: Any, split: data.Split, *rest: Any) -> evaluate.Evaluation:
        found = true_evaluate(params, model, split, *rest)
        return dataclasses.replace(found, accuracy=next(accuracies)) if len(split) == validation else found

    monkeypatch.setattr(evaluate, "evaluate", staged)
    result = train.run(config, tmp_path, show_progress=False)
    assert (result["best_step"], result["validation_accuracy"]) == (3, 0.9)
    mesh = sharding.make_mesh()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        shapes = abstract_state(train_step.init_state(config), sharding.replicated(mesh))
        best = checkpoints.restore(3, shapes)
    expected = true_evaluate(best.params, config.model, data.load(config.data).test, 16, mesh)
    assert result["test_nll"] == expected.nll


def test_a_workdir_of_another_configuration_is_refused_and_left_alone(finished):
    config, workdir, _ = finished
    before = {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match=r"another configuration.*seed: 0 != 5"):
        train.run(dataclasses.replace(config, seed=5), workdir, show_progress=False)
    assert {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == before


def test_a_damaged_config_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0,')
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        train.run(make_config(), tmp_path, show_progress=False)
    assert (tmp_path / "config.json").read_text() == '{"seed": 0,'


def test_checkpoints_without_a_config_file_are_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"checkpoints but no config\.json"):
        train.run(make_config(), tmp_path, show_progress=False)


def test_a_workdir_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can be written to"):
        train.run(make_config(), tmp_path / "file" / "run", show_progress=False)


def test_a_run_cut_off_after_its_test_row_does_not_repeat_it(finished, tmp_path, monkeypatch):
    config, workdir, _ = finished

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(memory, "count_params", cut)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path, show_progress=False)
    assert metrics.read_rows(tmp_path / "metrics.jsonl")[-1]["split"] == "test"
    train.run(config, tmp_path, show_progress=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    batch = data.train_batch

    def spoilt(split: data.Split, batch_size: int, seed: int, step: int) -> data.Batch:
        good = batch(split, batch_size, seed, step)
        return dataclasses.replace(good, images=good.images * np.float32("nan")) if step == 2 else good

    monkeypatch.setattr(data, "train_batch", spoilt)
    with pytest.raises(FloatingPointError, match="step 4: .*loss, .*not finite"):
        train.run(make_config(eval_every=6), tmp_path, show_progress=False)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    train.run(make_config(), tmp_path / "run", show_progress=False)
    for name in ("result.json", "config.json"):
        (tmp_path / "run" / name).unlink()
    other = make_config(seed=4)
    (tmp_path / "run" / "config.json").write_text(json.dumps(other.to_dict()))
    with pytest.raises(ConfigError, match="checkpoints are of this configuration.*seed: 0 != 4"):
        train.run(other, tmp_path / "run", show_progress=False)


def test_timing_is_summed_over_all_rows_and_the_rate_is_a_median():
    rows = [{"wall_seconds": 10.0}, *({"wall_seconds": 1.0, "images_per_second": rate} for rate in (5.0, 90.0, 6.0))]
    assert train.total_timing(rows) == {"images_per_second": 6.0, "wall_seconds": 13.0}
    assert train.total_timing(rows[:1]) == {"images_per_second": None, "wall_seconds": 10.0}


MULTI_DEVICE = """
import json, sys
import jax
from bvit_jax import data, sharding, train_step
from tests.conftest import make_config
losses = {}
for argument in ("butterfly,4", "standard,4"):
    config = make_config(argument, model__router_noise=0.5, model__num_layers=1, model__d_model=16, model__d_ff=32)
    mesh = sharding.make_mesh()
    split = data.load(config.data).train
    state = jax.jit(lambda: train_step.init_state(config), out_shardings=sharding.replicated(mesh))()
    step = train_step.make_train_step(config, mesh)
    key = jax.random.key(0)
    for index in range(5):
        batch = data.train_batch(split, 16, 0, index)
        state, values = step(state, key, *sharding.put_batch((batch.images, batch.labels), mesh))
        losses.setdefault(argument, []).append(float(jax.block_until_ready(values)["loss"]))
print(json.dumps({"devices": jax.device_count(), "losses": losses}))
"""


def test_one_device_and_four_give_the_same_losses():
    found = []
    for devices in (1, 4):
        # NPROC: devices that wait for each other need a thread each, however few cores there are.
        devices_flag = f"--xla_force_host_platform_device_count={devices}"
        flags = {"XLA_FLAGS": devices_flag, "JAX_PLATFORMS": "cpu", "NPROC": "16"}
        run = subprocess.run(
            [sys.executable, "-c", MULTI_DEVICE], cwd=ROOT, env=os.environ | flags, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout.splitlines()[-1]))
    assert [result["devices"] for result in found] == [1, 4]
    for argument, losses in found[0]["losses"].items():
        np.testing.assert_allclose(found[1]["losses"][argument], losses, rtol=1e-5)


def test_a_batch_that_does_not_divide_over_the_devices_is_refused():
    sharding.check_batch(15, devices=3)
    with pytest.raises(ConfigError, match="batch_size = 16: it must be a multiple of the 3 devices"):
        sharding.check_batch(16, devices=3)


def test_bfloat16_compute_trains_with_float32_parameters(tmp_path):
    config = make_config(model__compute_dtype="bfloat16")
    result = train.run(config, tmp_path, show_progress=False)
    assert np.isfinite(result["test_nll"])
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        shapes = abstract_state(train_step.init_state(config), sharding.replicated(sharding.make_mesh()))
        state = checkpoints.restore(6, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
