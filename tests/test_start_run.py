import dataclasses
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bvit_jax import files, metrics, processes, sharding, start_run, train, train_step, trained
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError
from bvit_jax.sharding import Layout
from bvit_jax.stepping import Stepper
from tests.conftest import call, make_config, on_devices
from tests.several import endings, started

SMALL = {"num_layers": 1, "d_model": 16, "d_ff": 32, "num_heads": 2, "patch_size": 4}


def small(argument: str, **changes: object) -> Config:
    raw = {f"model__{name}": value for name, value in SMALL.items()} | {"total_steps": 4, "eval_every": 2}
    return make_config(argument, **raw | changes)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a dense model, left alone."""
    workdir = tmp_path_factory.mktemp("dense")
    train.run(small("dense"), workdir, show_progress=False)
    return workdir


def made(workdir: Path, config: Config, result: object) -> str:
    """A run's directory without checkpoints."""
    workdir.mkdir()
    files.write_json(workdir / "config.json", config.to_dict())
    (workdir / "result.json").write_text(result if isinstance(result, str) else json.dumps(result))
    return str(workdir)


def test_a_run_that_is_not_there_or_not_finished_is_refused(tmp_path):
    source = str(tmp_path / "run")
    config = small("butterfly,4", start_from=source)
    with pytest.raises(ConfigError, match=f"start_from = '{source}': .*finished run; there is no such directory"):
        start_run.find(config)
    made(tmp_path / "run", small("dense"), "{")
    with pytest.raises(ConfigError, match="finished run; its result.json cannot be read"):
        start_run.find(config)
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(ConfigError, match="finished run; it has no result.json"):
        start_run.find(config)
    files.write_json(tmp_path / "run" / "result.json", {"params_digest": "a" * 16})
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(ConfigError, match="start_from = .*it has no config.json"):
        start_run.find(config)
    assert start_run.find(small("butterfly,4")) is None


@pytest.mark.parametrize(
    ("argument", "change", "told"),
    [
        ("standard,4", {}, "a run of a dense model; it is of family standard"),
        ("dense", {"model__d_ff": 64}, "a run of equal shape; its model.d_ff is 64, not 32"),
        ("dense", {"model__num_layers": 3}, "a run of equal shape; its model.num_layers is 3, not 1"),
        ("dense", {"model__num_heads": 4}, "a run of equal shape; its model.num_heads is 4, not 2"),
    ],
)
def test_a_run_of_another_kind_is_refused_and_claims_no_directory(tmp_path, argument, change, told):
    source = made(tmp_path / "run", small(argument, **change), {"params_digest": "a" * 16})
    with pytest.raises(ConfigError, match=f"start_from = '{source}': it must be {told}"):
        train.run(small("butterfly,4", start_from=source), tmp_path / "new", show_progress=False)
    assert not (tmp_path / "new").exists()


def test_a_run_on_another_split_of_the_same_images_has_seen_those_for_test(tmp_path):
    procedural = {"name": "procedural", "image_size": 8, "channels": 1, "num_classes": 10}
    procedural |= {"num_train": 40, "num_validation": 10, "num_test": 10, "seed": 1}
    prepared = {"name": "made", "image_size": 8, "stored_size": 8, "channels": 1, "num_classes": 10}
    prepared |= {"num_train": 40, "num_validation": 10, "num_test": 10, "seed": 1}
    prepared |= {"test_split": "test", "reading": "memory"}
    few = {"name": "few_digits", "num_train": 300, "seed": 0}

    def find(source: dict[str, object], own: dict[str, object]) -> object:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        path = made(tmp_path / "run", make_config("dense", data=source), {"params_digest": "a" * 16})
        return start_run.find(make_config("dense", data=own, start_from=path))

    for source, own in (
        *((procedural, procedural), (prepared, prepared), (few, few)),
        (prepared, prepared | {"num_train": 20, "num_test": 5}),  # those held out come first
        (prepared, prepared | {"name": "made:1.0.0"}),
        (few, few | {"num_train": 100}),
        (procedural, {"name": "digits"}),  # other images altogether
    ):
        assert find(source, own) == start_run.Start(str(tmp_path / "run"), "a" * 16)
    for source, field, value in (
        *((procedural, "seed", 2), (procedural, "num_train", 50), (procedural, "num_test", 9)),
        *((prepared, "seed", 2), (prepared, "num_validation", 11)),
        (few, "seed", 2),
    ):
        before = re.escape(f"the same images held out; its data.{field} is {source[field]}, not {value}, so that it")
        with pytest.raises(ConfigError, match=before):
            find(source, source | {field: value})
    # Both are scikit-learn's digits, dealt otherwise.
    with pytest.raises(ConfigError, match=r"its data\.name is few_digits, not digits"):
        find(few, {"name": "digits"})


def test_the_form_reference_cannot_start_from_a_dense_model():
    config = small("butterfly,4,reference", start_from="runs/dense")
    with pytest.raises(ConfigError, match=r"start_from = 'runs/dense': it must be empty for model.form = reference"):
        start_run.find(config)


def test_what_is_recorded_is_what_a_run_goes_on_with(tmp_path):
    source = made(tmp_path / "run", small("dense", seed=5), {"params_digest": "a" * 16})
    config = small("butterfly,4", start_from=source)
    for _ in range(2):
        start_run.claim(tmp_path, config)
        recorded = json.loads((tmp_path / start_run.FILE).read_text())
        assert recorded == {"workdir": source, "params_digest": "a" * 16}
    assert start_run.recorded(tmp_path, config) == start_run.Start(source, "a" * 16)
    files.write_json(tmp_path / "run" / "result.json", {"params_digest": "b" * 16})
    for look in (start_run.claim, start_run.recorded):
        with pytest.raises(ConfigError, match="other parameters of start_from = .*digest a{16}, not b{16}"):
            look(tmp_path, config)
    for content in ("{", "[]", "{}"):  # as good as gone
        (tmp_path / "run" / "result.json").write_text(content)
        start_run.claim(tmp_path, config)
        with pytest.raises(ConfigError, match="its result.json cannot be read"):
            start_run.recorded(tmp_path, config)
    files.write_json(tmp_path / "run" / "result.json", {"params_digest": "a" * 16})
    (tmp_path / start_run.FILE).write_text("[]")
    with pytest.raises(ConfigError, match=r"start\.json cannot be read"):
        start_run.claim(tmp_path, config)
    start_run.claim(tmp_path / "absent", small("butterfly,4"))  # nothing to record
    assert start_run.recorded(tmp_path / "absent", small("butterfly,4")) is None


def test_parameters_that_are_not_those_of_the_result_are_refused(dense, tmp_path):
    source = Path(shutil.copytree(dense, tmp_path / "run"))
    files.write_json(source / "result.json", json.loads((source / "result.json").read_text()) | {"params_digest": "?"})
    config = small("butterfly,4", start_from=str(source))
    with pytest.raises(ConfigError, match=r"digest of its result.json, \?; it is [0-9a-f]{16}"):
        Stepper(config, sharding.place(config.model, config.batch_size)).first_state()


@pytest.mark.parametrize("argument", ["butterfly,4", "standard,4"])
def test_a_run_starts_from_the_best_parameters_of_a_dense_one(dense, tmp_path, argument):
    config = small(argument, start_from=str(dense), optimizer__ema_decay=0.5)
    placement = sharding.place(config.model, config.batch_size)
    state, plain = (
        Stepper(each, placement).first_state() for each in (config, dataclasses.replace(config, start_from=""))
    )
    _, _, best = trained.best_params(dense)
    ffn, theirs = (tree["segment_0"]["block_0"]["ffn"] for tree in (state.params, best))
    up = ffn["up_prototype"] if argument.startswith("butterfly") else ffn["up_kernel"][:, 2]
    np.testing.assert_array_equal(up, theirs["up"]["kernel"])
    np.testing.assert_array_equal(state.params["head"]["kernel"], best["head"]["kernel"])
    assert np.abs(best["head"]["kernel"]).max() > 0  # one that was never trained is all zeros
    jax.tree.map(np.testing.assert_array_equal, state.average, state.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, plain.opt_state)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(lambda leaf: leaf.sharding, plain)


def test_a_whole_run_from_a_dense_one_and_its_source_gone(dense, tmp_path, monkeypatch):
    source = Path(shutil.copytree(dense, tmp_path / "run"))
    config, workdir = small("butterfly,4", start_from=str(source)), tmp_path / "new"
    batch = Stepper.batch

    def cut(self: Stepper, step: int) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "batch", cut)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, workdir, show_progress=False)
    digest = json.loads((source / "result.json").read_text())["params_digest"]
    assert json.loads((workdir / start_run.FILE).read_text())["params_digest"] == digest
    shutil.rmtree(source)
    shutil.copytree(workdir, tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(ConfigError, match="finished run; there is no such directory"):  # it would begin again
        train.run(config, tmp_path / "bare", show_progress=False)
    result = train.run(config, workdir, show_progress=False)
    assert train.run(config, workdir, show_progress=False) == result
    # A run that was never trained guesses among ten digits: its head begins as zeros.
    assert result["validation_nll"] < np.log(10)


def first_on_all() -> list[Any]:
    sharding.LARGE_BYTES = 256  # so that these small arrays are split as large ones are
    found = []
    with tempfile.TemporaryDirectory() as workdir:
        train.run(small("dense"), Path(workdir), show_progress=False)
        config = small("standard,4", start_from=workdir)
        for count, layout in ((1, Layout()), (8, Layout(expert=2, model=2, fsdp=True))):
            placement = sharding.place(config.model, config.batch_size, layout, jax.devices()[:count])
            state = Stepper(config, placement).first_state()
            shardings = train_step.state_shardings(config, placement)
            assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
            found.append(jax.tree.map(np.asarray, state.params))
    return found


def test_any_devices_start_from_the_same_parameters():
    one, many = on_devices(8, first_on_all)
    jax.tree.map(np.testing.assert_array_equal, one, many)


def two(port: int, number: int, folder: str) -> None:
    """What each of two processes does."""
    processes.start(f"localhost:{port}", 2, number)
    train.run(from_dense(Path(folder) / "dense"), Path(folder) / "pair", show_progress=False)


def from_dense(dense: Path) -> Config:
    return small("standard,4", start_from=str(dense))


@pytest.mark.long
def test_two_processes_start_as_one(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    with started(2, lambda port, number: call(two, port, number, str(tmp_path))) as running:
        assert [(process.returncode, process.stderr) for process in endings(running) if process.returncode] == []
    train.run(from_dense(tmp_path / "dense"), tmp_path / "one", show_progress=False)
    pair, one = (
        [row["loss"] for row in metrics.read_rows(tmp_path / name / "metrics.jsonl") if row["split"] == "train"]
        for name in ("pair", "one")
    )
    assert len(pair) == 2
    np.testing.assert_allclose(pair, one, rtol=1e-5)
