import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import make_model, on_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core

from bvit_jax import low_rank, sharding
from bvit_jax.model_config import ModelConfig
from bvit_jax.sharding import Layout

# Compiling costs more here than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def small(**changes: Any) -> ModelConfig:
    fields = {"patch_size": 4, "d_model": 12, "d_ff": 20, "num_heads": 2, "num_experts": 3, "top_k": 2, "rank": 4}
    return make_model(family="low_rank", **fields | changes)


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, jax.Array]:
    """Draws all parameters, differences and biases included, about as large as the shared matrices."""
    rng = np.random.default_rng(seed)
    sizes = {"E": config.num_experts, "D": config.d_model, "F": config.d_ff, "R": config.rank}
    shapes = {name: [sizes[axis] for axis in axes] for name, (_, axes) in low_rank.PARAMS.items()}
    return {name: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32) for name, shape in shapes.items()}


def by_hand(params: Any, x_BxTxD: np.ndarray, expert_BxTxK: np.ndarray) -> np.ndarray:
    """The output of each choice's expert, row by row, of dense matrices W_i = W + U_i V_i in float64."""
    p = oracles.float64(params)
    y = np.zeros((*expert_BxTxK.shape, x_BxTxD.shape[-1]))
    for b, t, k in np.ndindex(expert_BxTxK.shape):
        e = expert_BxTxK[b, t, k]
        up = p["up_kernel"] + p["up_left"][e] @ p["up_right"][e]
        down = p["down_kernel"] + p["down_left"][e] @ p["down_right"][e]
        y[b, t, k] = down.T @ oracles.gelu(up.T @ np.float64(x_BxTxD[b, t]) + p["up_bias"]) + p["down_bias"]
    return y


def dense(params: Any, x_BxTxD: jax.Array, expert_BxTxK: jax.Array) -> jax.Array:
    """The same with a whole matrix for each row, to be differentiated by JAX."""
    up_ExDxF = params["up_kernel"][None] + params["up_left"] @ params["up_right"]
    down_ExFxD = params["down_kernel"][None] + params["down_left"] @ params["down_right"]
    h = jnp.einsum("btd,btkdf->btkf", x_BxTxD, up_ExDxF[expert_BxTxK]) + params["up_bias"].reshape(1, 1, 1, -1)
    y = jnp.einsum("btkf,btkfd->btkd", nn.gelu(h), down_ExFxD[expert_BxTxK])
    return y + params["down_bias"].reshape(1, 1, 1, -1)


# Batch, tokens, d_model, d_ff, experts, choices, rank: one of each; full rank and every expert for each token;
# wide to narrow; more experts than rows.
SHAPES = [(1, 1, 1, 2, 1, 1, 1), (2, 3, 4, 6, 3, 3, 4), (1, 5, 7, 2, 4, 2, 1), (1, 2, 3, 5, 9, 2, 2)]


@functools.lru_cache
def step_of(shape: tuple[int, ...], name: str) -> Any:
    """Compiles gradients and outputs, by the library or of dense matrices."""
    *_, d_model, d_ff, experts, top_k, rank = shape
    sizes = {"d_model": d_model, "d_ff": d_ff, "num_heads": 1, "num_stages": 1}
    config = small(**sizes, num_experts=experts, top_k=top_k, rank=rank)
    apply = functools.partial(low_rank.apply, config) if name == "library" else dense

    def loss(params: Any, x: jax.Array, expert: jax.Array, upstream: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = apply(params, x, expert)
        return (upstream * y).sum(), y

    return config, jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


@settings(max_examples=30, deadline=None)  # each shape compiles
@given(st.sampled_from(SHAPES), st.integers(0, 2**16), st.booleans())
def test_outputs_and_gradients_equal_those_of_dense_matrices(shape: tuple[int, ...], seed: int, alike: bool) -> None:
    batch, tokens, d_model, _, experts, top_k, _ = shape
    config, step = step_of(shape, "library")
    params, rng = random_params(config, seed), np.random.default_rng(seed)
    x = rng.normal(size=(batch, tokens, d_model)).astype(np.float32)
    chosen = [rng.permutation(experts)[:top_k] for _ in range(batch * tokens)]
    # Alike: all tokens choose the same experts, and the others have no rows.
    expert = np.array(chosen[:1] * len(chosen) if alike else chosen, np.int32).reshape(batch, tokens, top_k)
    upstream = rng.normal(size=(*expert.shape, d_model)).astype(np.float32)
    gradients, y = step(params, x, expert, upstream)
    np.testing.assert_allclose(y, by_hand(params, x, expert), rtol=1e-4, atol=1e-4)
    expected, _ = step_of(shape, "dense")[1](params, x, expert, upstream)
    chex.assert_trees_all_close(gradients, expected, rtol=1e-4, atol=1e-4)
    idle = sorted(set(range(experts)) - set(expert.reshape(-1).tolist()))
    for name in ("up_left", "up_right", "down_left", "down_right"):
        assert not gradients[0][name][np.array(idle, int)].any()


def test_one_row_by_hand() -> None:
    # Up (1 2) + 2 (3 0) = (7 2), less the bias (7 0): x = 1 gives (0 2), and gelu(0) = 0.
    # Down (5 1) + (1 4) / 2 = (5.5 3): 5.5 gelu(0) + 3 gelu(2) + 10.
    params = {
        "up_kernel": [[1.0, 2.0]],
        "up_left": [[[0.0]], [[2.0]]],
        "up_right": [[[9.0, 9.0]], [[3.0, 0.0]]],
        "up_bias": [-7.0, 0.0],
        "down_kernel": [[5.0], [1.0]],
        "down_left": [[[9.0], [9.0]], [[1.0], [4.0]]],
        "down_right": [[[9.0]], [[0.5]]],
        "down_bias": [10.0],
    }
    config = small(d_model=1, d_ff=2, num_heads=1, num_stages=1, num_experts=2, top_k=1, rank=1)
    arrays = jax.tree.map(jnp.array, params, is_leaf=lambda leaf: isinstance(leaf, list))
    y = low_rank.apply(config, arrays, jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1), jnp.int32))
    np.testing.assert_allclose(y, [[[[3 * oracles.gelu(np.float64(2)) + 10]]]], rtol=1e-6)


@pytest.mark.parametrize("block", [0, 1, 4, 16])
def test_every_grouping_gives_the_same(block: int) -> None:
    config, rng = small(), np.random.default_rng(0)
    params, x = random_params(config), rng.normal(size=(1, 7, 12)).astype(np.float32)
    expert = np.array([[[0, 2]] * 5 + [[2, 0]] * 2], np.int32)
    found = jit(functools.partial(low_rank._by, block, 0))(params, x[0], expert[0])
    np.testing.assert_allclose(found.reshape(1, 7, 2, 12), by_hand(params, x, expert), rtol=1e-4, atol=1e-4)


def test_experts_start_equal_with_differences_that_can_grow() -> None:
    config = small(num_experts=4, d_model=40, d_ff=60, rank=6)
    x = jax.random.normal(jax.random.key(1), (2, 5, 40))
    params = jit(lambda: nn.unbox(low_rank.LowRankMoe(config).init(jax.random.key(0), x, train=False)))()["params"]
    for name in ("up_right", "down_right", "up_bias", "down_bias"):
        assert not params[name].any()
    # U has variance 1 / inputs, whatever the number of experts; W is Xavier's, 2 / (inputs + outputs).
    np.testing.assert_allclose(params["up_left"].var(), 1 / 40, rtol=0.15)
    np.testing.assert_allclose(params["down_left"].var(), 1 / 60, rtol=0.15)
    np.testing.assert_allclose(params["up_kernel"].var(), 2 / 100, rtol=0.15)
    assert not np.array_equal(params["up_left"][0], params["up_left"][1])
    every = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (2, 5, 4))

    @jit
    @functools.partial(jax.grad, has_aux=True)
    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        y = low_rank.apply(config, params, x, every)
        return jnp.square(y).sum(), y

    gradient, y = run({name: params[name] for name in low_rank.PARAMS})
    np.testing.assert_allclose(y, np.broadcast_to(y[:, :, :1], y.shape), rtol=1e-5, atol=1e-6)
    assert np.abs(gradient["up_right"]).max(axis=(1, 2)).min() > 1e-3
    assert np.abs(gradient["down_right"]).max(axis=(1, 2)).min() > 1e-3
    assert not gradient["up_left"].any()


# What is computed


def test_no_matrix_of_an_expert_is_ever_made() -> None:
    config = small(num_experts=16, d_model=32, d_ff=64, rank=2, top_k=2)
    params, x = random_params(config), jnp.ones((2, 5, 32))
    expert = jnp.zeros((2, 5, 2), jnp.int32)
    step = jax.jit(jax.grad(lambda params, x: low_rank.apply(config, params, x, expert).sum(), argnums=(0, 1)))
    shapes = re.findall(r"\b(?:f32|s32|pred)\[([\d,]+)\]", step.lower(params, x).compile().as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    # Blocks of 16 rows: at most 20 + 16 * 15 = 260 slots of 64 channels, under 16 experts' or 20 rows' matrices.
    assert 32 * 64 < largest <= 260 * 64 < 16 * 32 * 64 < 20 * 32 * 64


def products(jaxpr: core.Jaxpr) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields the shapes of the operands of every matrix product, those of inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "ragged_dot_general"):
            left, right = (operand.aval.shape for operand in equation.invars[:2])
            yield left, right
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: isinstance(p, core.ClosedJaxpr | core.Jaxpr)
        ):
            if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
                yield from products(getattr(inner, "jaxpr", inner))


def test_the_shared_up_product_is_made_once_a_token_and_the_others_once_a_row() -> None:
    config = small(num_experts=5, top_k=3)
    expert = jnp.zeros((7, 3), jnp.int32)
    made = jax.make_jaxpr(functools.partial(low_rank._by, 0, 0))(random_params(config), jnp.ones((7, 12)), expert)
    assert sorted(products(made.jaxpr)) == sorted(
        [
            ((7, 12), (12, 20)),
            ((21, 20), (20, 12)),
            ((21, 12), (5, 12, 4)),
            ((21, 4), (5, 4, 20)),
            ((21, 20), (5, 20, 4)),
            ((21, 4), (5, 4, 12)),
        ]
    )


@pytest.mark.every_platform
def test_rows_go_by_tiles_on_tpus_by_blocks_on_cpus_and_ragged_elsewhere() -> None:
    config = small(num_experts=16, top_k=2)
    expert = jnp.zeros((16, 5, 2), jnp.int32)
    traced = jax.jit(lambda p, x: low_rank.apply(config, p, x, expert)).trace(
        random_params(config), jnp.ones((16, 5, 12))
    )
    found = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("tpu", "cuda", "cpu")}
    assert [name for name, text in found.items() if "tpu_custom_call" in text] == ["tpu"]
    assert [name for name, text in found.items() if "ragged_dot" in text] == ["cuda"]


def test_experts_compute_in_bfloat16() -> None:
    config = small(compute_dtype="bfloat16")
    params, rng = random_params(config), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 12)), jnp.bfloat16)
    expert = jnp.asarray(rng.integers(0, 3, (2, 5, 2)), jnp.int32)
    y = jit(functools.partial(low_rank.apply, config))(params, x, expert)
    assert y.dtype == jnp.bfloat16
    expected = by_hand(params, np.asarray(x, np.float64), np.asarray(expert))
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.05 * np.abs(expected).max())


# On a mesh

LAYOUTS = {"data": Layout(), "expert": Layout(expert=4), "all three": Layout(expert=2, model=2)}


def layer(layout: Layout | None) -> Any:
    """Output, report and gradients of a layer on eight devices, or on one without any mesh."""
    config = small(num_experts=8)
    module, rng = low_rank.LowRankMoe(config), np.random.default_rng(0)
    x, upstream = (rng.normal(size=(16, 5, 12)).astype(np.float32) for _ in range(2))
    params: Any = random_params(config) | {"router": {"kernel": rng.normal(size=(12, 8)).astype(np.float32)}}

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params: Any, x: jax.Array) -> Any:
        y, report = module.apply({"params": params}, x, train=False)
        return (upstream * y).sum(), (y, report)

    if layout is None:
        (_, outputs), gradients = jax.jit(run)(params, x)
    else:
        placement = sharding.place(config, 16, layout)
        with placement.active():
            (_, outputs), gradients = jax.jit(run, in_shardings=(placement.replicated, placement.batch))(params, x)
    return jax.tree.map(np.asarray, (outputs, gradients))


def all_layers() -> dict[str, Any]:
    return {name: layer(layout) for name, layout in LAYOUTS.items()} | {"one": layer(None)}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return on_devices(8, all_layers)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layer_on_a_mesh_equals_that_on_one_device(found: dict[str, Any], name: str) -> None:
    one, on_mesh = found["one"], found[name]
    assert jax.tree.structure(on_mesh) == jax.tree.structure(one)
    for a, b in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6 * np.abs(b).max())
    assert all(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(one[1]))
