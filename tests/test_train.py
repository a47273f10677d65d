import dataclasses
import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bvit_jax import (
    batches,
    bundles,
    checkpoints,
    data,
    digests,
    evaluate,
    expert_use,
    journal,
    metrics,
    preemption,
    seals,
    sentinels,
    sharding,
    timing,
    train,
    train_step,
    trained,
)
from bvit_jax.batches import Batch
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError
from bvit_jax.sharding import Layout
from bvit_jax.stepping import Stepper
from tests.conftest import long_but, make_config, on_devices


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, dict[str, Any]]:
    """A short run, left alone; its best step is its first evaluation's."""
    config = make_config(total_steps=7, seed=2, model__num_layers=2, model__patch_size=4)
    workdir = tmp_path_factory.mktemp("run")
    return config, workdir, train.run(config, workdir, show_progress=False)


def without_timing(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "timing"}


def restored(config: Config, workdir: Path, step: int) -> train_step.TrainState:
    shardings = train_step.state_shardings(config, sharding.place(config.model, config.batch_size))
    abstract = train_step.abstract_state(train_step.init_state(config), shardings)
    return checkpoints.restore(workdir / "checkpoints", step, config, abstract)[0]


def test_a_run_leaves_its_result_metrics_and_configuration(finished):
    config, workdir, result = finished
    assert json.loads((workdir / "result.json").read_text()) == result
    assert json.loads((workdir / "config.json").read_text()) == config.to_dict()
    assert result["config_digest"] == config.digest()
    assert (result["steps"], result["seed"]) == (7, 2)
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
    # CPUs do not tell what is in use.
    assert result["memory"] == {"params_bytes": 4 * result["params"], "optimizer_bytes": 8 * result["params"] + 8}
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


def test_the_result_says_whether_experts_differ_and_are_used(finished):
    config, workdir, result = finished
    _, _, params = trained.best_params(workdir)
    placement, split = sharding.place(config.model, 16), data.load_split(config.data, "test")
    found = evaluate.evaluate(params, config.model, split, 16, placement)
    use = expert_use.measure(params, config.model, split, found, 16, placement, config.seed)
    assert use.accuracy == result["test_accuracy"]
    assert result["experts"] == use.to_dict()
    assert len(use.cosine_M) == len(use.experts_used_M) == 2


def test_another_seed_gives_other_numbers(finished, tmp_path):
    config, workdir, _ = finished
    train.run(dataclasses.replace(config, seed=1), tmp_path, show_progress=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() != (workdir / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("stop_at", "kept"), long_but([(1, 0), (5, 3)], [(1, 0), (4, 3), (5, 3), (7, 6)]))
def test_an_interrupted_run_ends_like_an_uninterrupted_one(finished, tmp_path, monkeypatch, stop_at, kept):
    config, workdir, result = finished
    batch = Stepper.batch
    steps = []

    def cut(self: Stepper, step: int) -> Batch:
        if step + 1 == stop_at and step not in steps:
            steps.append(step)
            raise KeyboardInterrupt
        steps.append(step)
        return batch(self, step)

    monkeypatch.setattr(Stepper, "batch", cut)
    with pytest.raises(KeyboardInterrupt):
        train.run(config, tmp_path, show_progress=False)
    assert not (tmp_path / "result.json").exists()
    assert without_timing(train.run(config, tmp_path, show_progress=False)) == without_timing(result)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()
    assert steps == [*range(stop_at), *range(kept, 7)]


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    config, workdir, result = finished
    monkeypatch.setattr(data, "load", lambda config: pytest.fail("a finished run was started"))
    assert train.run(config, workdir, show_progress=False) == result


def test_the_test_split_is_reported_for_the_best_checkpoint_on_validation(tmp_path, monkeypatch):
    config = make_config("dense", total_steps=6)
    validation = len(data.load(config.data).validation)
    accuracies = iter([0.9, 0.1])
    true_evaluate = evaluate.evaluate

    def staged(params: Any, model: Any, split: data.Split, *rest: Any) -> evaluate.Evaluation:
        found = true_evaluate(params, model, split, *rest)
        return dataclasses.replace(found, accuracy=next(accuracies)) if len(split) == validation else found

    monkeypatch.setattr(evaluate, "evaluate", staged)
    result = train.run(config, tmp_path, show_progress=False)
    assert (result["best_step"], result["validation_accuracy"]) == (3, 0.9)
    best, placement = restored(config, tmp_path, 3), sharding.place(config.model, 16)
    expected = true_evaluate(best.params, config.model, data.load(config.data).test, 16, placement)
    assert result["test_nll"] == expected.nll


def test_a_workdir_of_another_configuration_is_refused_and_left_alone(finished):
    config, workdir, _ = finished
    before = {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match=r"another configuration.*seed: 2 != 5"):
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
        patch.setattr(timing, "total", cut)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path, show_progress=False)
    assert metrics.read_rows(tmp_path / "metrics.jsonl")[-1]["split"] == "test"
    train.run(config, tmp_path, show_progress=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()


def spoil(monkeypatch: pytest.MonkeyPatch, *bad: int) -> None:
    """Makes the images of these steps (counted from 1) NaN."""
    batch = Stepper.batch

    def spoilt(self: Stepper, step: int) -> Batch:
        good = batch(self, step)
        return dataclasses.replace(good, images=good.images * np.float32("nan")) if step + 1 in bad else good

    monkeypatch.setattr(Stepper, "batch", spoilt)


def incidents(workdir: Path) -> list[tuple[str, int]]:
    return [(row["kind"], row["step"]) for row in metrics.read_rows(workdir / journal.FILE) if row["kind"] != "experts"]


def test_a_loss_that_is_not_finite_stops_the_run_with_a_report(finished, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, 3)
    config = dataclasses.replace(finished[0], eval_every=2)
    told = "step 3: loss nan, gradient of .*angles.* not finite .report: .*step_3.json.; max_skipped_steps = 0 may"
    for _ in range(2):  # the same again: the checkpoint is of before
        with pytest.raises(sentinels.NonFiniteError, match=told):
            train.run(config, tmp_path, show_progress=False)
    assert "warning: step 3: loss nan" in capsys.readouterr().err
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert checkpoints.steps_in(tmp_path / "checkpoints") == [2]
    report = json.loads((tmp_path / "nonfinite" / "step_3.json").read_text())
    assert report["step"] == 3
    assert "angles" in report["groups"]
    expected = batches.batch_indices(len(data.load(config.data).train), config.batch_size, config.seed, 2)
    assert report["batch"]["indices"] == expected.tolist()
    assert [row["step"] for row in metrics.read_rows(tmp_path / "metrics.jsonl")] == [2, 2]
    assert incidents(tmp_path) == [("stopped", 3), ("resumed", 2), ("stopped", 3)]


def test_steps_that_are_not_finite_can_be_left_out_up_to_a_number(tmp_path, monkeypatch):
    spoil(monkeypatch, 2, 5)  # 2 is logged
    result = train.run(
        make_config("dense", total_steps=7, max_skipped_steps=2), tmp_path / "allowed", show_progress=False
    )
    assert result["skipped_steps"] == 2
    assert np.isfinite(result["test_nll"])
    assert incidents(tmp_path / "allowed") == [("skipped", 2), ("skipped", 5)]
    lines = (tmp_path / "allowed" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert ["loss" in row for row in rows if row["split"] == "train"] == [False, True, True, True]
    with pytest.raises(sentinels.NonFiniteError, match=r"step 5: .*max_skipped_steps = 1 may be left out"):
        train.run(make_config("dense", total_steps=7, max_skipped_steps=1), tmp_path / "one", show_progress=False)
    assert incidents(tmp_path / "one") == [("skipped", 2), ("stopped", 5)]
    assert checkpoints.steps_in(tmp_path / "one" / "checkpoints") == [3]


def told_to_stop(monkeypatch: pytest.MonkeyPatch, event: int) -> None:
    """Sends this process SIGTERM at the event of that number: batches of training and of evaluation, from 0."""
    batch, evaluation = Stepper.batch, data.eval_batches
    numbers = itertools.count()

    def count() -> None:
        if next(numbers) == event:
            os.kill(os.getpid(), signal.SIGTERM)

    def train_batch(self: Stepper, step: int) -> Batch:
        count()
        return batch(self, step)

    def eval_batches(*arguments: Any) -> Iterator[Batch]:
        for found in evaluation(*arguments):
            count()
            yield found

    monkeypatch.setattr(Stepper, "batch", train_batch)
    monkeypatch.setattr(data, "eval_batches", eval_batches)


# Seven steps and evaluations of 13 batches after steps 3, 6 and 7, then 25 batches of the test split, three times.
@pytest.mark.parametrize(
    ("event", "saved"),
    long_but([(0, 1), (3, 3), (32, 7), (95, 7)], [(0, 1), (2, 3), (3, 3), (17, 5), (32, 7), (46, 7), (95, 7)]),
)
def test_a_run_told_to_stop_saves_and_ends_like_an_undisturbed_one(finished, tmp_path, monkeypatch, event, saved):
    config, workdir, result = finished
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        told_to_stop(patch, event)
        with pytest.raises(preemption.Preempted, match=f"told to stop; step {saved} is saved"):
            train.run(config, tmp_path, show_progress=False)
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoints.steps_in(tmp_path / "checkpoints")[-1] == saved
    assert not (tmp_path / "result.json").exists()
    assert without_timing(train.run(config, tmp_path, show_progress=False)) == without_timing(result)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()
    assert incidents(tmp_path) == [("preempted", saved), ("resumed", saved)]
    assert last_digests(tmp_path) == last_digests(workdir)


def last_digests(workdir: Path) -> dict[str, str]:
    return checkpoints.read_record(workdir / "checkpoints", 7).digests


def test_a_run_told_to_stop_again_and_again_ends_like_an_undisturbed_one(finished, tmp_path, monkeypatch):
    config, workdir, result = finished
    for step in range(1, 8):
        with monkeypatch.context() as patch:
            told_to_stop(patch, 0 if step in (1, 2, 3, 5, 6) else 13)  # past the evaluation that is due
            with pytest.raises(preemption.Preempted):
                train.run(config, tmp_path, show_progress=False)
        assert checkpoints.steps_in(tmp_path / "checkpoints")[-1] == step
    assert without_timing(train.run(config, tmp_path, show_progress=False)) == without_timing(result)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()


def cut_off(config: Config, workdir: Path, step: int) -> None:
    """Interrupts a run before that step, counted from 1."""
    with pytest.MonkeyPatch.context() as patch:
        batch = Stepper.batch

        def cut(self: Stepper, number: int) -> Batch:
            if number + 1 == step:
                raise KeyboardInterrupt
            return batch(self, number)

        patch.setattr(Stepper, "batch", cut)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, workdir, show_progress=False)


def test_an_averaged_run_is_gone_on_with_and_its_average_is_what_counts(tmp_path):
    config = make_config("dense", total_steps=7, optimizer__ema_decay=0.5)
    result = train.run(config, tmp_path / "whole", show_progress=False)
    cut_off(config, tmp_path / "cut", 6)
    assert "experts" not in result  # it is dense
    assert without_timing(train.run(config, tmp_path / "cut", show_progress=False)) == without_timing(result)
    assert last_digests(tmp_path / "cut") == last_digests(tmp_path / "whole")
    state = restored(config, tmp_path / "whole", result["best_step"])
    _, step, params = trained.best_params(tmp_path / "whole")
    assert step == result["best_step"]
    jax.tree.map(np.testing.assert_array_equal, params, state.average)
    assert np.abs(params["head"]["kernel"] - state.params["head"]["kernel"]).max() > 1e-4
    assert result["params_digest"] == digests.combined(digests.of_tree(bundles.bundle(state.average)))
    place = sharding.place(config.model, config.batch_size)
    found = evaluate.evaluate(params, config.model, data.load_split(config.data, "test"), config.batch_size, place)
    assert (found.accuracy, found.nll) == (result["test_accuracy"], result["test_nll"])


def harm(workdir: Path, step: int) -> None:
    (workdir / "checkpoints" / str(step) / "record" / "metadata").write_text("{")


@pytest.mark.parametrize(
    ("damaged", "expected"),
    [
        ((6,), [("damaged", 6), ("resumed", 3)]),
        ((3,), [("resumed", 6), ("damaged", 3), ("remade", 3)]),  # the best
        ((3, 6), [("damaged", 6), ("damaged", 3)]),
    ],
)
def test_damaged_checkpoints_are_named_and_the_run_ends_like_an_undisturbed_one(finished, tmp_path, damaged, expected):
    config, workdir, result = finished
    assert result["best_step"] == 3
    cut_off(config, tmp_path, 7)
    for step in damaged:
        harm(tmp_path, step)
    assert without_timing(train.run(config, tmp_path, show_progress=False)) == without_timing(result)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()
    assert incidents(tmp_path) == expected
    assert {path.name for path in (tmp_path / "damaged").iterdir()} == {str(step) for step in damaged}
    assert last_digests(tmp_path) == last_digests(workdir)
    assert trained.best_params(tmp_path)[1] == 3
    texts = [row["text"] for row in metrics.read_rows(tmp_path / journal.FILE) if row["kind"] == "damaged"]
    assert all(
        f"the checkpoint of step {step} is damaged: record/metadata has" in text
        for step, text in zip(sorted(damaged, reverse=True), texts, strict=True)
    )


def test_a_remade_best_checkpoint_is_the_one_that_was_lost(finished, tmp_path):
    config, workdir, _ = finished
    cut_off(config, tmp_path, 7)
    harm(tmp_path, 3)
    train.run(config, tmp_path, show_progress=False)
    records = [checkpoints.read_record(path / "checkpoints", 3) for path in (tmp_path, workdir)]
    assert records[0] == records[1]


def test_damaged_metrics_are_taken_from_the_checkpoint(finished, tmp_path):
    config, workdir, _ = finished
    cut_off(config, tmp_path, 7)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace("accuracy", "accurate", 1))
    train.run(config, tmp_path, show_progress=False)
    assert path.read_bytes() == (workdir / "metrics.jsonl").read_bytes()
    assert incidents(tmp_path) == [("resumed", 6), ("damaged", 6)]


def test_a_damaged_configuration_is_taken_from_a_checkpoint(finished, tmp_path):
    config, workdir, _ = finished
    cut_off(config, tmp_path, 7)
    path = tmp_path / "config.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        train.run(dataclasses.replace(config, seed=3), tmp_path, show_progress=False)
    train.run(config, tmp_path, show_progress=False)
    assert path.read_bytes() == (workdir / "config.json").read_bytes()
    assert (tmp_path / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()
    assert incidents(tmp_path) == [("damaged", 6), ("resumed", 6)]


def test_a_save_that_fails_is_told_of_and_the_run_goes_on(finished, tmp_path, monkeypatch, capsys):
    config, workdir, result = finished
    seal = seals.seal

    def full_at_6(folder: Path) -> None:
        if folder.name.startswith("6."):
            raise OSError(28, "No space left on device")
        seal(folder)

    monkeypatch.setattr(seals, "seal", full_at_6)
    assert without_timing(train.run(config, tmp_path, show_progress=False)) == without_timing(result)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()
    assert checkpoints.steps_in(tmp_path / "checkpoints") == [3, 7]
    assert incidents(tmp_path) == [("unsaved", 6)]
    warning = "warning: the checkpoint of step 6 could not be written: [Errno 28] No space left on device; the next one"
    assert warning in capsys.readouterr().err


def test_a_run_whose_last_checkpoint_cannot_be_written_has_no_result(finished, tmp_path, monkeypatch):
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(seals, "seal", full)
    with pytest.raises(checkpoints.SaveError, match="step 6 could not be written: .*No space left"):
        train.run(finished[0], tmp_path, show_progress=False)
    assert not (tmp_path / "result.json").exists()
    assert incidents(tmp_path) == [("unsaved", 3), ("stopped", 6)]


CONTENTS = ['{"seed": ', "[]", "{}", '"text"', '{"config_digest": "other"}']


@pytest.mark.parametrize("content", long_but(['{"seed": ', '{"config_digest": "other"}'], CONTENTS))
def test_a_damaged_result_is_made_again(finished, tmp_path, capsys, content):
    config, workdir, result = finished
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "result.json").write_text(content)
    assert without_timing(train.run(config, tmp_path, show_progress=False)) == without_timing(result)
    assert "warning: result.json is damaged" in capsys.readouterr().err
    assert json.loads((tmp_path / "result.json").read_text())["seed"] == 2


def test_a_run_whose_experts_cannot_be_measured_is_reported_all_the_same(finished, tmp_path, monkeypatch, capsys):
    def out_of_memory(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 12 GB\nof all sorts")

    config, _, expected = finished
    monkeypatch.setattr(expert_use, "measure", out_of_memory)
    result = train.run(config, tmp_path, show_progress=False)
    assert without_timing(result) | {"experts": expected["experts"]} == without_timing(expected)
    assert "experts" not in json.loads((tmp_path / "result.json").read_text())
    told = (
        "whether experts differ could not be measured: RESOURCE_EXHAUSTED: 12 GB; experiments.evaluate --experts tries"
    )
    assert told in capsys.readouterr().err


def test_other_troubles_with_experts_are_told_as_they_are(finished, tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    config, workdir, _ = finished
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "result.json").unlink()
    monkeypatch.setattr(expert_use, "measure", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        train.run(config, tmp_path, show_progress=False)


@pytest.mark.long
def test_dead_experts_are_warned_of_with_their_numbers(tmp_path, capsys):
    # 64 experts share 985 tokens, and routers that learn a thousand times as fast are soon sure of themselves.
    shape = {"top_k": 1, "patch_size": 4, "num_layers": 1, "d_model": 16, "d_ff": 32}
    small = {f"model__{name}": value for name, value in shape.items()}
    config = make_config("standard,64", total_steps=3, optimizer__router_multiplier=1000.0, **small)
    result = train.run(config, tmp_path, show_progress=False)
    loads = result["test"]["expert_load"]
    assert result["warnings"] == sentinels.expert_warnings(tuple(map(tuple, loads)))
    row = next(r for r in metrics.read_rows(tmp_path / "metrics.jsonl") if r["split"] == "validation")
    (warning,) = sentinels.expert_warnings(tuple(map(tuple, row["expert_load"])))
    assert warning.startswith(f"mixture layer 0: {row['dead_experts'][0]} of 64 experts dead")
    assert f"warning: step 3, {warning}" in capsys.readouterr().err.splitlines()


def test_a_checkpoint_of_another_configuration_is_refused(finished, tmp_path):
    config, workdir, _ = finished
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    for name in ("result.json", "config.json"):
        (tmp_path / name).unlink()
    other = dataclasses.replace(config, seed=4)
    (tmp_path / "config.json").write_text(json.dumps(other.to_dict()))
    with pytest.raises(ConfigError, match="the checkpoint of step 7 is of another configuration: seed: 2 != 4"):
        train.run(other, tmp_path, show_progress=False)


STEPS = 50
LAYOUTS = {
    "4 devices": (4, Layout()),
    "8 devices": (8, Layout()),
    "expert 2 x model 2": (8, Layout(expert=2, model=2)),
    "model 4, fsdp": (8, Layout(model=4, fsdp=True)),
}
SPLIT = {"standard,4": ("expert 2 x model 2",), "butterfly,4": ("4 devices",)}
OTHERS = {"standard,4": ("8 devices", "model 4, fsdp"), "butterfly,4": ("expert 2 x model 2",)}


def losses_on(argument: str, count: int, layout: Layout) -> tuple[list[float], list[list[int]], tuple[int, ...]]:
    """Returns loss and sample ids of every step, and the mesh's shape."""
    small = {"num_layers": 1, "d_model": 16, "d_ff": 32, "patch_size": 4, "router_noise": 0.5}
    config = make_config(argument, total_steps=STEPS, **{f"model__{name}": value for name, value in small.items()})
    assert config.augment.max_shift > 0 < config.augment.noise
    placement = sharding.place(config.model, config.batch_size, layout, jax.devices()[:count])
    shardings = train_step.state_shardings(config, placement)
    split = {str(leaf.spec) for leaf in jax.tree.leaves(shardings) if not leaf.is_fully_replicated}
    assert bool(split) == (count > 1)
    images = data.load(config.data).train
    state = jax.device_put(jax.jit(train_step.init_state, static_argnums=0)(config), shardings)
    step = train_step.make_train_step(config, placement)
    key, rows = jax.random.key(config.seed), placement.host_rows(config.batch_size)
    losses, ids = [], []
    for number in range(STEPS):
        index = batches.batch_indices(len(images), config.batch_size, config.seed, number)
        batch = data.train_batch(images, config.batch_size, config.seed, number, rows)
        arrays = (batch.images, batch.labels, index[rows])
        placed = placement.put_batch(arrays, rows, config.batch_size)
        np.testing.assert_array_equal(placed[0], images.images[np.asarray(placed[2])])
        state, values = step(state, key, *placed[:2])
        losses.append(float(values["loss"]))
        ids.append(np.asarray(placed[2]).tolist())
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    return losses, ids, tuple(placement.mesh.shape.values())


def losses_of_all(split: dict[str, tuple[str, ...]]) -> dict[tuple[str, str], Any]:
    sharding.LARGE_BYTES = 256  # so that these small arrays are split as large ones are
    one = {(argument, "1 device"): losses_on(argument, 1, Layout()) for argument in split}
    cases = [(argument, name) for argument, names in split.items() for name in names]
    return one | {(argument, name): losses_on(argument, *LAYOUTS[name]) for argument, name in cases}


@pytest.mark.parametrize("split", [SPLIT, pytest.param(OTHERS, marks=pytest.mark.long)], ids=["some", "others"])
def test_any_devices_give_the_same_samples_and_losses_as_one(split):
    found = on_devices(8, losses_of_all, split)
    for argument, layout in [(argument, layout) for argument, layouts in split.items() for layout in layouts]:
        losses, ids, shape = found[argument, layout]
        expected_losses, expected_ids, _ = found[argument, "1 device"]
        assert ids == expected_ids
        assert len(losses) == STEPS
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, err_msg=f"{argument}, {layout}")
        assert losses[-1] < losses[0] - 0.1
        shared = {"4 devices": (1, 4, 1), "8 devices": (2, 4, 1)}
        alone = {"4 devices": (4, 1, 1), "8 devices": (8, 1, 1)}
        by_hand = {"expert 2 x model 2": (2, 2, 2), **(shared if argument == "standard,4" else alone)}
        assert shape == by_hand.get(layout, shape)


@pytest.mark.long
def test_bfloat16_compute_trains_with_float32_parameters(tmp_path):
    config = make_config(model__compute_dtype="bfloat16")
    result = train.run(config, tmp_path, show_progress=False)
    assert np.isfinite(result["test_nll"])
    state = restored(config, tmp_path, 6)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
