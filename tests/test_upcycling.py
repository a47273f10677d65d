from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax import upcycling, vit
from bvit_jax.model_config import ModelConfig
from tests.conftest import make_model

SHAPE = {"num_layers": 4, "d_model": 8, "d_ff": 12, "num_heads": 2, "patch_size": 4, "top_k": 2}
SILENT = {"angle_init": 0.0, "ternary_scale": "none"}


def model(family: str, **changes: Any) -> ModelConfig:
    return make_model(family=family, **SHAPE | changes)


def drawn(config: ModelConfig, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), vit.param_shapes(config))


def logits(config: ModelConfig, params: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda params, images: vit.apply(config, params, images)[0])(params, images))


@pytest.mark.parametrize(
    ("family", "moe_layers"),
    [
        ("butterfly", "second"),
        ("dense", "every"),
        pytest.param("standard", "0,2,3", marks=pytest.mark.long),
        pytest.param("low_rank", "0,2", marks=pytest.mark.long),
    ],
)
def test_a_mixture_starts_as_the_function_of_the_dense_model(family, moe_layers, key):
    # Experts are alike and two gates add up to 1; angles of 0 turn nothing and floats are not rounded.
    config, dense = model(family, moe_layers=moe_layers, **SILENT), model("dense")
    params, own = drawn(dense, 0), vit.init_params(config, key)
    first = upcycling.upcycled(config, own, params)
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, vit.param_shapes(config))
    images = np.random.default_rng(1).random((3, 8, 8, 1), np.float32)
    expected, found = logits(dense, params, images), logits(config, first, images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.std(expected) > 0.1


def test_of_a_tied_mixture_the_prototype_is_the_up_projection_and_what_is_its_own_stays():
    config = model("butterfly", form="tied", moe_layers="second")
    own, dense = drawn(config, 0), drawn(model("dense"), 1)
    found = upcycling.upcycled(config, own, dense)["segment_0"]["block_1"]["ffn"]  # of layers 1 and 3
    theirs, own = dense["segment_0"]["block_0"]["ffn"], own["segment_0"]["block_1"]["ffn"]
    expected = {
        "prototype": theirs["up"]["kernel"][1::2],
        "up_bias": theirs["up"]["bias"][1::2],
        "down_bias": theirs["down"]["bias"][1::2],
        **{name: own[name] for name in ("theta_angles", "phi_angles", "router")},
    }
    jax.tree.map(np.testing.assert_array_equal, found, expected)
