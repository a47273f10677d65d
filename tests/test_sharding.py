import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import KINDS, make_config, make_model, on_devices
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from bvit_jax import device_memory, sharding, train_step, vit
from bvit_jax.model_config import ConfigError, ModelConfig
from bvit_jax.sharding import Layout, Placement

P = PartitionSpec
BOTH = ("data", "expert")


def on_mesh(data: int, expert: int, model: int, fsdp: bool = False) -> Placement:
    """A placement without devices: enough to say where things go."""
    return Placement(AbstractMesh((data, expert, model), ("data", "expert", "model")), fsdp)


def is_spec(node: object) -> bool:
    return isinstance(node, PartitionSpec)


def specs(shardings: Any) -> dict[str, tuple[Any, ...]]:
    """Returns the mesh axes of each array, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.spec) for path, leaf in leaves}


# The mesh


SHARED = "it must be a multiple of the {} devices that share it out"


@pytest.mark.parametrize(
    ("model", "layout", "count", "shape"),
    [
        # The automatic expert axis is gcd(experts, devices / model).
        ({"family": "standard", "num_experts": 4}, {}, 8, (2, 4, 1)),
        ({"family": "standard", "num_experts": 12}, {}, 8, (2, 4, 1)),
        ({"family": "standard", "num_experts": 16}, {}, 8, (1, 8, 1)),
        ({"family": "standard", "num_experts": 5}, {}, 8, (8, 1, 1)),
        ({"family": "standard", "num_experts": 6}, {}, 4, (2, 2, 1)),
        ({"family": "standard", "num_experts": 6}, {"model": 2}, 8, (2, 2, 2)),
        ({"family": "standard", "num_experts": 16}, {"model": 4}, 8, (1, 2, 4)),
        ({"family": "standard", "num_experts": 4}, {}, 1, (1, 1, 1)),
        ({"family": "standard", "num_experts": 16}, {"expert": 1}, 8, (8, 1, 1)),
        ({"family": "standard", "num_experts": 16}, {"expert": 2, "model": 2}, 8, (2, 2, 2)),
        ({"family": "standard", "num_experts": 4, "moe_layers": "second"}, {}, 4, (1, 4, 1)),
        ({"family": "ternary", "num_experts": 6}, {"model": 2}, 8, (2, 2, 2)),
        *[({"family": family, "num_experts": 16}, {}, 8, (8, 1, 1)) for family in ("dense", "butterfly")],
        *[({"family": "butterfly", "form": form}, {"model": 2}, 8, (4, 1, 2)) for form in ("tied", "reference")],
        ({"family": "low_rank", "num_experts": 16}, {}, 8, (8, 1, 1)),
        # Images are split over the expert axis too, so a family without stored experts may have one.
        *[({"family": family, "num_experts": 3}, {"expert": 4}, 8, (2, 4, 1)) for family in ("dense", "butterfly")],
    ],
)
def test_the_shape_of_the_mesh_by_hand(model, layout, count, shape):
    assert sharding.mesh_shape(make_model(top_k=1, **model), 32, Layout(**layout), count) == shape


@pytest.mark.parametrize(
    ("model", "batch", "layout", "count", "message"),
    [
        ({}, 32, {"model": 3}, 8, "model_axis = 3: it must be a divisor of 8 devices"),
        ({}, 32, {"model": 16}, 8, "model_axis = 16: it must be a divisor of 8 devices"),
        ({}, 32, {"model": 0}, 8, "model_axis = 0: it must be a divisor of 8 devices"),
        ({}, 32, {"model": -2}, 8, "model_axis = -2: it must be a divisor of 8 devices"),
        ({}, 32, {"expert": 3}, 8, "expert_axis = 3: it must be a divisor of 8 devices"),
        ({}, 32, {"expert": 0}, 8, "expert_axis = 0: it must be a divisor of 8 devices"),
        ({}, 32, {"expert": -4}, 8, "expert_axis = -4: it must be a divisor of 8 devices"),
        ({}, 32, {"expert": 8, "model": 2}, 8, "expert_axis = 8: it must be a divisor of 8 devices / model_axis 2"),
        ({"num_experts": 6}, 32, {"expert": 4}, 8, "expert_axis = 4: it must be a divisor of num_experts = 6"),
        ({"num_heads": 4}, 32, {"model": 8}, 8, "model_axis = 8: it must be a divisor of num_heads = 4"),
        ({"d_ff": 30}, 32, {"model": 4}, 8, "model_axis = 4: it must be a divisor of d_ff = 30"),
        ({}, 12, {}, 8, f"batch_size = 12: {SHARED.format(8)}"),
        ({}, 16, {}, 3, f"batch_size = 16: {SHARED.format(3)}"),
        ({"num_experts": 3}, 15, {}, 3, None),
        # Devices along `model` work on the same images, but for rotated experts, which they share out too.
        ({}, 6, {"model": 2}, 8, f"batch_size = 6: {SHARED.format(4)}"),
        ({}, 4, {"model": 2}, 8, None),
        ({"family": "dense"}, 4, {"model": 2}, 8, None),
        ({"family": "ternary"}, 4, {"model": 2}, 8, None),
        (
            {"family": "ternary", "num_experts": 6},
            32,
            {"expert": 4},
            8,
            "expert_axis = 4: it must be a divisor of num_experts = 6",
        ),
        (
            {"family": "butterfly"},
            4,
            {"model": 2},
            8,
            f"batch_size = 4: {SHARED.format(8)}",
        ),
        ({"family": "low_rank"}, 4, {"model": 2}, 8, f"batch_size = 4: {SHARED.format(8)}"),
    ],
)
def test_what_does_not_divide_over_the_mesh_is_named(model, batch, layout, count, message):
    config = make_model(**{"family": "standard", "num_stages": 1} | model)
    if message is None:
        sharding.mesh_shape(config, batch, Layout(**layout), count)
        return
    with pytest.raises(ConfigError) as found:
        sharding.mesh_shape(config, batch, Layout(**layout), count)
    assert str(found.value) == message


@given(
    family=st.sampled_from(["dense", "standard", "ternary", "butterfly", "low_rank"]),
    experts=st.integers(1, 64),
    count=st.integers(1, 64),
    along_model=st.sampled_from([1, 2, 4]),
)
def test_the_automatic_mesh_uses_every_device_and_divides_the_experts(family, experts, count, along_model):
    model = make_model(family=family, num_experts=experts, top_k=1)
    devices = count * along_model
    data, expert, found = sharding.mesh_shape(model, devices, Layout(model=along_model), devices)
    assert (data * expert * found, found) == (devices, along_model)
    if family in ("standard", "ternary"):
        assert experts % expert == 0
        assert not any(experts % more == 0 == count % more for more in range(expert + 1, count + 1))
    else:
        assert expert == 1


def test_a_mesh_is_laid_over_the_devices_there_are():
    placement = sharding.place(make_model(family="standard"), 16, Layout(fsdp=True))
    assert dict(placement.mesh.shape) == {"data": 1, "expert": 1, "model": 1}
    assert placement.fsdp
    assert list(placement.mesh.devices.flat) == jax.devices()


# The axes of parameters


@pytest.mark.parametrize(("family", "form"), KINDS)
@pytest.mark.parametrize("moe_layers", ["every", "second", "0,2,3"])
def test_every_parameter_has_logical_axes_of_the_table(family, form, moe_layers):
    model = make_model(family=family, form=form, moe_layers=moe_layers, num_layers=5)
    axes, shapes = vit.param_axes(model), vit.param_shapes(model)
    assert jax.tree.structure(axes, is_leaf=is_spec) == jax.tree.structure(shapes)
    placement = on_mesh(2, 2, 2)
    assert jax.tree.structure(placement.params(axes, shapes)) == jax.tree.structure(shapes)
    named = jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_spec)
    for (path, spec), leaf in zip(named, jax.tree.leaves(shapes), strict=True):
        name = jax.tree_util.keystr(path)
        assert set(spec) <= sharding.RULES.keys(), name
        # Norms, embeddings and plain biases go without names: nothing splits them.
        unnamed = "norm" in name or path[-1].key in ("class_token", "position_embedding")
        unnamed |= name in ("['patch_embedding']['bias']", "['head']['bias']")
        assert len(spec) == (0 if unnamed else leaf.ndim), name
        if spec and "segment" in name:
            assert spec[0] == "layers"
            assert "layers" not in spec[1:]
        else:
            assert "layers" not in spec


BLOCK = "segment_0/block_0"
ATTENTION = {
    # layers, embed, heads, head_dim
    **{f"{BLOCK}/attention/{name}/kernel": (None, None, "model", None) for name in ("query", "key", "value")},
    **{f"{BLOCK}/attention/{name}/bias": (None, "model", None) for name in ("query", "key", "value")},
    f"{BLOCK}/attention/out/kernel": (None, "model", None, None),
    f"{BLOCK}/attention/out/bias": (None, None),
}
SPLIT_FFN = {
    "dense": {
        "up/kernel": (None, None, "model"),
        "up/bias": (None, "model"),
        "down/kernel": (None, "model", None),
        "down/bias": (None, None),
    },
    "standard": {
        "up_kernel": (None, "expert", None, "model"),
        "up_bias": (None, "expert", "model"),
        "down_kernel": (None, "expert", "model", None),
        "down_bias": (None, "expert", None),
        "router/kernel": (None, None, None),
    },
    "butterfly": {},
    "low_rank": {},
}
SPLIT_FFN["ternary"] = SPLIT_FFN["standard"]


@pytest.mark.parametrize(("family", "form"), KINDS)
def test_parameters_are_placed_by_hand(family, form):
    model = make_model(family=family, form=form)
    found = specs(on_mesh(2, 2, 2).params(vit.param_axes(model), vit.param_shapes(model)))
    expected = ATTENTION | {f"{BLOCK}/ffn/{name}": spec for name, spec in SPLIT_FFN[family].items()}
    assert {name: found[name] for name in expected} == expected
    # Whatever is not named here is on every device: rotated and low-rank experts above all.
    others = {name: spec for name, spec in found.items() if name not in expected}
    assert not any(any(spec) for spec in others.values())
    assert any(f"{BLOCK}/ffn/" in name for name in others) == model.keeps_tokens


def spread(model: ModelConfig, placement: Placement, kind: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sharding, "LARGE_BYTES", 4 * 1024)
    return specs(getattr(placement, kind)(vit.param_axes(model), vit.param_shapes(model)))


@pytest.mark.parametrize(("fsdp", "kind"), [(False, "moments"), (True, "moments"), (True, "params")])
def test_large_arrays_are_split_over_free_batch_axes_by_hand(fsdp, kind, monkeypatch):
    # Two layers of d_model 64, d_ff 128, 4 heads, 4 experts on 2 x 2 x 2 devices.
    standard = spread(make_model(family="standard"), on_mesh(2, 2, 2, fsdp), kind, monkeypatch)
    by_hand = {
        f"{BLOCK}/ffn/up_kernel": (None, "expert", "data", "model"),
        f"{BLOCK}/ffn/down_kernel": (None, "expert", "model", "data"),
        f"{BLOCK}/ffn/up_bias": (None, "expert", "model"),  # 4 KB: large, but 2 layers are all that is left
        f"{BLOCK}/ffn/down_bias": (None, "expert", None),  # 2 KB
        f"{BLOCK}/ffn/router/kernel": (None, None, None),  # 2 KB
        f"{BLOCK}/attention/query/kernel": (None, BOTH, "model", None),
        f"{BLOCK}/attention/out/kernel": (None, "model", None, BOTH),
        f"{BLOCK}/attention/query/bias": (None, "model", None),
        "position_embedding": (None, None, BOTH),  # 1 x 17 x 64: 4352 bytes
        "head/kernel": (None, None),  # 2560 bytes
    }
    assert {name: standard[name] for name in by_hand} == by_hand
    butterfly = spread(make_model(form="separate"), on_mesh(4, 1, 2, fsdp), kind, monkeypatch)
    by_hand = {
        f"{BLOCK}/ffn/up_prototype": (None, None, "data"),
        f"{BLOCK}/ffn/down_prototype": (None, "data", None),
        f"{BLOCK}/ffn/up_phi_angles": (None, None, "data"),
        f"{BLOCK}/ffn/up_bias": (None, None),
    }
    assert {name: butterfly[name] for name in by_hand} == by_hand


def test_without_fsdp_parameters_are_split_by_the_rules_alone(monkeypatch):
    model = make_model(family="standard")
    plain = specs(on_mesh(2, 2, 2).params(vit.param_axes(model), vit.param_shapes(model)))
    assert spread(model, on_mesh(2, 2, 2), "params", monkeypatch) == plain
    assert spread(model, on_mesh(2, 2, 2, fsdp=True), "params", monkeypatch) != plain


def test_the_bytes_of_an_array_say_whether_it_is_large():
    placement = on_mesh(2, 1, 1)
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        for less, expected in ((0, (None, "data")), (2, (None, None))):
            leaf = jax.ShapeDtypeStruct((1024, sharding.LARGE_BYTES // size // 1024 - less), jnp.dtype(dtype))
            assert tuple(placement.moments(P("layers", "outputs"), leaf).spec) == expected


def entries(spec: PartitionSpec, ndim: int) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension."""
    found = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    return found + [()] * (ndim - len(found))


@st.composite
def arrays(draw: Callable[..., Any]) -> tuple[PartitionSpec, tuple[int, ...]]:
    """Logical axes, each mesh axis in use at most once, and a shape; small, large and far too large ones."""
    names = draw(st.sets(st.sampled_from(["layers", "experts", "embed", "inputs", "head_dim"]), max_size=3))
    names |= draw(st.sets(st.sampled_from(["heads", "mlp"]), max_size=1))
    order: list[str | None] = draw(st.permutations([*sorted(names), None]))
    sizes = [draw(st.sampled_from([1, 2, 3, 4, 7, 8, 12, 64, 100, 768, 1000, 1024])) for _ in order]
    kept = draw(st.integers(0, len(order))) if order[-1] is None else len(order)
    while kept and order[kept - 1] is None:
        kept -= 1  # trailing names may be left out
    return P(*order[: max(kept, max((i + 1 for i, name in enumerate(order) if name), default=0))]), tuple(sizes)


@given(arrays(), st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 3), st.booleans())
def test_splitting_large_arrays_keeps_to_its_rules(array, mesh, fsdp):
    logical, shape = array
    placement = on_mesh(*mesh, fsdp)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    names = [*logical, *[None] * (len(shape) - len(logical))]
    plain = entries(sharding.split(*names), len(shape))
    assert plain == [{"experts": ("expert",), "heads": ("model",), "mlp": ("model",)}.get(name, ()) for name in names]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "LARGE_BYTES", 2**20)
        moments, params = placement.moments(logical, leaf), placement.params(logical, leaf)
    found = entries(moments.spec, len(shape))
    assert entries(params.spec, len(shape)) == (found if fsdp else plain)

    sizes = dict(zip(("data", "expert", "model"), mesh, strict=True))
    free = tuple(axis for axis in BOTH if sizes[axis] > 1 and (axis,) not in plain)
    parts = math.prod(sizes[axis] for axis in free)
    # An axis of one device leaves a dimension whole.
    whole = [i for i, axes in enumerate(plain) if math.prod(sizes[axis] for axis in axes) == 1]
    able = [i for i in whole if names[i] != "layers" and shape[i] % parts == 0]
    changed = [i for i in range(len(shape)) if found[i] != plain[i]]
    if 4 * math.prod(shape) < 2**20 or not free or not able:
        assert not changed
    else:
        [dimension] = changed
        assert found[dimension] == free
        assert dimension in able
        assert shape[dimension] == max(shape[i] for i in able)
        assert names[dimension] != "layers"


@pytest.mark.parametrize("argument", ["dense,4", "standard,4", "butterfly,4,tied", "low_rank,4"])
@pytest.mark.parametrize("fsdp", [False, True])
def test_the_optimiser_is_placed_as_its_parameters_would_be(argument, fsdp, monkeypatch):
    monkeypatch.setattr(sharding, "LARGE_BYTES", 4 * 1024)
    config, placement = make_config(argument), on_mesh(2, 2, 2, fsdp)
    shapes, axes = vit.param_shapes(config.model), vit.param_axes(config.model)
    found = train_step.state_shardings(config, placement)
    state = jax.eval_shape(lambda: train_step.init_state(config))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert all(isinstance(leaf, NamedSharding) for leaf in jax.tree.leaves(found))
    assert found.step == placement.replicated
    assert found.params == placement.params(axes, shapes)
    moments = placement.moments(axes, shapes)
    [adam] = [part for part in found.opt_state if hasattr(part, "mu")]
    assert adam.mu == adam.nu == moments
    assert (found.params == moments) == fsdp
    counts = set(jax.tree.leaves(found.opt_state)) - set(jax.tree.leaves((adam.mu, adam.nu)))
    assert counts <= {placement.replicated}


# Modules and the mesh


def test_modules_see_the_mesh_of_an_active_placement_alone(monkeypatch):
    x = jnp.ones((4, 2, 3))
    assert sharding.active_mesh() is None
    assert sharding.constrain(x, "batch", "tokens", "embed") is x
    with sharding.place(make_model(), 16).active():
        assert sharding.active_mesh() is None  # one device needs no collective
        assert sharding.constrain(x, "batch", "tokens", "embed") is x
    mesh = on_mesh(2, 1, 1)
    monkeypatch.setattr(sharding.Placement, "platform", "cpu")  # this mesh has no devices
    with mesh.active():
        assert sharding.active_mesh() == mesh.mesh
    assert sharding.active_mesh() is None


def test_logical_axes_by_hand():
    assert tuple(sharding.split("batch", "tokens", None, "heads")) == (BOTH, None, None, "model")
    assert tuple(sharding.split("rotated_batch", "experts")) == (("data", "expert", "model"), "expert")
    assert [
        name for name in ("rotations", "angles", "rank", "inputs", "outputs", "layers") if sharding.RULES[name]
    ] == []


# Batches


def seen_by_one_of_several(parts: list[slice | None], monkeypatch: pytest.MonkeyPatch) -> Placement:
    """A placement as a process sees it whose devices hold these parts of the batch; None for no device of its own."""
    held = SimpleNamespace(
        addressable_devices_indices_map=lambda shape: {
            f"device {number}": part and (part,) for number, part in enumerate(parts)
        }
    )
    monkeypatch.setattr(Placement, "batch", held)

    def make(shape: tuple[int, ...], where: object, part: Callable[[Any], np.ndarray]) -> Any:
        assert where is held
        rest = [slice(None)] * (len(shape) - 1)
        return shape, [part((own, *rest)) for own in parts if own is not None]

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    return on_mesh(2, 1, 1)


@pytest.mark.parametrize(
    ("parts", "rows"),
    [
        ([slice(0, 4), slice(4, 8)], range(8)),
        ([slice(8, 12), slice(12, None)], range(8, 16)),
        # Out of order, with a gap, and held twice along the axis `model`.
        ([slice(12, 16), slice(0, 4), None, slice(12, 16), slice(0, 4)], [*range(4), *range(12, 16)]),
        ([slice(None)], range(16)),
    ],
)
def test_a_process_holds_the_rows_of_its_devices_and_gives_each_its_own(parts, rows, monkeypatch):
    placement = seen_by_one_of_several(parts, monkeypatch)
    found = placement.host_rows(16)
    np.testing.assert_array_equal(found, rows)
    assert found.dtype == np.int64
    images, labels = np.random.default_rng(0).normal(size=(16, 3, 2)), np.arange(16) + 100
    shape_and_parts = placement.put_batch({"images": images[found], "labels": labels[found]}, found, 16)
    for name, whole in (("images", images), ("labels", labels)):
        shape, local = shape_and_parts[name]
        assert shape == whole.shape
        for part, here in zip([part for part in parts if part], local, strict=True):
            np.testing.assert_array_equal(here, whole[part])


# On devices


MESHES = {
    "one": (1, Layout()),
    "two": (2, Layout()),
    "data 8": (8, Layout(expert=1)),
    "data 2, expert 4": (8, Layout()),
    "all three": (8, Layout(expert=2, model=2)),
    "model 4": (8, Layout(model=4)),
    "fsdp": (8, Layout(fsdp=True)),
}


def batches_and_bytes() -> dict[str, Any]:
    sharding.LARGE_BYTES = 4 * 1024
    config = make_config("standard,4", model__num_layers=1)
    state = jax.jit(train_step.init_state, static_argnums=0)(config)
    found = {}
    for name, (count, layout) in MESHES.items():
        placement = sharding.place(config.model, 16, layout, jax.devices()[:count])
        rows = placement.host_rows(16)
        images = np.random.default_rng(0).normal(size=(16, 2, 2, 1)).astype(np.float32)
        placed = placement.put_batch((images[rows], rows), rows, 16)
        assert {leaf.sharding for leaf in placed} == {placement.batch}
        shardings = train_step.state_shardings(config, placement)
        found[name] = {
            "shape": tuple(placement.mesh.shape.values()),
            "rows": rows.tolist(),
            "images": np.array_equal(placed[0], images),
            "ids": np.asarray(placed[1]).tolist(),
            "parts": sorted({tuple(np.asarray(shard.data).tolist()) for shard in placed[1].addressable_shards}),
            "bytes": device_memory.of_state(jax.device_put(state, shardings)),
        }
    return found


@pytest.fixture(scope="module")
def on_eight() -> dict[str, Any]:
    return on_devices(8, batches_and_bytes)


SHAPES = {
    "one": (1, 1, 1),
    "two": (1, 2, 1),
    "data 8": (8, 1, 1),
    "data 2, expert 4": (2, 4, 1),
    "all three": (2, 2, 2),
    "model 4": (1, 2, 4),
    "fsdp": (2, 4, 1),
}


@pytest.mark.parametrize("name", MESHES)
def test_a_batch_on_devices_is_the_batch(on_eight, name):
    found = on_eight[name]
    assert found["shape"] == SHAPES[name]
    assert found["rows"] == found["ids"] == list(range(16))
    assert found["images"]
    data, expert, _ = found["shape"]
    each = 16 // (data * expert)
    assert found["parts"] == [tuple(range(start, start + each)) for start in range(0, 16, each)]


@pytest.mark.parametrize("name", MESHES)
def test_bytes_on_a_device_are_those_counted_by_hand(on_eight, name):
    # One layer of d_model 64, d_ff 128, 4 heads of 16 channels, 4 experts; 4 KB or more is large. Counted in floats.
    data, expert, model = SHAPES[name]
    images, fsdp = data * expert, name == "fsdp"
    kernels, biases = 2 * 4 * 64 * 128 // (expert * model), (4 * 128 // model + 4 * 64) // expert
    attention = 4 * 64 * 64 // model
    attention_biases = 3 * 64 // model + 64
    router, norms, head, patches, token, positions = 64 * 4, 3 * 2 * 64, 64 * 10 + 10, 4 * 64 + 64, 64, 17 * 64
    small = biases + attention_biases + router + norms + head + patches + token
    large_whole = kernels + attention + positions
    large_split = kernels // data + attention // images + positions // images
    assert on_eight[name]["bytes"]["params_bytes"] == 4 * (small + (large_split if fsdp else large_whole))
    adam = 2 * 4 * (small + large_split)
    assert on_eight[name]["bytes"]["optimizer_bytes"] == adam + 4 + 4  # and two counters of steps
