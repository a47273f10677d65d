import dataclasses
import time

import jax
import pytest

from bvit_jax import components, memory, vit
from bvit_jax.config import resolve
from bvit_jax.model_config import ModelConfig
from configs import paper
from tests.conftest import KINDS, make_model

# d_model 8, d_ff 16, 2 layers, 2 heads, 4 experts, 2 stages; images of 8 x 8 x 1 in 4 patches; 10 classes.
SMALL = {"d_model": 8, "d_ff": 16, "num_heads": 2, "patch_size": 4, "num_experts": 4, "num_stages": 2, "top_k": 2}
ledger = memory.ledger


def small(family: str, form: str = "separate", **changes: object) -> ModelConfig:
    return make_model(family=family, form=form, **SMALL | changes)


def paper_model(family: str, form: str = "tied") -> ModelConfig:
    return resolve(paper.get_config(f"{family},64,{form}").to_dict()).model


def rows_of(config: ModelConfig) -> dict[str, memory.Row]:
    return {row.component: row for row in ledger(config).rows}


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
}
# 128 trits at 5 a byte are 25.6, so 26 bytes a matrix.
PACKED = {"separate": 2 * 2 * 26, "tied": 2 * 26, "reference": 2 * 26}
# The paper's formula: 128 x 1.58 / 8 = 25.28 bytes a ternary matrix; 4 bytes an angle or a stored weight.
PAPER = {
    ("dense", "separate"): {"ffn": 2 * 2 * 128 * 4},
    ("standard", "separate"): {"experts": 2 * 4 * 2 * 128 * 4},
    ("butterfly", "separate"): {"prototype": 2 * 2 * 25.28, "angles": 2 * 2 * 96 * 4},
    ("butterfly", "tied"): {"prototype": 2 * 25.28, "angles": 2 * 96 * 4},
    ("butterfly", "reference"): {"prototype": 2 * 25.28, "angles": 2 * 96 * 4},
}


@pytest.mark.parametrize(("family", "form"), KINDS)
def test_every_tensor_of_a_small_model_by_hand(family, form):
    found = rows_of(small(family, form))
    expected = BACKBONE | FFN[family, form]
    assert {name: row.params for name, row in found.items()} == expected
    full = {name: 4 * number for name, number in expected.items()}
    if family == "butterfly":
        full["prototype"] = PACKED[form]
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
    assert found.bytes_full - found.bytes_full_ffn == 4 * sum(BACKBONE.values())


@pytest.mark.parametrize(("family", "form"), KINDS)
def test_the_ledger_counts_the_parameters_that_are_drawn(family, form, key):
    config = small(family, form, moe_layers="second")
    params = vit.init_params(config, key)
    assert ledger(config).params == memory.count_params(params) == sum(p.size for p in jax.tree.leaves(params))


def test_rows_come_in_the_order_of_the_components():
    order = ["prototype", "scales", "angles", "router", "ffn_bias", "attention", "embeddings", "norms", "head"]
    assert [row.component for row in ledger(small("butterfly")).rows] == order
    assert set(order) - {"scales"} <= set(components.COMPONENTS)


def test_one_scale_a_tensor():
    config = small("butterfly", "separate", ternary_scale="tensor")
    by_row, by_tensor = ledger(small("butterfly")), ledger(config)
    assert rows_of(config)["scales"].params == 2 * 2  # layers x prototypes
    assert by_row.bytes_full - by_tensor.bytes_full == 4 * (2 * (16 + 8) - 4)
    assert (by_tensor.params, by_tensor.bytes_paper) == (by_row.params, by_row.bytes_paper)


@pytest.mark.parametrize(("moe_layers", "mixtures"), [("every", 3), ("second", 1), ("0,2", 2)])
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


@pytest.mark.parametrize(("trits", "expected"), [(0, 0), (1, 1), (5, 1), (6, 2), (128, 26), (262_144, 52_429)])
def test_five_trits_a_byte(trits, expected):
    assert memory.packed_bytes(trits) == expected


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
    assert more.bytes_full - few.bytes_full == 3 * 4 * (pairs * angles + d_model)
    before, after = ({row.component: row for row in found.rows} for found in (few, more))
    grown = {name for name in after if after[name] != before[name]}
    assert grown == {"angles", "router"}


def test_a_standard_mixture_grows_by_whole_experts():
    few, more = (ledger(small("standard", num_experts=number)) for number in (5, 6))
    assert more.bytes_paper - few.bytes_paper == 2 * 2 * 128 * 4
    # Matrices, biases and a column of the router, in 2 layers.
    assert more.bytes_full - few.bytes_full == 2 * 4 * (2 * 128 + 16 + 8 + 8)


def test_the_standard_twin_has_the_same_shape_and_experts():
    config = small("butterfly", "tied", moe_layers="second", num_layers=3)
    twin = memory.standard_twin(config)
    assert twin.family == "standard"
    for field in ("num_experts", "top_k", "moe_layers", "d_model", "d_ff", "num_layers", "patch_size", "num_classes"):
        assert getattr(twin, field) == getattr(config, field)
    assert twin == twin.canonical() == memory.standard_twin(dataclasses.replace(config, form="reference"))
    assert memory.standard_twin(twin) == twin


def test_the_twin_of_a_dense_model_has_one_expert():
    twin = memory.standard_twin(small("dense"))
    assert twin.num_experts == 1
    assert ledger(twin).bytes_paper == ledger(small("dense")).bytes_paper


def test_the_curves_agree_with_the_ledger():
    config = small("butterfly", "tied")
    rows = memory.scaling(config, (1, 4))
    kinds = [("standard", "-"), ("butterfly", "separate"), ("butterfly", "tied"), ("butterfly", "reference")]
    places = [(*kind, number) for kind in kinds for number in (1, 4)]
    assert [(row.family, row.form, row.num_experts) for row in rows] == places
    for row in rows:
        changes = {"num_experts": row.num_experts, "top_k": min(2, row.num_experts)}
        own = ledger(small(row.family, row.form if row.form != "-" else "separate", **changes))
        standard = ledger(small("standard", **changes))
        assert (row.bytes_paper, row.bytes_full) == (own.bytes_paper, own.bytes_full)
        assert row.bytes_full_ffn == own.bytes_full_ffn
        assert row.compression_paper == pytest.approx(standard.bytes_paper / own.bytes_paper)
        assert row.compression_full == pytest.approx(standard.bytes_full / own.bytes_full)
        assert row.compression_full_ffn == pytest.approx(standard.bytes_full_ffn / own.bytes_full_ffn)
        if row.family == "standard":
            assert row.compression_paper == row.compression_full == row.compression_full_ffn == 1


def test_curves_reach_thousands_of_experts_at_once():
    # 4,096 stored experts of this shape would be 60 GB: nothing may be made.
    started = time.monotonic()
    numbers = [1, 8, 64, 256, 4096]
    rows = memory.scaling(paper_model("butterfly"), numbers)
    assert time.monotonic() - started < 30
    for family, form in {(row.family, row.form) for row in rows}:
        line = [row for row in rows if (row.family, row.form) == (family, form)]
        for field in ("bytes_paper", "bytes_full", "bytes_full_ffn"):
            values = [getattr(row, field) for row in line]
            assert values == sorted(set(values))
    tied = {row.num_experts: row for row in rows if row.form == "tied"}
    # Design section 2, one layer: 0.0927, 0.3795, 1.3625 and 21.02 MB.
    for number, megabytes, ratio in ((8, 0.0927, 181), (64, 0.3795, 354), (256, 1.3625, 394), (4096, 21.02, 409)):
        assert tied[number].bytes_paper / 7e6 == pytest.approx(megabytes, abs=5e-3 if number == 4096 else 5e-5)
        assert tied[number].compression_paper == pytest.approx(ratio, abs=0.5)
