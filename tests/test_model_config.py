import dataclasses
import re

import pytest

from bvit_jax import model_config
from bvit_jax.model_config import VARIANTS, ConfigError, ModelConfig, moe_layer_indices
from tests.conftest import make_model

# A value that differs from the `make_model` default, for every field.
OTHER = {
    "family": "standard",
    "form": "tied",
    "num_experts": 5,
    "top_k": 3,
    "moe_layers": "0",
    "rank": 2,
    "rotations": "outer",
    "num_stages": 3,
    "stride_order": "ascending",
    "ternary_scale": "tensor",
    "angle_bits": 8,
    "router_precision": "int8",
    "angle_init": 0.123,
    "router_noise": 0.123,
    "attention_dropout": 0.123,
    "stochastic_depth": 0.123,
    "dispatch": "blocks",
    "compute_dtype": "bfloat16",
    "image_size": 16,
    "patch_size": 4,
    "num_layers": 3,
    "d_model": 32,
    "d_ff": 256,
    "num_heads": 2,
    "channels": 3,
    "num_classes": 7,
}
BUTTERFLY_ONLY = {
    *("form", "rotations", "num_stages", "stride_order"),
    *("ternary_scale", "angle_bits", "angle_init", "dispatch"),
}
FAMILIES = ["dense", "standard", "ternary", "butterfly", "low_rank"]
MIXTURE_ONLY = {"num_experts", "top_k", "moe_layers", "router_noise", "router_precision"}


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("family", "sparse", "dense or standard or ternary or butterfly or low_rank"),
        ("form", "both", "separate or tied or reference"),
        ("rotations", "inner", "all or outer"),
        ("stride_order", "random", "descending or ascending"),
        ("ternary_scale", "column", "row or tensor or none"),
        ("angle_bits", 7, "32 or 16 or 8 or 6 or 4"),
        ("router_precision", "int2", "float32 or bfloat16 or int8 or int4"),
        ("compute_dtype", "float16", "float32 or bfloat16"),
        ("dispatch", "sorted", "auto or rows or blocks or fused"),
        ("num_experts", 0, "at least 1"),
        ("top_k", 0, "at least 1"),
        ("rank", 0, "at least 1"),
        ("num_stages", 0, "at least 1"),
        ("image_size", 0, "at least 1"),
        ("patch_size", 0, "at least 1"),
        ("num_layers", -1, "at least 1"),
        ("num_layers", 513, "at most 512"),
        ("d_model", 0, "at least 1"),
        ("d_ff", 0, "at least 1"),
        ("num_heads", 0, "at least 1"),
        ("channels", 0, "at least 1"),
        ("num_classes", 0, "at least 1"),
        ("top_k", 5, "at most num_experts = 4"),
        ("patch_size", 3, "a divisor of image_size = 8"),
        ("num_heads", 5, "a divisor of d_model = 64"),
        ("num_stages", 8, "at most 7 (full depth)"),  # the wider side, d_ff = 128 = 2^7
        ("angle_init", -0.1, "0 or more"),
        ("router_noise", -1.0, "0 or more"),
        ("attention_dropout", 1.0, "0 to under 1"),
        ("attention_dropout", -0.1, "0 to under 1"),
        ("stochastic_depth", 1.0, "0 to under 1"),
        ("stochastic_depth", -0.1, "0 to under 1"),
    ],
)
def test_an_impossible_value_is_named_with_what_would_be_right(field, value, right):
    message = f"model.{field} = {value!r}: it must be {right}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(make_model(), **{field: value})


@pytest.mark.parametrize("field", [field for field, value in OTHER.items() if not isinstance(value, str)])
def test_not_a_number_is_no_size(field):
    with pytest.raises(ConfigError, match=rf"model\.{field} = nan"):
        dataclasses.replace(make_model(), **{field: float("nan")})


@pytest.mark.parametrize(("d_model", "d_ff", "most"), [(64, 128, 64), (64, 40, 40), (8, 1, 1)])
def test_a_rank_is_at_most_that_of_the_matrices(d_model, d_ff, most):
    model = dataclasses.replace(make_model(num_stages=1), family="low_rank", d_model=d_model, d_ff=d_ff, rank=most)
    assert model.rank == most
    message = f"model.rank = {most + 1}: it must be at most {most}, the smaller of d_model and d_ff"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(model, rank=most + 1)
    assert dataclasses.replace(model, family="standard", rank=most + 1).canonical().rank == 1


def test_the_limits_themselves_are_possible():
    model = dataclasses.replace(
        make_model(), top_k=4, patch_size=8, num_heads=64, num_stages=7, angle_init=0.0, router_noise=0.0
    )
    assert (model.top_k, model.num_stages, model.grid) == (4, 7, (1, 1))
    assert dataclasses.replace(model, num_experts=1, top_k=1).num_experts == 1


@pytest.mark.parametrize(
    "moe_layers", ["", "every,1", "first", "1,1", "0,1,0", "4", "-1", "1.5", "1,,2", "1;2", ",", "second,0", "EVERY"]
)
def test_malformed_mixture_layers_are_refused(moe_layers):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(make_model(), num_layers=4, moe_layers=moe_layers)
    assert str(caught.value) == (
        f"model.moe_layers = {moe_layers!r}: it must be every, second or indices of 0 to 3, comma between"
    )


def test_second_needs_a_second_layer():
    with pytest.raises(ConfigError, match=r"model\.moe_layers = 'second'"):
        moe_layer_indices("second", 1)


@pytest.mark.parametrize(
    ("moe_layers", "expected"),
    [("every", (0, 1, 2, 3, 4)), ("second", (1, 3)), ("1,3,4", (1, 3, 4)), ("0", (0,)), ("4, 2", (2, 4))],
)
def test_mixture_layers_are_read(moe_layers, expected):
    assert moe_layer_indices(moe_layers, 5) == expected
    model = dataclasses.replace(make_model(), num_layers=5, moe_layers=moe_layers)
    assert model.is_moe_by_layer == tuple(layer in expected for layer in range(5))


def test_a_dense_model_has_no_mixture_layers():
    assert dataclasses.replace(make_model(), family="dense").is_moe_by_layer == (False, False)


def test_the_grid_counts_patches_a_side():
    assert dataclasses.replace(make_model(), image_size=12, patch_size=3).grid == (4, 4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("field", sorted(OTHER.keys() - {"family"}))
def test_canonical_drops_what_the_family_ignores_and_keeps_the_rest(family, field):
    plain = dataclasses.replace(make_model(top_k=2, num_stages=2), family=family)
    changed = dataclasses.replace(plain, **{field: OTHER[field]})
    assert changed != plain
    ignored = {
        "dense": BUTTERFLY_ONLY | MIXTURE_ONLY | {"rank"},
        "standard": BUTTERFLY_ONLY | {"rank"},
        "ternary": BUTTERFLY_ONLY - {"ternary_scale"} | {"rank"},
        "butterfly": {"rank"},
        "low_rank": BUTTERFLY_ONLY,
    }[family]
    assert (changed.canonical() == plain.canonical()) == (field in ignored)
    if field not in ignored:
        assert getattr(changed.canonical(), field) == OTHER[field]


def test_every_field_is_covered_above():
    assert OTHER.keys() == {field.name for field in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize("family", FAMILIES)
def test_canonical_is_idempotent_and_keeps_the_family(family):
    model = dataclasses.replace(make_model(), family=family)
    assert model.canonical().canonical() == model.canonical()
    assert model.canonical().family == family


def test_families_stay_apart():
    assert len({dataclasses.replace(make_model(), family=family).canonical() for family in FAMILIES}) == 5


def test_what_families_have_experts_of_which_kind():
    models = [dataclasses.replace(make_model(), family=family) for family in FAMILIES]
    assert [model.stores_experts for model in models] == [False, True, True, False, False]
    assert [model.keeps_tokens for model in models] == [False, False, False, True, True]
    assert [model.has_ternary_experts for model in models] == [False, False, True, True, False]


def test_the_paper_variant_has_the_papers_numbers():
    # Design section 2: 7 mixture layers, d_model 256, d_ff 1024; CIFAR images of 32 x 32.
    shape = VARIANTS["paper"]
    assert (shape.num_layers, shape.d_model, shape.d_ff, shape.image_size) == (7, 256, 1024, 32)


@pytest.mark.parametrize(
    ("name", "expected"), [("vit_s16", (16, 12, 384, 1536, 6)), ("vit_b16", (16, 12, 768, 3072, 12))]
)
def test_the_vit_variants_are_those_of_the_literature(name, expected):
    shape = VARIANTS[name]
    assert (shape.patch_size, shape.num_layers, shape.d_model, shape.d_ff, shape.num_heads) == expected
    assert shape.image_size == 224


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant_makes_a_model(name):
    model = dataclasses.replace(make_model(), **dataclasses.asdict(VARIANTS[name]))
    assert all(model.is_moe_by_layer)
    assert len(model.is_moe_by_layer) == VARIANTS[name].num_layers


def test_config_errors_are_value_errors():
    with pytest.raises(ValueError, match="x = 3: it must be even"):
        model_config.require(False, "x", 3, "even")
    model_config.require(True, "x", 3, "even")


@pytest.mark.parametrize(("spelling", "expected"), [("0,1", "every"), ("1,0", "every"), ("1", "second"), ("0", "0")])
def test_equal_mixture_layers_are_spelt_alike(spelling, expected):
    assert make_model(moe_layers=spelling).moe_layers == expected


def test_a_deployed_model_rounds_nothing_and_is_otherwise_the_same():
    model = dataclasses.replace(make_model(), ternary_scale="tensor", angle_bits=6, router_precision="int4")
    deployed = model.deployed()
    assert (deployed.ternary_scale, deployed.angle_bits, deployed.router_precision) == ("none", 32, "float32")
    own = {"ternary_scale": "tensor", "angle_bits": 6, "router_precision": "int4"}
    assert dataclasses.replace(deployed, **own) == model
