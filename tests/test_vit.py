import dataclasses
import functools
import itertools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import long_but, make_model
from hypothesis import given
from hypothesis import strategies as st

from bvit_jax import vit
from bvit_jax.model_config import ModelConfig

T, F = True, False

# Compiling costs more here than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def small(**changes: object) -> ModelConfig:
    shape = {"patch_size": 4, "d_model": 12, "d_ff": 20, "num_heads": 2, "num_experts": 3, "num_layers": 3}
    return make_model(**shape | changes)


def random_params(config: ModelConfig, seed: int = 0) -> Any:
    """Draws every parameter anew, those that start at zero (the head, biases) too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 3, s.dtype), vit.param_shapes(config))


def random_images(config: ModelConfig, batch: int = 3) -> jax.Array:
    shape = (batch, config.image_size, config.image_size, config.channels)
    return jax.random.uniform(jax.random.key(0), shape)


apply = jit(vit.apply, static_argnums=0)


# Segments


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((), ()),
        ((T,), (((T,), 1),)),
        ((T, T, T, T), (((T,), 4),)),
        ((F, T), (((F,), 1), ((T,), 1))),
        ((F, T, F, T), (((F, T), 2),)),
        ((F, T, F, T, T), (((F, T), 2), ((T,), 1))),
        ((F, F, T, F, F, T), (((F, F, T), 2),)),
        ((T, F, F, F), (((T,), 1), ((F,), 3))),
        ((T, F, T, F, T, F, T), (((T, F), 3), ((T,), 1))),
    ],
)
def test_segments_by_hand(layers: tuple[bool, ...], expected: tuple[vit.Segment, ...]) -> None:
    assert vit.layer_segments(layers) == expected


@given(st.lists(st.booleans(), max_size=16).map(tuple))
def test_segments_reproduce_the_layers(layers: tuple[bool, ...]) -> None:
    segments = vit.layer_segments(layers)
    assert tuple(itertools.chain.from_iterable(pattern * repeats for pattern, repeats in segments)) == layers
    for pattern, repeats in segments:
        assert repeats > 1 or len(pattern) == 1
        # The shortest pattern: none of its beginnings repeats to make it.
        for size in range(1, len(pattern)):
            assert pattern[:size] * (len(pattern) // size) != pattern


# Parameters


ATTENTION = {
    **{name: {"kernel": (12, 2, 6), "bias": (2, 6)} for name in ("query", "key", "value")},
    "out": {"kernel": (2, 6, 12), "bias": (12,)},
}
NORM = {"scale": (12,), "bias": (12,)}
DENSE = {"up": {"kernel": (12, 20), "bias": (20,)}, "down": {"kernel": (20, 12), "bias": (12,)}}
TIED = {
    "router": {"kernel": (12, 3)},
    "prototype": (12, 20),
    "up_bias": (20,),
    "down_bias": (12,),
    "theta_angles": (3, 12),
    "phi_angles": (3, 20),
}


def stacked(repeats: int, ffn: Any) -> Any:
    block = {"attention": ATTENTION, "attention_norm": NORM, "ffn": ffn, "ffn_norm": NORM}
    return jax.tree.map(lambda s: (repeats, *s), block, is_leaf=lambda s: isinstance(s, tuple))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@jax.numpy_dtype_promotion("standard")  # Flax's LayerNorm promotes bfloat16
def test_parameter_shapes(dtype: str) -> None:
    config = small(form="tied", num_layers=5, moe_layers="second", compute_dtype=dtype)
    shapes = vit.param_shapes(config)
    assert jax.tree.map(lambda s: s.shape, shapes) == {
        "class_token": (1, 1, 12),
        "position_embedding": (1, 5, 12),
        "patch_embedding": {"kernel": (16, 12), "bias": (12,)},
        "segment_0": {"block_0": stacked(2, DENSE), "block_1": stacked(2, TIED)},
        "segment_1": {"block_0": stacked(1, DENSE)},
        "final_norm": NORM,
        "head": {"kernel": (12, 10), "bias": (10,)},
    }
    assert {s.dtype for s in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_initial_parameters() -> None:
    config = small()
    params = vit.init_params(config, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, vit.param_shapes(config))
    block = params["segment_0"]["block_0"]
    for stack in (block["ffn"]["up_prototype"], block["attention"]["query"]["kernel"], block["ffn"]["up_theta_angles"]):
        assert jnp.abs(stack[0] - stack[1]).max() > 0.01  # the layers of a scan start apart
    logits, _ = apply(config, params, random_images(config))
    np.testing.assert_array_equal(logits, np.zeros((3, 10)))
    other = vit.init_params(config, jax.random.key(1))
    assert jnp.abs(other["patch_embedding"]["kernel"] - params["patch_embedding"]["kernel"]).max() > 0.01


# Values


def by_layer(config: ModelConfig, params: Any) -> list[Any]:
    """Cuts the stacked parameters into those of each layer, by the documented order."""
    blocks = []
    for index, (pattern, repeats) in enumerate(vit.layer_segments(config.is_moe_by_layer)):
        for repeat in range(repeats):
            for place in range(len(pattern)):
                stack = params[f"segment_{index}"][f"block_{place}"]
                blocks.append(jax.tree.map(lambda p, r=repeat: p[r], stack))
    return blocks


def embed(config: ModelConfig, params: Any, images: jax.Array) -> jax.Array:
    """Cuts the patches one by one."""
    size = config.patch_size
    tokens = [jnp.broadcast_to(params["class_token"][:, 0], (images.shape[0], config.d_model))]
    for row in range(0, config.image_size, size):
        for column in range(0, config.image_size, size):
            patch = 2 * images[:, row : row + size, column : column + size].reshape(images.shape[0], -1) - 1
            embedding = params["patch_embedding"]
            tokens.append(patch @ embedding["kernel"] + embedding["bias"][None])
    return jnp.stack(tokens, axis=1) + params["position_embedding"]


def attention(params: Any, x_BxTxD: jax.Array) -> jax.Array:
    query, key, value = (
        jnp.einsum("btd,dhf->bhtf", x_BxTxD, params[name]["kernel"]) + params[name]["bias"][None, :, None]
        for name in ("query", "key", "value")
    )
    scores = jax.nn.softmax(jnp.einsum("bhtf,bhsf->bhts", query, key) / math.sqrt(query.shape[-1]))
    mixed = jnp.einsum("bhts,bhsf->bthf", scores, value)
    return jnp.einsum("bthf,hfd->btd", mixed, params["out"]["kernel"]) + params["out"]["bias"][None, None]


def norm(params: Any, x: jax.Array) -> jax.Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    shape = (1,) * (x.ndim - 1) + (-1,)
    scaled = centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    return scaled * params["scale"].reshape(shape) + params["bias"].reshape(shape)


@functools.partial(jit, static_argnums=0)
def unrolled(config: ModelConfig, params: Any, images: jax.Array, weight: np.ndarray) -> tuple[jax.Array, Any]:
    x = embed(config, params, images)
    reports = []
    for is_moe, layer in zip(config.is_moe_by_layer, by_layer(config, params), strict=True):
        x = x + attention(layer["attention"], norm(layer["attention_norm"], x))
        ffn = vit.FFN_OF_FAMILY[config.family if is_moe else "dense"](config)
        y, report = ffn.apply({"params": layer["ffn"]}, norm(layer["ffn_norm"], x), train=False, weight_B=weight)
        x = x + y
        reports += [report] if is_moe else []
    logits = norm(params["final_norm"], x[:, 0]) @ params["head"]["kernel"] + params["head"]["bias"][None]
    return logits, jax.tree.map(lambda *fields: jnp.stack(fields), *reports) if reports else None


WEIGHT = np.array([1, 1, 0], np.float32)
MODELS: dict[str, dict[str, Any]] = {
    "every": {},
    "two alone": {"num_layers": 2},
    "second": {"num_layers": 5, "moe_layers": "second", "form": "tied"},
    "two of three": {"num_layers": 6, "moe_layers": "0,1,3,4", "form": "reference", "patch_size": 2},
    "out of order": {"num_layers": 5, "moe_layers": "4,0,1", "form": "tied"},
    "standard": {"num_layers": 4, "moe_layers": "2", "family": "standard"},
    "dense": {"family": "dense"},
}


@pytest.mark.parametrize(
    "model", long_but(["second", "two of three", "dense"], ["every", "second", "two of three", "standard", "dense"])
)
def test_scanned_layers_equal_one_after_another(model: str) -> None:
    config = small(**MODELS[model])
    params, images = random_params(config), random_images(config)
    logits, reports = apply(config, params, images, weight_B=WEIGHT)
    expected_logits, expected_reports = unrolled(config, params, images, WEIGHT)
    assert logits.shape == (3, 10)
    np.testing.assert_allclose(logits, expected_logits, atol=2e-4)
    chex.assert_trees_all_close(reports, expected_reports, rtol=1e-3, atol=1e-5)
    assert (reports is None) == (model == "dense")


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("every", (0, 1, 2)),
        pytest.param("two alone", (0, 1), marks=pytest.mark.long),
        ("second", (1, 3)),
        ("two of three", (0, 1, 3, 4)),
        ("out of order", (0, 1, 4)),
    ],
)
def test_reports_come_in_layer_order(model: str, layers: tuple[int, ...]) -> None:
    config = small(**MODELS[model])
    params, images = random_params(config), random_images(config)
    # A router of zeros has the entropy log 3; one layer at a time keeps its own.
    for place, layer in enumerate(layers):
        changed = jax.tree.map(np.array, params)
        for other in layers:
            kernel, index = router_kernel(config, changed, other)
            if other != layer:
                kernel[index] = 0
        _, reports = apply(config, changed, images, weight_B=WEIGHT)
        assert reports.load_balance.shape == (len(layers),)
        assert reports.assignments_E.shape == (len(layers), 3)
        own = np.abs(np.asarray(reports.entropy) - math.log(3)) > 1e-5
        np.testing.assert_array_equal(np.flatnonzero(own), [place])


def router_kernel(config: ModelConfig, params: Any, layer: int) -> tuple[np.ndarray, int]:
    """Finds the stacked router kernels that hold those of `layer`, and its index there."""
    start = 0
    for index, (pattern, repeats) in enumerate(vit.layer_segments(config.is_moe_by_layer)):
        if layer < start + len(pattern) * repeats:
            repeat, place = divmod(layer - start, len(pattern))
            return params[f"segment_{index}"][f"block_{place}"]["ffn"]["router"]["kernel"], repeat
        start += len(pattern) * repeats
    raise AssertionError(layer)


def test_padding_changes_neither_logits_nor_reports() -> None:
    config = small()
    params, images = random_params(config), random_images(config)
    logits, reports = apply(config, params, images, weight_B=WEIGHT)
    repainted = apply(config, params, images.at[2:].set(0.3), weight_B=WEIGHT)
    alone = apply(config, params, images[:2])
    for other_logits, other_reports in (repainted, alone):
        np.testing.assert_allclose(other_logits[:2], logits[:2], atol=1e-5)
        chex.assert_trees_all_close(other_reports, reports, rtol=1e-4)
    all_count = apply(config, params, images)
    np.testing.assert_allclose(all_count[0], logits, atol=1e-5)
    assert np.abs(all_count[1].entropy - reports.entropy).max() > 1e-4


def test_images_of_another_shape() -> None:
    config = small()
    params = random_params(config)
    for shape in ((2, 8, 4, 1), (2, 8, 8, 3), (2, 8, 8)):
        with pytest.raises(ValueError, match=r"images have shape .* this model needs \(batch, 8, 8, 1\)"):
            vit.apply(config, params, jnp.zeros(shape))


def test_patches_are_embedded_in_row_order() -> None:
    config = small(num_layers=1, patch_size=2)
    params = random_params(config)

    @jit
    def tokens(images: jax.Array) -> jax.Array:
        _, state = vit.Vit(config).apply(
            {"params": params}, images, capture_intermediates=lambda module, _: module.name == "patch_embedding"
        )
        return state["intermediates"]["patch_embedding"]["__call__"][0]

    dark = jnp.zeros((1, 8, 8, 1))
    before = tokens(dark)
    kernel = params["patch_embedding"]["kernel"]
    for row, column in ((0, 0), (0, 7), (5, 2), (7, 7)):
        change = tokens(dark.at[0, row, column, 0].set(1.0)) - before
        expected = np.zeros((1, 16, 12))
        # Pixels run from -1 to 1, so a bright one adds twice its row of the kernel.
        expected[0, row // 2 * 4 + column // 2] = 2 * kernel[row % 2 * 2 + column % 2]
        np.testing.assert_allclose(change, expected, atol=1e-5)


@jax.numpy_dtype_promotion("standard")
def test_bfloat16_compute() -> None:
    wide, narrow = small(), small(compute_dtype="bfloat16")
    params, images = random_params(wide), random_images(wide)
    logits, reports = apply(narrow, params, images)
    expected, _ = apply(wide, params, images)
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, reports))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits, expected, atol=0.1 * float(jnp.abs(expected).max()))
    assert jnp.abs(logits - expected).max() > 0
    block = vit.Block(narrow, is_moe=True, train=False)
    x = jax.ShapeDtypeStruct((2, 5, 12), jnp.bfloat16)
    y, _ = jax.eval_shape(lambda p, x: block.apply({"params": p}, x, None, None), by_layer(narrow, params)[0], x)
    assert y.dtype == jnp.bfloat16
    gradient = jax.eval_shape(jax.grad(lambda p: vit.apply(narrow, p, images)[0].sum()), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_router_noise_in_training_alone() -> None:
    noisy, quiet = small(router_noise=1.0), small()
    params, images = random_params(noisy), random_images(noisy)
    key, other_key = jax.random.split(jax.random.key(0))
    logits, reports = apply(noisy, params, images, train_key=key)
    evaluated, _ = apply(noisy, params, images)
    np.testing.assert_array_equal(evaluated, apply(quiet, params, images)[0])
    np.testing.assert_array_equal(evaluated, apply(quiet, params, images, train_key=key)[0])
    np.testing.assert_array_equal(logits, apply(noisy, params, images, train_key=key)[0])
    assert jnp.abs(logits - evaluated).max() > 1e-3
    assert jnp.abs(logits - apply(noisy, params, images, train_key=other_key)[0]).max() > 1e-3
    # With routers of zeros noise alone selects, and every layer has its own.
    params["segment_0"]["block_0"]["ffn"]["router"]["kernel"] *= 0
    _, reports = apply(noisy, params, images, train_key=key)
    assert len({tuple(counts) for counts in np.asarray(reports.assignments_E)}) > 1


def without_or_scaled(params: Any, attention: float, ffn: float) -> Any:
    """Scales what the last of two dense layers adds by its attention and by its FFN."""
    scales = {("attention", "out"): attention, ("ffn", "down"): ffn}

    def scaled(path: Any, leaf: jax.Array) -> jax.Array:
        factor = scales.get(tuple(part.key for part in path[2:4]), 1.0)
        return leaf.at[1].multiply(factor) if path[0].key.startswith("segment") else leaf

    return jax.tree_util.tree_map_with_path(scaled, params)


def test_stochastic_depth_leaves_out_what_a_layer_adds_and_scales_up_the_rest() -> None:
    # Shares 0 and 0.4: in the last layer attention and FFN each stay, scaled by 1 / 0.6, in 60 % of the images.
    still = small(family="dense", num_layers=2)
    deep = dataclasses.replace(still, stochastic_depth=0.4)
    params = random_params(still)
    images = jnp.broadcast_to(random_images(still, batch=1), (400, 8, 8, 1))
    logits = np.asarray(apply(deep, params, images, train_key=jax.random.key(0))[0])
    factors = itertools.product((0.0, 1 / 0.6), repeat=2)
    expected = np.stack([apply(still, without_or_scaled(params, *pair), images[:1])[0][0] for pair in factors])
    apart = np.abs(logits[:, None] - expected).max(axis=-1)
    assert apart.min(axis=1).max() < 1e-4
    counts = np.bincount(apart.argmin(axis=1), minlength=4) / 400
    np.testing.assert_allclose(counts, [0.16, 0.24, 0.24, 0.36], atol=0.08)  # three standard deviations
    np.testing.assert_array_equal(apply(deep, params, images[:2])[0], apply(still, params, images[:2])[0])


def test_the_shares_of_stochastic_depth_rise_evenly_from_the_first_layer() -> None:
    # The first layer of two is always whole: if the second adds nothing, nothing is random.
    config = small(family="dense", stochastic_depth=0.5, num_layers=2)
    params, images = random_params(config), random_images(config, batch=20)

    def spread(layer: int) -> float:
        silent = jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                leaf.at[layer].set(0) if path[0].key.startswith("segment") and path[3].key in ("out", "down") else leaf
            ),
            params,
        )
        logits = apply(config, silent, images, train_key=jax.random.key(0))[0]
        return float(jnp.abs(logits - apply(config, silent, images)[0]).max())

    assert spread(1) < 1e-5
    assert spread(0) > 0.1


def test_attention_dropout_is_drawn_for_each_image_and_in_training_alone() -> None:
    config, still = small(attention_dropout=0.3), small()
    params = random_params(config)
    images = jnp.broadcast_to(random_images(config, batch=1), (4, 8, 8, 1))
    key, other = jax.random.split(jax.random.key(0))
    logits = apply(config, params, images, train_key=key)[0]
    assert len({row.tobytes() for row in np.asarray(logits)}) == 4
    np.testing.assert_array_equal(logits, apply(config, params, images, train_key=key)[0])
    assert jnp.abs(logits - apply(config, params, images, train_key=other)[0]).max() > 1e-3
    np.testing.assert_array_equal(apply(config, params, images)[0], apply(still, params, images)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "dense"},
        {"family": "standard", "num_experts": 7, "top_k": 3},
        {"family": "ternary", "num_experts": 7, "moe_layers": "second"},
        *({"form": form, "num_experts": 7, "top_k": 3} for form in ("separate", "tied", "reference")),
        {"num_experts": 1, "top_k": 1},
    ],
)
def test_described_parameters_are_those_that_are_drawn(changes: dict[str, Any]) -> None:
    # Described from a model of as many experts as are selected.
    config = small(**changes).canonical()
    for model in (config, config.deployed()):
        drawn = jax.eval_shape(lambda model=model: vit.init_params(model, jax.random.key(0)))
        described = vit.param_shapes(model)
        chex.assert_trees_all_equal_shapes_and_dtypes(described, drawn)
        assert jax.tree.structure(vit.param_axes(model)) == jax.tree.structure(drawn)


def test_bytes_are_pixels_of_255_levels() -> None:
    config = small()
    params = random_params(config)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    logits, expected = apply(config, params, images)[0], apply(config, params, images.astype(np.float32) / 255)[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", long_but(["dense", "butterfly"], ["dense", "standard", "butterfly"]))
def test_program_does_not_grow_with_depth(family: str) -> None:
    def lines(depth: int, **changes: object) -> int:
        config = small(family=family, num_layers=depth, **changes)
        images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
        return (
            jax.jit(vit.apply, static_argnums=0).lower(config, vit.param_shapes(config), images).as_text().count("\n")
        )

    assert lines(8) == lines(4)
    assert lines(8, moe_layers="second") == lines(6, moe_layers="second")
