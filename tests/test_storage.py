import dataclasses
import json
import math
from typing import Any

import pytest

from bvit_jax import storage
from bvit_jax.model_config import ConfigError, ModelConfig
from bvit_jax.reductions import Reductions
from bvit_jax.storage import Storage
from tests.conftest import make_model

# Sides that are no powers of two, 2 heads of 3 channels, 3 experts; images of 8 x 8 x 1 in 4 patches.
SMALL = {"d_model": 6, "d_ff": 10, "num_heads": 2, "patch_size": 4, "num_experts": 3, "num_stages": 2, "num_layers": 2}


def small(**changes: object) -> ModelConfig:
    return make_model(**SMALL | changes)


# Layout


def dtypes_and_shapes(model: ModelConfig, stored_as: Storage) -> dict[str, tuple[str, tuple[int, ...]]]:
    tensors = [tensor for stored in storage.layout(model, stored_as) for tensor in stored.tensors]
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}


def test_layout_by_hand() -> None:
    # A pair of rotations of 6 and 10 channels, 2 stages each: 6 = 2 x 3 has 3 angles, then 2 x 1 (position 0 meets 2,
    # 1 is alone); 10 = 2 x 5 has 5 angles, then 2 x 1 (position 0 of 5 meets 4). 5 and 7 angles.
    found = dtypes_and_shapes(small(form="tied"), Storage(6, "int4", "int2", "int8", "base3"))
    ffn = "segment_0/block_0/ffn"
    assert {name: value for name, value in found.items() if name.startswith(ffn + "/")} == {
        f"{ffn}/down_bias": ("F32", (2, 6)),
        f"{ffn}/up_bias": ("F32", (2, 10)),
        f"{ffn}/theta_angles.codes": ("U8", (2, 3, 6)),  # 5 codes: 2 groups of 3 bytes
        f"{ffn}/phi_angles.codes": ("U8", (2, 3, 6)),  # 7 codes
        f"{ffn}/prototype.codes": ("U8", (2, 12)),  # 60 trits
        f"{ffn}/prototype.scale": ("F32", (2, 10)),
        f"{ffn}/router/kernel.codes": ("U8", (2, 9)),  # 6 x 3 = 18 codes of 4 bits
        f"{ffn}/router/kernel.scale": ("F32", (2, 3)),
    }
    assert found["head/kernel.codes"] == ("U8", (60,))
    assert found["head/kernel.scale"] == ("F32", (10,))
    assert found["patch_embedding/kernel.codes"] == ("U8", (96,))  # 16 pixels x 6
    assert found["patch_embedding/kernel.scale"] == ("F32", (6,))
    assert found["class_token"] == ("F32", (1, 1, 6))
    assert found["position_embedding"] == ("F32", (1, 5, 6))
    attention = "segment_0/block_0/attention"
    for name in ("query", "key", "value", "out"):
        assert found[f"{attention}/{name}/kernel.codes"] == ("U8", (2, 36))
        assert found[f"{attention}/{name}/kernel.scale"] == ("F32", (2, 6))
    assert found[f"{attention}/query/bias"] == ("F32", (2, 2, 3))
    assert found[f"{attention}/out/bias"] == ("F32", (2, 6))


def test_layout_of_stored_experts_by_hand() -> None:
    found = dtypes_and_shapes(small(family="standard"), Storage(experts="int2", router="bfloat16"))
    ffn = "segment_0/block_0/ffn"
    # 2 layers x 3 experts; 6 x 10 = 60 codes of 2 bits, 15 bytes.
    assert found[f"{ffn}/up_kernel.codes"] == ("U8", (2, 3, 15))
    assert found[f"{ffn}/up_kernel.scale"] == ("F32", (2, 3, 10))
    assert found[f"{ffn}/down_kernel.codes"] == ("U8", (2, 3, 15))
    assert found[f"{ffn}/down_kernel.scale"] == ("F32", (2, 3, 6))
    assert found[f"{ffn}/up_bias"] == ("F32", (2, 3, 10))
    assert found[f"{ffn}/router/kernel"] == ("BF16", (2, 6, 3))


@pytest.mark.parametrize("experts", ["float32", "int4", "ternary"])
def test_layout_of_ternary_experts_by_hand(experts: Any) -> None:
    # Whatever the format of other experts: 2 layers x 3 experts of 6 x 10 = 60 trits, 12 bytes.
    found = dtypes_and_shapes(small(family="ternary"), Storage(experts=experts))
    ffn = "segment_0/block_0/ffn"
    assert {name: value for name, value in found.items() if name.startswith(ffn + "/")} == {
        f"{ffn}/up_kernel.codes": ("U8", (2, 3, 12)),
        f"{ffn}/up_kernel.scale": ("F32", (2, 3, 10)),
        f"{ffn}/up_bias": ("F32", (2, 3, 10)),
        f"{ffn}/down_kernel.codes": ("U8", (2, 3, 12)),
        f"{ffn}/down_kernel.scale": ("F32", (2, 3, 6)),
        f"{ffn}/down_bias": ("F32", (2, 3, 6)),
        f"{ffn}/router/kernel": ("F32", (2, 6, 3)),
    }
    found = dtypes_and_shapes(small(family="ternary", ternary_scale="tensor"), Storage(experts=experts, trits="2bit"))
    assert found[f"{ffn}/down_kernel.codes"] == ("U8", (2, 3, 15))
    assert found[f"{ffn}/down_kernel.scale"] == ("F32", (2, 3, 1))
    found = dtypes_and_shapes(small(family="ternary", ternary_scale="none"), Storage(experts=experts))
    assert found[f"{ffn}/down_kernel"] == ("F32", (2, 3, 10, 6))
    # Dense FFNs beside them are stored as asked for.
    found = dtypes_and_shapes(small(family="ternary", moe_layers="second"), Storage(experts="int8"))
    assert found[f"{ffn}/up/kernel.codes"] == ("U8", (1, 60))
    assert found["segment_1/block_0/ffn/up_kernel.codes"] == ("U8", (1, 3, 12))


def test_layout_of_low_rank_experts_by_hand() -> None:
    # 2 layers; shared 6 x 10 = 60 weights; of each of 3 experts 6 x 2 = 12 and 2 x 10 = 20. Two int4 codes a byte.
    found = dtypes_and_shapes(small(family="low_rank", rank=2), Storage(experts="int4"))
    ffn = "segment_0/block_0/ffn"
    assert {name: value for name, value in found.items() if name.startswith(ffn + "/")} == {
        f"{ffn}/up_kernel.codes": ("U8", (2, 30)),
        f"{ffn}/up_kernel.scale": ("F32", (2, 10)),
        f"{ffn}/up_left.codes": ("U8", (2, 3, 6)),
        f"{ffn}/up_left.scale": ("F32", (2, 3, 2)),
        f"{ffn}/up_right.codes": ("U8", (2, 3, 10)),
        f"{ffn}/up_right.scale": ("F32", (2, 3, 10)),
        f"{ffn}/up_bias": ("F32", (2, 10)),
        f"{ffn}/down_kernel.codes": ("U8", (2, 30)),
        f"{ffn}/down_kernel.scale": ("F32", (2, 6)),
        f"{ffn}/down_left.codes": ("U8", (2, 3, 10)),
        f"{ffn}/down_left.scale": ("F32", (2, 3, 2)),
        f"{ffn}/down_right.codes": ("U8", (2, 3, 6)),
        f"{ffn}/down_right.scale": ("F32", (2, 3, 6)),
        f"{ffn}/down_bias": ("F32", (2, 6)),
        f"{ffn}/router/kernel": ("F32", (2, 6, 3)),
    }


def test_layout_of_other_formats_by_hand() -> None:
    ffn = "segment_0/block_0/ffn"
    found = dtypes_and_shapes(small(family="dense"), Storage(experts="ternary", trits="2bit"))
    assert found[f"{ffn}/up/kernel.codes"] == ("U8", (2, 15))
    found = dtypes_and_shapes(small(family="dense"), Storage(experts="ternary", trits="base3", backbone="bfloat16"))
    assert found[f"{ffn}/up/kernel.codes"] == ("U8", (2, 12))
    assert found["segment_0/block_0/attention/query/kernel"] == ("BF16", (2, 6, 2, 3))
    found = dtypes_and_shapes(small(form="tied", ternary_scale="tensor"), Storage(16))
    assert found[f"{ffn}/theta_angles.codes"] == ("U16", (2, 3, 5))
    assert found[f"{ffn}/prototype.scale"] == ("F32", (2, 1))
    found = dtypes_and_shapes(small(form="reference", ternary_scale="none"), Storage(4, experts="int4"))
    assert found[f"{ffn}/prototype"] == ("F32", (2, 6, 10))
    assert found[f"{ffn}/theta_angles.codes"] == ("U8", (2, 3, 4))  # 7 codes of 4 bits
    assert found[f"{ffn}/projection/kernel.codes"] == ("U8", (2, 30))
    assert found[f"{ffn}/projection/kernel.scale"] == ("F32", (2, 6))


def test_layers_of_several_segments() -> None:
    # 5 layers, the 2nd and 4th with a mixture: (FFN, mixture) twice, then an FFN.
    found = dtypes_and_shapes(small(num_layers=5, moe_layers="second"), Storage(experts="int8"))
    assert found["segment_0/block_0/ffn/up/kernel.codes"] == ("U8", (2, 60))
    assert found["segment_0/block_1/ffn/up_prototype.codes"] == ("U8", (2, 12))
    assert found["segment_1/block_0/ffn/up/kernel.codes"] == ("U8", (1, 60))


def test_layout_of_a_huge_model_is_made_at_once() -> None:
    model = make_model(num_experts=1_000_000)
    found = {tensor for stored in storage.layout(model, Storage(4)) for tensor in stored.tensors}
    assert sum(tensor.nbytes for tensor in found) > 10**8


# Reductions. Matrices of a layer's attention are 6 x 6, of its FFNs 6 x 10 and 10 x 6.

FFN, ATTENTION = "segment_0/block_0/ffn", "segment_0/block_0/attention"


def reduced(
    experts: Any = "float32",
    backbone: Any = "float32",
    ranks: dict[str, tuple[int, ...]] | None = None,
    kept: dict[str, int] | None = None,
    groups: dict[str, tuple[tuple[int, ...], ...]] | None = None,
) -> Storage:
    found = Reductions(*(tuple((each or {}).items()) for each in (ranks, kept, groups)))
    return Storage(experts=experts, backbone=backbone, reductions=found)


@pytest.mark.parametrize(
    ("experts", "values"),
    [
        # Rank 1: 6 + 10 numbers; rank 6: the 60 of the matrix. Rank 0: none.
        ("float32", ("factors", "F32", 16 + 60)),
        ("bfloat16", ("factors", "BF16", 16 + 60)),
        ("int8", ("codes", "U8", 16 + 60)),
        ("int4", ("codes", "U8", 3 + 5 + 30)),  # two codes a byte, each factor to its last byte
        ("int2", ("codes", "U8", 2 + 3 + 15)),  # four: 6 / 4 and 10 / 4 rounded up, 60 / 4
        ("ternary", ("codes", "U8", 2 + 2 + 12)),  # five: 6 / 5 rounded up, 10 / 5, 60 / 5
    ],
)
def test_factors_by_hand(experts: Any, values: tuple[str, str, int]) -> None:
    model = small(family="dense", num_layers=3)
    path = f"{FFN}/up/kernel"
    stored_as = reduced(experts, ranks={path: (1, 6, 0)})
    found = dtypes_and_shapes(model, stored_as)
    name, dtype, size = values
    assert found[f"{path}.{name}"] == (dtype, (size,))
    # Scales, one an output of each factor: 1 + 10, of the matrix 10, of rank 0 those of (0, 10).
    assert found.get(f"{path}.scale") == (("F32", (1 + 10 + 10 + 10,)) if name == "codes" else None)
    assert path not in found
    (stored,) = (each for each in storage.layout(model, stored_as) if each.path == path)
    assert (stored.numbers, stored.shape, stored.matrix) == (76, (3, 6, 10), (6, 10))
    # The other parameters are those of the model as it is.
    plain = dtypes_and_shapes(model, Storage(experts=experts))
    assert {n: v for n, v in found.items() if not n.startswith(path)} == {
        n: v for n, v in plain.items() if not n.startswith(path)
    }


def test_factors_of_attention_and_of_experts_by_hand() -> None:
    query, up = f"{ATTENTION}/query/kernel", f"{FFN}/up_kernel"
    ranks = {query: (2, 6), up: (1, 1, 6, 0, 2, 2)}
    found = dtypes_and_shapes(small(family="standard"), reduced("int8", "int4", ranks))
    # 6 x 2 and 2 x 6 numbers, then 36, two a byte; scales 2 + 6 + 6.
    assert found[f"{query}.codes"] == ("U8", (6 + 6 + 18,))
    assert found[f"{query}.scale"] == ("F32", (14,))
    # 2 layers x 3 experts: 16 + 16 + 60, 0 + 32 + 32; scales 11 + 11 + 10, 10 + 12 + 12.
    assert found[f"{up}.codes"] == ("U8", (92 + 64,))
    assert found[f"{up}.scale"] == ("F32", (32 + 34,))


@pytest.mark.parametrize(("experts", "dtype"), [("float32", "F32"), ("bfloat16", "BF16")])
def test_pruned_by_hand(experts: Any, dtype: str) -> None:
    # 2 layers x 60 weights: 120 bits, 15 bytes; attention 2 x 36 = 72, 9 bytes.
    up, out = f"{FFN}/up/kernel", f"{ATTENTION}/out/kernel"
    model = small(family="dense")
    stored_as = reduced(experts, kept={up: 7, out: 0})
    found = dtypes_and_shapes(model, stored_as)
    assert {name: value for name, value in found.items() if name.startswith((up, out))} == {
        f"{up}.kept": (dtype, (7,)),
        f"{up}.index": ("U8", (15,)),
        f"{out}.kept": ("F32", (0,)),
        f"{out}.index": ("U8", (9,)),
    }
    numbers = {each.path: each.numbers for each in storage.layout(model, stored_as)}
    assert (numbers[up], numbers[out]) == (7, 0)


@pytest.mark.parametrize("family", ["standard", "ternary"])
def test_merged_by_hand(family: str) -> None:
    # 2 layers of 3 experts, of which 2 are stored; up 60 int4 codes or trits.
    model = small(family=family)
    found = dtypes_and_shapes(model, reduced("int4", groups={FFN: ((0, 1, 0), (0, 0, 1))}))
    width = 30 if family == "standard" else 12
    assert {name: value for name, value in found.items() if name.startswith(FFN + "/")} == {
        f"{FFN}/up_kernel.codes": ("U8", (2, 2, width)),
        f"{FFN}/up_kernel.scale": ("F32", (2, 2, 10)),
        f"{FFN}/up_bias": ("F32", (2, 2, 10)),
        f"{FFN}/down_kernel.codes": ("U8", (2, 2, width)),
        f"{FFN}/down_kernel.scale": ("F32", (2, 2, 6)),
        f"{FFN}/down_bias": ("F32", (2, 2, 6)),
        f"{FFN}/router/kernel": ("F32", (2, 6, 3)),
    }
    one = dtypes_and_shapes(model, reduced("float32", groups={FFN: ((0, 0, 0), (0, 0, 0))}))
    assert one[f"{FFN}/down_bias"] == ("F32", (2, 1, 6))


def test_formats_of_the_ends_by_hand() -> None:
    ends, backbone = {"patch_embedding/kernel": 96, "head/kernel": 60}, f"{ATTENTION}/query/kernel"
    found = dtypes_and_shapes(small(), Storage(backbone="int4", ends="int8"))
    assert found[f"{backbone}.codes"] == ("U8", (2, 18))  # 36 codes, two a byte
    for name, weights in ends.items():
        assert found[f"{name}.codes"] == ("U8", (weights,))
    found = dtypes_and_shapes(small(), Storage(backbone="int2", ends="bfloat16"))
    assert found[f"{backbone}.codes"] == ("U8", (2, 9))
    assert [found[name][0] for name in ends] == ["BF16", "BF16"]
    found = dtypes_and_shapes(small(), Storage(backbone="int2"))
    assert found["head/kernel.codes"] == ("U8", (15,))
    found = dtypes_and_shapes(small(), Storage(ends="int2"))
    assert found["head/kernel.codes"] == ("U8", (15,))
    assert found[backbone] == ("F32", (2, 6, 2, 3))


UP, UP_EXPERTS = f"{FFN}/up/kernel", f"{FFN}/up_kernel"
A_KERNEL, A_MIXTURE = "a kernel of a layer of the model", "a mixture of stored experts of the model"
GROUPS = ((0, 1, 0), (0, 0, 1))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("dense", {"ranks": {"other/kernel": (1, 1)}}, f"storage.reductions = 'other/kernel': it must be {A_KERNEL}"),
        ("dense", {"ranks": {"head/kernel": (1,)}}, f"storage.reductions = 'head/kernel': it must be {A_KERNEL}"),
        ("dense", {"kept": {f"{FFN}/up/bias": 3}}, f"storage.reductions = '{FFN}/up/bias': it must be {A_KERNEL}"),
        ("low_rank", {"kept": {f"{FFN}/up_left": 3}}, f"storage.reductions = '{FFN}/up_left': it must be {A_KERNEL}"),
        ("butterfly", {"ranks": {UP_EXPERTS: (1,) * 6}}, f"storage.reductions = '{UP_EXPERTS}': it must be {A_KERNEL}"),
        ("standard", {"ranks": {FFN: (1,) * 6}}, f"storage.reductions = '{FFN}': it must be {A_KERNEL}"),
        ("standard", {"kept": {FFN: 3}}, f"storage.reductions = '{FFN}': it must be {A_KERNEL}"),
        *(
            (family, {"groups": {FFN: GROUPS}}, f"storage.reductions = '{FFN}': it must be {A_MIXTURE}")
            for family in ("dense", "butterfly", "low_rank")
        ),
        (
            "standard",
            {"groups": {UP_EXPERTS: GROUPS}},
            f"storage.reductions = '{UP_EXPERTS}': it must be {A_MIXTURE}",
        ),
        (
            "dense",
            {"ranks": {UP: (1, 1)}, "kept": {UP: 3}},
            f"storage.reductions = '{UP}': it must be reduced in one way",
        ),
        (
            "standard",
            {"ranks": {UP_EXPERTS: (1,) * 6}, "groups": {FFN: GROUPS}},
            f"storage.reductions = '{UP_EXPERTS}': it must be reduced in one way",
        ),
        ("dense", {"ranks": {UP: (1,)}}, f"ranks of {UP} = 1: it must be 2, one a matrix"),
        ("standard", {"ranks": {UP_EXPERTS: (1, 1)}}, f"ranks of {UP_EXPERTS} = 2: it must be 6, one a matrix"),
        (
            "dense",
            {"ranks": {UP: (6, 7)}},
            f"rank of {UP} = 7: it must be such that factors are fewer numbers than (6, 10), or 6",
        ),
        ("dense", {"kept": {UP: 121}}, f"kept weights of {UP} = 121: it must be at most 120"),
        (
            "dense",
            {"kept": {UP: 3}, "experts": "int8"},
            f"format of {UP} = 'packed': it must be floats, as it is pruned",
        ),
        (
            "ternary",
            {"kept": {UP_EXPERTS: 3}},
            f"format of {UP_EXPERTS} = 'packed': it must be floats, as it is pruned",
        ),
        (
            "standard",
            {"groups": {FFN: ((0, 1, 0),)}},
            f"groups of {UP_EXPERTS} = ((0, 1, 0),): it must be 3 for each of 2 layers",
        ),
        (
            "standard",
            {"groups": {FFN: ((0, 1), (0, 1, 0))}},
            f"groups of {UP_EXPERTS} = ((0, 1), (0, 1, 0)): it must be 3 for each of 2 layers",
        ),
        *(
            (
                "standard",
                {"groups": {FFN: groups}},
                f"groups of {UP_EXPERTS} = {groups!r}: it must be numbered by first appearance, as many in all layers",
            )
            for groups in (
                ((0, 1, 0), (1, 0, 1)),
                ((0, 1, 0), (0, 0, 0)),
                ((0, 2, 0), (0, 1, 2)),
                ((1, 1, 1), (1, 1, 1)),
                ((0, 0, 10**15), (0, 0, 10**15)),
            )
        ),
    ],
)
def test_reductions_that_the_model_cannot_have_are_refused(family: str, changes: dict[str, Any], message: str) -> None:
    stored_as = reduced(**changes)
    with pytest.raises(ConfigError) as error:
        storage.layout(small(family=family, form="tied"), stored_as)
    # Of a merged mixture the parameter that comes first in the tree is named.
    assert str(error.value) == message.replace(f"groups of {UP_EXPERTS}", f"groups of {FFN}/down_bias")


def test_a_path_named_twice_is_refused() -> None:
    twice = Reductions(ranks=((UP, (1, 1)), (UP, (2, 2))))
    with pytest.raises(ConfigError, match=f"storage.reductions = '{UP}': it must be reduced in one way"):
        storage.layout(small(family="dense"), Storage(reductions=twice))
    twice = Reductions(groups=((FFN, GROUPS), (FFN, GROUPS)))
    with pytest.raises(ConfigError, match="it must be reduced in one way"):
        storage.layout(small(family="standard"), Storage(reductions=twice))


# Settings


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        *(("angle_bits", value, "32 or 16 or 8 or 6 or 4") for value in (8.0, True, "8", 5, 0, None, [8], math.nan)),
        *(("router", value, "float32 or bfloat16 or int8 or int4") for value in ("int2", "ternary", "", None, 8)),
        *(
            ("experts", value, "float32 or bfloat16 or int8 or int4 or int2 or ternary")
            for value in ("int3", "Int8", None, ["int8"])
        ),
        *(("backbone", value, "float32 or bfloat16 or int8 or int4 or int2") for value in ("ternary", True, None)),
        *(("ends", value, "float32 or bfloat16 or int8 or int4 or int2") for value in ("ternary", 8)),
        *(("trits", value, "base3 or 2bit") for value in ("base4", 2, None)),
    ],
)
def test_impossible_settings_are_refused(field: str, value: object, wanted: str) -> None:
    with pytest.raises(ConfigError) as error:
        Storage(**{field: value})
    assert str(error.value) == f"storage.{field} = {value!r}: it must be {wanted}"


def test_settings_are_values() -> None:
    assert Storage(8) == Storage(angle_bits=8) != Storage(6)
    assert len({Storage(8), Storage(8), Storage()}) == 2
    values = [32, "float32", "float32", "float32", "base3", None, Reductions()]
    assert [getattr(Storage(), field.name) for field in dataclasses.fields(Storage)] == values


def test_settings_come_back_through_json() -> None:
    reduced = Reductions(ranks=(("a/kernel", (1, 2)),), kept=(("b/kernel", 3),), groups=(("c", ((0, 1), (0, 0))),))
    for stored_as in (Storage(), Storage(6, "int4", "int2", "int8", "2bit", "bfloat16", reduced)):
        found = storage.from_dict(json.loads(json.dumps(stored_as.to_dict())))
        assert found == stored_as
        assert hash(found) == hash(stored_as)


def test_settings_that_are_not_whole_do_not_come_back() -> None:
    whole = Storage().to_dict()
    with pytest.raises(KeyError, match="reductions"):
        storage.from_dict({name: value for name, value in whole.items() if name != "reductions"})
    with pytest.raises(TypeError, match="more"):
        storage.from_dict(whole | {"more": 1})
    with pytest.raises(ConfigError, match="storage.ends = 'int3'"):
        storage.from_dict(whole | {"ends": "int3"})
