import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from absl import logging

from bvit_jax import checkpoints, files
from bvit_jax.checkpoints import Checkpoints
from bvit_jax.model_config import ConfigError
from bvit_jax.trained import best_params
from tests.test_checkpoints import CONFIG, accuracies, assert_equal, contents, drawn_state, flip, log_of, sealed_files

SCORES = accuracies(s1=0.2, s2=0.9, s3=0.5)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory, its best checkpoint at step 2 and its newest at step 3; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("run")
    state = drawn_state(CONFIG)
    with Checkpoints(workdir / "checkpoints") as writer:
        for step in SCORES:
            params = jax.tree.map(lambda leaf, step=step: leaf + step, state.params)
            log = log_of({known: SCORES[known] for known in range(1, step + 1)})
            writer.save(state.replace(step=jnp.int32(step), params=params), CONFIG, log)
    files.write_json(workdir / "config.json", CONFIG.to_dict())
    (workdir / "metrics.jsonl").write_text(log_of(SCORES))
    return workdir


@pytest.fixture
def run(whole_run, tmp_path) -> Path:
    return Path(shutil.copytree(whole_run, tmp_path / "copied"))


def best_step(workdir: Path) -> int:
    return best_params(workdir)[1]


def test_the_best_parameters_of_a_run_are_read_and_nothing_is_changed(run):
    (run / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()  # a save going on
    before, verbosity = contents(run), logging.get_verbosity()
    config, step, params = best_params(run)
    assert (config, step) == (CONFIG, 2)
    assert_equal(params, jax.tree.map(lambda leaf: leaf + 2, drawn_state(CONFIG).params))
    assert contents(run) == before
    assert (run / "checkpoints" / "4.orbax-checkpoint-tmp").is_dir()
    assert logging.get_verbosity() == verbosity


@pytest.mark.parametrize(
    ("text", "step"),
    [
        (log_of(SCORES | accuracies(s4=1.0)), 2),  # the run is ahead of its checkpoints
        (log_of(SCORES) + '{"step": 3, "split": "test", "accuracy": 1.0, "nll": 0.0}\n', 2),
        (log_of(SCORES)[:-30], 2),  # cut short: the newest checkpoint knows better
        (log_of(accuracies(s1=0.2, s2=0.1, s3=0.5)), 2),  # altered
        ("", 2),
        (None, 2),
    ],
)
def test_the_best_is_told_by_the_log_where_it_goes_on_from_the_newest_checkpoint(run, text, step):
    (run / "metrics.jsonl").unlink()
    if text is not None:
        (run / "metrics.jsonl").write_text(text)
    assert best_step(run) == step


def test_of_those_that_are_there_the_best_is_read(run):
    shutil.rmtree(run / "checkpoints" / "2")
    assert best_step(run) == 3


@pytest.mark.parametrize("field", ["model.num_experts", "model.top_k", "seed"])
def test_a_configuration_that_is_not_the_checkpoints_own_is_refused(run, field):
    stored = json.loads((run / "config.json").read_text())
    place = stored["model"] if "." in field else stored
    place[field.split(".")[-1]] = 3
    files.write_json(run / "config.json", stored)
    with pytest.raises(ConfigError, match=f"the checkpoint of step 2 is of another configuration: {field}: . != 3"):
        best_params(run)


def test_a_damaged_best_checkpoint_is_one_clear_error_and_stays_where_it_is(run):
    flip(sealed_files(run / "checkpoints" / "2")[-1])
    before = contents(run)
    with pytest.raises(ConfigError, match="the checkpoint of step 2 is damaged: .*start the training again"):
        best_params(run)
    assert contents(run) == before


def test_a_damaged_newest_checkpoint_does_not_keep_the_best_from_being_read(run):
    flip(sealed_files(run / "checkpoints" / "3")[-1])
    assert best_step(run) == 2


def test_a_best_checkpoint_that_is_dropped_while_it_is_read_gives_way_to_the_better_one(run, monkeypatch):
    true = checkpoints.restore

    def dropped_first(directory: Path, step: int, *rest: Any) -> Any:
        if step == 2:
            (run / "metrics.jsonl").write_text(log_of(SCORES | accuracies(s3=0.95)))
            shutil.rmtree(directory / "2")
        return true(directory, step, *rest)

    monkeypatch.setattr(checkpoints, "restore", dropped_first)
    assert best_step(run) == 3


def test_a_run_that_was_not_evaluated_yet_has_no_best(run):
    with Checkpoints(run / "other" / "checkpoints") as writer:
        writer.save(drawn_state(CONFIG), CONFIG, "")
    shutil.copy(run / "config.json", run / "other")
    with pytest.raises(ConfigError, match="it holds no evaluated checkpoint yet"):
        best_params(run / "other")


def test_what_is_no_run_or_has_no_checkpoint_is_refused(whole_run, tmp_path):
    with pytest.raises(ConfigError, match="it must be the directory of a run; it has no config.json"):
        best_params(tmp_path / "absent")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((whole_run / "config.json").read_text())
    with pytest.raises(ConfigError, match="it holds no checkpoint yet"):
        best_params(other)
    (other / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="it holds no checkpoint yet"):
        best_params(other)
    for text in ("{", "[]", "{}", '{"seed": 0}'):
        (other / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="it is damaged, or of another version"):
            best_params(other)
