"""Rotated experts by every path, against dense matrices in float64."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import long_but, make_model, on_devices
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bvit_jax import blocks, butterfly, dispatch, hlo, moe, rotated, sharding
from bvit_jax.model_config import ConfigError, ModelConfig

# Compiling costs more here than running.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6}
"""Largest error, in parts of the largest value of an array; bfloat16 rounds by up to 2^-9, several times."""
PHASES = (Phase.explicit, Phase.generate)
"""Of hypothesis: each example compiles, and shrinking takes minutes."""


def model(**changes: object) -> ModelConfig:
    small = {"d_model": 12, "d_ff": 16, "num_heads": 1, "num_experts": 5, "top_k": 2, "num_stages": 2}
    return make_model(**{"family": "butterfly", **small, **changes})


def sides_of(config: ModelConfig) -> list[oracles.Side]:
    """The rotations in the order of application."""
    (d, f), inverse = (config.d_model, config.d_ff), True
    named = {
        "separate": [("up_theta", d), ("up_phi", f), ("down_theta", f), ("down_phi", d)],
        "tied": [("theta", d), ("phi", f), ("phi", f), ("theta", d)],
        "reference": [("phi", d), ("theta", f)],
    }[config.form]
    sides = []
    for name, dim in named:
        hidden = name in ("up_phi", "down_theta") or name == ("theta" if config.form == "reference" else "phi")
        depth = 0 if hidden and config.rotations == "outer" else min(config.num_stages, butterfly.max_stages(dim))
        sides.append(oracles.Side(name, depth, config.stride_order, inverse and config.form != "reference"))
        inverse = not inverse
    return sides


class Case:
    """Random parameters, (2, T / 2) tokens and their experts."""

    def __init__(self, config: ModelConfig, expert_TxK: np.ndarray, seed: int = 0) -> None:
        rng, d, f = np.random.default_rng(seed), config.d_model, config.d_ff
        self.config = config
        lead = (2, len(expert_TxK) // 2) if len(expert_TxK) % 2 == 0 else (1, len(expert_TxK))

        def normal(*size: int, scale: float = 1.0) -> np.ndarray:
            return np.asarray(jnp.asarray(scale * rng.normal(size=size), config.compute_dtype))

        self.expert = expert_TxK.astype(np.int32).reshape(*lead, -1)
        self.x = normal(*lead, d)
        self.dy = normal(*lead, config.top_k, f if config.form == "reference" else d)
        self.params: dict[str, np.ndarray] = {}
        for side, dim in zip(sides_of(config), (d, f, f, d), strict=False):
            if not side.num_stages:
                continue
            size = config.num_experts, oracles.count_angles(dim, side.num_stages, side.order)
            self.params[f"{side.name}_angles"] = rng.uniform(-3, 3, size).astype(np.float32)
        if config.form == "separate":
            self.params["up_prototype"] = normal(d, f, scale=d**-0.5)
            self.params["down_prototype"] = normal(f, d, scale=f**-0.5)
        else:
            self.params["prototype"] = normal(d, f, scale=d**-0.5)
        if config.form != "reference":
            self.params |= {"up_bias": normal(f), "down_bias": normal(d)}

    def expected(self) -> Any:
        """Outputs, gradients of tokens and of parameters."""
        sides, (p, x, dy) = sides_of(self.config), jax.tree.map(oracles.float64, (self.params, self.x, self.dy))
        top_k, num_rows = self.config.top_k, self.expert.size
        none = np.zeros((self.config.num_experts, 0))
        angles = {side.name: p.get(f"{side.name}_angles", none) for side in sides}
        x_TxD, expert_TxK = x.reshape(-1, x.shape[-1]), self.expert.reshape(-1, top_k)
        if self.config.form == "reference":
            weights = [p["prototype"], np.zeros(self.config.d_ff)]
            rows = np.repeat(x_TxD, top_k, axis=0), expert_TxK.flatten()
            y, dx, d_angles, d = oracles.rotated_product(sides, *rows, angles, weights, dy.reshape(num_rows, -1))
            dx, d_params = dx.reshape(-1, top_k, dx.shape[-1]).sum(axis=1), {"prototype": d[0]}
        else:
            names = ("up_prototype", "down_prototype") if self.config.form == "separate" else ("prototype",) * 2
            down = p[names[1]] if self.config.form == "separate" else p["prototype"].T
            weights = [p[names[0]], p["up_bias"], down, p["down_bias"]]
            y, dx, d_angles, d = oracles.rotated_ffn(
                sides, x_TxD, expert_TxK, angles, weights, dy.reshape(-1, *dy.shape[-2:])
            )
            d_params = {"up_bias": d[1], "down_bias": d[3]}
            d_params |= {"prototype": d[0] + d[2].T} if self.config.form == "tied" else {names[0]: d[0], names[1]: d[2]}
        d_params |= {f"{name}_angles": table for name, table in d_angles.items() if table.size}
        return y.reshape(dy.shape), dx.reshape(x.shape), d_params


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def output_and_gradients(
    config: ModelConfig, x: jax.Array, params: rotated.Params, expert: jax.Array, dy: jax.Array
) -> tuple[jax.Array, ...]:
    with jax.numpy_dtype_promotion("strict"):
        y, pull = jax.vjp(lambda x, params: rotated.apply(config, params, x, expert), x, params)
    return y, *pull(dy)


def check(config: ModelConfig, expert_TxK: np.ndarray, seed: int = 0, slack: float = 1) -> None:
    case = Case(config, expert_TxK, seed)
    found = output_and_gradients(config, case.x, case.params, case.expert, case.dy)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(case.expected()), strict=True):
        name, wide = jax.tree_util.keystr(path), np.asarray(a, np.float64)
        assert a.shape == b.shape, name
        assert a.dtype == ("float32" if "angles" in name else config.compute_dtype), name
        tolerance = slack * TOLERANCE[config.compute_dtype] * np.abs(b).max(initial=1e-30)
        np.testing.assert_allclose(wide, b, rtol=0, atol=tolerance, err_msg=name)
        if "angles" in name:
            idle = np.setdiff1d(np.arange(config.num_experts), expert_TxK)
            assert not np.any(wide[idle]), name


def distinct(tokens: int, top_k: int, experts: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])


# All paths


LARGE = {"d_model": 128, "d_ff": 256}
TWO_WAYS = ("separate", "tied")
OUTER = {"rotations": "outer"}
PATHS: dict[str, dict[str, object]] = {
    **{
        f"{path}, {form}": {"dispatch": path, "form": form}
        for path in ("rows", "blocks", "auto")
        for form in ("separate", "tied", "reference")
        if path != "auto" or form == "tied"
    },
    **{f"fused, {form}": {"dispatch": "fused", "form": form, **LARGE} for form in TWO_WAYS},
    "blocks, bfloat16": {"dispatch": "blocks", "compute_dtype": "bfloat16"},
    "rows, bfloat16": {"dispatch": "rows", "compute_dtype": "bfloat16"},
    "fused, bfloat16": {"dispatch": "fused", "compute_dtype": "bfloat16", **LARGE},
    "rows, ascending": {"dispatch": "rows", "stride_order": "ascending", "num_stages": 4},
    "blocks, ascending, tied": {"dispatch": "blocks", "form": "tied", "stride_order": "ascending", "d_ff": 64},
    "blocks, full depth": {"dispatch": "blocks", "d_model": 24, "d_ff": 40, "num_stages": 6},
    "fused, ascending, tied": {"dispatch": "fused", "form": "tied", "stride_order": "ascending", **LARGE},
    **{
        f"{path}, {form}, outer": {"dispatch": path, "form": form, **OUTER}
        for path, form in (("rows", "separate"), ("rows", "reference"), ("blocks", "separate"), ("blocks", "tied"))
    },
    **{f"fused, {form}, outer": {"dispatch": "fused", "form": form, **LARGE, **OUTER} for form in TWO_WAYS},
    "blocks, narrower within": {"dispatch": "blocks", "d_model": 20, "d_ff": 6, "num_stages": 3},
    "blocks, reference, narrower": {"dispatch": "blocks", "form": "reference", "d_model": 20, "d_ff": 6},
}


LONG = [
    *("fused, separate", "blocks, full depth", "blocks, narrower within", "fused, bfloat16", "fused, ascending, tied"),
    *("blocks, ascending, tied", "blocks, separate, outer", "fused, tied, outer", "rows, bfloat16"),
]


@pytest.mark.parametrize("name", long_but(set(PATHS) - set(LONG), PATHS))
def test_every_path_equals_the_oracle(name: str) -> None:
    check(model(**PATHS[name]), distinct(12, 2, 5))


@pytest.mark.parametrize("path", ["rows", "blocks"])
@given(st.data())
@settings(max_examples=2, deadline=None, phases=PHASES)
def test_random_shapes(path: str, data: st.DataObject) -> None:
    dims = st.sampled_from([2, 3, 6, 8, 16, 20, 28, 32])
    d_model, d_ff, experts = data.draw(st.just(1) | dims), data.draw(dims), data.draw(st.integers(1, 6))
    top_k = data.draw(st.integers(1, min(3, experts)))
    config = model(
        dispatch=path,
        form=data.draw(st.sampled_from(["separate", "tied", "reference"])),
        stride_order=data.draw(st.sampled_from(butterfly.STRIDE_ORDERS)),
        num_stages=data.draw(st.integers(1, butterfly.max_stages(max(d_model, d_ff)))),
        **{"d_model": d_model, "d_ff": d_ff, "num_experts": experts, "top_k": top_k},
    )
    # With few channels what is summed may nearly vanish.
    check(config, distinct(data.draw(st.integers(1, 20)), top_k, experts), slack=10)


# 200 rows, so that on a CPU there are two tiles of 128 even without padding.
ROUTES = st.lists(st.integers(0, 4), min_size=1, max_size=5).map(lambda used: np.resize(used, (100, 2)))


@pytest.mark.parametrize("path", ["rows", "blocks"])
@given(route=ROUTES, seed=st.integers(0, 99))
@settings(max_examples=4, deadline=None, phases=PHASES)
def test_however_rows_fall(path: str, route: np.ndarray, seed: int) -> None:
    check(model(dispatch=path, d_model=8), np.random.default_rng(seed).permuted(route), seed, slack=3)


@pytest.mark.parametrize("path", ["rows", "blocks"])
@pytest.mark.parametrize(("experts", "top_k", "tokens"), long_but([(40, 3, 5)], [(1, 1, 7), (40, 3, 5), (3, 3, 1)]))
def test_few_rows_and_many_experts_or_one(path: str, experts: int, top_k: int, tokens: int) -> None:
    check(model(dispatch=path, num_experts=experts, top_k=top_k, d_model=8), distinct(tokens, top_k, experts))


def test_many_rows_by_auto() -> None:
    check(model(num_experts=40), distinct(257, 2, 40))


# Which path


@pytest.mark.parametrize("path", ["rows", "blocks", "fused", "auto"])
@pytest.mark.parametrize("form", ["separate", "reference"])
def test_no_images_have_no_outputs(path: str, form: str) -> None:
    if path == "fused" and form == "reference":
        return
    config = model(dispatch=path, form=form, d_model=128, d_ff=256)
    x, expert = jnp.zeros((0, 5, 128), jnp.bfloat16), jnp.zeros((0, 5, 2), jnp.int32)
    y = rotated.apply(config, {}, x, expert)
    assert (y.shape, y.dtype) == ((0, 5, 2, 256 if form == "reference" else 128), jnp.bfloat16)


@pytest.mark.every_platform
@pytest.mark.parametrize("path", ["rows", "blocks"])
def test_programs_for_several_platforms_at_once(path: str) -> None:
    lowered = traced(model(dispatch=path)).lower(lowering_platforms=("cpu", "tpu"))
    assert "tpu_custom_call" not in lowered.as_text()


def traced(config: ModelConfig, tokens: int = 20) -> Any:
    params = Case(config, np.zeros((1, config.top_k), int)).params
    x = jax.ShapeDtypeStruct((1, tokens, config.d_model), jnp.dtype(config.compute_dtype))
    expert = jax.ShapeDtypeStruct((1, tokens, config.top_k), jnp.int32)
    return jax.jit(functools.partial(rotated.apply, config)).trace(params, x, expert)


def path_taken(platform: str, tokens: int = 20, **changes: object) -> str:
    text = traced(model(**changes), tokens).lower(lowering_platforms=(platform,)).as_text()
    return "fused" if "tpu_custom_call" in text else "blocks" if "stablehlo.sort" in text else "rows"


@pytest.mark.every_platform
@pytest.mark.parametrize(
    ("platform", "tokens", "changes", "expected"),
    [
        ("tpu", 20, LARGE, "fused"),
        ("tpu", 20, {"form": "tied", **LARGE}, "fused"),
        ("tpu", 20, {"dispatch": "fused", **LARGE}, "fused"),
        ("tpu", 20, {"dispatch": "blocks", **LARGE}, "blocks"),
        ("tpu", 20, {"dispatch": "rows", **LARGE}, "rows"),
        # Where the kernels cannot run.
        ("tpu", 20, {"form": "reference", **LARGE}, "blocks"),
        ("tpu", 20, {"d_model": 64, "d_ff": 256}, "blocks"),
        ("tpu", 20, {"d_model": 1024, "d_ff": 8192, "num_stages": 10, "stride_order": "ascending"}, "blocks"),
        # Up to 512 rows, two a token, are few.
        ("cpu", 256, {}, "rows"),
        ("cpu", 257, {}, "blocks"),
        ("cpu", 257, LARGE, "blocks"),
        ("cpu", 20, {"dispatch": "blocks"}, "blocks"),
        ("cpu", 300, {"dispatch": "rows"}, "rows"),
        ("cuda", 20, LARGE, "blocks"),
    ],
)
def test_the_path_taken(platform: str, tokens: int, changes: dict[str, object], expected: str) -> None:
    assert path_taken(platform, tokens, **changes) == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"form": "reference", **LARGE}, "form = reference: the fused kernels need separate or tied"),
        ({"d_model": 64, "d_ff": 256}, "d_model = 64: the fused kernels need a multiple of 128"),
        ({"d_model": 128, "d_ff": 200}, "d_ff = 200: the fused kernels need a multiple of 128"),
    ],
)
def test_what_the_kernels_cannot_run_is_named(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as found:
        traced(model(dispatch="fused", **changes))
    assert str(found.value) == f"model.dispatch = 'fused' cannot run this model: {said}"
    traced(model(dispatch="auto", **changes))


# Cost


def cost(tokens: int, **changes: object) -> tuple[hlo.Program, float]:
    """What the compiled program's text says, and all operations by XLA's count, which runs through loops once."""
    compiled = traced(model(d_model=32, d_ff=64, **changes), tokens).lower().compile(QUICK)
    return hlo.read(compiled.as_text(), at_most=blocks.AT_MOST_SCOPE), compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("form", ["separate", "tied", "reference"])
def test_rows_cost_the_same_however_many_experts(form: str) -> None:
    (few, flops), (many, more) = (cost(40, dispatch="rows", form=form, num_experts=n) for n in (8, 64))
    products = 1 if form == "reference" else 2
    # 40 tokens, 2 experts each.
    assert few.matmul_flops == many.matmul_flops == products * 2 * 80 * 32 * 64
    # Each further expert costs the cosines and sines of its 2 stages of 16 + 32 pairs a product, 60 operations each;
    # one more product a row would be a hundred times that.
    angles = products * 2 * (16 + 32)
    assert more - flops <= 56 * angles * 60
    assert flops > few.matmul_flops


def test_blocks_cost_more_with_more_experts_by_padding_alone() -> None:
    # 1,000 rows in blocks of 4 and tiles of 128: (1000 + 3 * 8 + 124) // 128 = 8 tiles, (1000 + 3 * 64 + 124) // 128
    # = 10, and with more experts than rows (1000 + 3 * 1000 + 124) // 128 = 32 at most.
    for num_experts, tiles in ((8, 8), (64, 10), (5000, 32)):
        found, _ = cost(500, dispatch="blocks", num_experts=num_experts)
        assert found.matmul_flops == tiles * 2 * 2 * 128 * 32 * 64


def estimate(num_experts: int) -> int:
    text = traced(model(num_experts=num_experts, **LARGE), 128).lower(lowering_platforms=("tpu",)).as_text()
    (found,) = re.findall(r'"?flops\\?\d*"?: ?(\d+)', text)
    return int(found)


@pytest.mark.every_platform
def test_the_kernel_costs_its_rows_and_their_padding_however_many_experts() -> None:
    # 256 rows, two products; 8 and 16 experts fill their blocks of 16 rows, 64 experts have 4 rows each in one.
    assert estimate(8) == estimate(16) == 2 * 2 * 256 * 128 * 256
    assert estimate(64) == 2 * 2 * 64 * 16 * 128 * 256


def test_tiles_for_tpus_hold_so_many_hidden_numbers() -> None:
    # 2^22 / 64 = 65,536 rows are a tile; 1,000 tokens, 2 experts each, are less: 2,000 rows, one tile of blocks of 16.
    paths = rotated._choose_blocks(model(d_ff=64), jnp.zeros((1000, 12)), jnp.zeros((1000, 2), jnp.int32))
    assert paths["default"].args[1:] == (16, 2000)
    # 2^22 / 4,096 = 1,024 rows, 64 blocks of 16.
    paths = rotated._choose_blocks(model(d_ff=4096), jnp.zeros((1000, 12)), jnp.zeros((1000, 2), jnp.int32))
    assert paths["default"].args[1:] == (16, 1024)
    # 5 rows fill one block; on a CPU tiles stay in cache.
    paths = rotated._choose_blocks(model(), jnp.zeros((5, 12)), jnp.zeros((5, 1), jnp.int32))
    assert (paths["default"].args[1:], paths["cpu"].args[1:]) == ((16, 16), (4, 128))


# On a mesh


def layer(path: str, devices: int) -> Any:
    """Output, report and gradients of a layer whose 8 images are shared out, or on one device without any mesh."""
    config = model(dispatch=path, d_model=128, d_ff=128, num_stages=1, patch_size=4)
    module, rng = moe.ButterflyMoe(config), np.random.default_rng(0)
    x, upstream = rng.normal(size=(2, 8, 5, 128)).astype(np.float32)
    shapes = jax.eval_shape(lambda: moe.nn.unbox(module.init(jax.random.key(0), x, train=False)))["params"]
    params = jax.tree.map(lambda s: (rng.normal(size=s.shape) / 4).astype(np.float32), shapes)

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params: Any, x: jax.Array) -> Any:
        y, report = module.apply({"params": params}, x, train=False)
        return (upstream * y).sum(), (y, report)

    if devices == 1:
        (_, outputs), gradients = jax.jit(run)(params, x)
    else:
        placement = sharding.place(config, 8, sharding.Layout())
        with placement.active():
            (_, outputs), gradients = jax.jit(run, in_shardings=(placement.replicated, placement.batch))(params, x)
        assert len(outputs[0].sharding.device_set) == devices
    return jax.tree.map(np.asarray, (outputs, gradients))


def layers() -> Any:
    return {path: (layer(path, 1), layer(path, 4)) for path in ("blocks", "fused")}


@pytest.mark.long
def test_on_a_mesh_blocks_and_fused_give_what_one_device_gives() -> None:
    found = on_devices(4, layers)
    for a, b in zip(jax.tree.leaves(found["blocks"][0]), jax.tree.leaves(found["fused"][0]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max())
    for one, on_mesh in found.values():
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(on_mesh), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max())


def test_slots_of_a_tile_are_of_blocks_of_one_expert() -> None:
    # What `blocks` asks of the grouping on CPUs.
    grouping = dispatch.group(jnp.arange(200) % 7, 7, rotated._CPU_BLOCK, rotated._CPU_TILE)
    by_block = np.asarray(grouping.expert_S).reshape(-1, rotated._CPU_BLOCK)
    assert (by_block == by_block[:, :1]).all()
    assert int(grouping.sizes_E.sum()) % rotated._CPU_TILE == 0
