import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from bvit_jax import calibration, data, vit
from bvit_jax.calibration import Layer, LinearMap
from tests import oracles
from tests.conftest import make_config, make_model

SMALL: dict[str, Any] = {"patch_size": 4, "num_layers": 3, "d_model": 8, "d_ff": 12, "num_heads": 2, "num_experts": 3}
"""Five tokens an image."""


def random_params(model, seed=0):
    """Parameters of which none is 0, so that biases and norms matter."""
    shapes, rng = vit.param_shapes(model), np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)


def images_of(model, count, seed=0):
    shape = (count, model.image_size, model.image_size, model.channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_layers_by_hand():
    model = make_model(**SMALL, family="standard", moe_layers="1")
    # Dense, mixture, dense: no pattern repeats, so each is a segment of its own.
    assert calibration.layers(model) == (
        Layer(0, "segment_0", "block_0", 0, False),
        Layer(1, "segment_1", "block_0", 0, True),
        Layer(2, "segment_2", "block_0", 0, False),
    )
    model = make_model(**SMALL | {"num_layers": 4}, family="standard", moe_layers="second")
    assert calibration.layers(model) == (
        Layer(0, "segment_0", "block_0", 0, False),
        Layer(1, "segment_0", "block_1", 0, True),
        Layer(2, "segment_0", "block_0", 1, False),
        Layer(3, "segment_0", "block_1", 1, True),
    )


def test_maps_by_hand():
    model = make_model(**SMALL | {"num_layers": 2, "num_experts": 2}, family="standard", moe_layers="1")
    first, second = calibration.layers(model)
    attention = [("query", "normed"), ("key", "normed"), ("value", "normed"), ("out", "context")]
    assert calibration.maps_of(model, first) == (
        *(
            LinearMap(0, f"segment_0/block_0/attention/{name}/kernel", 0, None, (8, 8), inputs)
            for name, inputs in attention
        ),
        LinearMap(0, "segment_0/block_0/ffn/up/kernel", 0, None, (8, 12), "ffn"),
        LinearMap(0, "segment_0/block_0/ffn/down/kernel", 0, None, (12, 8), "hidden"),
    )
    assert calibration.maps_of(model, second)[4:] == (
        LinearMap(1, "segment_1/block_0/ffn/up_kernel", 0, 0, (8, 12), "ffn"),
        LinearMap(1, "segment_1/block_0/ffn/up_kernel", 0, 1, (8, 12), "ffn"),
        LinearMap(1, "segment_1/block_0/ffn/down_kernel", 0, 0, (12, 8), "hidden"),
        LinearMap(1, "segment_1/block_0/ffn/down_kernel", 0, 1, (12, 8), "hidden"),
    )
    assert len(set(calibration.maps(model))) == len(calibration.maps(model)) == 4 + 2 + 4 + 4


@pytest.mark.parametrize("family", ["ternary", "butterfly", "low_rank"])
def test_experts_of_other_families_are_no_maps(family):
    found = calibration.maps(make_model(**SMALL, family=family))
    assert {one.inputs for one in found} == {"normed", "context"}
    assert len(found) == 3 * 4


def test_every_map_is_a_parameter_of_its_shape():
    model = make_model(**SMALL, family="standard", moe_layers="second")
    params = calibration.flat(random_params(model))
    for found in calibration.maps(model):
        assert found.of(params).shape == found.shape
    covered = {found.path for found in calibration.maps(model)}
    kernels = {path for path in params if path.startswith("segment") and path.endswith("kernel")}
    assert covered == {path for path in kernels if "router" not in path}


def test_put_replaces_one_matrix_and_no_other():
    model = make_model(**SMALL, family="standard", moe_layers="every")
    params = calibration.flat(random_params(model))
    before = {path: leaf.copy() for path, leaf in params.items()}
    wanted = next(found for found in calibration.maps(model) if found.expert == 1 and found.repeat == 2)
    wanted.put(params, np.ones(wanted.shape))
    before[wanted.path][2, 1] = 1
    for path, leaf in params.items():
        np.testing.assert_array_equal(leaf, before[path])
    out = next(found for found in calibration.maps(model) if found.path.endswith("out/kernel"))
    matrix = np.arange(64, dtype=np.float32).reshape(8, 8)
    out.put(params, matrix)
    # Inputs are heads times channels of a head, row by row: (2, 4, 8).
    np.testing.assert_array_equal(params[out.path][0], matrix.reshape(2, 4, 8))
    np.testing.assert_array_equal(out.of(params), matrix)


def module_outputs(model, params, images):
    """Returns what every module puts out, by path and layer, in a run of the model itself."""
    _, found = vit.Vit(model).apply({"params": params}, images, capture_intermediates=True, mutable=["intermediates"])
    leaves = jax.tree_util.tree_leaves_with_path(found["intermediates"])
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("moe_layers", ["1", "second"])
def test_what_a_map_sees_times_the_map_is_what_the_model_has(moe_layers):
    model = make_model(**SMALL | {"num_layers": 4}, family="standard", moe_layers=moe_layers)
    params, images = random_params(model), images_of(model, calibration.BATCH + 3)
    outputs, own = module_outputs(model, params, images), calibration.flat(params)
    walk, compared = calibration.Walk(model, own, images), 0
    for layer in calibration.layers(model):
        seen = walk.see(layer)
        for wanted in calibration.maps_of(model, layer):
            if wanted.expert is None:
                module = wanted.path.removesuffix("/kernel")
                y_NxO = seen.inputs(wanted, own) @ wanted.of(own) + own[f"{module}/bias"][wanted.repeat].ravel()
                expected = outputs[f"{module}/__call__/0"][wanted.repeat]
                np.testing.assert_allclose(y_NxO, expected.reshape(y_NxO.shape), atol=2e-5)
                compared += 1
        walk.step(layer)
    assert compared == 4 * 4 + 2 * (4 - sum(model.is_moe_by_layer))


def test_what_experts_see_against_a_loop_over_tokens():
    model = make_model(**SMALL, family="standard", moe_layers="1", top_k=2)
    params, images = random_params(model), images_of(model, 4)
    own = calibration.flat(params)
    walk = calibration.Walk(model, own, images)
    first, mixture, _ = calibration.layers(model)
    walk.step(first)
    seen = walk.see(mixture)
    x_NxD = jax.jit(vit.ffn_inputs, static_argnums=0)(model, params, images)["segment_1"]["block_0"][0].reshape(-1, 8)
    np.testing.assert_allclose(seen.rows["ffn"], x_NxD, atol=1e-5)
    router = own["segment_1/block_0/ffn/router/kernel"][0]
    chosen = [oracles.route(x @ router, 2)[0] for x in np.asarray(x_NxD, np.float64)]
    assert [sorted(row) for row in seen.experts_NxK.tolist()] == [sorted(row) for row in chosen]
    places_of = {expert: [index for index, row in enumerate(chosen) if expert in row] for expert in range(3)}
    assert all(seen.places(expert).tolist() == places for expert, places in places_of.items())
    expert, places = next((one, found) for one, found in places_of.items() if 0 < len(found) < len(x_NxD))
    up, down = [found for found in calibration.maps_of(model, mixture) if found.expert == expert]
    np.testing.assert_array_equal(seen.inputs(up, own), seen.rows["ffn"][places])
    bias = own["segment_1/block_0/ffn/up_bias"][0, expert].astype(np.float64)
    hidden = oracles.gelu(np.asarray(x_NxD, np.float64)[places] @ up.of(own).astype(np.float64) + bias)
    np.testing.assert_allclose(seen.inputs(down, own), hidden, atol=2e-5)
    np.testing.assert_allclose(seen.inputs(down, own, np.array(places[:1])), hidden[:1], atol=2e-5)


def test_a_walk_uses_the_parameters_as_they_are_now():
    model = make_model(**SMALL, family="dense")
    own, images = calibration.flat(random_params(model)), images_of(model, 3)
    changed = {path: leaf.copy() for path, leaf in own.items()}
    walk, other = calibration.Walk(model, own, images), calibration.Walk(model, changed, images)
    first = calibration.layers(model)[0]
    out = calibration.maps_of(model, first)[3]
    np.testing.assert_array_equal(walk.see(first).rows["ffn"], other.see(first).rows["ffn"])
    out.put(changed, np.zeros(out.shape))
    np.testing.assert_array_equal(walk.see(first).rows["context"], other.see(first).rows["context"])
    assert not np.allclose(walk.see(first).rows["ffn"], other.see(first).rows["ffn"])


def test_a_walk_in_bfloat16_models_is_in_float32():
    model = make_model(**SMALL, family="dense", compute_dtype="bfloat16")
    params, images = random_params(model), images_of(model, 2)
    first = calibration.layers(model)[0]
    found = calibration.Walk(model, calibration.flat(params), images).see(first)
    wanted = calibration.Walk(
        dataclasses.replace(model, compute_dtype="float32"), calibration.flat(params), images
    ).see(first)
    for name, rows in found.rows.items():
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, wanted.rows[name])


def test_gelu_is_that_of_the_model():
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    np.testing.assert_allclose(calibration.gelu(x), np.asarray(nn.gelu(x)), atol=1e-6)


def test_a_dense_layer_has_no_experts():
    with pytest.raises(ValueError, match="a dense layer has no experts"):
        calibration.Seen({}, None).places(0)


def test_calibration_images_are_the_first_that_the_run_trains_on():
    config = make_config("dense", seed=3)
    split = data.load_split(config.data, "train")
    found = calibration.calibration_images(split, config.model, config.seed, 20)
    wanted = data.train_batch(split, 20, config.seed, 0, np.arange(20)).images
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == np.uint8
    test = {image.tobytes() for image in data.load_split(config.data, "test").images}
    held_out = {image.tobytes() for image in data.load_split(config.data, "validation").images}
    assert not {image.tobytes() for image in found} & (test | held_out)
    assert len({image.tobytes() for image in found}) == 20
