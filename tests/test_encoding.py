import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from bvit_jax import calibration, components, encoding, memory, packed_file, precision, reductions, storage, vit
from bvit_jax.model_config import ModelConfig
from bvit_jax.reductions import Factors, Reductions
from bvit_jax.storage import Storage
from bvit_jax.tensors import NUMPY_DTYPE
from tests import reduced
from tests.conftest import KINDS, long_but, make_config
from tests.test_storage import small

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
FEW = [("butterfly separate", name) for name in STORAGES]
FEW += [(f"{family} separate", "least") for family in ("dense", "standard", "ternary", "low_rank")]
FEW += [("butterfly tied", "floats"), ("butterfly reference", "six bits"), ("scale per tensor", "ternary")]
FEW += [("standard separate", "bytes"), ("two segments of mixtures", "halves"), ("rounded in training", "bytes")]
REDUCED = [("factored", "dense", "int8"), ("factored", "butterfly", "float32"), ("factored", "standard", "int2")]
REDUCED += [("pruned", "dense", "bfloat16"), ("merged", "standard", "int8"), ("merged", "ternary", "float32")]


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
    return {stored.path: encoding.decode(stored, arrays, stored_as) for stored in storage.layout(model, stored_as)}


def precision_of(path: str, model: ModelConfig, stored_as: Storage) -> str:
    """The format of a parameter that is no angles, from its name."""
    name = path.split("/ffn/")[-1]
    if name.endswith("prototype") or (model.family == "ternary" and name in ("up_kernel", "down_kernel")):
        return "float32" if model.ternary_scale == "none" else "ternary"
    if name == "router/kernel":
        return stored_as.router
    if name.endswith(("_kernel", "_left", "_right")) or name in ("up/kernel", "down/kernel", "projection/kernel"):
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


# Tensors


@pytest.mark.parametrize(("model", "name"), long_but(FEW, CASES))
def test_encode_makes_what_layout_lists(model: str, name: str) -> None:
    config, stored_as = small(**MODELS[model]), STORAGES[name]
    params = random_params(config)
    arrays = encoding.encode(params, config, stored_as)
    tensors = [tensor for stored in storage.layout(config, stored_as) for tensor in stored.tensors]
    assert [tensor.name for tensor in tensors] == list(arrays)
    for tensor in tensors:
        array = arrays[tensor.name]
        assert array.dtype == NUMPY_DTYPE[tensor.dtype], tensor
        assert (array.shape, array.nbytes) == (tensor.shape, tensor.nbytes), tensor
    leaves = flat(params)
    assert [stored.path for stored in storage.layout(config, stored_as)] == list(leaves)
    for stored in storage.layout(config, stored_as):
        assert stored.shape == leaves[stored.path].shape
        assert stored.component == components.component_of(stored.path)
        precision = "angles" if stored.path.endswith("_angles") else precision_of(stored.path, config, stored_as)
        wanted = precision if precision != "angles" or stored_as.angle_bits < 32 else "float32"
        assert stored.encoding == wanted, stored.path


# Values


@pytest.mark.parametrize(("model", "name"), long_but(FEW, CASES))
def test_what_comes_back_is_rounded_by_the_rules(model: str, name: str) -> None:
    config, stored_as = small(**MODELS[model]), STORAGES[name]
    params = random_params(config)
    found = decode_all(encoding.encode(params, config, stored_as), config, stored_as)
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
    arrays = encoding.encode(random_params(config), config, stored_as)
    whole = decode_all(arrays, config, stored_as)
    seen = 0

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def layer(arrays: dict[str, jax.Array], index: int) -> dict[str, jax.Array]:
        inside = [stored for stored in storage.layout(config, stored_as) if stored.path.startswith("segment_0/")]
        part = {tensor.name: arrays[tensor.name][index] for stored in inside for tensor in stored.tensors}
        return {stored.path: encoding.decode(stored, part, stored_as) for stored in inside}

    for index in range(2):
        for path, value in layer(arrays, index).items():
            np.testing.assert_array_equal(value, whole[path][index])
            seen += 1
    assert seen > 2 * 20


def test_scales_of_attention_are_those_of_its_channels() -> None:
    config = small()
    params = random_params(config)
    arrays = encoding.encode(params, config, Storage(backbone="int8"))
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
        np.testing.assert_allclose(encoding.encode(params, config, Storage())[f"{path}.scale"], mean, rtol=1e-6)


@pytest.mark.parametrize("bits", [32, 16, 8, 6])
def test_angles_trained_with_4_bits_are_stored_as_those(bits: int) -> None:
    config = small(form="tied", angle_bits=4)
    params = random_params(config)
    stored_as = Storage(angle_bits=bits)
    found = flat(encoding.as_stored(params, config, stored_as))
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
    found = flat(encoding.as_stored(params, config, Storage(router=name)))[path]
    once = oracles.round_matrices(np.asarray(flat(params)[path], np.float64), trained)
    np.testing.assert_allclose(found, oracles.round_matrices(once, name), rtol=1e-6, atol=1e-8)


def test_stored_as_trained() -> None:
    model = small(angle_bits=6, router_precision="int8")
    assert storage.as_trained(model) == Storage(angle_bits=6, router="int8")
    assert storage.as_trained(small()) == Storage()
    params = random_params(model)
    found = flat(encoding.as_stored(params, model, storage.as_trained(model)))
    for path, leaf in flat(params).items():
        if not path.endswith(("_angles", "prototype", "router/kernel")):
            np.testing.assert_array_equal(found[path], leaf)


@pytest.mark.parametrize("name", ["floats", "least"])
def test_as_stored_has_the_tree_of_the_parameters(name: str) -> None:
    config = small(num_layers=5, moe_layers="second")
    params, stored_as = random_params(config), STORAGES[name]
    found = encoding.as_stored(params, config, stored_as)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    decoded = decode_all(encoding.encode(params, config, stored_as), config, stored_as)
    for path, leaf in flat(found).items():
        np.testing.assert_array_equal(leaf, decoded[path])


def test_storing_what_is_stored_changes_nothing_in_floats() -> None:
    config = small()
    once = encoding.as_stored(random_params(config), config, Storage(8, "int8", "int8", "int8"))
    again = encoding.as_stored(once, config.deployed(), Storage())
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
        encoding.encode(params, config, Storage(8, "int8"))


def test_parameters_of_another_model_are_refused() -> None:
    model = small()
    params = random_params(model)
    kernel = params["head"]["kernel"]
    params["head"]["kernel"] = kernel.T
    with pytest.raises(ValueError, match=r"parameter head/kernel is \(10, 6\); this model has \(6, 10\)"):
        encoding.encode(params, model, Storage())
    params["head"] = {"kernel": kernel}
    with pytest.raises(ValueError, match=r"parameter head/bias is absent; this model has \(10,\)"):
        encoding.encode(params, model, Storage())
    params = random_params(model) | {"other": np.zeros(3)}
    with pytest.raises(ValueError, match=r"parameter other is \(3,\); this model has none"):
        encoding.encode(params, model, Storage())


# Reduced parameters


def expected_factors(path: str, leaf: np.ndarray, ranks: tuple[int, ...], name: str) -> np.ndarray:
    """Rounds the balanced factors of each matrix, or the matrix itself, and multiplies them."""
    found = []
    for w_IxO, rank in zip(reduced.matrices(path, leaf).astype(np.float64), ranks, strict=True):
        left, values, right = np.linalg.svd(w_IxO, full_matrices=False)
        root = np.sqrt(values[:rank])
        parts = [left[:, :rank] * root, root[:, None] * right[:rank]] if rank < min(w_IxO.shape) else [w_IxO]
        parts = [part.astype(np.float32).astype(np.float64) for part in parts]
        rounded = [oracles.round_matrix(part, name) if part.size else part for part in parts]
        found.append(functools.reduce(np.matmul, rounded))
    return np.array(found).reshape(leaf.shape)


@pytest.mark.parametrize(("kind", "family", "name"), long_but(REDUCED, reduced.CASES))
def test_reduced_parameters_come_back_from_a_file(kind: str, family: str, name: str) -> None:
    config = reduced.config_of(family)
    model = config.model
    leaves, stored_as = reduced.reduced(model, kind, name)
    raw = packed_file.pack(reduced.tree_of(leaves), config, stored_as)
    assert len(raw) == memory.ledger(config, stored_as).bytes_full
    arrays = packed_file.unpack(raw).arrays
    params = storage.layout(model, stored_as)
    tensors = [tensor for stored in params for tensor in stored.tensors]
    found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    assert found == {tensor.name: (tensor.shape, NUMPY_DTYPE[tensor.dtype]) for tensor in tensors}
    ranks, kept = dict(stored_as.reductions.ranks), dict(stored_as.reductions.kept)
    merged = [f"{reduced.FFN}/{each}" for each in ("up_kernel", "up_bias", "down_kernel", "down_bias")]
    seen = 0
    for stored in params:
        if stored.reduction is None:
            continue
        path, leaf, seen = stored.path, leaves[stored.path], seen + 1
        back = encoding.decode(stored, arrays, stored_as)
        assert (back.shape, back.dtype) == (leaf.shape, np.float32), path
        as_it_is = leaf if stored.encoding == "float32" else expected_plain(path, leaf, stored.encoding)
        if path in ranks:
            wanted = expected_factors(path, leaf, ranks[path], stored.encoding)
            np.testing.assert_allclose(back, wanted, rtol=0, atol=1e-6, err_msg=path)
            if name == "float32" and stored.encoding == name:
                np.testing.assert_allclose(back, leaf, rtol=0, atol=1e-6, err_msg=path)
        elif path in kept or stored.encoding in ("float32", "bfloat16"):
            assert path in (kept or merged)
            np.testing.assert_array_equal(back, as_it_is, err_msg=path)  # to the bit
        else:
            assert path in merged
            np.testing.assert_allclose(back, as_it_is, rtol=2e-6, atol=1e-7, err_msg=path)
    assert seen == len(ranks) + len(kept) + len(merged) * bool(stored_as.reductions.groups)


def expected_plain(path: str, leaf: np.ndarray, name: Any) -> np.ndarray:
    found = [oracles.round_matrix(w_IxO, name) for w_IxO in reduced.matrices(path, leaf.astype(np.float64))]
    return np.array(found).reshape(leaf.shape)


@pytest.mark.parametrize("name", reduced.FORMATS)
def test_merged_experts_are_those_of_the_model_that_is_not_merged(name: str) -> None:
    model = reduced.config_of("standard").model
    leaves, stored_as = reduced.reduced(model, "merged", name)
    tree = reduced.tree_of(leaves)
    plain = dataclasses.replace(stored_as, reductions=reductions.NONE)
    found, expected = (flat(encoding.as_stored(tree, model, each)) for each in (stored_as, plain))
    for path in leaves:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


def test_pruned_by_hand() -> None:
    model = reduced.config_of("dense").model
    leaves, stored_as = reduced.reduced(model, "pruned", "bfloat16")
    path = f"{reduced.FFN}/up/kernel"
    leaf = np.zeros((2, 4, 6), np.float32)
    leaf[0, 0, 1], leaf[0, 1, 2], leaf[1, 3, 5] = 1.5, -2.0, 1.00390625  # the last one halfway between two numbers
    leaf[1, 3, 4] = -0.0
    stored_as = dataclasses.replace(stored_as, reductions=Reductions(kept=((path, 3),)))
    arrays = encoding.encode(reduced.tree_of(leaves | {path: leaf}), model, stored_as)
    np.testing.assert_array_equal(arrays[f"{path}.kept"].astype(np.float32), [1.5, -2, 1])
    # Weights 1, 8 (second row, third column) and 47 of 48, the first of each byte in its lowest bit.
    np.testing.assert_array_equal(arrays[f"{path}.index"], [2, 1, 0, 0, 0, 128])


@pytest.mark.parametrize(
    ("kind", "family", "path", "message"),
    [
        ("factored", "dense", "up/kernel", r"matrix 0 is of a rank above 1"),
        ("factored", "low_rank", "down_kernel", r"matrix 0 is of a rank above 1"),
        ("pruned", "dense", "up/kernel", r"48 weights are not 0; \d+ are to be kept"),
        ("merged", "standard", "up_bias", r"experts of one group differ"),
        ("merged", "ternary", "down_kernel", r"experts of one group differ"),
    ],
)
def test_parameters_that_are_not_reduced_as_said_are_refused(kind: str, family: str, path: str, message: str) -> None:
    model = reduced.config_of(family).model
    leaves, stored_as = reduced.reduced(model, kind, "float32")
    path = f"{reduced.FFN}/{path}"
    stored_as = dataclasses.replace(
        stored_as, reductions=dataclasses.replace(stored_as.reductions, kept=stored_as.reductions.kept[-2:-1])
    )
    if kind == "pruned":
        stored_as = dataclasses.replace(stored_as, reductions=Reductions(kept=((path, 24),)))
    leaves[path] = np.random.default_rng(1).normal(size=leaves[path].shape).astype(np.float32)
    with pytest.raises(ValueError, match=f"^parameter {path}: {message}$"):
        encoding.encode(reduced.tree_of(leaves), model, stored_as)


def test_one_weight_more_or_fewer_than_are_kept_is_refused() -> None:
    model = reduced.config_of("dense").model
    leaves, stored_as = reduced.reduced(model, "pruned", "float32")
    tree, path = reduced.tree_of(leaves), f"{reduced.FFN}/up/kernel"
    found = int(np.count_nonzero(leaves[path]))
    for kept in {max(found - 1, 0), min(found + 1, 48)} - {found}:
        changed = dataclasses.replace(stored_as, reductions=Reductions(kept=((path, kept),)))
        with pytest.raises(ValueError, match=f"{path}: {found} weights are not 0; {kept} are to be kept"):
            encoding.encode(tree, model, changed)


# Scales that are given


def on_grid(shape: tuple[int, ...], name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrices (..., I, O) on a grid, and its scales (..., O), float32; the largest weights are seldom at its ends."""
    rng = np.random.default_rng(seed)
    low, top = {"int8": (-127, 127), "int4": (-7, 7), "int2": (-2, 1)}[name]
    scale = np.exp(rng.normal(size=(*shape[:-2], shape[-1]))).astype(np.float32)
    integers = rng.integers(low, top + 1, shape).astype(np.float32)
    if name != "int2":
        integers[..., :2] = np.round(integers[..., :2] / 3)
    return scale[..., None, :] * (integers + np.float32(0.5 if name == "int2" else 0)), scale


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_weights_on_a_given_grid_come_back_to_the_bit(name: Any) -> None:
    model = reduced.config_of("standard").model
    stored_as = Storage(experts=name, backbone=name, ends="float32")
    leaves = {path: np.zeros(shape, np.float32) + path.endswith("bias") for path, shape in storage.param_shapes(model)}
    scales = {}
    for stored in storage.layout(model, stored_as):
        if stored.path.startswith("segment_") and stored.scale is not None:
            matrices, scale = on_grid((*stored.scale.shape[:-1], *stored.matrix), name, len(scales))
            leaves[stored.path], scales[stored.path] = matrices.reshape(stored.shape), scale
    assert any("attention" in path for path in scales)
    assert any("ffn" in path for path in scales)
    tree = reduced.tree_of(leaves)
    arrays = encoding.encode(tree, model, stored_as, scales)
    found = {each.path: encoding.decode(each, arrays, stored_as) for each in storage.layout(model, stored_as)}
    for path, scale in scales.items():
        np.testing.assert_array_equal(arrays[f"{path}.scale"], scale)
        np.testing.assert_array_equal(found[path], leaves[path], err_msg=path)
    # Without them, the scales follow the largest weights, which are not at the ends of the grid; nothing else changes.
    own = encoding.encode(tree, model, stored_as)
    assert own.keys() == arrays.keys()
    differing = {each for each in own if not np.array_equal(own[each], arrays[each])}
    assert {each.rpartition(".")[0] for each in differing} == scales.keys()


def test_scales_of_another_shape_are_refused() -> None:
    model = reduced.config_of("standard").model
    leaves, _ = reduced.reduced(model, "merged", "float32")
    path = f"{reduced.FFN}/up_kernel"
    for shape in ((6,), (3, 6), (2, 3, 1), (2, 3, 4)):
        message = f"parameter {path}: scales of shape {shape} were given; they have (2, 3, 6)"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            encoding.encode(reduced.tree_of(leaves), model, Storage(experts="int8"), {path: np.ones(shape)})


def test_nest() -> None:
    leaves = [("a", 1), ("b/c", 2), ("b/d/e", 3), ("b/d/f", 4)]
    assert encoding.nest(iter(leaves)) == {"a": 1, "b": {"c": 2, "d": {"e": 3, "f": 4}}}
    assert encoding.nest(iter(())) == {}


@pytest.mark.parametrize(
    ("name", "trits"),
    [("int8", "base3"), ("int4", "base3"), ("int2", "base3"), ("ternary", "base3"), ("ternary", "2bit")],
)
def test_factors_are_rounded_one_by_one_whatever_their_rank(name: Any, trits: Any) -> None:
    shape = {"d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "patch_size": 8}
    model = make_config("dense", **{f"model__{field}": value for field, value in shape.items()}).model
    path = "segment_0/block_0/ffn/up/kernel"
    rng, ranks = np.random.default_rng(0), (3, 6)
    leaves = {at: rng.normal(size=size).astype(np.float32) for at, size in storage.param_shapes(model)}
    matrices = [rng.normal(size=(16, rank)) @ rng.normal(size=(rank, 24)) for rank in ranks]
    leaves[path] = np.stack(matrices).astype(np.float32)
    stored_as = Storage(experts=name, trits=trits, reductions=Reductions(ranks=((path, ranks),)))
    found = calibration.flat(encoding.as_stored(reduced.tree_of(leaves), model, stored_as))[path]
    left, right, last, end = Factors(ranks).split(leaves[path])
    for matrix, parts in zip(found, ((left, right), (last, end)), strict=True):
        rounded = [
            np.asarray(precision.from_levels(*precision.levels(jnp.asarray(part, jnp.float32), name), name))
            for part in parts
        ]
        np.testing.assert_allclose(matrix, rounded[0] @ rounded[1], rtol=1e-5, atol=1e-5)


def test_scales_of_what_is_not_stored_as_integers_are_refused() -> None:
    model = reduced.config_of("dense").model
    leaves = {at: np.ones(size, np.float32) for at, size in storage.param_shapes(model)}
    path = f"{reduced.FFN}/up/kernel"
    scale = np.ones((2, 6), np.float32)
    for stored_as, given in ((Storage(), path), (Storage(experts="int8"), "nowhere")):
        with pytest.raises(ValueError, match=f"scales of {given} were given, which is not stored as integers"):
            encoding.encode(reduced.tree_of(leaves), model, stored_as, {given: scale})
    for wrong in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"{path}: scales were given that are not finite or not above 0"):
            encoding.encode(reduced.tree_of(leaves), model, Storage(experts="int8"), {path: scale * wrong})
