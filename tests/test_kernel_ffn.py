"""The kernels compiled by the real TPU compiler, and what their programs say; values are in test_kernel_fused.py."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import long_but
from jax.sharding import Mesh

from bvit_jax import butterfly, topology
from bvit_jax.kernels import cut as cutting
from bvit_jax.kernels import ffn, rotation
from bvit_jax.kernels.cut import Side
from bvit_jax.kernels.ffn import Plan, Tiles, Weights

SLOTS = 16384


@dataclasses.dataclass(frozen=True)
class Shape:
    d_model: int = 256
    d_ff: int = 1024
    experts: int = 64
    dtype: str = "bfloat16"
    stages: int = 2
    tied: bool = False
    order: butterfly.StrideOrder = "descending"
    outer: bool = False


def plan_of(shape: Shape, device: str) -> Plan:
    narrow, wide = (
        butterfly.make_stages(dim, min(shape.stages, butterfly.max_stages(dim)), shape.order)
        for dim in (shape.d_model, shape.d_ff)
    )
    wide = () if shape.outer else wide
    last = ("phi", "theta") if shape.tied else ("down_theta", "down_phi")
    sides = (
        Side("theta", narrow, True),
        Side("phi", wide, False),
        Side(last[0], wide, True),
        Side(last[1], narrow, False),
    )
    mesh = Mesh(np.array(topology.devices_of(device)), ("data",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        cut = cutting.choose(sides, shape.d_model, shape.d_ff, SLOTS, shape.experts, jnp.dtype(shape.dtype))
    assert cut.strips == 1
    return cut.plan


def arguments(shape: Shape, plan: Plan, sharding: Any = None) -> tuple[Any, ...]:
    """Describes what `ffn.backward` takes; `ffn.forward` takes the first four."""

    def array(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    columns = max(turn.start + rotation.num_columns(turn.stages) for turn in plan.turns)
    tiles = Tiles(
        *(array(count, dtype="int32") for count in (SLOTS // plan.tile, SLOTS // ffn.BLOCK)), array(1, dtype="int32")
    )
    rows, table = array(SLOTS, shape.d_model, dtype=shape.dtype), (array(shape.experts, columns),) * 2
    weights = Weights(
        array(shape.d_model, shape.d_ff, dtype=shape.dtype),
        array(1, shape.d_ff),
        array(shape.d_ff, shape.d_model, dtype=shape.dtype),
    )
    return tiles, rows, table, weights, rows, rows


@functools.cache
def programs(shape: Shape, device: str) -> tuple[Any, Any]:
    """Compiles the forward and the backward kernel; the test keeps them out of JAX's cache."""
    plan = plan_of(shape, device)
    given = arguments(shape, plan, jax.sharding.SingleDeviceSharding(topology.devices_of(device)[0]))
    forward = jax.jit(functools.partial(ffn.forward, plan)).lower(*given[:4]).compile()
    return forward, jax.jit(functools.partial(ffn.backward, plan)).lower(*given).compile()


def accessed(program: Any) -> float:
    return program.cost_analysis()["bytes accessed"]


SHAPES = {
    "separate": (Shape(), ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")),
    "tied, float32": (Shape(128, 512, 16, tied=True, dtype="float32"), ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")),
    "whole depth": (Shape(stages=10), ("v5e:2x2",)),
    "whole depth, ascending, odd factors, tied": (
        Shape(384, 640, 8, stages=10, order="ascending", tied=True),
        ("v6e:2x2",),
    ),
    "ViT-B": (Shape(768, 3072), ("v5e:2x2",)),
    "no hidden rotations": (Shape(128, 512, 16, outer=True), ("v5e:2x2",)),
    "no hidden rotations, tied": (Shape(128, 512, 16, outer=True, tied=True), ("v6e:2x2",)),
}


PROGRAMS = [(name, device) for name in SHAPES for device in SHAPES[name][1]]
LONG = {("ViT-B", "v5e:2x2"), ("whole depth, ascending, odd factors, tied", "v6e:2x2")}


@pytest.mark.parametrize(("name", "device"), long_but(set(PROGRAMS) - LONG, PROGRAMS))
def test_kernels_compile_and_need_no_memory_beside_their_arrays(name: str, device: str, uncached: None) -> None:
    for program in programs(SHAPES[name][0], device):
        assert "tpu_custom_call" in program.as_text()
        assert program.memory_analysis().temp_size_in_bytes <= 2**16


def test_bytes_by_hand(uncached: None) -> None:
    forward, backward = (accessed(program) for program in programs(Shape(), "v5e:2x2"))
    rows = 16384 * 256 * 2  # 8.39 MB
    table = 64 * (2 * 384 + 2 * 1024) * 4  # columns: of 256 channels 128 + 256, of 1024 512 + 512
    prototypes, bias = 2 * 256 * 1024, 1024 * 4
    # Forward: x and y; cosines and sines; weights. Backward: x, y, dy, dx; a table of gradients more; float32
    # gradients of the weights.
    expected_forward = 2 * rows + 2 * table + 2 * prototypes + bias
    expected_backward = 4 * rows + 3 * table + (2 + 4) * prototypes + 2 * bias
    scalars = 4 * (16384 // 256 + 16384 // 16 + 1)
    assert 0 <= forward - expected_forward <= 2 * scalars
    assert 0 <= backward - expected_backward <= 2 * scalars
    assert forward <= 20e6
    assert forward + backward <= 60e6


def test_operations_do_not_depend_on_the_number_of_experts(uncached: None) -> None:
    few, many = (programs(Shape(experts=experts), "v5e:2x2") for experts in (8, 64))
    for a, b, products in zip(few, many, (2, 5), strict=True):
        assert a.cost_analysis()["flops"] == b.cost_analysis()["flops"]
        assert a.cost_analysis()["flops"] == pytest.approx(products * 2 * 16384 * 256 * 1024, rel=0.01)
    # 56 experts more: their tables.
    assert accessed(many[0]) - accessed(few[0]) == 56 * 2 * 2816 * 4
    assert accessed(many[1]) - accessed(few[1]) == 56 * 3 * 2816 * 4


def kernel_texts(shape: Shape) -> tuple[str, str]:
    plan = dataclasses.replace(plan_of(shape, "v5e:2x2"), interpret=True)
    given = arguments(shape, plan)
    forward = jax.make_jaxpr(functools.partial(ffn.forward, plan))(*given[:4])
    return str(forward), str(jax.make_jaxpr(functools.partial(ffn.backward, plan))(*given))


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "None")])
def test_products_are_as_exact_as_their_operands(dtype: str, precision: str) -> None:
    # A TPU multiplies float32 as bfloat16 unless told otherwise.
    for text, products in zip(kernel_texts(Shape(stages=1, dtype=dtype)), (2, 5), strict=True):
        assert text.count("dot_general[") == products
        exact = text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") + text.count("precision=HIGHEST")
        assert exact == (products if precision == "HIGHEST" else 0)
        assert text.count("preferred_element_type=float32") == products


def test_what_is_not_in_use_moves_nothing() -> None:
    shape = Shape()
    plan = plan_of(shape, "v5e:2x2")
    _, rows, table, weights, *_ = arguments(shape, plan)
    call = ffn._Call(plan, rows, table, weights)
    assert call.grid == (math.ceil(SLOTS / plan.tile),)
    chunk, used = np.array([0, 1, 1, 2, 2]), np.array([3])
    # 3 tiles in use: the fourth and the fifth name the third's rows.
    assert [int(call.rows.index_map(tile, chunk, None, used)[0]) for tile in range(5)] == [0, 1, 2, 2, 2]
    assert [int(call.angles.index_map(tile, chunk, None, used)[0]) for tile in range(5)] == [0, 1, 1, 2, 2]
    assert call.rows.block_shape == (plan.tile, 256)
    assert call.angles.block_shape == (plan.chunk, 2816)
