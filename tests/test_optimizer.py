import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bvit_jax import components, vit
from bvit_jax.config import OptimizerConfig
from bvit_jax.optimizer import learning_rate, make_optimizer
from tests.conftest import KINDS, make_model

PLAIN = OptimizerConfig(
    learning_rate=0.01,
    final_learning_rate=0.0,
    warmup_steps=0,
    weight_decay=0.0,
    clip_norm=1e9,
    ema_decay=0.0,
    expert_multiplier=1.0,
    angle_multiplier=1.0,
    router_multiplier=1.0,
)
BACKBONE_MATRICES = {
    "head/kernel",
    "patch_embedding/kernel",
    *(f"segment_0/block_0/attention/{name}/kernel" for name in ("query", "key", "value", "out")),
}
FFN_MATRICES = {
    ("dense", "separate"): {"up/kernel", "down/kernel"},
    ("standard", "separate"): {"up_kernel", "down_kernel", "router/kernel"},
    ("ternary", "separate"): {"up_kernel", "down_kernel", "router/kernel"},
    ("butterfly", "separate"): {"up_prototype", "down_prototype", "router/kernel"},
    ("butterfly", "tied"): {"prototype", "router/kernel"},
    ("butterfly", "reference"): {"prototype", "projection/kernel", "router/kernel"},
    ("low_rank", "separate"): {
        *(f"{side}_{kind}" for side in ("up", "down") for kind in ("kernel", "left", "right")),
        "router/kernel",
    },
}


def shapes(family: str, form: str, **changes: object) -> Any:
    small = {"d_model": 8, "d_ff": 16, "num_heads": 2}
    return vit.param_shapes(make_model(family=family, form=form, **small | changes))


def random_tree(shapes: Any, seed: int) -> Any:
    """Draws a tree with the paths of a model; all leaves are of one shape, so that each operation compiles once."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda _: jnp.asarray(rng.standard_normal(3), jnp.float32), shapes)


def by_path(tree: Any) -> dict[str, np.ndarray]:
    return {components.path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def updates(config: OptimizerConfig, params: Any, gradients: list[Any], total_steps: int = 10) -> list[dict[str, Any]]:
    """Returns the updates of each step, of parameters that stay where they are."""
    optimizer = make_optimizer(config, total_steps)
    state = optimizer.init(params)
    found = []
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, params)
        found.append(by_path(update))
    return found


def test_learning_rate_by_hand():
    schedule = learning_rate(dataclasses.replace(PLAIN, learning_rate=0.8, warmup_steps=4), 12)
    # Up by 0.2 a step; then 0.4 (1 + cos(pi (s - 4) / 8)).
    expected = {
        0: 0,
        1: 0.2,
        2: 0.4,
        4: 0.8,
        6: 0.4 * (1 + math.sqrt(0.5)),
        8: 0.4,
        10: 0.4 * (1 - math.sqrt(0.5)),
        12: 0,
    }
    for step, rate in expected.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6)


def test_learning_rate_without_warm_up_starts_at_its_peak():
    schedule = learning_rate(PLAIN, 10)
    assert [float(schedule(step)) for step in (0, 5, 10)] == pytest.approx([0.01, 0.005, 0], abs=1e-8)


def test_the_last_learning_rate_can_be_above_zero():
    # From 0.8 to 0.2 by half a cosine: 0.5 in the middle.
    schedule = learning_rate(dataclasses.replace(PLAIN, learning_rate=0.8, final_learning_rate=0.2), 8)
    assert [float(schedule(step)) for step in (0, 4, 8, 20)] == pytest.approx([0.8, 0.5, 0.2, 0.2], abs=1e-6)


def test_learning_rate_falls_after_its_peak_and_stays_at_zero():
    schedule = learning_rate(dataclasses.replace(PLAIN, warmup_steps=3), 9)
    rates = [float(schedule(step)) for step in range(12)]
    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[9:] == pytest.approx([0, 0, 0], abs=1e-9)


@pytest.mark.parametrize(("family", "form"), KINDS)
def test_decay_is_for_the_matrices_exactly(family, form):
    mask = by_path(components.decay_mask(shapes(family, form)))
    decayed = {path for path, decays in mask.items() if decays}
    ffn = {f"segment_0/block_0/ffn/{name}" for name in FFN_MATRICES[family, form]}
    assert decayed == BACKBONE_MATRICES | ffn


@pytest.mark.parametrize(("family", "form"), KINDS)
def test_decay_shrinks_nothing_but_the_matrices(family, form):
    params = random_tree(shapes(family, form), 0)
    config = dataclasses.replace(PLAIN, weight_decay=0.5, expert_multiplier=3.0)
    zero = jax.tree.map(jnp.zeros_like, params)
    [found] = updates(config, params, [zero])
    mask, before = by_path(components.decay_mask(params)), by_path(params)
    for path, update in found.items():
        factor = 3 if components.component_of(path) in ("prototype", "experts") else 1
        expected = -0.01 * 0.5 * factor * before[path] if mask[path] else 0 * before[path]
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-9, err_msg=path)


@pytest.mark.parametrize(("family", "form"), KINDS)
@pytest.mark.parametrize("moe_layers", ["every", "1"])
def test_every_parameter_has_a_component(family, form, moe_layers):
    tree = shapes(family, form, moe_layers=moe_layers)
    found = components.tree_of(tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert set(jax.tree.leaves(found)) <= set(components.COMPONENTS)


def test_components_of_all_kinds_are_found():
    seen = {name for kind in KINDS for name in jax.tree.leaves(components.tree_of(shapes(*kind)))}
    assert seen == set(components.COMPONENTS)


@pytest.mark.parametrize(
    ("path", "component"),
    [
        ("segment_0/block_0/ffn/prototype", "prototype"),
        ("segment_1/block_3/ffn/down_prototype", "prototype"),
        ("segment_0/block_0/ffn/up_theta_angles", "angles"),
        ("segment_0/block_0/ffn/phi_angles", "angles"),
        ("segment_0/block_0/ffn/router/kernel", "router"),
        ("segment_0/block_0/ffn/up_kernel", "experts"),
        ("segment_0/block_0/ffn/up/kernel", "ffn"),
        ("segment_0/block_0/ffn/projection/kernel", "projection"),
        ("segment_0/block_0/ffn/projection/bias", "ffn_bias"),
        ("segment_0/block_0/ffn/down_bias", "ffn_bias"),
        ("segment_0/block_0/ffn/up/bias", "ffn_bias"),
        ("segment_0/block_0/attention/out/kernel", "attention"),
        ("segment_0/block_0/attention/key/bias", "attention"),
        ("class_token", "embeddings"),
        ("position_embedding", "embeddings"),
        ("patch_embedding/kernel", "embeddings"),
        ("segment_0/block_0/attention_norm/scale", "norms"),
        ("final_norm/bias", "norms"),
        ("head/bias", "head"),
    ],
)
def test_components_by_path(path, component):
    assert components.component_of(path) == component


@pytest.mark.parametrize(
    "path",
    [
        "",
        "segment_0/block_0/ffn/gate_kernel",
        "segment_0/block_0/ffn/prototype_scale",
        "segment_0/block_0/ffn/psi_angles",
        "segment_0/block_0/ffn/router/bias",
        "head/scale",
        "other_class_token",
        "block_0/head/kernel",
    ],
)
def test_an_unknown_path_is_an_error(path):
    with pytest.raises(ValueError, match=f"parameter '{path}' belongs to no component"):
        components.component_of(path)


@pytest.mark.parametrize(
    ("family", "field", "component"),
    [
        ("butterfly", "expert_multiplier", "prototype"),
        ("standard", "expert_multiplier", "experts"),
        ("ternary", "expert_multiplier", "experts"),
        ("low_rank", "expert_multiplier", "experts"),
        ("butterfly", "angle_multiplier", "angles"),
        ("butterfly", "router_multiplier", "router"),
    ],
)
def test_a_multiplier_scales_the_updates_of_its_component_alone(family, field, component):
    tree = shapes(family, "separate")
    params, gradients = random_tree(tree, 0), [random_tree(tree, seed) for seed in (1, 2)]
    base = dataclasses.replace(PLAIN, weight_decay=0.1)
    plain = updates(base, params, gradients)
    scaled = updates(dataclasses.replace(base, **{field: 3.0}), params, gradients)
    still = updates(dataclasses.replace(base, **{field: 0.0}), params, gradients)
    for step in (0, 1):
        for path, update in plain[step].items():
            factor = 3 if components.component_of(path) == component else 1
            assert np.abs(update).max() > 0
            np.testing.assert_allclose(scaled[step][path], factor * update, rtol=1e-6, err_msg=path)
            if factor == 3:
                assert not still[step][path].any()


def test_multipliers_act_together():
    tree = shapes("butterfly", "tied")
    params, gradient = random_tree(tree, 0), random_tree(tree, 1)
    factors = {"prototype": 2.0, "angles": 5.0, "router": 7.0}
    config = dataclasses.replace(PLAIN, expert_multiplier=2.0, angle_multiplier=5.0, router_multiplier=7.0)
    [plain], [scaled] = updates(PLAIN, params, [gradient]), updates(config, params, [gradient])
    for path, update in plain.items():
        factor = factors.get(components.component_of(path), 1.0)
        np.testing.assert_allclose(scaled[path], factor * update, rtol=1e-6, err_msg=path)


def test_gradients_are_clipped_by_their_global_norm():
    # Two steps, for Adam's first update does not see the scale of a gradient. (3, 4) has norm 5; clipped to 1 it is
    # (0.6, 0.8); the second, of norm 0.5, is under the limit.
    first = {"head": {"kernel": jnp.array([[3.0]]), "bias": jnp.array([4.0])}}
    second = {"head": {"kernel": jnp.array([[0.3]]), "bias": jnp.array([0.4])}}
    clipped = {"head": {"kernel": jnp.array([[0.6]]), "bias": jnp.array([0.8])}}
    params = jax.tree.map(jnp.ones_like, first)
    config = dataclasses.replace(PLAIN, clip_norm=1.0)
    found = updates(config, params, [first, second])
    expected = updates(PLAIN, params, [clipped, second])
    unclipped = updates(PLAIN, params, [first, second])
    for path in expected[1]:
        np.testing.assert_allclose(found[1][path], expected[1][path], rtol=1e-5)
        assert abs(found[1][path] - unclipped[1][path]).max() > 1e-4


def test_steps_of_adamw_by_hand():
    rng = np.random.default_rng(0)
    params = {"head": {"kernel": rng.standard_normal((3, 2)), "bias": rng.standard_normal(2)}}
    gradients = [{"head": {"kernel": rng.standard_normal((3, 2)), "bias": rng.standard_normal(2)}} for _ in range(3)]
    config = dataclasses.replace(PLAIN, learning_rate=0.1, warmup_steps=2, weight_decay=0.3, clip_norm=0.5)
    rates = [0, 0.05, 0.1]  # warm-up of 2 steps

    optimizer = make_optimizer(config, 10)
    now = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    state = optimizer.init(now)
    mean = {name: np.zeros_like(leaf) for name, leaf in params["head"].items()}
    square = {name: np.zeros_like(leaf) for name, leaf in params["head"].items()}
    expected = {name: leaf.copy() for name, leaf in params["head"].items()}
    for step, gradient in enumerate(gradients):
        update, state = optimizer.update(jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradient), state, now)
        now = optax.apply_updates(now, update)
        norm = math.sqrt(sum((leaf**2).sum() for leaf in gradient["head"].values()))
        for name, leaf in gradient["head"].items():
            g = leaf * min(1, 0.5 / norm)
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.999 * square[name] + 0.001 * g**2
            corrected = mean[name] / (1 - 0.9 ** (step + 1))
            scale = np.sqrt(square[name] / (1 - 0.999 ** (step + 1))) + 1e-8
            decay = 0.3 * expected[name] if name == "kernel" else 0
            expected[name] = expected[name] - rates[step] * (corrected / scale + decay)
        for name in expected:
            np.testing.assert_allclose(now["head"][name], expected[name], rtol=2e-5, atol=1e-6)
    assert np.abs(expected["kernel"] - params["head"]["kernel"]).min() > 1e-3
