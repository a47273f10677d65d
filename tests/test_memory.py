import dataclasses
import json

import jax
import pytest

from bvit_jax import components, memory, packed_file, vit
from bvit_jax.config import Config, resolve
from bvit_jax.reductions import Reductions
from bvit_jax.storage import Storage
from configs import paper
from tests.conftest import KINDS, long_but, make_config

# d_model 8, d_ff 16, 2 layers, 2 heads, 4 experts, 2 stages; images of 8 x 8 x 1 in 4 patches; 10 classes.
SMALL = {
    "d_model": 8,
    "d_ff": 16,
    "num_heads": 2,
    "patch_size": 4,
    "num_experts": 4,
    "num_stages": 2,
    "num_layers": 2,
    "top_k": 2,
}
ledger = memory.ledger


def small(family: str, form: str = "separate", **changes: object) -> Config:
    fields = {"family": family, "form": form} | SMALL | changes
    return make_config(**{f"model__{name}": value for name, value in fields.items()})


def paper_model(family: str, form: str = "tied") -> Config:
    """The paper's setting, with angles and router in float32."""
    config = paper.get_config(f"{family},64,{form}")
    config.model.update({"angle_bits": 32, "router_precision": "float32"})
    return resolve(config.to_dict())


def rows_of(config: Config, storage: Storage | None = None) -> dict[str, memory.Row]:
    """The rows of all components but the header, which has tests of its own."""
    return {row.component: row for row in ledger(config, storage).rows if row.component != "header"}


def tensors_of(found: memory.Ledger) -> int:
    """Bytes without the header, whose length hangs on how many digits the numbers in it have."""
    return found.bytes_full - found.rows[-1].bytes_full


def test_the_standard_mixture_in_the_papers_setting():
    # 7 layers x 64 experts x 2 matrices x 256 x 1024 x 4 bytes: the paper's 939 MB.
    assert ledger(paper_model("standard")).bytes_paper == 939_524_096 == 7 * 64 * 2 * 256 * 1024 * 4


def test_tied_butterflies_in_the_papers_setting():
    # 256 x 1024 x 1.58 bit = 51,773.44 bytes; an expert has 2 stages x (128 + 512) angles x 4 bytes = 5,120; 7 layers.
    found = ledger(paper_model("butterfly"))
    assert found.bytes_paper == pytest.approx(2_656_174.08, abs=1e-3)
    assert found.bytes_paper == pytest.approx(7 * (256 * 1024 * 1.58 / 8 + 64 * 5120), abs=1e-3)
    assert 939_524_096 / found.bytes_paper == pytest.approx(353.7, abs=0.05)


def test_separate_butterflies_in_the_papers_setting():
    # Two prototypes, and for each expert two pairs of rotations: everything twice.
    found = ledger(paper_model("butterfly", "separate"))
    assert found.bytes_paper == pytest.approx(7 * (2 * 51_773.44 + 64 * 2 * 5120), abs=1e-3)
    assert 939_524_096 / found.bytes_paper == pytest.approx(353.7 / 2, abs=0.05)


def test_reference_butterflies_in_the_papers_setting():
    # The paper's formula leaves the dense projection out. With it: 7 x (379,453.44 + 1024 x 256 x 4) bytes, 94x.
    config = paper_model("butterfly", "reference")
    assert ledger(config).bytes_paper == pytest.approx(2_656_174.08, abs=1e-3)
    projection = rows_of(config)["projection"].bytes_full
    assert projection == 7 * 1024 * 256 * 4
    assert 939_524_096 / (ledger(config).bytes_paper + projection) == pytest.approx(94, abs=0.05)


def test_a_ternary_mixture_in_the_papers_setting():
    # As the standard one, at 1.58 bits a weight: 32 / 1.58 = 20.25.
    found = ledger(paper_model("ternary"))
    assert found.bytes_paper == pytest.approx(7 * 64 * 2 * 256 * 1024 * 1.58 / 8, abs=1e-3)
    assert 939_524_096 / found.bytes_paper == pytest.approx(20.25, abs=0.005)
    # All counted: 52,429 bytes of trits a matrix, 1024 + 256 scales and as many biases, and the router's 256 x 64.
    assert found.bytes_full_ffn == 7 * (64 * (2 * 52_429 + 2 * 1280 * 4) + 256 * 64 * 4) == 52_022_656


def test_a_dense_model_in_the_papers_setting():
    # The paper's formula for one FFN a layer: 7 x 2 x 256 x 1024 x 4 bytes.
    assert ledger(paper_model("dense")).bytes_paper == 7 * 2 * 256 * 1024 * 4


# Stored numbers by hand.
# embeddings: patches of 4 x 4 x 1 to 8, 128, and 8 of bias; class token 8; positions 5 x 8 = 40. Sum 184.
# attention:  4 projections of 8 x 8 + 8 = 288 a layer; 2 layers, 576.
# norms:      2 norms of 8 + 8 = 32 a layer; 2 layers, 64; the last one 16. Sum 80.
# head:       8 x 10 + 10 = 90.
BACKBONE = {"embeddings": 184, "attention": 576, "norms": 80, "head": 90}
# An FFN matrix is 8 x 16 = 128. Angles of one pair of rotations: 2 stages x (4 + 8) = 24 an expert, 96 for 4.
# Router: 8 x 4 = 32. Everything for 2 layers.
FFN = {
    ("dense", "separate"): {"ffn": 2 * 2 * 128, "ffn_bias": 2 * (16 + 8)},
    ("standard", "separate"): {"experts": 2 * 4 * 2 * 128, "ffn_bias": 2 * 4 * (16 + 8), "router": 2 * 32},
    ("ternary", "separate"): {
        "experts": 2 * 4 * 2 * 128,
        "scales": 2 * 4 * (16 + 8),  # of each expert one an output
        "ffn_bias": 2 * 4 * (16 + 8),
        "router": 2 * 32,
    },
    ("butterfly", "separate"): {
        "prototype": 2 * 2 * 128,
        "scales": 2 * (16 + 8),  # one an output: 16 of the up prototype, 8 of the down prototype
        "angles": 2 * 2 * 96,
        "router": 2 * 32,
        "ffn_bias": 2 * (16 + 8),
    },
    ("butterfly", "tied"): {
        "prototype": 2 * 128,
        "scales": 2 * 16,
        "angles": 2 * 96,
        "router": 2 * 32,
        "ffn_bias": 2 * (16 + 8),
    },
    ("butterfly", "reference"): {
        "prototype": 2 * 128,
        "scales": 2 * 16,
        "angles": 2 * 96,
        "router": 2 * 32,
        "projection": 2 * 16 * 8,
        "ffn_bias": 2 * 8,
    },
    # Two matrices of 128, and of each of 4 experts, of rank 4, 4 x (8 + 16) numbers for either.
    ("low_rank", "separate"): {"experts": 2 * 2 * (128 + 4 * 96), "ffn_bias": 2 * (16 + 8), "router": 2 * 32},
}
# 128 trits at 5 a byte are 25.6, so 26 bytes a matrix.
PACKED = {
    ("ternary", "separate"): {"experts": 2 * 4 * 2 * 26},
    ("butterfly", "separate"): {"prototype": 2 * 2 * 26},
    ("butterfly", "tied"): {"prototype": 2 * 26},
    ("butterfly", "reference"): {"prototype": 2 * 26},
}
# The paper's formula: 128 x 1.58 / 8 = 25.28 bytes a ternary matrix; 4 bytes an angle or a stored weight.
PAPER = {
    ("dense", "separate"): {"ffn": 2 * 2 * 128 * 4},
    ("standard", "separate"): {"experts": 2 * 4 * 2 * 128 * 4},
    ("ternary", "separate"): {"experts": 2 * 4 * 2 * 25.28},
    ("butterfly", "separate"): {"prototype": 2 * 2 * 25.28, "angles": 2 * 2 * 96 * 4},
    ("butterfly", "tied"): {"prototype": 2 * 25.28, "angles": 2 * 96 * 4},
    ("butterfly", "reference"): {"prototype": 2 * 25.28, "angles": 2 * 96 * 4},
    ("low_rank", "separate"): {"experts": 2 * 2 * (128 + 4 * 96) * 4},
}


@pytest.mark.parametrize(("family", "form"), KINDS)
def test_every_tensor_of_a_small_model_by_hand(family, form):
    found = rows_of(small(family, form))
    expected = BACKBONE | FFN[family, form]
    trained = {name: row.params for name, row in found.items() if name != "scales"}
    assert trained == {name: number for name, number in expected.items() if name != "scales"}
    full = {name: 4 * number for name, number in expected.items()} | PACKED.get((family, form), {})
    assert {name: row.bytes_full for name, row in found.items()} == full
    in_paper = {name: row.bytes_paper for name, row in found.items() if row.bytes_paper}
    assert in_paper == pytest.approx(PAPER[family, form])


@pytest.mark.parametrize(("family", "form"), KINDS)
def test_the_whole_is_the_sum_of_its_components(family, form):
    found = ledger(small(family, form))
    numbers = BACKBONE | FFN[family, form]
    rows = {row.component: row for row in found.rows}
    assert len(rows) == len(found.rows)
    assert found.params == sum(numbers.values()) - numbers.get("scales", 0)
    assert found.bytes_full == sum(row.bytes_full for row in found.rows)
    assert found.bytes_paper == pytest.approx(sum(PAPER[family, form].values()))
    assert found.bytes_full_ffn == sum(rows[name].bytes_full for name in FFN[family, form])
    assert tensors_of(found) - found.bytes_full_ffn == 4 * sum(BACKBONE.values())


@pytest.mark.parametrize(("family", "form"), long_but([KINDS[at] for at in (1, 4, 6)], KINDS))
def test_the_ledger_counts_the_parameters_that_are_drawn(family, form, key):
    config = small(family, form, moe_layers="second")
    params = vit.init_params(config.model, key)
    assert ledger(config).params == memory.count_params(params) == sum(p.size for p in jax.tree.leaves(params))


def test_rows_come_in_the_order_of_the_components():
    order = [
        "prototype",
        "scales",
        "angles",
        "router",
        "ffn_bias",
        "attention",
        "embeddings",
        "norms",
        "head",
        "header",
    ]
    assert [row.component for row in ledger(small("butterfly")).rows] == order
    assert set(order) - {"scales", "header"} <= set(components.COMPONENTS)


def test_one_scale_a_tensor():
    config = small("butterfly", "separate", ternary_scale="tensor")
    by_row, by_tensor = ledger(small("butterfly")), ledger(config)
    assert rows_of(config)["scales"].bytes_full == 4 * 2 * 2  # layers x prototypes
    assert rows_of(small("ternary", ternary_scale="tensor"))["scales"].bytes_full == 4 * 2 * 4 * 2  # x experts
    assert tensors_of(by_row) - tensors_of(by_tensor) == 4 * (2 * (16 + 8) - 4)
    assert (by_tensor.params, by_tensor.bytes_paper) == (by_row.params, by_row.bytes_paper)


@pytest.mark.parametrize(
    ("moe_layers", "mixtures"), [("every", 3), ("second", 1), pytest.param("0,2", 2, marks=pytest.mark.long)]
)
def test_only_mixture_layers_are_in_the_papers_formula(moe_layers, mixtures):
    for family, form in KINDS[1:]:
        config = small(family, form, num_layers=3, moe_layers=moe_layers)
        assert ledger(config).bytes_paper == pytest.approx(mixtures * sum(PAPER[family, form].values()) / 2)
        dense = rows_of(config).get("ffn")
        # The other layers hold dense FFNs, which the full accounting counts: 2 x 128 weights each.
        assert (dense.bytes_full if dense else 0) == (3 - mixtures) * 2 * 128 * 4
        assert dense is None or dense.bytes_paper == 0


def test_prototypes_are_packed_layer_by_layer():
    # Three layers of 128 trits: 3 x 26 bytes, not ceil(384 / 5) = 77.
    assert rows_of(small("butterfly", "tied", num_layers=3))["prototype"].bytes_full == 78


@pytest.mark.parametrize(("form", "pairs"), [("separate", 2), ("tied", 1), ("reference", 1)])
@pytest.mark.parametrize(
    ("d_model", "d_ff", "num_stages", "order", "angles"),
    [
        (8, 16, 3, "descending", 3 * (4 + 8)),
        (16, 4, 4, "ascending", 4 * 8 + 2 * 2),  # the narrow side has 2 stages at full depth and stops there
        # 12 = 4 x 3: two even stages of 6 pairs, then on 4 runs of 3 one pair each; 24 = 8 x 3: three stages of 12.
        (12, 24, 3, "descending", (6 + 6 + 4) + 3 * 12),
    ],
)
def test_bytes_grow_with_the_angles_and_the_router_alone(form, pairs, d_model, d_ff, num_stages, order, angles):
    changes = {"d_model": d_model, "d_ff": d_ff, "num_stages": num_stages, "stride_order": order, "num_layers": 3}
    few, more = (ledger(small("butterfly", form, num_experts=number, **changes)) for number in (5, 6))
    # One expert more: in each of 3 layers its angles, 4 bytes each, and in the full accounting its router column.
    assert more.bytes_paper - few.bytes_paper == pytest.approx(3 * 4 * pairs * angles)
    assert tensors_of(more) - tensors_of(few) == 3 * 4 * (pairs * angles + d_model)
    before, after = ({row.component: row for row in found.rows[:-1]} for found in (few, more))
    grown = {name for name in after if after[name] != before[name]}
    assert grown == {"angles", "router"}


@pytest.mark.parametrize(
    ("form", "rotations"), long_but([("tied", 1)], [("separate", 2), ("tied", 1), ("reference", 1)])
)
def test_without_hidden_rotations_an_expert_is_its_angles_of_d_model(form, rotations, key):
    few, more = (ledger(small("butterfly", form, rotations="outer", num_experts=number)) for number in (5, 6))
    # 2 stages of 4 pairs, 4 bytes each, in 2 layers.
    assert more.bytes_paper - few.bytes_paper == pytest.approx(2 * rotations * 8 * 4)
    config = small("butterfly", form, rotations="outer")
    params = vit.init_params(config.model, key)
    assert ledger(config).params == memory.count_params(params)
    raw = packed_file.pack(params, config)
    assert len(raw) == ledger(config).bytes_full
    angles = [name for name in packed_file.unpack(raw).arrays if "angles" in name]
    assert len(angles) == rotations


def test_where_a_run_started_is_not_in_its_file(key):
    config = small("butterfly", "tied")
    params = vit.init_params(config.model, key)
    started = dataclasses.replace(config, start_from="somebody/runs/dense")
    assert packed_file.pack(params, started) == packed_file.pack(params, config)
    assert ledger(started).bytes_full == ledger(config).bytes_full


def test_a_standard_mixture_grows_by_whole_experts():
    few, more = (ledger(small("standard", num_experts=number)) for number in (5, 6))
    assert more.bytes_paper - few.bytes_paper == 2 * 2 * 128 * 4
    # Matrices, biases and a column of the router, in 2 layers.
    assert tensors_of(more) - tensors_of(few) == 2 * 4 * (2 * 128 + 16 + 8 + 8)


@pytest.mark.parametrize("experts", ["float32", "int8", "ternary"])
def test_a_ternary_mixture_grows_by_packed_experts_whatever_the_format_of_others(experts):
    few, more = (ledger(small("ternary", num_experts=number), Storage(experts=experts)) for number in (5, 6))
    assert more.bytes_paper - few.bytes_paper == pytest.approx(2 * 2 * 25.28)
    # Two matrices, 24 scales, 24 biases and a column of the router, in 2 layers.
    assert tensors_of(more) - tensors_of(few) == 2 * (2 * 26 + 4 * (24 + 24 + 8))


def test_the_standard_twin_has_the_same_shape_and_experts():
    config = small("butterfly", "tied", moe_layers="second", num_layers=3)
    twin = memory.standard_twin(config)
    assert twin.model.family == "standard"
    for field in ("num_experts", "top_k", "moe_layers", "d_model", "d_ff", "num_layers", "patch_size", "num_classes"):
        assert getattr(twin.model, field) == getattr(config.model, field)
    assert dataclasses.replace(twin, model=config.model) == config
    assert twin.model == twin.model.canonical()
    assert memory.standard_twin(twin) == twin


def test_compression_is_against_float32_whatever_the_model_is_trained_with():
    config = small("butterfly", angle_bits=4, router_precision="int4")
    assert memory.standard_ledger(config).bytes_full_ffn == ledger(small("standard")).bytes_full_ffn
    config = small("ternary", ternary_scale="tensor", router_precision="int4")
    assert memory.standard_ledger(config).bytes_full_ffn == ledger(small("standard")).bytes_full_ffn


def test_the_twin_of_a_dense_model_has_one_expert():
    twin = memory.standard_twin(small("dense"))
    assert twin.model.num_experts == 1
    assert ledger(twin).bytes_paper == ledger(small("dense")).bytes_paper


@pytest.mark.parametrize(("bits", "width"), [(32, 4 * 24), (16, 2 * 24), (8, 24), (6, 18), (4, 12)])
def test_angles_by_bits(bits, width):
    # 24 angles an expert and pair of rotations: 2 stages of 4 at d_model 8, 2 stages of 8 at d_ff 16. Rows of 8 and 16
    # angles fill whole bytes at every number of bits: 8 x 6 / 8 = 6, 16 x 6 / 8 = 12.
    row = rows_of(small("butterfly"), Storage(angle_bits=bits))["angles"]
    assert row.bytes_full == 2 * 4 * 2 * width == row.bytes_paper  # layers x experts x (up, down)
    assert rows_of(small("butterfly", angle_bits=bits))["angles"] == row


def test_rows_of_angles_that_do_not_fill_bytes_are_rounded_up_one_by_one():
    # d_model 6 = 2 x 3, one stage: 3 angles; 3 x 6 bits = 18, so 3 bytes hold 4 codes. d_ff 10: 5 angles, two groups
    # of 4, 6 bytes. The formula counts 8 angles x 6 / 8 = 6 bytes.
    config = small("butterfly", "tied", d_model=6, d_ff=10, num_stages=1)
    row = rows_of(config, Storage(angle_bits=6))["angles"]
    assert row.bytes_full == 2 * 4 * (3 + 6)
    assert row.bytes_paper == 2 * 4 * 6


# Bytes of a matrix of 128 weights and of a channel's scale, and bits in the paper's formula.
FORMATS = {
    "float32": (512, 0, 32),
    "bfloat16": (256, 0, 16),
    "int8": (128, 4, 8),
    "int4": (64, 4, 4),
    "int2": (32, 4, 2),
    "ternary": (26, 4, 1.58),
}


@pytest.mark.parametrize("experts", FORMATS)
def test_stored_experts_by_format(experts):
    matrix, scale, bits = FORMATS[experts]
    rows = rows_of(small("standard"), Storage(experts=experts))
    assert rows["experts"].bytes_full == 2 * 4 * 2 * matrix
    assert rows["experts"].bytes_paper == pytest.approx(2 * 4 * 2 * 128 * bits / 8)
    found = rows["scales"].bytes_full if "scales" in rows else 0
    assert found == 2 * 4 * (16 + 8) * scale  # 16 channels out of the up matrix, 8 out of the down matrix
    dense = rows_of(small("dense"), Storage(experts=experts))
    assert dense["ffn"].bytes_full == 2 * 2 * matrix
    projection = rows_of(small("butterfly", "reference"), Storage(experts=experts))
    assert projection["projection"].bytes_full == 2 * matrix
    assert projection["scales"].bytes_full == 2 * (16 * 4 + 8 * scale)  # the prototype's 16, the projection's 8


@pytest.mark.parametrize(("router", "size"), [("float32", 128), ("bfloat16", 64), ("int8", 48), ("int4", 32)])
def test_the_router_by_format(router, size):
    # 8 x 4 weights; the integers' 4 scales, one an expert, are 16 bytes of the router's own.
    assert rows_of(small("butterfly"), Storage(router=router))["router"].bytes_full == 2 * size
    assert rows_of(small("standard", router_precision=router))["router"].bytes_full == 2 * size


@pytest.mark.parametrize(
    ("backbone", "number", "scale"),
    [("float32", 4, 0), ("bfloat16", 2, 0), ("int8", 1, 4), ("int4", 0.5, 4), ("int2", 0.25, 4)],
)
def test_the_backbone_by_format(backbone, number, scale):
    # Kernels: attention 2 x 4 x 64, patches 16 x 8, head 8 x 10. Scales: 8 a projection, 8, 10. The rest is float32.
    rows = rows_of(small("butterfly"), Storage(backbone=backbone))
    assert rows["attention"].bytes_full == 2 * 4 * (64 * number + 8 * scale + 8 * 4)
    assert rows["embeddings"].bytes_full == 128 * number + 8 * scale + (8 + 8 + 40) * 4
    assert rows["head"].bytes_full == 80 * number + 10 * scale + 10 * 4
    assert rows["norms"].bytes_full == 4 * 80


def test_the_ends_by_format():
    # As above: patches 16 x 8 and the head 8 x 10 in a byte each, attention in a quarter of one.
    rows = rows_of(small("butterfly"), Storage(backbone="int2", ends="int8"))
    assert rows["attention"].bytes_full == 2 * 4 * (16 + 8 * 4 + 8 * 4)
    assert rows["embeddings"].bytes_full == 128 + 8 * 4 + (8 + 8 + 40) * 4
    assert rows["head"].bytes_full == 80 + 10 * 4 + 10 * 4


UP, QUERY, FFN_PATH = (
    "segment_0/block_0/ffn/up/kernel",
    "segment_0/block_0/attention/query/kernel",
    "segment_0/block_0/ffn",
)


def differences(family, storage, **reductions):
    """Rows that a reduction changes: by how many numbers, bytes of the formula and bytes of the file."""
    config = small(family)
    found = Reductions(**{name: tuple(each.items()) for name, each in reductions.items()})
    before, after = rows_of(config, storage), rows_of(config, dataclasses.replace(storage, reductions=found))
    none = memory.Row("", 0, 0.0, 0)
    return {
        name: tuple(
            getattr(after.get(name, none), field) - getattr(before.get(name, none), field)
            for field in ("params", "bytes_paper", "bytes_full")
        )
        for name in before | after
        if before.get(name) != after.get(name)
    }


def test_factors_by_hand():
    # Of 2 matrices of 8 x 16 = 128 the first is of rank 3, 3 x (8 + 16) = 72 numbers; the second is whole.
    ranks = {UP: (3, 8), QUERY: (0, 1)}
    # Attention: 8 x 8 = 64 each; nothing, and 8 + 8 = 16.
    floats = differences("dense", Storage(), ranks=ranks)
    assert floats == {"ffn": (-56, -224, -224), "attention": (16 - 128, 0, 4 * (16 - 128))}
    # int4: half a byte each; a scale for each of the 3 columns of the first factor beside the 16 of the second.
    codes = differences("dense", Storage(experts="int4", backbone="int4"), ranks=ranks)
    # Attention's scales are its own: 8 of the factor without a row, and 1 + 8, in place of 8 and 8.
    assert codes == {
        "ffn": (-56, -28, -28),
        "scales": (0, 0, 3 * 4),
        "attention": (-112, 0, -56 + (8 + 1 + 8 - 16) * 4),
    }


def test_kept_weights_by_hand():
    # 100 of 2 x 128 weights, and 256 bits; 5 of attention's 2 x 64, and 128 bits.
    found = differences("dense", Storage(), kept={UP: 100, QUERY: 5})
    assert found == {"ffn": (-156, -624, -624), "attention": (-123, 0, -492), "index": (0, 0, 32 + 16)}
    found = differences("dense", Storage(experts="bfloat16"), kept={UP: 100})
    assert found == {"ffn": (-156, -312, -312), "index": (0, 0, 32)}


@pytest.mark.parametrize(("experts", "matrix", "scale", "bits"), [("float32", 512, 0, 32), ("int2", 32, 4, 2)])
def test_merged_experts_by_hand(experts, matrix, scale, bits):
    # 3 of 4 experts in either of 2 layers: 2 fewer of 2 x 128 weights, 16 + 8 biases and as many scales.
    found = differences("standard", Storage(experts=experts), groups={FFN_PATH: ((0, 1, 2, 0), (0, 0, 1, 2))})
    assert found.pop("scales", (0, 0, 0)) == (0, 0, -2 * 24 * scale)
    assert found == {"experts": (-512, -512 * bits / 8, -4 * matrix), "ffn_bias": (-48, 0, -48 * 4)}


def test_merged_ternary_experts_by_hand():
    found = differences("ternary", Storage(experts="int8"), groups={FFN_PATH: ((0, 0, 0, 0), (0, 0, 0, 0))})
    # One of 4: 6 fewer, each 2 x 26 bytes of trits and 24 scales.
    assert found["experts"] == (-6 * 256, pytest.approx(-6 * 2 * 25.28), -6 * 52)
    assert found["scales"] == (0, 0, -6 * 24 * 4)
    assert found["ffn_bias"] == (-6 * 24, 0, -6 * 24 * 4)
    assert found.keys() == {"experts", "scales", "ffn_bias"}


def test_a_reduced_mixture_is_counted_with_its_index():
    kept = (("segment_0/block_0/ffn/up_kernel", 10), (QUERY, 1))
    config = small("standard")
    found = ledger(config, Storage(reductions=Reductions(kept=kept)))
    # Of 2 x 4 x 128 weights 10 are kept, and 1,024 bits; attention's are not the mixture's.
    assert found.bytes_full_ffn - ledger(config).bytes_full_ffn == (10 - 1024) * 4 + 128
    index = next(row for row in found.rows if row.component == "index")
    assert index.bytes_full == 128 + 16
    names = [row.component for row in found.rows]
    assert names == [name for name in ("index", *components.COMPONENTS, "header") if name in names]


def test_two_bits_a_trit():
    assert rows_of(small("butterfly", "tied"), Storage(trits="2bit"))["prototype"].bytes_full == 2 * 32


def test_prototypes_that_are_not_ternary_are_floats():
    rows = rows_of(small("butterfly", "tied", ternary_scale="none"))
    assert rows["prototype"].bytes_full == rows["prototype"].bytes_paper == 2 * 512
    assert "scales" not in rows


def test_the_mixture_layers_of_the_papers_setting_all_counted():
    # 939.52 MB over 354 is 2.654 MB. Seven layers of, `separate`: 2 x 52,429 of trits, (1024 + 256) x 4 of scales and
    # as many of biases, 64 x 2 x 1,280 angles, 256 x 64 router weights; `tied`: half the trits and angles, 1024 scales.
    separate = ledger(paper_model("butterfly", "separate"), Storage(angle_bits=8)).bytes_full_ffn
    assert separate == 7 * (2 * 52_429 + 2 * 1280 * 4 + 64 * 2560 + 256 * 64 * 4) == 2_411_318 < 2_654_000
    tied = ledger(paper_model("butterfly"), Storage(angle_bits=8, router="int8")).bytes_full_ffn
    assert tied == 7 * (52_429 + (1024 + 1280) * 4 + 64 * 1280 + 256 * 64 + 64 * 4) == 1_121_435 < 1_320_000
    smallest = ledger(paper_model("butterfly"), Storage(angle_bits=4, router="int8")).bytes_full_ffn
    assert smallest == 7 * (52_429 + (1024 + 1280) * 4 + 64 * 640 + 256 * 64 + 64 * 4) == 834_715
    assert smallest < 939_524_096 / 1000


def test_dense_layers_beside_the_mixtures_are_in_the_file_but_not_in_the_mixtures():
    # One mixture of two layers: half of the mixtures' bytes; the dense FFN has 2 x 128 weights and 16 + 8 biases.
    for family, form in KINDS[1:]:
        every, second = (ledger(small(family, form, moe_layers=layers)) for layers in ("every", "second"))
        assert second.bytes_full_ffn == every.bytes_full_ffn / 2
        assert tensors_of(second) - tensors_of(every) == 4 * (2 * 128 + 24) - every.bytes_full_ffn / 2


@pytest.mark.parametrize(("experts", "own", "scales"), [("float32", 4, 0), ("int8", 1, 4)])
def test_low_rank_experts_add_four_thin_matrices_each(experts, own, scales):
    # d_model 4, d_ff 8, 2 experts of rank 1, 2 layers. Shared: 2 x 4 x 8 = 64 weights; an expert: 2 x (4 + 8) = 24.
    # Scales, one an output: shared 8 + 4 = 12, of an expert 1 + 8 up and 1 + 4 down, 14.
    changes = {"d_model": 4, "d_ff": 8, "num_stages": 1, "rank": 1}
    two, three = (ledger(small("low_rank", num_experts=n, **changes), Storage(experts=experts)) for n in (2, 3))
    rows = {row.component: row for row in two.rows}
    assert (rows["experts"].params, rows["experts"].bytes_full) == (2 * (64 + 2 * 24), 2 * (64 + 2 * 24) * own)
    assert rows["experts"].bytes_paper == rows["experts"].bytes_full
    assert (rows["scales"].bytes_full if scales else 0) == 2 * (12 + 2 * 14) * scales
    # 8 + 4 biases and a router of 4 x 2 beside them; a third expert adds its own and a column of the router.
    assert two.bytes_full_ffn == 2 * ((64 + 48) * own + (12 + 28) * scales + 12 * 4 + 8 * 4)
    assert three.bytes_full_ffn - two.bytes_full_ffn == 2 * (24 * own + 14 * scales + 4 * 4)


def test_the_header_states_its_own_size():
    found = ledger(small("butterfly"))
    assert found.rows[-1].component == "header"
    stated = json.loads(memory.metadata(small("butterfly"), Storage(), found))["ledger"]
    assert stated["components"][-1]["bytes_full"] == found.rows[-1].bytes_full
    assert stated["bytes_full"] == found.bytes_full
    assert stated == found.to_dict()


def test_the_file_in_the_papers_setting_has_the_bytes_counted(key):
    config = resolve(paper.get_config("butterfly,64,tied").to_dict())
    assert len(packed_file.pack(vit.init_params(config.model, key), config)) == ledger(config).bytes_full == 8_747_059
