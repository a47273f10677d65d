import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from bvit_jax import data, encoding, opened, packed, packed_file, run_images, sharding, storage, train, trained, vit
from bvit_jax.config import Config, from_dict
from bvit_jax.model_config import ConfigError
from bvit_jax.opened import Opened
from bvit_jax.packed_file import PackedFileError
from bvit_jax.prepared import PreparedSet
from tests.conftest import make_config, on_devices
from tests.test_checkpoints import assert_equal, contents

# Images of 8 x 8 x 1 in 4 patches.
SMALL = {"d_model": 8, "d_ff": 12, "num_heads": 2, "patch_size": 4, "num_layers": 1}


def trained_on_all_devices() -> dict[str, bytes]:
    """Trains for a few steps, parameters split over as many devices as there are; returns the files of the run."""
    # All that training rounds is there, and steps are large, so that it shows.
    fields = SMALL | {"num_stages": 2, "angle_bits": 4, "angle_init": 2.0, "router_precision": "int4"}
    fields["dispatch"] = "rows"
    changes = {f"model__{name}": value for name, value in fields.items()}
    changes |= {"total_steps": 3, "eval_every": 2, "optimizer__warmup_steps": 0, "optimizer__learning_rate": 0.03}
    config = make_config("butterfly,4,tied", **changes)
    with tempfile.TemporaryDirectory() as workdir:
        train.run(config, Path(workdir), show_progress=False, layout=sharding.Layout(fsdp=True))
        assert len(jax.devices()) == 4
        return contents(Path(workdir))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that four devices wrote, opened here by one."""
    workdir = tmp_path_factory.mktemp("run")
    for name, content in on_devices(4, trained_on_all_devices).items():
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).write_bytes(content)
    assert len(jax.devices()) == 1
    return workdir


@pytest.fixture(scope="module")
def model(run) -> Opened:
    return opened.load(run)


@pytest.fixture(scope="module")
def file(run, tmp_path_factory) -> Path:
    """The packed file of the run, in a directory of its own."""
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    config, _, params = trained.best_params(run)
    packed_file.write(path, params, config)
    return path


apply = jax.jit(vit.apply, static_argnums=0)


def logits_of(found: Opened, images: np.ndarray) -> np.ndarray:
    return np.array(apply(found.model, found.params, images)[0])


def states(directory: Path) -> dict[str, tuple[int, int]]:
    """When everything in a directory, and it itself, was written, and how long it is."""
    every = [directory, *directory.rglob("*")]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in every}


# Runs


def test_a_run_is_its_best_parameters_rounded_as_training_rounds_them(run, model):
    config, step, params = trained.best_params(run)
    result = json.loads((run / "result.json").read_text())
    assert (model.path, model.config, model.step) == (run, config, step)
    assert from_dict(json.loads((run / "config.json").read_text())) == config
    assert step == result["best_step"]
    assert trained.params_digest(params) == result["params_digest"]
    assert_equal(model.params, encoding.as_stored(params, config.model, storage.as_trained(config.model)))
    assert_equal(opened.as_used(params, config.model), model.params)
    assert model.model == dataclasses.replace(
        config.model, ternary_scale="none", angle_bits=32, router_precision="float32"
    )
    before, after = params["segment_0"]["block_0"]["ffn"], model.params["segment_0"]["block_0"]["ffn"]
    assert all(len(np.unique(np.abs(column[column != 0]))) <= 1 for column in np.array(after["prototype"][0]).T)
    for name in ("theta_angles", "phi_angles"):
        # 16 steps of the circle.
        steps = np.array(after[name], np.float64) / (np.pi / 8)
        np.testing.assert_allclose(steps, steps.round(), atol=1e-5)
        assert np.abs(before[name] - after[name]).max() > 0.05
    assert np.abs(before["router"]["kernel"] - after["router"]["kernel"]).max() > 1e-4
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(model.params))


def test_an_opened_run_gives_the_logits_and_scores_of_the_run(run, model):
    config, _, params = trained.best_params(run)
    images = model.images("test", 400)
    logits = logits_of(model, images.pixels)
    expected = np.array(apply(config.model, params, images.pixels)[0])
    assert np.ptp(expected, axis=0).max() > 0.1  # images make a difference
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    unrounded = np.array(apply(model.model, params, images.pixels)[0])
    assert np.abs(unrounded - expected).max() > 1e-2
    result = json.loads((run / "result.json").read_text())
    # Three images in four hundred may be near enough to two classes to fall to the other.
    assert (logits.argmax(axis=1) == images.labels).mean() == pytest.approx(result["test_accuracy"], abs=0.0075)
    nll = oracles.cross_entropy(logits.astype(np.float64), images.labels, 0.0).mean()
    assert nll == pytest.approx(result["test_nll"], abs=1e-4)


def test_opening_writes_nothing(run, file):
    for place in (run, file.parent):
        before = states(place)
        found = opened.load(place)
        found.images("test", 2)
        assert states(place) == before
    before = states(file.parent)
    opened.load(file)
    assert states(file.parent) == before


def test_a_path_may_be_a_string(run, model):
    found = opened.load(os.fspath(run))
    assert (found.path, found.step) == (run, model.step)


# Packed files


def test_a_packed_file_is_the_model_of_the_run(model, file):
    found = opened.load(file)
    assert (found.path, found.config, found.step, found.model) == (file, model.config, None, model.model)
    assert_equal(found.params, model.params)
    images = found.images("test", 400)
    np.testing.assert_array_equal(images.pixels, model.images("test", 400).pixels)
    logits = logits_of(found, images.pixels)
    np.testing.assert_allclose(packed.load(file)(images.pixels, 100), logits, rtol=0, atol=1e-5)


def test_a_packed_file_of_fewer_bits_is_what_the_file_holds(run, model, tmp_path):
    config, _, params = trained.best_params(run)
    path, fewer = tmp_path / "small", storage.Storage(4, "int4", backbone="int4", ends="bfloat16")
    packed_file.write(path, params, config, fewer)
    found = opened.load(path)
    assert_equal(found.params, encoding.as_stored(params, config.model, fewer))
    kernels = [one.params["segment_0"]["block_0"]["attention"]["out"]["kernel"] for one in (found, model)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3


def test_a_directory_that_holds_a_packed_file_is_that_file(file, model, tmp_path):
    shutil.copy(file, tmp_path / "model.safetensors")
    (tmp_path / "compression.json").write_text("{}")
    found = opened.load(tmp_path)
    assert (found.path, found.step) == (tmp_path / "model.safetensors", None)
    assert_equal(found.params, model.params)


def test_models_are_computed_in_float32_whatever_they_were_trained_in(tmp_path):
    shape = {f"model__{name}": value for name, value in SMALL.items()}
    config = make_config("dense,1", **shape, model__compute_dtype="bfloat16")
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), vit.param_shapes(config.model))
    packed_file.write(tmp_path / "dense", params, config)
    found = opened.load(tmp_path / "dense")
    assert found.config.model.compute_dtype == "bfloat16"
    assert found.model == dataclasses.replace(config.model.deployed(), compute_dtype="float32")
    assert found.mixtures == ()


# What cannot be opened


def test_what_is_not_there_or_no_run_is_refused(tmp_path):
    absent = tmp_path / "absent"
    with pytest.raises(ConfigError, match="absent'.*it must be the directory of a run; it has no config.json"):
        opened.load(absent)
    assert not absent.exists()
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "notes.txt").touch()  # no trial
    with pytest.raises(ConfigError, match="it must be the directory of a run; it has no config.json"):
        opened.load(tmp_path)


def test_a_run_without_checkpoints_is_refused(run, tmp_path):
    shutil.copy(run / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="it holds no checkpoint yet"):
        opened.load(tmp_path)


def test_a_sweep_is_refused_and_one_of_its_runs_named_which_opens(run, model, tmp_path):
    for trial in ("b2", "d4", "a1", "e5", "c3"):
        (tmp_path / "trials" / trial).mkdir(parents=True)
    (tmp_path / "trials" / "a0.lock").touch()
    (tmp_path / "sweep.json").write_text("{}")
    named = str(tmp_path / "trials" / "a1")
    with pytest.raises(ConfigError) as refused:
        opened.load(tmp_path)
    assert str(refused.value) == f"{str(tmp_path)!r} is a sweep; open one of its runs, such as {named!r}"
    shutil.copytree(run, named, dirs_exist_ok=True)
    assert_equal(opened.load(named).params, model.params)


def test_a_damaged_file_or_one_of_another_kind_is_refused(run, file, tmp_path):
    path = tmp_path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    for place in (path, tmp_path):
        with pytest.raises(PackedFileError, match="model.safetensors: damaged: its digest is"):
            opened.load(place)
    path.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(PackedFileError, match="model.safetensors: damaged"):
        opened.load(path)
    with pytest.raises(PackedFileError, match="config.json: not a packed model"):
        opened.load(run / "config.json")


# Images


@pytest.mark.parametrize(
    ("split", "count", "expected"),
    [
        ("test", 1, [0]),
        ("test", 3, [0, 133, 266]),
        ("validation", 4, [0, 49, 98, 147]),
        ("train", 5, [0, 240, 480, 720, 960]),
        ("test", 400, range(400)),
        ("validation", 198, range(197)),
        ("test", 100_000, range(400)),
    ],
)
def test_images_are_spread_evenly_over_a_split(model, split, count, expected):
    found, whole = model.images(split, count), data.load_split(model.config.data, split)
    assert (found.pixels.dtype, found.pixels.shape[1:]) == (np.uint8, (8, 8, 1))
    assert len(found) == len(found.pixels) == len(expected)
    np.testing.assert_array_equal(found.pixels, whole.images[list(expected)])
    np.testing.assert_array_equal(found.labels, whole.labels[list(expected)])


def test_by_default_images_are_64_of_the_test_split(model):
    found, expected = model.images(), model.images("test", 64)
    assert len(found) == 64
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_images_are_cut_to_what_the_model_takes(model):
    smaller = dataclasses.replace(model, model=dataclasses.replace(model.model, image_size=4))
    np.testing.assert_array_equal(smaller.images("test", 9).pixels, model.images("test", 9).pixels[:, 2:6, 2:6])


def test_wrong_requests_for_images_are_refused(model):
    wrong: list[tuple[Any, int, str]] = [
        ("tests", 4, "split = 'tests': it must be train or validation or test"),
        ("", 4, "split = '': it must be train or validation or test"),
        ("test", 0, "count = 0: it must be at least 1"),
        ("train", -3, "count = -3: it must be at least 1"),
    ]
    for split, count, message in wrong:
        with pytest.raises(ConfigError, match=message):
            model.images(split, count)


def test_images_that_are_not_the_runs_own_are_refused_but_a_file_has_recorded_none(run, file, tmp_path, monkeypatch):
    recorded = PreparedSet("digits", Path("/data/digits/1.0.0"), "1.0.0", {"test": 400}, 10, ("0",), 1, "a" * 16)
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    run_images.claim(copied, "digits", recorded)
    split = data.Split(np.zeros((5, 8, 8, 1), np.uint8), np.arange(5, dtype=np.int32))
    monkeypatch.setattr(data, "load_split", lambda config, name, found: split)
    monkeypatch.setattr(data, "opened", lambda config: recorded)
    assert opened.load(copied).images("test", 9).labels.tolist() == [0, 1, 2, 3, 4]
    monkeypatch.setattr(data, "opened", lambda config: dataclasses.replace(recorded, digest="b" * 16))
    with pytest.raises(ConfigError, match="it is of other images of digits, digest a{16}, not b{16}"):
        opened.load(copied).images("test", 9)
    shutil.copy(file, copied / "beside")
    assert len(opened.load(copied / "beside").images("test", 9)) == 5


def test_without_its_data_a_model_opens_but_has_no_images(model, monkeypatch):
    def absent(config: Any) -> Any:
        raise ConfigError("data.name = 'birds': it must be prepared first")

    monkeypatch.setattr(data, "opened", absent)
    assert opened.load(model.path).step == model.step
    with pytest.raises(ConfigError, match="it must be prepared first"):
        model.images()


# Layers


def test_the_mixtures_and_their_parameters_layer_by_layer():
    # Layers 0 and 1 are a pattern that 2 and 3 repeat, and 4 is alone.
    fields = SMALL | {"num_layers": 5, "moe_layers": "1,3,4"}
    config: Config = make_config("butterfly,4,tied", **{f"model__{name}": value for name, value in fields.items()})
    numbers = {("segment_0", "block_0"): [0, 2], ("segment_0", "block_1"): [1, 3], ("segment_1", "block_0"): [4]}
    params: dict[str, Any] = {"segment_0": {}, "segment_1": {}}
    for (segment, block), layers in numbers.items():
        leaf = jnp.asarray(layers)
        params[segment][block] = {"ffn": {"prototype": leaf, "router": {"kernel": 10 * leaf}}, "attention": -leaf}
    found = Opened(Path("made"), config, None, config.model.deployed(), params)
    assert [layer.index for layer in found.mixtures] == [1, 3, 4]
    for layer in found.mixtures:
        assert found.ffn(layer) == {"prototype": layer.index, "router": {"kernel": 10 * layer.index}}
