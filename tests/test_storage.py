import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from bvit_jax import components, storage, vit
from bvit_jax.model_config import ConfigError, ModelConfig
from bvit_jax.storage import Storage
from tests.conftest import KINDS, make_model

# Sides that are no powers of two, 2 heads of 3 channels, 3 experts; images of 8 x 8 x 1 in 4 patches.
SMALL = {"d_model": 6, "d_ff": 10, "num_heads": 2, "patch_size": 4, "num_experts": 3, "num_stages": 2, "num_layers": 2}
STORAGES = {
    "floats": Storage(),
    "halves": Storage(16, "bfloat16", "bfloat16", "float32", "2bit"),
    "bytes": Storage(8, "int8", "int8", "int8", "base3"),
    "six bits": Storage(6, "int8", "int4", "bfloat16", "2bit"),
    "least": Storage(4, "int4", "int2", "int8", "base3"),
    "ternary": Storage(4, "int4", "ternary", "int8", "2bit"),
}
MODELS: dict[str, dict[str, Any]] = {" ".join(kind): {"family": kind[0], "form": kind[1]} for kind in KINDS} | {
    "every second layer": {"num_layers": 5, "moe_layers": "second"},
    "two segments of mixtures": {"num_layers": 4, "moe_layers": "1,2,3", "form": "tied", "d_model": 9, "num_heads": 3},
    "scale per tensor": {"ternary_scale": "tensor", "form": "reference"},
    "ternary experts, every second layer": {"family": "ternary", "num_layers": 3, "moe_layers": "second"},
    "ternary experts, scale per tensor": {"family": "ternary", "ternary_scale": "tensor"},
    "ternary experts, no scale": {"family": "ternary", "ternary_scale": "none"},
    "no scale": {"ternary_scale": "none", "form": "reference"},
    "rounded in training": {"angle_bits": 6, "router_precision": "int4", "form": "tied"},
}
CASES = [
    (model, name)
    for model in MODELS
    for name in STORAGES
    if name in ("halves", "least") or model == "butterfly separate"
]
CASES += [("standard separate", name) for name in ("bytes", "six bits", "ternary")] + [("rounded in training", "bytes")]
CASES += [
    ("dense separate", "ternary"),
    ("scale per tensor", "ternary"),
    ("butterfly reference", "six bits"),
    ("butterfly tied", "floats"),
]


def small(**changes: object) -> ModelConfig:
    return make_model(**SMALL | changes)


def random_params(model: ModelConfig, seed: int = 0) -> Any:
    """Draws every parameter anew, angles over several turns; channels differ in size."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if components.component_of(components.path_of(path)) == "angles":
            return jnp.asarray(rng.uniform(-10, 10, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape) * np.exp(rng.normal(size=leaf.shape[-1])) / 3, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, vit.param_shapes(model))


def flat(tree: Any) -> dict[str, Any]:
    return {components.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.partial(jax.jit, static_argnums=(1, 2), compiler_options={"xla_backend_optimization_level": 0})
def decode_all(arrays: dict[str, jax.Array], model: ModelConfig, stored_as: Storage) -> dict[str, jax.Array]:
    return {stored.path: storage.decode(stored, arrays, stored_as) for stored in storage.layout(model, stored_as)}


def precision_of(path: str, model: ModelConfig, stored_as: Storage) -> str:
    """The format of a parameter that is no angles, from its name."""
    name = path.split("/ffn/")[-1]
    if name.endswith("prototype") or (model.family == "ternary" and name in ("up_kernel", "down_kernel")):
        return "float32" if model.ternary_scale == "none" else "ternary"
    if name == "router/kernel":
        return stored_as.router
    if name in ("up_kernel", "down_kernel", "up/kernel", "down/kernel", "projection/kernel"):
        return stored_as.experts
    if path.endswith("kernel"):
        return stored_as.backbone
    return "float32"


def as_matrices(path: str, values: np.ndarray) -> np.ndarray:
    """Kernels of attention, (L, D, heads, channels) or, for `out`, (L, heads, channels, D), to (L, I, O)."""
    if path.endswith(("query/kernel", "key/kernel", "value/kernel")):
        layers, inputs, heads, channels = values.shape
        return values.reshape(layers, inputs, heads * channels)
    if path.endswith("attention/out/kernel"):
        layers, heads, channels, outputs = values.shape
        return values.reshape(layers, heads * channels, outputs)
    return values


def expected_value(path: str, values: np.ndarray, model: ModelConfig, stored_as: Storage) -> np.ndarray:
    """Rounds one parameter, first as in training, then as stored."""
    if path.endswith("_angles"):
        return oracles.round_angles(oracles.round_angles(values, model.angle_bits), stored_as.angle_bits)
    precision = precision_of(path, model, stored_as)
    if path.endswith("router/kernel") and model.router_precision != precision:
        values = oracles.round_matrices(values, model.router_precision)
    if precision == "float32":
        return values
    kind = model.ternary_scale if path.endswith(("prototype", "up_kernel", "down_kernel")) else "row"
    return oracles.round_matrices(as_matrices(path, values), precision, kind).reshape(values.shape)


# Layout


@pytest.mark.parametrize(("model", "name"), CASES)
def test_layout_lists_what_encode_makes(model: str, name: str) -> None:
    config, stored_as = small(**MODELS[model]), STORAGES[name]
    params = random_params(config)
    arrays = storage.encode(params, config, stored_as)
    tensors = [tensor for stored in storage.layout(config, stored_as) for tensor in stored.tensors]
    assert [tensor.name for tensor in tensors] == list(arrays)
    for tensor in tensors:
        array = arrays[tensor.name]
        assert array.dtype == storage.NUMPY_DTYPE[tensor.dtype], tensor
        assert (array.shape, array.nbytes) == (tensor.shape, tensor.nbytes), tensor
    leaves = flat(params)
    assert [stored.path for stored in storage.layout(config, stored_as)] == list(leaves)
    for stored in storage.layout(config, stored_as):
        assert stored.shape == leaves[stored.path].shape
        assert stored.component == components.component_of(stored.path)
        precision = "angles" if stored.path.endswith("_angles") else precision_of(stored.path, config, stored_as)
        wanted = precision if precision != "angles" or stored_as.angle_bits < 32 else "float32"
        assert stored.encoding == wanted, stored.path


def dtypes_and_shapes(model: ModelConfig, stored_as: Storage) -> dict[str, tuple[str, tuple[int, ...]]]:
    tensors = [tensor for stored in storage.layout(model, stored_as) for tensor in stored.tensors]
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}


def test_layout_by_hand() -> None:
    # A pair of rotations of 6 and 10 channels, 2 stages each: 6 = 2 x 3 has 3 angles, then 2 x 1 (position 0 meets 2,
    # 1 is alone); 10 = 2 x 5 has 5 angles, then 2 x 1 (position 0 of 5 meets 4). 5 and 7 angles.
    found = dtypes_and_shapes(small(form="tied"), Storage(6, "int4", "int2", "int8", "base3"))
    ffn = "segment_0/block_0/ffn"
    assert {name: value for name, value in found.items() if name.startswith(ffn + "/")} == {
        f"{ffn}/down_bias": ("F32", (2, 6)),
        f"{ffn}/up_bias": ("F32", (2, 10)),
        f"{ffn}/theta_angles.codes": ("U8", (2, 3, 6)),  # 5 codes: 2 groups of 3 bytes
        f"{ffn}/phi_angles.codes": ("U8", (2, 3, 6)),  # 7 codes
        f"{ffn}/prototype.codes": ("U8", (2, 12)),  # 60 trits
        f"{ffn}/prototype.scale": ("F32", (2, 10)),
        f"{ffn}/router/kernel.codes": ("U8", (2, 9)),  # 6 x 3 = 18 codes of 4 bits
        f"{ffn}/router/kernel.scale": ("F32", (2, 3)),
    }
    assert found["head/kernel.codes"] == ("U8", (60,))
    assert found["head/kernel.scale"] == ("F32", (10,))
    assert found["patch_embedding/kernel.codes"] == ("U8", (96,))  # 16 pixels x 6
    assert found["patch_embedding/kernel.scale"] == ("F32", (6,))
    assert found["class_token"] == ("F32", (1, 1, 6))
    assert found["position_embedding"] == ("F32", (1, 5, 6))
    attention = "segment_0/block_0/attention"
    for name in ("query", "key", "value", "out"):
        assert found[f"{attention}/{name}/kernel.codes"] == ("U8", (2, 36))
        assert found[f"{attention}/{name}/kernel.scale"] == ("F32", (2, 6))
    assert found[f"{attention}/query/bias"] == ("F32", (2, 2, 3))
    assert found[f"{attention}/out/bias"] == ("F32", (2, 6))


def test_layout_of_stored_experts_by_hand() -> None:
    found = dtypes_and_shapes(small(family="standard"), Storage(experts="int2", router="bfloat16"))
    ffn = "segment_0/block_0/ffn"
    # 2 layers x 3 experts; 6 x 10 = 60 codes of 2 bits, 15 bytes.
    assert found[f"{ffn}/up_kernel.codes"] == ("U8", (2, 3, 15))
    assert found[f"{ffn}/up_kernel.scale"] == ("F32", (2, 3, 10))
    assert found[f"{ffn}/down_kernel.codes"] == ("U8", (2, 3, 15))
    assert found[f"{ffn}/down_kernel.scale"] == ("F32", (2, 3, 6))
    assert found[f"{ffn}/up_bias"] == ("F32", (2, 3, 10))
    assert found[f"{ffn}/router/kernel"] == ("BF16", (2, 6, 3))


@pytest.mark.parametrize("experts", ["float32", "int4", "ternary"])
def test_layout_of_ternary_experts_by_hand(experts: Any) -> None:
    # Whatever the format of other experts: 2 layers x 3 experts of 6 x 10 = 60 trits, 12 bytes.
    found = dtypes_and_shapes(small(family="ternary"), Storage(experts=experts))
    ffn = "segment_0/block_0/ffn"
    assert {name: value for name, value in found.items() if name.startswith(ffn + "/")} == {
        f"{ffn}/up_kernel.codes": ("U8", (2, 3, 12)),
        f"{ffn}/up_kernel.scale": ("F32", (2, 3, 10)),
        f"{ffn}/up_bias": ("F32", (2, 3, 10)),
        f"{ffn}/down_kernel.codes": ("U8", (2, 3, 12)),
        f"{ffn}/down_kernel.scale": ("F32", (2, 3, 6)),
        f"{ffn}/down_bias": ("F32", (2, 3, 6)),
        f"{ffn}/router/kernel": ("F32", (2, 6, 3)),
    }
    found = dtypes_and_shapes(small(family="ternary", ternary_scale="tensor"), Storage(experts=experts, trits="2bit"))
    assert found[f"{ffn}/down_kernel.codes"] == ("U8", (2, 3, 15))
    assert found[f"{ffn}/down_kernel.scale"] == ("F32", (2, 3, 1))
    found = dtypes_and_shapes(small(family="ternary", ternary_scale="none"), Storage(experts=experts))
    assert found[f"{ffn}/down_kernel"] == ("F32", (2, 3, 10, 6))
    # Dense FFNs beside them are stored as asked for.
    found = dtypes_and_shapes(small(family="ternary", moe_layers="second"), Storage(experts="int8"))
    assert found[f"{ffn}/up/kernel.codes"] == ("U8", (1, 60))
    assert found["segment_1/block_0/ffn/up_kernel.codes"] == ("U8", (1, 3, 12))


def test_layout_of_other_formats_by_hand() -> None:
    ffn = "segment_0/block_0/ffn"
    found = dtypes_and_shapes(small(family="dense"), Storage(experts="ternary", trits="2bit"))
    assert found[f"{ffn}/up/kernel.codes"] == ("U8", (2, 15))
    found = dtypes_and_shapes(small(family="dense"), Storage(experts="ternary", trits="base3", backbone="bfloat16"))
    assert found[f"{ffn}/up/kernel.codes"] == ("U8", (2, 12))
    assert found["segment_0/block_0/attention/query/kernel"] == ("BF16", (2, 6, 2, 3))
    found = dtypes_and_shapes(small(form="tied", ternary_scale="tensor"), Storage(16))
    assert found[f"{ffn}/theta_angles.codes"] == ("U16", (2, 3, 5))
    assert found[f"{ffn}/prototype.scale"] == ("F32", (2, 1))
    found = dtypes_and_shapes(small(form="reference", ternary_scale="none"), Storage(4, experts="int4"))
    assert found[f"{ffn}/prototype"] == ("F32", (2, 6, 10))
    assert found[f"{ffn}/theta_angles.codes"] == ("U8", (2, 3, 4))  # 7 codes of 4 bits
    assert found[f"{ffn}/projection/kernel.codes"] == ("U8", (2, 30))
    assert found[f"{ffn}/projection/kernel.scale"] == ("F32", (2, 6))


def test_layers_of_several_segments() -> None:
    # 5 layers, the 2nd and 4th with a mixture: (FFN, mixture) twice, then an FFN.
    found = dtypes_and_shapes(small(num_layers=5, moe_layers="second"), Storage(experts="int8"))
    assert found["segment_0/block_0/ffn/up/kernel.codes"] == ("U8", (2, 60))
    assert found["segment_0/block_1/ffn/up_prototype.codes"] == ("U8", (2, 12))
    assert found["segment_1/block_0/ffn/up/kernel.codes"] == ("U8", (1, 60))


def test_layout_of_a_huge_model_is_made_at_once() -> None:
    model = make_model(num_experts=1_000_000)
    found = {tensor for stored in storage.layout(model, Storage(4)) for tensor in stored.tensors}
    assert sum(tensor.nbytes for tensor in found) > 10**8


def test_bytes_of_a_tensor() -> None:
    assert storage.Tensor("a", "F32", (2, 3)).nbytes == 24
    assert storage.Tensor("a", "BF16", (2, 3)).nbytes == 12
    assert storage.Tensor("a", "U16", (2, 3)).nbytes == 12
    assert storage.Tensor("a", "U8", (2, 3)).nbytes == 6
    assert storage.Tensor("a", "F32", ()).nbytes == 4


# Values


@pytest.mark.parametrize(("model", "name"), CASES)
def test_what_comes_back_is_rounded_by_the_rules(model: str, name: str) -> None:
    config, stored_as = small(**MODELS[model]), STORAGES[name]
    params = random_params(config)
    found = decode_all(storage.encode(params, config, stored_as), config, stored_as)
    for path, leaf in flat(params).items():
        back = np.asarray(found[path])
        assert (back.shape, back.dtype) == (leaf.shape, np.float32), path
        expected = expected_value(path, np.asarray(leaf, np.float64), config, stored_as)
        if path.endswith("_angles"):
            rounded_at = min(config.angle_bits, stored_as.angle_bits)
            off = np.abs(oracles.on_circle(back - expected))
            if config.angle_bits == 32 or stored_as.angle_bits >= config.angle_bits:
                np.testing.assert_allclose(off, 0, atol=3e-6, err_msg=path)
            else:  # grid on grid: what lies in the middle between two steps may go either way
                step = 2 * math.pi / 2**rounded_at
                assert ((off < 3e-6) | (np.abs(off - step) < 3e-6)).all(), path
        else:
            np.testing.assert_allclose(back, expected, rtol=2e-6, atol=1e-7, err_msg=path)


@pytest.mark.parametrize("name", STORAGES)
def test_one_layer_decodes_to_its_part_of_the_whole(name: str) -> None:
    config, stored_as = small(num_layers=5, moe_layers="second"), STORAGES[name]
    arrays = storage.encode(random_params(config), config, stored_as)
    whole = decode_all(arrays, config, stored_as)
    seen = 0

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def layer(arrays: dict[str, jax.Array], index: int) -> dict[str, jax.Array]:
        inside = [stored for stored in storage.layout(config, stored_as) if stored.path.startswith("segment_0/")]
        part = {tensor.name: arrays[tensor.name][index] for stored in inside for tensor in stored.tensors}
        return {stored.path: storage.decode(stored, part, stored_as) for stored in inside}

    for index in range(2):
        for path, value in layer(arrays, index).items():
            np.testing.assert_array_equal(value, whole[path][index])
            seen += 1
    assert seen > 2 * 20


def test_scales_of_attention_are_those_of_its_channels() -> None:
    config = small()
    params = random_params(config)
    arrays = storage.encode(params, config, Storage(backbone="int8"))
    for name in ("query", "key", "value", "out"):
        path = f"segment_0/block_0/attention/{name}/kernel"
        kernel = np.asarray(flat(params)[path])
        inputs = (1, 2) if name == "out" else (1,)
        largest = np.abs(kernel).max(axis=inputs).reshape(2, 6)
        np.testing.assert_allclose(arrays[f"{path}.scale"], largest / 127, rtol=1e-6)


@pytest.mark.parametrize(("family", "name", "lead"), [("butterfly", "prototype", 1), ("ternary", "down_kernel", 2)])
def test_scales_of_ternary_matrices(family: str, name: str, lead: int) -> None:
    for kind, axes in (("row", (-2,)), ("tensor", (-2, -1))):
        config = small(family=family, form="tied", ternary_scale=kind)
        params = random_params(config)
        path = f"segment_0/block_0/ffn/{name}"
        matrices = np.asarray(flat(params)[path], np.float64)
        mean = np.abs(matrices).mean(axis=axes).reshape(*matrices.shape[:lead], -1)
        np.testing.assert_allclose(storage.encode(params, config, Storage())[f"{path}.scale"], mean, rtol=1e-6)


@pytest.mark.parametrize("bits", [32, 16, 8, 6])
def test_angles_trained_with_4_bits_are_stored_as_those(bits: int) -> None:
    config = small(form="tied", angle_bits=4)
    params = random_params(config)
    stored_as = Storage(angle_bits=bits)
    found = flat(storage.as_stored(params, config, stored_as))
    step, seen = 2 * math.pi / 16, 0
    for path, leaf in flat(params).items():
        if path.endswith("_angles"):
            ratio = np.asarray(found[path], np.float64) / step
            np.testing.assert_allclose(ratio, np.round(ratio), atol=1e-5)
            error = oracles.on_circle(np.asarray(found[path], np.float64) - np.asarray(leaf, np.float64))
            assert np.abs(error).max() <= step / 2 + 1e-5
            assert np.abs(error).max() > step / 4  # they were not on the grid before
            seen += 1
    assert seen == 2


@pytest.mark.parametrize("trained", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "int4"])
def test_the_router_is_rounded_as_trained_before_it_is_stored(trained: str, name: str) -> None:
    config = small(form="tied", router_precision=trained)
    params = random_params(config)
    path = "segment_0/block_0/ffn/router/kernel"
    found = flat(storage.as_stored(params, config, Storage(router=name)))[path]
    once = oracles.round_matrices(np.asarray(flat(params)[path], np.float64), trained)
    np.testing.assert_allclose(found, oracles.round_matrices(once, name), rtol=1e-6, atol=1e-8)


def test_stored_as_trained() -> None:
    model = small(angle_bits=6, router_precision="int8")
    assert storage.as_trained(model) == Storage(angle_bits=6, router="int8")
    assert storage.as_trained(small()) == Storage()
    params = random_params(model)
    found = flat(storage.as_stored(params, model, storage.as_trained(model)))
    for path, leaf in flat(params).items():
        if not path.endswith(("_angles", "prototype", "router/kernel")):
            np.testing.assert_array_equal(found[path], leaf)


@pytest.mark.parametrize("name", ["floats", "least"])
def test_as_stored_has_the_tree_of_the_parameters(name: str) -> None:
    config = small(num_layers=5, moe_layers="second")
    params, stored_as = random_params(config), STORAGES[name]
    found = storage.as_stored(params, config, stored_as)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    decoded = decode_all(storage.encode(params, config, stored_as), config, stored_as)
    for path, leaf in flat(found).items():
        np.testing.assert_array_equal(leaf, decoded[path])


def test_storing_what_is_stored_changes_nothing_in_floats() -> None:
    config = small()
    once = storage.as_stored(random_params(config), config, Storage(8, "int8", "int8", "int8"))
    again = storage.as_stored(once, config.deployed(), Storage())
    for path, leaf in flat(once).items():
        np.testing.assert_array_equal(flat(again)[path], leaf)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "path",
    [
        "head/bias",
        "segment_0/block_0/ffn/theta_angles",
        "segment_0/block_0/ffn/prototype",
        "segment_0/block_0/ffn/router/kernel",
    ],
)
def test_parameters_that_are_not_finite_are_refused(value: float, path: str) -> None:
    config = small(form="tied", angle_bits=4, router_precision="int4")
    params = random_params(config)

    def spoilt(key_path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf.at[(-1,) * leaf.ndim].set(value) if components.path_of(key_path) == path else leaf

    params = jax.tree_util.tree_map_with_path(spoilt, params)
    with pytest.raises(ValueError, match=f"parameter {path} is not finite"):
        storage.encode(params, config, Storage(8, "int8"))


def test_parameters_of_another_model_are_refused() -> None:
    model = small()
    params = random_params(model)
    kernel = params["head"]["kernel"]
    params["head"]["kernel"] = kernel.T
    with pytest.raises(ValueError, match=r"parameter head/kernel is \(10, 6\); this model has \(6, 10\)"):
        storage.encode(params, model, Storage())
    params["head"] = {"kernel": kernel}
    with pytest.raises(ValueError, match=r"parameter head/bias is absent; this model has \(10,\)"):
        storage.encode(params, model, Storage())
    params = random_params(model) | {"other": np.zeros(3)}
    with pytest.raises(ValueError, match=r"parameter other is \(3,\); this model has none"):
        storage.encode(params, model, Storage())


def test_nest() -> None:
    leaves = [("a", 1), ("b/c", 2), ("b/d/e", 3), ("b/d/f", 4)]
    assert storage.nest(iter(leaves)) == {"a": 1, "b": {"c": 2, "d": {"e": 3, "f": 4}}}
    assert storage.nest(iter(())) == {}


# Settings


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        *(("angle_bits", value, "32 or 16 or 8 or 6 or 4") for value in (8.0, True, "8", 5, 0, None, [8], math.nan)),
        *(("router", value, "float32 or bfloat16 or int8 or int4") for value in ("int2", "ternary", "", None, 8)),
        *(
            ("experts", value, "float32 or bfloat16 or int8 or int4 or int2 or ternary")
            for value in ("int3", "Int8", None, ["int8"])
        ),
        *(("backbone", value, "float32 or bfloat16 or int8") for value in ("int4", "ternary", True)),
        *(("trits", value, "base3 or 2bit") for value in ("base4", 2, None)),
    ],
)
def test_impossible_settings_are_refused(field: str, value: object, wanted: str) -> None:
    with pytest.raises(ConfigError) as error:
        Storage(**{field: value})
    assert str(error.value) == f"storage.{field} = {value!r}: it must be {wanted}"


def test_settings_are_values() -> None:
    assert Storage(8) == Storage(angle_bits=8) != Storage(6)
    assert len({Storage(8), Storage(8), Storage()}) == 2
    assert list(dataclasses.asdict(Storage()).values()) == [32, "float32", "float32", "float32", "base3"]
