import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import long_but, make_model
from jax.extend import core

from bvit_jax import moe, ternary, vit
from bvit_jax.model_config import ModelConfig

# Compiling costs more here than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TOKENS = 5  # a 2 x 2 grid and the class token
LAYERS = vit.FFN_OF_FAMILY


def small(**changes: object) -> ModelConfig:
    return make_model(**{"patch_size": 4, "d_model": 12, "d_ff": 20, "num_heads": 2, "num_experts": 3} | changes)


def make_layer(config: ModelConfig, batch: int = 2) -> tuple[nn.Module, Any, jax.Array]:
    """Makes a layer, parameters far from their initial values (biases not zero) and an input."""
    layer = LAYERS[config.family](config)
    x = jax.random.normal(jax.random.key(1), (batch, TOKENS, config.d_model))
    shapes = jax.eval_shape(lambda: nn.unbox(layer.init(jax.random.key(0), x, train=False)))["params"]
    rng = np.random.default_rng(0)
    return layer, jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 2, s.dtype), shapes), x


def oracle(config: ModelConfig, params: Any, x: np.ndarray) -> np.ndarray:
    if config.family == "dense":
        return oracles.dense_mlp(params, x)
    if config.stores_experts:
        return oracles.standard_moe(params, x, config.top_k)
    if config.family == "low_rank":
        return oracles.low_rank_moe(params, x, config.top_k)
    return oracles.butterfly_moe(
        params, x, form=config.form, top_k=config.top_k, num_stages=config.num_stages, order=config.stride_order
    )


def quantised(config: ModelConfig, params: Any) -> Any:
    """Copies parameters to float64 with the ternary matrices quantised, those of experts one by one."""
    params = oracles.float64(params)
    ends = {"butterfly": "prototype", "ternary": "_kernel"}.get(config.family)
    return {
        name: oracles.round_matrices(value, "ternary", config.ternary_scale) if ends and name.endswith(ends) else value
        for name, value in params.items()
    }


BUTTERFLIES: dict[str, dict[str, Any]] = {
    "two stages": {"num_stages": 2, "stride_order": "descending", "top_k": 2},
    "deep, one choice, per tensor": {
        "num_stages": 5,
        "stride_order": "ascending",
        "top_k": 1,
        "ternary_scale": "tensor",
    },
    "outer rotations alone": {"rotations": "outer", "num_stages": 3, "top_k": 2},
    "one expert": {"num_experts": 1, "top_k": 1, "num_stages": 1, "d_model": 8, "d_ff": 16},
    "every expert, wide to narrow": {
        "top_k": 3,
        "num_stages": 3,
        "stride_order": "ascending",
        "d_model": 20,
        "d_ff": 6,
    },
}
CASES = {
    f"butterfly, {form}, {name}": {"form": form} | case
    for form in ("separate", "tied", "reference")
    for name, case in BUTTERFLIES.items()
}
CASES |= {
    "dense": {"family": "dense"},
    "standard, two choices": {"family": "standard", "top_k": 2},
    "standard, one choice": {"family": "standard", "top_k": 1, "num_experts": 8},
    "standard, one expert": {"family": "standard", "top_k": 1, "num_experts": 1},
    "ternary, two choices": {"family": "ternary", "top_k": 2},
    "ternary, one choice, per tensor": {"family": "ternary", "top_k": 1, "num_experts": 8, "ternary_scale": "tensor"},
    "ternary, one expert": {"family": "ternary", "top_k": 1, "num_experts": 1},
    "low rank, two choices": {"family": "low_rank", "top_k": 2},
    "low rank, one choice, rank 1": {"family": "low_rank", "top_k": 1, "num_experts": 8, "rank": 1},
    "low rank, one expert, full rank": {"family": "low_rank", "top_k": 1, "num_experts": 1, "rank": 12},
    "low rank, every expert, wide to narrow": {"family": "low_rank", "top_k": 3, "d_model": 20, "d_ff": 6},
}


FEW = [
    *("butterfly, separate, two stages", "butterfly, separate, outer rotations alone"),
    *("butterfly, tied, deep, one choice, per tensor", "butterfly, tied, one expert"),
    *("butterfly, reference, two stages", "butterfly, reference, every expert, wide to narrow"),
    *("dense", "standard, two choices", "standard, one expert", "ternary, one choice, per tensor"),
    *("low rank, two choices", "low rank, every expert, wide to narrow"),
]


@pytest.mark.parametrize("case", long_but(FEW, CASES))
def test_output_report_and_gradients_equal_oracle(case: str) -> None:
    config = small(**CASES[case])
    layer, params, x = make_layer(config)
    rng = np.random.default_rng(1)
    upstream = rng.normal(size=x.shape).astype(np.float32)
    weight = jnp.array([1.0, 0.0])

    @jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, report = layer.apply({"params": params}, x, train=False, weight_B=weight)
        return (upstream * y).sum(), (y, report)

    (_, (y, report)), (d_params, d_x) = run(params, x)
    exact, exact_x = quantised(config, params), np.array(x, np.float64)
    np.testing.assert_allclose(y, oracle(config, exact, exact_x), rtol=1e-4, atol=1e-4)

    if config.family == "dense":
        assert report is None
    else:
        expected = oracles.report(exact_x @ exact["router"]["kernel"], config.top_k, (2, 2), np.array(weight))
        for name, value in expected._asdict().items():
            np.testing.assert_allclose(getattr(report, name), value, rtol=1e-4, atol=1e-6, err_msg=name)

    def loss() -> float:
        return float(np.sum(upstream * oracle(config, exact, exact_x)))

    # The straight-through gradient of a ternary matrix is that of its quantised values, which `exact` holds.
    leaves = jax.tree_util.tree_leaves_with_path((exact, exact_x))
    for (path, array), gradient in zip(leaves, jax.tree.leaves((d_params, d_x)), strict=True):
        name, gradient = jax.tree_util.keystr(path), np.asarray(gradient)
        largest = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        for index in (largest, *(tuple(rng.integers(gradient.shape)) for _ in range(2))):
            wanted = oracles.finite_difference(loss, array, index)
            np.testing.assert_allclose(gradient[index], wanted, rtol=2e-3, atol=2e-3, err_msg=f"{name} {index}")


SHAPES: dict[str, tuple[dict[str, Any], Any]] = {
    # 12 channels: two even stages of 6 angles and two odd of 4; 20: two even of 10, then (1 XOR 4 and so on) 4, 8, 8.
    "separate": (
        {"num_stages": 3},
        {
            "up_prototype": (12, 20),
            "up_bias": (20,),
            "up_theta_angles": (3, 16),
            "up_phi_angles": (3, 24),
            "down_prototype": (20, 12),
            "down_bias": (12,),
            "down_theta_angles": (3, 24),
            "down_phi_angles": (3, 16),
            "router": {"kernel": (12, 3)},
        },
    ),
    "tied": (
        {"form": "tied", "num_stages": 5},
        {
            "prototype": (12, 20),
            "up_bias": (20,),
            "down_bias": (12,),
            "theta_angles": (3, 20),
            "phi_angles": (3, 40),
            "router": {"kernel": (12, 3)},
        },
    ),
    "reference": (
        {"form": "reference", "num_stages": 1},
        {
            "prototype": (12, 20),
            "phi_angles": (3, 6),
            "theta_angles": (3, 10),
            "projection": {"kernel": (20, 12), "bias": (12,)},
            "router": {"kernel": (12, 3)},
        },
    ),
    "standard": (
        {"family": "standard"},
        {
            "up_kernel": (3, 12, 20),
            "up_bias": (3, 20),
            "down_kernel": (3, 20, 12),
            "down_bias": (3, 12),
            "router": {"kernel": (12, 3)},
        },
    ),
    "ternary": (
        {"family": "ternary"},
        {
            "up_kernel": (3, 12, 20),
            "up_bias": (3, 20),
            "down_kernel": (3, 20, 12),
            "down_bias": (3, 12),
            "router": {"kernel": (12, 3)},
        },
    ),
    "low_rank": (
        {"family": "low_rank", "rank": 5},
        {
            "up_kernel": (12, 20),
            "up_left": (3, 12, 5),
            "up_right": (3, 5, 20),
            "up_bias": (20,),
            "down_kernel": (20, 12),
            "down_left": (3, 20, 5),
            "down_right": (3, 5, 12),
            "down_bias": (12,),
            "router": {"kernel": (12, 3)},
        },
    ),
    "dense": (
        {"family": "dense"},
        {"up": {"kernel": (12, 20), "bias": (20,)}, "down": {"kernel": (20, 12), "bias": (12,)}},
    ),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameter_shapes(case: str, dtype: str) -> None:
    changes, expected = SHAPES[case]
    config = small(**changes, compute_dtype=dtype)
    layer = LAYERS[config.family](config)
    x = jax.ShapeDtypeStruct((1, TOKENS, 12), jnp.dtype(dtype))
    params = jax.eval_shape(lambda x: nn.unbox(layer.init(jax.random.key(0), x, train=False)), x)["params"]
    assert jax.tree.map(lambda p: p.shape, params) == expected
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def initial(config: ModelConfig) -> Any:
    layer = LAYERS[config.family](config)
    x = jnp.zeros((1, TOKENS, config.d_model))
    return jit(lambda: nn.unbox(layer.init(jax.random.key(0), x, train=False)))()["params"]


def test_initial_butterfly() -> None:
    params = initial(small(num_experts=64, angle_init=0.5))
    for name, value in params.items():
        if name.endswith("angles"):
            assert 0.48 < jnp.abs(value).max() <= 0.5
            assert jnp.abs(value.mean()) < 0.05
    assert not params["up_bias"].any()
    assert not params["down_bias"].any()
    assert 0.015 < params["router"]["kernel"].std() < 0.025
    still = initial(small(angle_init=0.0))
    assert not any(value.any() for name, value in still.items() if name.endswith("angles"))


def test_initial_spread_of_an_expert_does_not_depend_on_their_number() -> None:
    # Xavier: the variance is 2 / (inputs + outputs) whatever the number of experts.
    for num_experts in (2, 16):
        params = initial(small(family="standard", num_experts=num_experts, d_model=40, d_ff=60))
        for kernel in (params["up_kernel"], params["down_kernel"]):
            np.testing.assert_allclose(kernel.var(), 2 / 100, rtol=0.1)
        assert not params["up_bias"].any()


@pytest.mark.parametrize("scale", ["row", pytest.param("tensor", marks=pytest.mark.long)])
def test_ternary_experts_are_standard_ones_of_quantised_matrices(scale: str) -> None:
    changes: dict[str, Any] = {"num_experts": 4, "ternary_scale": scale}
    layer, params, x = make_layer(small(family="ternary", **changes))
    kernels = {name: ternary.quantise(params[name], scale) for name in ("up_kernel", "down_kernel")}
    apply = jit(lambda layer, params: layer.apply({"params": params}, x, train=False), static_argnums=0)
    found = apply(layer, params)
    # Rounding inside the program or before it: the same numbers, added in an order that is the compiler's.
    standard = apply(LAYERS["standard"](small(family="standard", **changes)), params | kernels)
    chex.assert_trees_all_close(found, standard, rtol=1e-4, atol=1e-5)
    floats, _ = apply(LAYERS["standard"](small(family="standard", **changes)), params)
    assert jnp.abs(found[0] - floats).max() > 0.1
    # Matrices that are rounded already, as a file holds them, are used as they are.
    deployed = small(family="ternary", **changes).deployed()
    chex.assert_trees_all_close(found, apply(LAYERS["ternary"](deployed), params | kernels), rtol=1e-4, atol=1e-5)


OUTPUTS: dict[str, dict[str, Any]] = {
    "standard": {"family": "standard"},
    "ternary": {"family": "ternary", "ternary_scale": "tensor"},
    "separate": {"num_stages": 2, "angle_bits": 4},
    "separate, by blocks, one expert": {"dispatch": "blocks", "num_experts": 1, "top_k": 1},
    "separate, outer": {"rotations": "outer", "num_stages": 2},
    "tied": {"form": "tied", "num_stages": 5},
    "reference": {"form": "reference", "num_stages": 2},
    "low rank": {"family": "low_rank", "rank": 2},
}
OWN = ("angles", "left", "right")
"""Endings of the names of what is an expert's own, where experts share the rest."""


@pytest.mark.parametrize("case", OUTPUTS)
def test_the_outputs_of_every_expert_are_those_of_a_layer_that_has_it_alone(case: str) -> None:
    config = small(**OUTPUTS[case])
    _, params, x = make_layer(config)
    found = jit(moe.expert_outputs, static_argnums=0)(config, params, x)
    assert found.shape == (2, TOKENS, config.num_experts, config.d_model)
    exact = quantised(config, params)
    shared = () if config.stores_experts else ("down_bias", "projection")
    for expert in range(config.num_experts):
        # Of one expert the gate is 1. A final bias that all share is no expert's own.
        alone = {name: leaf for name, leaf in exact.items() if name != "router"}
        for name, leaf in alone.items():
            if config.stores_experts or name.endswith(OWN):
                alone[name] = leaf[expert : expert + 1]
            if name.endswith("angles"):
                alone[name] = oracles.round_angles(alone[name], config.angle_bits)
            if name in shared:
                alone[name] = leaf | {"bias": 0 * leaf["bias"]} if name == "projection" else 0 * leaf
        alone["router"] = {"kernel": np.zeros((config.d_model, 1))}
        one = dataclasses.replace(config, num_experts=1, top_k=1)
        expected = oracle(one, alone, np.array(x, np.float64))
        np.testing.assert_allclose(found[:, :, expert], expected, rtol=1e-4, atol=1e-4)


def test_the_outputs_of_experts_have_the_dtype_that_they_are_computed_in() -> None:
    config = small(compute_dtype="bfloat16")
    _, params, x = make_layer(config)
    found = jit(moe.expert_outputs, static_argnums=0)(config, params, x)
    assert found.dtype == jnp.bfloat16
    wide = moe.expert_outputs(small(), params, x)
    np.testing.assert_allclose(found.astype(jnp.float32), wide, atol=0.05 * float(jnp.abs(wide).max()))


@pytest.mark.parametrize("family", ["standard", "ternary", "butterfly", "low_rank"])
def test_experts_without_rows_get_no_gradient(family: str) -> None:
    config = small(family=family, num_experts=16, top_k=1)
    layer, params, x = make_layer(config, batch=1)
    gradient, report = jit(
        jax.grad(
            lambda p: (lambda y, report: ((y**2).sum(), report))(*layer.apply({"params": p}, x, train=False)),
            has_aux=True,
        )
    )(params)
    used = np.asarray(report.assignments_E) > 0
    assert 1 <= used.sum() <= TOKENS
    for name, value in gradient.items():
        if name.endswith(OWN) or (config.stores_experts and name != "router"):
            size = np.abs(value).reshape(16, -1).max(axis=1)
            np.testing.assert_array_equal(size > 0, used, err_msg=name)


@pytest.mark.parametrize(
    "family", long_but(["standard", "butterfly"], ["standard", "ternary", "butterfly", "low_rank"])
)
def test_router_noise_in_training_alone(family: str) -> None:
    noisy, quiet = small(family=family, router_noise=2.0, num_experts=8), small(family=family, num_experts=8)
    layer, params, x = make_layer(noisy)

    @functools.partial(jit, static_argnums=(0, 1))
    def run(layer: nn.Module, train: bool, seed: int) -> tuple[jax.Array, Any]:
        return layer.apply({"params": params}, x, train=train, rngs={"router": jax.random.key(seed)})

    evaluated, silent = run(layer, False, 0), run(LAYERS[family](quiet), True, 0)
    chex.assert_trees_all_equal(evaluated, silent)
    first, second = run(layer, True, 0), run(layer, True, 1)
    chex.assert_trees_all_equal(first, run(layer, True, 0))
    for one, other in ((first, evaluated), (first, second)):
        assert (one[1].assignments_E != other[1].assignments_E).any()
        assert jnp.abs(one[0] - other[0]).max() > 0.01
    # What the losses see is the router without its noise.
    for name in ("router_z", "smoothness", "entropy"):
        assert getattr(first[1], name) == getattr(evaluated[1], name)


def products(jaxpr: core.Jaxpr) -> Iterator[tuple[Any, Any]]:
    """Yields the operands of every matrix product, those of inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "ragged_dot", "ragged_dot_general"):
            yield tuple(v.aval for v in equation.invars[:2])
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: isinstance(p, core.ClosedJaxpr | core.Jaxpr)
        ):
            if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
                yield from products(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("case", long_but(["separate", "standard", "dense"], SHAPES))
def test_bfloat16_compute(case: str) -> None:
    changes, _ = SHAPES[case]
    narrow, params, x = make_layer(small(**changes, compute_dtype="bfloat16"))
    wide = make_layer(small(**changes))[0]
    # Rounded beforehand, so that both route alike.
    x = x.astype(jnp.bfloat16)
    y, report = jit(narrow.apply, static_argnames="train")({"params": params}, x, train=False)
    y_wide, report_wide = jit(wide.apply, static_argnames="train")(
        {"params": params}, x.astype(jnp.float32), train=False
    )
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), y_wide, atol=0.05 * float(jnp.abs(y_wide).max()))
    assert not np.array_equal(y, y_wide.astype(jnp.bfloat16))
    if report is not None:
        chex.assert_trees_all_close(report, report_wide, rtol=1e-6)
    jaxpr = jax.make_jaxpr(lambda p, x: narrow.apply({"params": p}, x, train=False))(params, x).jaxpr
    dtypes = {tuple(sorted(a.shape[-2:])): (a.dtype, b.dtype) for b, a in products(jaxpr)}
    assert dtypes[12, 20] == (jnp.bfloat16, jnp.bfloat16)
    if report is not None:
        assert dtypes[3, 12] == (jnp.float32, jnp.float32)


@pytest.mark.every_platform
def test_standard_experts_go_by_tiles_on_tpus_by_blocks_on_cpus_and_ragged_elsewhere() -> None:
    layer, params, x = make_layer(small(family="standard", num_experts=16, d_model=32, d_ff=64), batch=16)
    traced = jax.jit(lambda p, x: layer.apply({"params": p}, x, train=False)[0]).trace(params, x)
    for platform, found in (("tpu", "tpu_custom_call"), ("cuda", "ragged_dot")):
        assert found in traced.lower(lowering_platforms=(platform,)).as_text()
    # 160 rows in blocks of 16 take at most 160 + 16 * 15 slots; `ragged` on a CPU would be 160 * 16 products.
    products = 2 * 2 * 400 * 32 * 64
    assert products < traced.lower().compile().cost_analysis()["flops"] < 2 * products


@pytest.mark.parametrize("form", long_but(["separate"], ["separate", "tied", "reference"]))
def test_cost_of_rotated_experts_does_not_grow_with_their_number(form: str) -> None:
    d_model, d_ff, tokens, rotations = 32, 64, 16 * TOKENS, 1 if form == "reference" else 2

    def flops(num_experts: int) -> float:
        layer, params, x = make_layer(small(d_model=d_model, d_ff=d_ff, num_experts=num_experts, form=form), batch=16)
        apply = jax.jit(lambda p, x: layer.apply({"params": p}, x, train=False))
        return apply.lower(params, x).compile().cost_analysis()["flops"]

    few, many = flops(8), flops(64)
    # Each further expert costs its router logits and softmax, and the cosines and sines of its own angles.
    per_expert = tokens * (2 * d_model + 30) + 60 * rotations * (d_model + d_ff)
    assert many - few <= 56 * per_expert
    # One more product a row with the prototype would be 2 * 2 * tokens * d_model * d_ff.
    assert 56 * per_expert < 56 * 2 * tokens * d_model * d_ff / 10
    assert few > 2 * 2 * tokens * d_model * d_ff
