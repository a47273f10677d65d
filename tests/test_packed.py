import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from bvit_jax import components, encoding, memory, packed, packed_file, storage, vit
from bvit_jax.config import Config
from bvit_jax.storage import Storage
from tests import reduced
from tests.conftest import KINDS, long_but, make_config

# Sides that are no powers of two; images of 8 x 8 x 1 in 4 patches.
SMALL = {"d_model": 12, "d_ff": 20, "num_heads": 2, "patch_size": 4, "num_experts": 3, "num_stages": 3, "num_layers": 3}
BUTTERFLIES = [form for family, form in KINDS if family == "butterfly"]

# Compiling costs more here than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def small(family: str = "butterfly", form: str = "tied", **changes: object) -> Config:
    fields = SMALL | {"family": family, "form": form} | changes
    return make_config("butterfly,3", **{f"model__{name}": value for name, value in fields.items()})


def random_params(config: Config, seed: int = 0) -> Any:
    """Draws every parameter anew, those that start at zero (the head, biases) too; logits are of order 1."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = components.path_of(path)
        if name.endswith("_angles"):
            return jnp.asarray(rng.uniform(-4, 4, leaf.shape), leaf.dtype)
        values = rng.normal(size=leaf.shape) / 3
        return jnp.asarray(values + 1 if name.endswith("norm/scale") else values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, vit.param_shapes(config.model))


def random_images(config: Config, number: int = 3, seed: int = 0) -> np.ndarray:
    m = config.model
    return np.random.default_rng(seed).random((number, m.image_size, m.image_size, m.channels), np.float32)


def pack(params: Any, config: Config, stored_as: Storage | None = None) -> packed.PackedModel:
    return packed.PackedModel(packed_file.unpack(packed_file.pack(params, config, stored_as)))


apply = jit(vit.apply, static_argnums=0)


def logits_of(config: Config, params: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(apply(config.model, params, images)[0])


def are_equal_logits(found: np.ndarray, expected: np.ndarray, tolerance: float = 3e-6) -> None:
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    size = np.abs(expected).max()
    assert 0.1 < size < 20
    assert np.ptp(expected, axis=0).max() > 0.01 or len(expected) == 1  # images make a difference
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(size, 1))


# The packed model is the trained one

TRAINED: dict[str, dict[str, Any]] = {" ".join(kind): {"family": kind[0], "form": kind[1]} for kind in KINDS}
TRAINED |= {f"tied, {bits} bits": {"angle_bits": bits} for bits in (16, 8, 4)}
TRAINED |= {
    "separate, 4 bits": {"form": "separate", "angle_bits": 4, "router_precision": "int4"},
    "reference, 6 bits": {"form": "reference", "angle_bits": 6, "router_precision": "int8"},
    "standard, int4 router": {"family": "standard", "router_precision": "int4"},
    "bfloat16 router": {"router_precision": "bfloat16", "angle_bits": 16},
    "scale per tensor": {"ternary_scale": "tensor", "angle_bits": 8},
    "no scale": {"ternary_scale": "none", "angle_bits": 8, "form": "separate"},
    "ternary, scale per tensor": {"family": "ternary", "ternary_scale": "tensor", "router_precision": "int8"},
    "ternary, no scale": {"family": "ternary", "ternary_scale": "none"},
    "ternary, every second layer": {"family": "ternary", "num_layers": 5, "moe_layers": "second"},
    "every second layer": {"num_layers": 5, "moe_layers": "second", "angle_bits": 8},
    "one by one": {"num_layers": 4, "moe_layers": "0,1,2", "form": "separate", "angle_bits": 4},
    "odd sides": {"d_model": 15, "d_ff": 21, "num_heads": 3, "form": "separate", "angle_bits": 6},
}


AS_TRAINED = [
    *("dense separate", "standard separate", "butterfly separate", "tied, 4 bits", "reference, 6 bits"),
    *("ternary, no scale", "one by one"),
]


@pytest.mark.parametrize("name", long_but(AS_TRAINED, TRAINED))
def test_stored_as_trained_it_gives_the_logits_of_training(name: str) -> None:
    config = small(**TRAINED[name])
    params, images = random_params(config), random_images(config)
    model = pack(params, config)
    assert model.storage == storage.as_trained(config.model)
    are_equal_logits(model(images, 3), logits_of(config, params, images))


STORED: list[tuple[dict[str, Any], Storage]] = [
    ({"family": "dense"}, Storage(experts="int8", backbone="int8")),
    ({"family": "dense"}, Storage(experts="ternary", backbone="bfloat16")),
    ({"family": "standard"}, Storage(experts="int4", router="int4", backbone="int8")),
    ({"family": "standard"}, Storage(experts="ternary", router="bfloat16", trits="2bit")),
    ({"family": "standard"}, Storage(experts="int2")),
    ({"family": "low_rank", "moe_layers": "1"}, Storage(experts="int8", router="int8", backbone="int8")),
    ({"family": "low_rank", "rank": 1}, Storage(experts="int4")),
    ({"family": "ternary", "moe_layers": "1"}, Storage(experts="int4", router="int4", backbone="int8", trits="2bit")),
    ({"form": "tied"}, Storage(4, "int4", backbone="int8")),
    ({"form": "separate"}, Storage(6, "int8", trits="2bit")),
    ({"form": "reference"}, Storage(8, "bfloat16", "int8", "bfloat16")),
    ({"form": "reference", "angle_bits": 4, "router_precision": "int4"}, Storage(16, "float32", "int2")),
    ({"num_layers": 5, "moe_layers": "second", "angle_bits": 4}, Storage(8, "int8", "int4", "int8", "2bit")),
    ({"ternary_scale": "tensor", "d_model": 15, "num_heads": 5}, Storage(6, trits="2bit")),
]


@pytest.mark.parametrize(("changes", "stored_as"), long_but([STORED[at] for at in (0, 4, 8, 11)], STORED))
def test_stored_in_fewer_bits_it_gives_the_logits_of_the_rounded_parameters(
    changes: dict[str, Any], stored_as: Storage
) -> None:
    config = small(**changes)
    params, images = random_params(config), random_images(config)
    as_it_is = dataclasses.replace(config.model, ternary_scale="none", angle_bits=32, router_precision="float32")
    assert config.model.deployed() == as_it_is
    deployed = dataclasses.replace(config, model=as_it_is)
    expected = logits_of(deployed, encoding.as_stored(params, config.model, stored_as), images)
    are_equal_logits(pack(params, config, stored_as)(images, 3), expected)
    # The test would not see much if it came to the same.
    assert np.abs(expected - logits_of(config, params, images)).max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "family", "name"),
    [
        ("factored", "standard", "int8"),
        ("pruned", "dense", "bfloat16"),
        ("merged", "standard", "int4"),
    ],
)
def test_a_reduced_model_gives_the_logits_of_the_reduced_parameters(
    kind: str, family: str, name: Any, tmp_path: Path
) -> None:
    config = reduced.config_of(family)
    leaves, stored_as = reduced.reduced(config.model, kind, name)
    params, images = reduced.tree_of(leaves), random_images(config)
    packed_file.write(tmp_path / "model", params, config, stored_as)
    deployed = dataclasses.replace(config, model=config.model.deployed())
    expected = logits_of(deployed, encoding.as_stored(params, config.model, stored_as), images)
    are_equal_logits(packed.load(tmp_path / "model")(images, 3), expected)


@pytest.mark.parametrize(("family", "form"), long_but([("standard", "separate"), ("butterfly", "tied")], KINDS))
def test_bfloat16_activations(family: str, form: str) -> None:
    config = small(family, form, compute_dtype="bfloat16", angle_bits=8, num_layers=1)
    params, images = random_params(config), random_images(config)
    # Rounding to bfloat16, 2^-8 of a number, comes in another order in another program.
    are_equal_logits(pack(params, config)(images, 3), logits_of(config, params, images), 0.05)


def test_the_model_says_what_it_is(tmp_path: Path) -> None:
    config = small(angle_bits=8)
    stored_as = Storage(8, "int8")
    path = tmp_path / "model.safetensors"
    packed_file.write(path, random_params(config), config, stored_as)
    for model in (packed.load(path), packed.load(str(path))):
        assert (model.config, model.storage) == (config, stored_as)
        assert model.ledger == memory.ledger(config, stored_as)
        assert model.digest == packed_file.read(path).digest
        assert model.digest.encode() in path.read_bytes()
    with pytest.raises(packed_file.PackedFileError, match="No such file"):
        packed.load(tmp_path / "missing")


# Calls


@pytest.fixture(scope="module")
def model() -> packed.PackedModel:
    config = small(angle_bits=8, num_layers=1)
    return pack(random_params(config), config)


def test_any_number_of_images(model: packed.PackedModel) -> None:
    images = random_images(model.config, 5)
    alone = np.concatenate([model(image[None], 2) for image in images])
    for number in range(6):
        found = model(images[:number], batch_size=2)
        assert (found.dtype, found.shape) == (np.float32, (number, 10))
        np.testing.assert_allclose(found, alone[:number], rtol=0, atol=1e-5)
    np.testing.assert_allclose(model(images, 5), alone, rtol=0, atol=1e-5)
    np.testing.assert_allclose(model(images), alone, rtol=0, atol=1e-5)


def test_images_may_be_lists_or_other_floats(model: packed.PackedModel) -> None:
    images = random_images(model.config, 2)
    expected = model(images, 2)
    np.testing.assert_array_equal(model(images.tolist(), 2), expected)
    np.testing.assert_array_equal(model(jnp.asarray(images), 2), expected)
    np.testing.assert_array_equal(model(images.astype(np.float64), 2), expected)


@pytest.mark.parametrize(
    "shape", [(8, 8, 1), (2, 8, 8), (2, 8, 8, 3), (2, 4, 4, 1), (2, 8, 4, 1), (1, 2, 8, 8, 1), (), (0,)]
)
def test_images_of_another_shape_are_refused(model: packed.PackedModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images have shape") as error:
        model(np.zeros(shape))
    assert str(error.value) == f"images have shape {shape}; this model needs (images, 8, 8, 1)"


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_hold_an_image_at_least(model: packed.PackedModel, batch_size: int) -> None:
    for call in (model, model.probabilities):
        with pytest.raises(ValueError, match=f"batch_size is {batch_size}; it must be at least 1"):
            call(random_images(model.config), batch_size)


def test_probabilities_are_the_softmax_of_the_logits(model: packed.PackedModel) -> None:
    images = random_images(model.config, 5)
    found = model.probabilities(images, 2)
    assert (found.dtype, found.shape) == (np.float64, (5, 10))
    np.testing.assert_allclose(found.sum(axis=-1), np.ones(5), rtol=1e-12)
    expected = [oracles.softmax(logits) for logits in model(images, 2).astype(np.float64)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert model.probabilities(images[:0]).shape == (0, 10)


def test_probabilities_of_large_logits_are_finite() -> None:
    config = small(num_layers=1)
    params = random_params(config)
    params["head"]["kernel"] = 1e5 * params["head"]["kernel"]
    found = pack(params, config).probabilities(random_images(config), 3)
    np.testing.assert_allclose(found.sum(axis=-1), np.ones(3), rtol=1e-12)


# Memory


def test_memory_counts_the_packed_tensors() -> None:
    config = small(num_layers=1)
    stored_as = Storage(8, "int8", "int8", "int8")
    model = pack(random_params(config), config, stored_as)
    use = model.memory(4)
    tensors = [tensor for stored in storage.layout(config.model, stored_as) for tensor in stored.tensors]
    assert use.packed == sum(tensor.nbytes for tensor in tensors)
    header = next(row.bytes_full for row in model.ledger.rows if row.component == "header")
    assert use.packed == model.ledger.bytes_full - header
    # 4 images of 8 x 8 x 1 and 4 rows of 10 logits, float32, perhaps aligned.
    assert 4 * (64 + 10) * 4 <= use.images <= 4 * (64 + 10) * 4 + 4096
    assert use.working > 0
    assert use.peak == use.packed + use.images + use.working
    assert model.memory(1).working < model.memory(64).working


@pytest.mark.parametrize(
    ("family", "form"),
    long_but(
        [("standard", "tied"), ("butterfly", "tied")],
        [(kind, "tied") for kind in ("dense", "standard", "ternary", "butterfly", "low_rank")],
    ),
)
def test_working_memory_does_not_grow_with_the_layers(family: str, form: str) -> None:
    # Sides large enough that the parameters of a layer, once unpacked, outweigh the activations of an image.
    changes = {"d_model": 64, "d_ff": 128, "num_experts": 8, "num_heads": 2}
    stored_as = Storage(4, "int4", "int8", "int8")
    use = {}
    for layers in (3, 9):
        config = small(family, form, num_layers=layers, **changes)
        use[layers] = pack(random_params(config), config, stored_as).memory(1)
    assert use[9].packed > 2.5 * use[3].packed * (1 - 0.2)
    unpacked = 4 * 2 * 64 * 128 * (8 if config.model.stores_experts else 1)  # the FFN of one layer, float32
    assert use[9].working - use[3].working < unpacked / 4
    assert use[9].images == use[3].images


def test_loading_takes_none_of_the_training_code(tmp_path: Path) -> None:
    path, config = tmp_path / "model.safetensors", small(angle_bits=8, num_layers=1)
    params, images = random_params(config), random_images(config)
    packed_file.write(path, params, config)
    np.save(tmp_path / "images.npy", images)
    code = (
        "import json, sys; import numpy as np; from bvit_jax import packed\n"
        "model = packed.load(sys.argv[1])\n"
        "logits = model(np.load(sys.argv[2]), 3)\n"
        "print(json.dumps([logits.tolist(), sorted(sys.modules)]))"
    )
    command = [sys.executable, "-c", code, path, tmp_path / "images.npy"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    found = subprocess.run(command, env=env, check=True, timeout=300, capture_output=True, text=True)
    logits, modules = json.loads(found.stdout)
    are_equal_logits(np.array(logits, np.float32), logits_of(config, params, images))
    assert "bvit_jax.packed" in modules
    for module in modules:
        top = module.split(".")[0]
        assert top not in ("optax", "orbax", "tensorboardX", "sklearn", "absl_app", "ml_collections", "matplotlib")
        assert top not in ("configs", "experiments", "tests")
        assert not module.startswith("bvit_jax.train"), module
        others = ("processes", "checkpoints", "optimizer", "data", "augment", "sweep", "executor", "workdir")
        assert module not in [f"bvit_jax.{name}" for name in others]


# Rounding in training


def angles_rounded(params: Any, bits: int) -> Any:
    """Rounds the angles alone, by the slow reference."""

    def rounded(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if not components.path_of(path).endswith("_angles"):
            return leaf
        return jnp.asarray(oracles.round_angles(np.asarray(leaf, np.float64), bits), jnp.float32)

    return jax.tree_util.tree_map_with_path(rounded, params)


@pytest.mark.parametrize("form", long_but(["separate"], BUTTERFLIES))
def test_training_sees_angles_as_they_are_stored(form: str) -> None:
    config, plain = small(form=form, angle_bits=4, num_layers=1), small(form=form, num_layers=1)
    params, images = random_params(config), random_images(config)
    rounded = angles_rounded(params, 4)
    found = logits_of(config, params, images)
    np.testing.assert_allclose(found, logits_of(plain, rounded, images), rtol=0, atol=1e-5)
    assert np.abs(found - logits_of(plain, params, images)).max() > 0.01

    @functools.partial(jit, static_argnums=0)
    def gradient(model: Any, params: Any) -> Any:
        upstream = jnp.asarray(np.random.default_rng(1).normal(size=(3, 10)), jnp.float32)
        return jax.grad(lambda params: (vit.apply(model, params, images)[0] * upstream).sum())(params)

    # Straight through: that of the rounded angles.
    found, expected = gradient(config.model, params), gradient(plain.model, rounded)
    for (path, value), wanted in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        size = np.abs(wanted).max()
        assert size > 0, path
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-5 * max(size, 1), err_msg=str(path))


@pytest.mark.parametrize("scale", ["row", pytest.param("tensor", marks=pytest.mark.long)])
def test_training_sees_ternary_experts_as_they_are_stored(scale: str) -> None:
    config = small("ternary", ternary_scale=scale, num_layers=1)
    params, images = random_params(config), random_images(config)
    ffn = params["segment_0"]["block_0"]["ffn"]
    found = logits_of(config, params, images)
    rounded = {
        name: jnp.asarray(oracles.round_matrices(np.asarray(ffn[name], np.float64), "ternary", scale), jnp.float32)
        for name in ("up_kernel", "down_kernel")
    }
    params["segment_0"]["block_0"]["ffn"] = ffn | rounded
    standard = small("standard", num_layers=1)
    np.testing.assert_allclose(found, logits_of(standard, params, images), rtol=0, atol=1e-5)
    params["segment_0"]["block_0"]["ffn"] = ffn
    assert np.abs(found - logits_of(standard, params, images)).max() > 0.01


@pytest.mark.parametrize("precision", long_but(["int4"], ["bfloat16", "int8", "int4"]))
@pytest.mark.parametrize("family", ["standard", "butterfly"])
def test_training_sees_the_router_as_it_is_stored(family: str, precision: str) -> None:
    config, plain = small(family, router_precision=precision, num_layers=1), small(family, num_layers=1)
    params, images = random_params(config), random_images(config)
    kernel = np.asarray(params["segment_0"]["block_0"]["ffn"]["router"]["kernel"], np.float64)
    rounded = jax.tree.map(lambda leaf: leaf, params)
    rounded["segment_0"]["block_0"]["ffn"]["router"]["kernel"] = jnp.asarray(
        oracles.round_matrices(kernel, precision), jnp.float32
    )
    found = logits_of(config, params, images)
    np.testing.assert_allclose(found, logits_of(plain, rounded, images), rtol=0, atol=1e-5)
    assert np.abs(found - logits_of(plain, params, images)).max() > 1e-4
