"""Compiles for TPUs that are not there. Set UPDATE_RECORDED=1 to write recorded_tpu.json anew after a change meant."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import jax
import pytest

from bvit_jax import components, exchange, hlo, sharding, topology, vit
from bvit_jax.compiled import Compiled
from bvit_jax.config import Config, resolve
from bvit_jax.model_config import ConfigError
from bvit_jax.sharding import Layout
from configs import digits, paper

RECORDED = Path(__file__).parent / "recorded_tpu.json"
NAMED = [
    ("digits", "butterfly,8", "v5e:2x2"),
    ("paper", "butterfly,64,tied", "v5e:4x4"),
    ("paper", "standard,64", "v5e:4x4"),
]


def tiny(argument: str) -> Config:
    """The model of configs/digits.py, as it stands."""
    return resolve(digits.get_config(argument).to_dict())


def one_layer(argument: str, **changes: Any) -> Config:
    """A quick one to compile."""
    config = tiny(argument)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1, **changes).canonical())


def facts(found: Compiled) -> dict[str, Any]:
    """What a recorded compilation is held to."""
    memory = {f"{name}_bytes": getattr(found, f"{name}_bytes") for name in ("argument", "output", "temp", "peak")}
    return memory | {"matmul_flops": found.matmul_flops, "collectives": dict(sorted(found.by_kind.items()))}


@pytest.mark.long
@pytest.mark.parametrize(("module", "kind", "name"), NAMED)
def test_training_steps_compile_and_take_what_is_recorded(module: str, kind: str, name: str) -> None:
    config = resolve({"digits": digits, "paper": paper}[module].get_config(kind).to_dict())
    found = topology.compile_step(config, name, "train")
    assert found.status == "fits"
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    key = f"configs/{module}.py:{kind} {name} train"
    if os.environ.get("UPDATE_RECORDED"):
        recorded[key] = facts(found)
        RECORDED.write_text(json.dumps(dict(sorted(recorded.items())), indent=2) + "\n")
    assert recorded.get(key) == facts(found), (
        f"{key}: the compiled step is not what {RECORDED.name} says. If that is intended, update it: "
        "UPDATE_RECORDED=1 pytest -n 0 -m 'long or not long' tests/test_topology.py"
    )


def per_expert_bytes(config: Config) -> int:
    """Bytes of float32 that each expert adds to the sums over devices: its parameters' gradients and its statistics."""
    params = jax.tree_util.tree_leaves_with_path(vit.param_shapes(config.model))
    own = [
        leaf.size // config.model.num_experts
        for path, leaf in params
        if components.component_of(components.path_of(path)) in ("angles", "router")
    ]
    statistics = 2 * sum(config.model.is_moe_by_layer)  # of the load: tokens, and probability
    return 4 * (sum(own) + statistics)


@pytest.mark.parametrize(
    ("form", "dispatch"),
    [
        ("separate", "auto"),
        pytest.param("tied", "rows", marks=pytest.mark.long),
        pytest.param("reference", "rows", marks=pytest.mark.long),
    ],
)
def test_butterfly_tokens_stay_and_traffic_grows_with_the_gradients_of_angles_and_router_alone(
    form: str, dispatch: str
) -> None:
    few, many = (
        topology.compile_step(one_layer(f"butterfly,{n},{form}", dispatch=dispatch), "v5e:2x2", "train")
        for n in (8, 64)
    )
    assert set(few.by_kind) == set(many.by_kind) == {"all-reduce"}
    added = many.by_kind["all-reduce"] - few.by_kind["all-reduce"]
    assert added == 56 * per_expert_bytes(one_layer(f"butterfly,8,{form}"))


@pytest.mark.long
def test_stored_experts_are_split_and_their_tokens_travel() -> None:
    config = one_layer("standard,8")
    found = topology.compile_step(config, "v5e:2x2", "train")
    assert (found.data_axis, found.expert_axis, found.model_axis) == (1, 4, 1)
    # Of 32 images a chip has 8, so 8 * 17 tokens * 2 choices = 272 rows; 68 for each chip on average, at most
    # 68 + 4 sqrt(68) = 100.98, to 104. They travel there and back, and so do their gradients: 4 all-to-alls of 4 * 104
    # rows of 64 float32 each, and one of the rows' experts, int32.
    assert found.by_kind["all-to-all"] == 4 * 104 * (4 * 64 * 4 + 4)
    alone = topology.compile_step(config, "v5e:2x2", "train", Layout(expert=1))
    assert "all-to-all" not in alone.by_kind
    # Each chip holds 2 of 8 experts and their two moments, rather than all: 6 * 3 * (2 * 64 * 128 + 64 + 128) floats
    # fewer, within the padding of tiles.
    saved = alone.argument_bytes - found.argument_bytes
    assert saved == pytest.approx(4 * 6 * 3 * (2 * 64 * 128 + 64 + 128), rel=0.05)


@pytest.mark.parametrize("experts", [2, 4, 32, 512])
def test_meshes_may_split_the_axes_of_a_slice(experts: int) -> None:
    model = dataclasses.replace(tiny("standard,8").model, num_experts=experts)
    shape = sharding.place(model, 512, devices=topology.devices_of("v5p:8x8x8")).mesh.shape
    assert dict(shape) == {"data": 512 // experts, "expert": experts, "model": 1}


def test_evaluation_moves_nothing_but_its_sums() -> None:
    config = one_layer("butterfly,8")
    found = topology.compile_step(config, "v5e:2x2", "eval")
    # Images, right ones, likelihood, and by layer assignments of 8 experts and entropy with its weight, at most.
    assert 0 < found.collective_bytes <= 4 * (3 + 8 + 4)


def test_loops_count_as_often_as_they_run() -> None:
    config = tiny("dense")
    deep, flat = (
        topology.compile_step(dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=n)), *step)
        for n, step in ((6, ("v5e:2x2", "eval")), (3, ("v5e:2x2", "eval")))
    )
    m = config.model
    tokens, images = 17, config.batch_size // 4
    layer = 4 * 2 * tokens * m.d_model**2 + 2 * 2 * tokens**2 * m.d_model + 2 * 2 * tokens * m.d_model * m.d_ff
    assert deep.matmul_flops - flat.matmul_flops == pytest.approx(3 * images * layer, rel=0.01)
    # The compiler's own figure counts the loop's body once, in both.
    assert deep.flops_unlooped == pytest.approx(flat.flops_unlooped, rel=0.05)


@pytest.mark.long
def test_what_does_not_fit_is_told_with_what_it_would_need() -> None:
    config = one_layer("standard,4096", d_model=1024, d_ff=4096, num_heads=4)
    found = topology.compile_step(config, "v5e:2x2", "train")
    assert found.status == "does not fit"
    # 1,024 experts a chip, 2 * 1024 * 4096 floats each, with gradients or two moments at least.
    assert found.peak_bytes > 3 * 4 * 1024 * 2 * 1024 * 4096 > found.hbm_bytes
    assert found.by_kind == {}
    assert found.temp_bytes is found.matmul_flops is None


def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else\nand more")

    monkeypatch.setattr(topology, "build", broken)
    found = topology.compile_step(one_layer("dense"), "v5e:2x2", "train")
    assert (found.status, found.error, found.peak_bytes) == ("failed", "INTERNAL: something else", None)


@pytest.mark.parametrize(
    "name", ["v5e", "v9:2x2", "v5e:3x3", "v5e:2x", "", "v5e:0x2", "v5litepod:2x2", "v5e:2x2x2x2", "v5e:4x4 "]
)
def test_an_unknown_topology_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="topology = .*: it must be one of v4, v5e, .* such as v5e:4x4"):
        topology.devices_of(name)


def test_a_missing_libtpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"libtpu is not installed.*pip install -r requirements-tpu\.txt"):
        topology.devices_of("v5e:2x2")


def test_what_does_not_divide_is_refused_before_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "build", lambda *_: pytest.fail("it was compiled"))
    with pytest.raises(ConfigError, match="batch_size = 32: it must be a multiple of the 64 devices that share it out"):
        topology.compile_step(tiny("dense"), "v5e:8x8", "train")
    with pytest.raises(ConfigError, match="expert_axis = 4: it must be a divisor of num_experts = 6"):
        topology.compile_step(tiny("standard,6"), "v5e:2x2", "train", Layout(expert=4))
    with pytest.raises(ConfigError, match="step = 'test': it must be train or eval"):
        topology.compile_step(tiny("dense"), "v5e:2x2", "test")  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    ("kind", "dispatch"), [("butterfly,8", "rows"), pytest.param("standard,8", "auto", marks=pytest.mark.long)]
)
def test_split_heads_and_channels_and_fsdp_compile(kind: str, dispatch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "LARGE_BYTES", 2**14)
    config = one_layer(kind, dispatch=dispatch)
    found = topology.compile_step(config, "v5e:2x2", "train", Layout(expert=1, model=2, fsdp=True))
    assert found.status == "fits"
    assert {"all-gather", "all-reduce"} <= set(found.by_kind)


@pytest.mark.long
def test_programs_of_the_compiler_are_read_whole() -> None:
    placement = sharding.place(one_layer("standard,8").model, 32, devices=topology.devices_of("v5e:2x2"))
    program = topology.build(one_layer("standard,8"), placement, "train")
    overflow = hlo.read(str(program.as_text()), rare="")
    common = hlo.read(str(program.as_text()), rare=exchange.OVERFLOW_SCOPE)
    assert overflow.bytes_by_kind()["all-to-all"] > common.bytes_by_kind()["all-to-all"]
