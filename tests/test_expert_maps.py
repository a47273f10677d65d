import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import butterfly, expert_maps, moe, vit
from bvit_jax.kernels.cut import Side
from bvit_jax.model_config import ModelConfig
from bvit_jax.opened import Opened
from tests.conftest import KINDS, make_config, make_model

# Sides that are no powers of two; images of 8 x 8 x 1 in 4 patches.
SMALL = {"d_model": 12, "d_ff": 20, "num_heads": 2, "patch_size": 4, "num_experts": 3, "num_stages": 3, "num_layers": 1}
MAPS = {"separate": ("up", "down"), "tied": ("up",), "reference": ("up",)}

CASES: dict[str, dict[str, Any]] = {" ".join(kind): {"family": kind[0], "form": kind[1]} for kind in KINDS[1:]}
CASES |= {
    "separate, full depth, ascending": {"form": "separate", "num_stages": 5, "stride_order": "ascending"},
    "separate, outer": {"form": "separate", "rotations": "outer"},
    "tied, outer": {"form": "tied", "rotations": "outer"},
    "reference, outer": {"form": "reference", "rotations": "outer"},
    "one channel, which nothing turns": {"form": "separate", "d_model": 1, "num_heads": 1},
}


def opened_of(**changes: object) -> Opened:
    """A small model whose mixtures have random parameters, as if they were rounded already; it has no others."""
    fields = SMALL | changes
    fields = {"top_k": min(2, int(str(fields["num_experts"])))} | fields
    config = make_config("butterfly,3", **{f"model__{name}": value for name, value in fields.items()})
    rng, params = np.random.default_rng(0), {}
    for number, (pattern, repeats) in enumerate(vit.layer_segments(config.model.is_moe_by_layer)):
        blocks = [place for place, is_moe in enumerate(pattern) if is_moe]
        params[f"segment_{number}"] = {f"block_{b}": {"ffn": random_ffn(config.model, repeats, rng)} for b in blocks}
    return Opened(Path("made"), config, None, config.model.deployed(), params)


def random_ffn(model: ModelConfig, layers: int, rng: np.random.Generator) -> dict[str, Any]:
    """Parameters of mixtures of one kind, stacked; routers have none here."""
    e, d, f, r = model.num_experts, model.d_model, model.d_ff, model.rank
    if model.stores_experts:
        shapes = {"up_kernel": (e, d, f), "up_bias": (e, f), "down_kernel": (e, f, d), "down_bias": (e, d)}
    elif model.family == "low_rank":
        shapes = {"up_kernel": (d, f), "up_left": (e, d, r), "up_right": (e, r, f), "up_bias": (f,)}
        shapes |= {"down_kernel": (f, d), "down_left": (e, f, r), "down_right": (e, r, d), "down_bias": (d,)}
    else:
        prefixes = {"separate": (("up_", d, f), ("down_", f, d)), "tied": (("", d, f),), "reference": (("", f, d),)}
        shapes = {"up_bias": (f,), "down_bias": (d,)} if model.form != "reference" else {}
        for prefix, theta, phi in prefixes[model.form]:
            shapes[f"{prefix}prototype"] = (d, f) if model.form == "reference" else (theta, phi)
            for name, side in (("theta", theta), ("phi", phi)):
                angles = oracles.count_angles(side, min(model.num_stages, depth_of(side)), model.stride_order)
                if angles and not (model.rotations == "outer" and side == f):
                    shapes[f"{prefix}{name}_angles"] = (e, angles)
    drawn = {
        name: rng.uniform(-4, 4, (layers, *shape)) if "angles" in name else rng.normal(size=(layers, *shape)) / 2
        for name, shape in shapes.items()
    }
    ffn: dict[str, Any] = {name: jnp.asarray(array, jnp.float32) for name, array in drawn.items()}
    if model.family == "butterfly" and model.form == "reference":
        ffn["projection"] = {"kernel": jnp.asarray(rng.normal(size=(layers, f, d)), jnp.float32)}
    return ffn


def depth_of(dim: int) -> int:
    """Stages of a rotation at full depth."""
    return math.ceil(math.log2(dim))


def first_ffn(opened: Opened) -> dict[str, Any]:
    return opened.ffn(opened.mixtures[0])


def dense_maps(model: ModelConfig, ffn: Any) -> dict[str, list[np.ndarray]]:
    """The matrices of all experts by name, float64: those of y = x W, the transposes of the oracles' y = W x."""
    ffn, experts = oracles.float64(ffn), range(model.num_experts)
    if model.stores_experts:
        return {name: list(ffn[f"{name}_kernel"]) for name in ("up", "down")}
    if model.family == "low_rank":
        return {
            name: [ffn[f"{name}_kernel"] + ffn[f"{name}_left"][e] @ ffn[f"{name}_right"][e] for e in experts]
            for name in ("up", "down")
        }

    def rotation(name: str, expert: int, dim: int) -> np.ndarray:
        if name not in ffn:
            return np.eye(dim)
        depth = min(model.num_stages, depth_of(dim))
        return oracles.rotation_matrix(dim, depth, model.stride_order, ffn[name][expert])

    def matrix(prefix: str, expert: int) -> np.ndarray:
        w_q = ffn[f"{prefix}prototype"].T
        outputs, inputs = w_q.shape
        theta, phi = f"{prefix}theta_angles", f"{prefix}phi_angles"
        if model.form == "reference":
            return (rotation(theta, expert, outputs) @ w_q @ rotation(phi, expert, inputs)).T
        return (rotation(phi, expert, outputs) @ w_q @ rotation(theta, expert, inputs).T).T

    if model.form == "separate":
        return {name: [matrix(f"{name}_", e) for e in experts] for name in ("up", "down")}
    return {"up": [matrix("", e) for e in experts]}


def whole(model: ModelConfig, name: str, ffn: Any, experts: list[int]) -> np.ndarray:
    """All rows of a map, seven at a time, and those beyond the last."""
    starts = range(0, expert_maps.shape(model, name)[0], 7)
    parts = [expert_maps.rows(model, name, ffn, jnp.asarray(experts), start, count=7) for start in starts]
    assert {part.dtype for part in parts} == {jnp.dtype("float32")}
    return np.concatenate(parts, axis=1)


@pytest.fixture(scope="module", params=CASES)
def opened(request: pytest.FixtureRequest) -> Opened:
    return opened_of(**CASES[request.param])


def test_rows_put_together_are_the_matrices_of_the_experts(opened):
    model, ffn = opened.model, first_ffn(opened)
    expected = dense_maps(model, ffn)
    assert expert_maps.names(model) == tuple(expected)
    for name, matrices in expected.items():
        inputs, outputs = expert_maps.shape(model, name)
        found = whole(model, name, ffn, [2, 0, 1])
        assert found.shape == (3, -(-inputs // 7) * 7, outputs)
        np.testing.assert_allclose(found[:, :inputs], np.stack([matrices[e] for e in (2, 0, 1)]), rtol=0, atol=1e-5)
        assert (found[:, inputs:] == 0).all()
        # Experts that are mixed up would show.
        assert np.abs(matrices[0] - matrices[1]).max() > 0.1
        assert np.abs(matrices[0] - matrices[2]).max() > 0.1


def test_the_maps_with_gelu_and_biases_are_what_the_experts_do(opened):
    model, ffn = opened.model, first_ffn(opened)
    x_TxD = np.random.default_rng(1).normal(size=(5, model.d_model))
    maps = {name: whole(model, name, ffn, [2, 0, 1]).astype(np.float64) for name in expert_maps.names(model)}
    own, expected_TxExD = oracles.float64(ffn), np.empty((5, 3, model.d_model))
    for place, expert in enumerate((2, 0, 1)):
        up_DxF = maps["up"][place, : model.d_model]
        if model.family == "butterfly" and model.form == "reference":
            expected_TxExD[:, expert] = x_TxD @ up_DxF @ own["projection"]["kernel"]
            continue
        down_FxD = maps["down"][place, : model.d_ff] if "down" in maps else up_DxF.T
        # What all experts add alike, the last bias, is not an expert's own.
        biases = own["up_bias"], np.zeros(model.d_model)
        if model.stores_experts:
            biases = own["up_bias"][expert], own["down_bias"][expert]
        expected_TxExD[:, expert] = oracles.gelu(x_TxD @ up_DxF + biases[0]) @ down_FxD + biases[1]
    outputs = jax.jit(moe.expert_outputs, static_argnums=0)
    [found_TxExD] = outputs(model, ffn, jnp.asarray(x_TxD, jnp.float32)[None])
    size = np.abs(expected_TxExD).max()
    np.testing.assert_allclose(found_TxExD, expected_TxExD, rtol=0, atol=3e-6 * size)


@pytest.fixture(scope="module")
def tied() -> Opened:
    return opened_of(form="tied")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 25), st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_rows_are_those_from_the_start_on_of_the_experts_asked_for(tied, start, experts):
    ffn = first_ffn(tied)
    matrices = dense_maps(tied.model, ffn)["up"]
    found = np.array(expert_maps.rows(tied.model, "up", ffn, jnp.asarray(experts), start, count=5))
    expected = np.zeros((4, 5, 20))
    for place, expert in enumerate(experts):
        for row in range(start, min(start + 5, 12)):
            expected[place, row - start] = matrices[expert][row]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert (found[:, max(12 - start, 0) :] == 0).all()


@pytest.mark.parametrize("case", ["ternary separate", "low_rank separate"])
def test_a_single_expert_has_rows_too(case):
    opened = opened_of(num_experts=1, **CASES[case])
    ffn = first_ffn(opened)
    found = expert_maps.rows(opened.model, "down", ffn, jnp.array([0]), 0, count=20)
    np.testing.assert_allclose(found, dense_maps(opened.model, ffn)["down"], rtol=0, atol=1e-5)


def test_a_rotated_map_by_hand():
    # One stage turns channels 1 and 2 by a quarter. `separate` and `tied` turn inputs back, (x1, x2) -> (x2, -x1), and
    # `reference` turns them on, (x1, x2) -> (-x2, x1); W then weighs them 3 and 5. Outputs are one channel, left alone.
    shape = {"d_model": 2, "d_ff": 1, "num_heads": 1, "num_stages": 1, "num_experts": 1}
    for form, name, expected in (("tied", "theta", [-5.0, 3.0]), ("reference", "phi", [5.0, -3.0])):
        model = make_model(form=form, top_k=1, **shape).deployed()
        ffn = {f"{name}_angles": jnp.array([[np.pi / 2]]), "prototype": jnp.array([[3.0], [5.0]])}
        ffn |= {"up_bias": jnp.zeros(1), "down_bias": jnp.zeros(2)} if form == "tied" else {}
        found = expert_maps.rows(model, "up", ffn, jnp.array([0]), 0, count=2)
        np.testing.assert_allclose(found[0, :, 0], expected, atol=1e-6)


def test_names_and_shapes_of_the_maps():
    for family, form in KINDS[1:]:
        model = make_model(family=family, form=form, **SMALL)
        assert expert_maps.names(model) == (MAPS[form] if family == "butterfly" else ("up", "down"))
    assert expert_maps.shape(model, "up") == (12, 20)
    assert expert_maps.shape(model, "down") == (20, 12)
    # A form that the family ignores changes nothing.
    assert expert_maps.names(dataclasses.replace(model, family="standard", form="tied")) == ("up", "down")


def test_a_side_without_stages_is_left_as_it_is():
    x = jnp.arange(12.0).reshape(3, 4)
    assert expert_maps.turn({}, Side("theta", (), True), jnp.int32(1), x) is x
    side = Side("theta", butterfly.make_stages(4, 1), False)
    # Pairs of channels (0, 2) and (1, 3): expert 1 turns the first by a quarter and leaves the second.
    ffn = {"theta_angles": jnp.array([[1.0, 2.0], [np.pi / 2, 0.0]])}
    expected = [[-2, 1, 0, 3], [-6, 5, 4, 7], [-10, 9, 8, 11]]
    np.testing.assert_allclose(expert_maps.turn(ffn, side, jnp.int32(1), x), expected, atol=1e-5)
    back = [[2, 1, 0, 3], [6, 5, -4, 7], [10, 9, -8, 11]]
    np.testing.assert_allclose(expert_maps.turn(ffn, side._replace(inverse=True), jnp.int32(1), x), back, atol=1e-5)
