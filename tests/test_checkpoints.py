import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from bvit_jax import files, sharding, train_step
from bvit_jax.checkpoints import Checkpoints, abstract_state, best_params
from bvit_jax.config import from_dict
from bvit_jax.model_config import ConfigError
from bvit_jax.train_step import TrainState
from tests.conftest import make_config


def make_state(step: int) -> TrainState:
    """A small state, no two of them alike."""
    rng = np.random.default_rng(step)
    params = {"layer": {"kernel": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)}}
    moments = ({"mean": jnp.asarray(rng.standard_normal(4), jnp.float32)}, jnp.int32(step * 10))
    return TrainState(jnp.int32(step), params, moments)


def whole() -> jax.sharding.NamedSharding:
    return sharding.place(make_config().model, 16).replicated


def restore(checkpoints: Checkpoints, step: int) -> TrainState:
    return checkpoints.restore(step, abstract_state(make_state(0), whole()))


def save_all(directory: Path, scores: dict[int, tuple[float, float]]) -> None:
    with Checkpoints(directory) as checkpoints:
        for step, (accuracy, nll) in scores.items():
            checkpoints.save(make_state(step), make_config(), accuracy, nll)


def steps_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def assert_equal(found: TrainState, expected: TrainState) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_state_comes_back_exactly(tmp_path):
    save_all(tmp_path, {3: (0.5, 1.0)})
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(restore(checkpoints, 3), make_state(3))


def test_a_whole_training_state_comes_back_exactly(tmp_path):
    config = make_config(model__d_model=8, model__d_ff=16, model__num_heads=2)
    state = jax.jit(train_step.init_state, static_argnums=0)(config)
    shardings = train_step.state_shardings(config, sharding.place(config.model, config.batch_size))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, config, 0.1, 2.3)
        found = checkpoints.restore(0, abstract_state(state, shardings))
    assert_equal(found, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest_step is None
        assert checkpoints.best_step is None


@pytest.mark.parametrize(
    ("scores", "latest", "best"),
    [
        ({1: (0.2, 2.0), 2: (0.9, 1.0), 3: (0.3, 0.5), 4: (0.4, 0.4)}, 4, 2),  # by accuracy first
        ({1: (0.5, 2.0), 2: (0.5, 1.0), 3: (0.5, 3.0), 4: (0.1, 0.1)}, 4, 2),  # then by likelihood
        ({1: (0.5, 1.0), 2: (0.5, 1.0), 3: (0.5, 1.0), 4: (0.1, 1.0)}, 4, 3),  # then the later
        ({1: (0.5, 1.0), 2: (0.5, 1.0)}, 2, 2),
        ({1: (0.9, 1.0), 2: (0.1, 1.0), 10: (0.2, 1.0)}, 10, 1),
        ({5: (0.0, 2.0)}, 5, 5),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, scores, latest, best):
    save_all(tmp_path, scores)
    assert steps_in(tmp_path) == {str(latest), str(best)}
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (latest, best)
        for step in (latest, best):
            assert_equal(restore(checkpoints, step), make_state(step))
            assert checkpoints.metrics(step) == {"accuracy": scores[step][0], "nll": scores[step][1]}


def test_best_and_newest_are_right_after_every_save(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step, accuracy, best in [(1, 0.5, 1), (2, 0.4, 1), (3, 0.6, 3), (4, 0.6, 4), (5, 0.1, 4)]:
            checkpoints.save(make_state(step), make_config(), accuracy, 1.0)
            assert (checkpoints.latest_step, checkpoints.best_step) == (step, best)
            assert steps_in(tmp_path) == {str(step), str(best)}


def test_the_best_is_kept_when_a_run_goes_on(tmp_path):
    save_all(tmp_path, {1: (0.9, 1.0), 2: (0.1, 1.0)})
    save_all(tmp_path, {3: (0.2, 1.0)})
    assert steps_in(tmp_path) == {"1", "3"}
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (3, 1)


def test_the_configuration_is_inside(tmp_path):
    save_all(tmp_path, {1: (0.5, 1.0)})
    with Checkpoints(tmp_path) as checkpoints:
        stored = checkpoints.config(1)
    assert stored == make_config().to_dict()
    assert json.loads(json.dumps(stored)) == stored
    assert from_dict(stored) == make_config()


def test_what_an_interrupted_save_left_is_ignored_and_cleared_away(tmp_path):
    save_all(tmp_path, {1: (0.5, 1.0)})
    torn = tmp_path / "2.orbax-checkpoint-tmp"
    (torn / "state").mkdir(parents=True)
    (torn / "state" / "manifest.ocdbt").write_bytes(b"half")
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (1, 1)
        assert_equal(restore(checkpoints, 1), make_state(1))
    assert steps_in(tmp_path) == {"1"}
    save_all(tmp_path, {2: (0.6, 1.0)})
    assert steps_in(tmp_path) == {"2"}


def test_a_relative_directory_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_all(Path("here"), {1: (0.5, 1.0)})
    assert steps_in(tmp_path / "here") == {"1"}


def test_a_described_state_has_the_shapes_and_the_place():
    placement = whole()
    abstract = abstract_state(make_state(1), placement)
    assert jax.tree.structure(abstract) == jax.tree.structure(make_state(1))
    for found, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(make_state(1)), strict=True):
        assert isinstance(found, jax.ShapeDtypeStruct)
        assert (found.shape, found.dtype, found.sharding) == (leaf.shape, leaf.dtype, placement)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's directory, its best checkpoint at step 2 and its newest at step 3."""
    config = make_config()
    state = train_step.init_state(config)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, accuracy in ((1, 0.2), (2, 0.9), (3, 0.5)):
            params = jax.tree.map(lambda leaf, step=step: leaf + step, state.params)
            checkpoints.save(state.replace(step=jnp.int32(step), params=params), config, accuracy, 1.0)
    files.write_json(tmp_path / "config.json", config.to_dict())
    return tmp_path


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_best_parameters_of_a_run_are_read_and_nothing_is_changed(run):
    (run / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()  # a save going on
    before, verbosity = contents(run), logging.get_verbosity()
    config, step, params = best_params(run)
    assert (config, step) == (make_config(), 2)
    expected = jax.tree.map(lambda leaf: leaf + 2, train_step.init_state(config).params)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert contents(run) == before
    assert (run / "checkpoints" / "4.orbax-checkpoint-tmp").is_dir()
    assert logging.get_verbosity() == verbosity


@pytest.mark.parametrize("field", ["model.num_experts", "model.top_k", "seed"])
def test_a_configuration_that_is_not_the_checkpoints_own_is_refused(run, field):
    stored = json.loads((run / "config.json").read_text())
    place = stored["model"] if "." in field else stored
    place[field.split(".")[-1]] = 3
    files.write_json(run / "config.json", stored)
    with pytest.raises(ConfigError, match=f"config.json and the checkpoint of step 2 differ: {field}: . != 3"):
        best_params(run)


def test_a_damaged_checkpoint_is_one_clear_error(run):
    for path in (run / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ConfigError, match="the checkpoint of step 2 cannot be read"):
        best_params(run)


def test_what_is_no_run_or_has_no_checkpoint_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="it must be the directory of a run; it has no config.json"):
        best_params(tmp_path / "absent")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(ConfigError, match="it holds no checkpoint yet"):
        best_params(other)
    (other / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="it holds no checkpoint yet"):
        best_params(other)
    for text in ("{", "[]", "{}", '{"seed": 0}'):
        (other / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="it is damaged, or of another version"):
            best_params(other)
