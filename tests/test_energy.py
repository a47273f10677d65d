import dataclasses
import itertools
import math

import pytest

from bvit_jax import energy, memory
from bvit_jax.config import Config, resolve
from bvit_jax.model_config import ConfigError
from bvit_jax.scaling import Variant
from bvit_jax.storage import Storage
from configs import paper
from tests.conftest import KINDS, make_config

# d_model 8, d_ff 16, 1 layer, 4 experts, 2 a token, 2 stages; images of 8 x 8 x 1 in one patch, so 2 tokens.
SMALL = {
    **{"d_model": 8, "d_ff": 16, "num_heads": 2, "patch_size": 8, "num_experts": 4, "num_stages": 2, "top_k": 2},
    "num_layers": 1,
}
EIGHT_BIT = Storage(angle_bits=8)


def small(family: str = "butterfly", form: str = "separate", **changes: object) -> Config:
    fields = {"family": family, "form": form} | SMALL | changes
    return make_config(**{f"model__{name}": value for name, value in fields.items()})


def paper_config() -> Config:
    return resolve(paper.get_config().to_dict())


def parts(config: Config, storage: Storage | None = None, images: int = 1) -> tuple[float, ...]:
    return dataclasses.astuple(energy.step(config.model, storage or Storage(), images))


def test_prices():
    assert (energy.FLOAT_ADD, energy.FLOAT_MULTIPLY) == (0.9, 3.7)
    assert (energy.DRAM_BYTE, energy.SRAM_BYTE) == (160, 12.5)
    assert energy.PAPER_SAVING == 0.995


# 2 tokens choosing 2 of 4 experts touch 4 (1 - (1 / 2)^2) = 3 of them. Bytes, then x 160 pJ:
BYTES = {
    # An expert: 2 x 128 weights and 16 + 8 biases, 280 floats; the router 8 x 4 floats.
    ("standard", "separate"): 3 * 280 * 4 + 32 * 4,
    # Matrices of 128 trits, 26 bytes; scales and biases 16 + 8 each.
    ("ternary", "separate"): 3 * (2 * 26 + 24 * 4 + 24 * 4) + 32 * 4,
    ("dense", "separate"): 280 * 4,
    # Prototypes of 128 trits, 26 bytes; scales and biases 16 + 8 each. Angles of a pair of rotations: 2 x (4 + 8) = 24.
    ("butterfly", "separate"): 2 * 26 + 24 * 4 + 24 * 4 + 32 * 4 + 3 * 48 * 4,
    ("butterfly", "tied"): 26 + 16 * 4 + 24 * 4 + 32 * 4 + 3 * 24 * 4,
    # The projection has 16 x 8 weights and 8 biases.
    ("butterfly", "reference"): 26 + 16 * 4 + 136 * 4 + 32 * 4 + 3 * 24 * 4,
    # Shared matrices of 128 and 24 biases; of an expert, of rank 4, 4 x (8 + 16) for each of two matrices.
    ("low_rank", "separate"): (2 * 128 + 24) * 4 + 32 * 4 + 3 * 2 * 96 * 4,
}
# Numbers moved a token, then x 2 tokens x 4 bytes x 12.5 pJ. The router moves 8 + 4, the sum of 2 rows of 8 moves 24.
NUMBERS = {
    ("standard", "separate"): 12 + 24 + 2 * (24 + 24),
    ("ternary", "separate"): 12 + 24 + 2 * (24 + 24),
    ("dense", "separate"): 24 + 24,
    ("butterfly", "separate"): 12 + 24 + 2 * (24 + 24),
    ("butterfly", "tied"): 12 + 24 + 2 * (24 + 24),
    # The sum has rows of 16; then the projection.
    ("butterfly", "reference"): 12 + 3 * 16 + (16 + 8) + 2 * 24,
    # The shared up product; of 2 rows the down product, and up and down 8 to 4 to 16 and 16 to 4 to 8, each added to
    # what is read once more, 16 and 8.
    ("low_rank", "separate"): 12 + 24 + 24 + 2 * (24 + (12 + 20 + 16) + (20 + 12 + 8)),
}
# Numbers moved a token by the stages of rotations: 6 for each of 24 angles a pair of rotations, of 2 rows.
TURNED = {("butterfly", "separate"): 2 * 6 * 48, ("butterfly", "tied"): 2 * 6 * 48, ("butterfly", "reference"): 2 * 144}
# Arithmetic a token, then x 2 tokens: multiply-adds at 4.6 pJ, additions at 0.9, scales at 3.7, turns at 16.6.
ARITHMETIC = {
    ("standard", "separate"): (32 + 16 + 2 * 256) * 4.6,
    ("ternary", "separate"): (32 + 16) * 4.6 + 2 * (256 * 0.9 + (16 + 8) * 3.7),
    ("dense", "separate"): 256 * 4.6,
    ("butterfly", "separate"): (32 + 16) * 4.6 + 2 * (256 * 0.9 + (16 + 8) * 3.7 + 48 * 16.6),
    ("butterfly", "tied"): (32 + 16) * 4.6 + 2 * (256 * 0.9 + (16 + 16) * 3.7 + 48 * 16.6),
    ("butterfly", "reference"): (32 + 32 + 128) * 4.6 + 2 * (128 * 0.9 + 16 * 3.7 + 24 * 16.6),
    ("low_rank", "separate"): (32 + 16 + 128 + 2 * (128 + 2 * 96)) * 4.6,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_small_model_by_hand(kind):
    found = energy.step(small(*kind).model, Storage())
    assert found.weights == pytest.approx(BYTES[kind] * 160)
    assert found.activations == pytest.approx(NUMBERS[kind] * 2 * 4 * 12.5)
    assert found.arithmetic == pytest.approx(ARITHMETIC[kind] * 2)
    assert found.rotations == pytest.approx(TURNED.get(kind, 0) * 2 * 4 * 12.5)
    assert found.total == pytest.approx(found.weights + found.activations + found.rotations + found.arithmetic)


def test_a_standard_step_in_picojoules():
    # 3,488 bytes, 132 numbers and 560 multiply-adds a token.
    assert parts(small("standard")) == pytest.approx((558_080, 13_200, 0, 5_152))


@pytest.mark.parametrize(
    ("experts", "expert_bytes", "row_pj"),
    [
        # An expert is 2 x 128 weights, 24 scales and 24 biases of 4 bytes.
        ("bfloat16", 2 * 256 + 96, 256 * 4.6),
        ("int8", 256 + 96 + 96, 256 * 4.6 + 24 * 3.7),
        ("int4", 128 + 96 + 96, 256 * 4.6 + 24 * 3.7),
        ("ternary", 2 * 26 + 96 + 96, 256 * 0.9 + 24 * 3.7),
    ],
)
def test_stored_experts_of_fewer_bits(experts, expert_bytes, row_pj):
    found = energy.step(small("standard").model, Storage(experts=experts))
    assert found.weights == pytest.approx((3 * expert_bytes + 128) * 160)
    assert found.activations == pytest.approx(13_200)
    assert found.arithmetic == pytest.approx(2 * (48 * 4.6 + 2 * row_pj))


def test_ternary_experts_cost_what_standard_ones_stored_so_do():
    own = parts(small("ternary"), Storage(experts="int8"))
    assert own == parts(small("standard"), Storage(experts="ternary"))
    assert parts(small("ternary", ternary_scale="none")) == parts(small("standard"))


def test_prototypes_that_are_not_ternary_cost_multiply_adds():
    ternary, floats = (energy.step(small(ternary_scale=scale).model, Storage()) for scale in ("row", "none"))
    assert floats.arithmetic - ternary.arithmetic == pytest.approx(4 * (256 * 3.7 - 24 * 3.7))  # 4 rows
    assert floats.weights - ternary.weights == pytest.approx(160 * (256 * 4 - 2 * 26 - 96))


def test_a_projection_of_fewer_bits():
    floats, codes = (
        energy.step(small("butterfly", "reference").model, Storage(experts=experts))
        for experts in ("float32", "ternary")
    )
    # 16 x 8 weights, 26 bytes; 8 scales, each 4 bytes and a multiplication for each of 2 tokens.
    assert floats.weights - codes.weights == pytest.approx(160 * (128 * 4 - 26 - 8 * 4))
    assert floats.arithmetic - codes.arithmetic == pytest.approx(2 * (128 * 3.7 - 8 * 3.7))
    assert codes.activations == floats.activations


def test_angles_of_fewer_bits_move_fewer_bytes_and_no_less_else():
    floats, codes = (energy.step(small().model, Storage(angle_bits=bits)) for bits in (32, 8))
    assert floats.weights - codes.weights == pytest.approx(160 * 3 * 48 * 3)  # 3 experts of 48 angles, 3 bytes less
    assert (codes.activations, codes.arithmetic) == (floats.activations, floats.arithmetic)


@pytest.mark.parametrize(
    ("d_model", "d_ff", "num_stages", "angles"),
    [
        (16, 4, 4, 4 * 8 + 2 * 2),  # the narrow side has 2 stages at full depth
        # 12 = 4 x 3: two even stages of 6 pairs, then on 4 runs of 3 one pair each; 24 = 8 x 3: three stages of 12.
        (12, 24, 3, (6 + 6 + 4) + 3 * 12),
    ],
)
def test_only_pairs_are_turned(d_model, d_ff, num_stages, angles):
    changes = {"d_model": d_model, "d_ff": d_ff, "num_stages": num_stages}
    standard, own = (energy.step(small(kind, **changes).model, Storage()) for kind in ("standard", "butterfly"))
    # 2 tokens, 2 rows each, forth and back.
    assert own.rotations == pytest.approx(4 * 2 * angles * 6 * 50)
    assert (standard.rotations, standard.activations) == (0, own.activations)


def test_without_hidden_rotations_only_d_model_is_turned():
    # Two stages of 4 pairs, forth and back, of 2 rows of 2 tokens: 6 numbers of 4 bytes a turn.
    own, all_sides = (energy.step(small(rotations=which).model, Storage()) for which in ("outer", "all"))
    assert own.rotations == pytest.approx(2 * 2 * 16 * 6 * 50)
    # 3 experts' angles that are not read: two rotations of 2 stages of 8 pairs each.
    assert all_sides.weights - own.weights == pytest.approx(3 * 32 * 4 * 160)


def test_only_mixture_layers_count():
    one = parts(small())
    assert parts(small(num_layers=3)) == pytest.approx(tuple(3 * part for part in one))
    for kind in KINDS[1:]:
        alone = parts(small(*kind))
        assert parts(small(*kind, num_layers=3, moe_layers="1")) == pytest.approx(alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", [Storage(), Storage(angle_bits=4, experts="ternary", router="int8")])
def test_a_step_of_very_many_images_reads_every_stored_byte_of_the_layers_once(kind, storage):
    config = small(*kind, num_layers=2, num_experts=7)
    stored = memory.ledger(config, storage).bytes_full_ffn
    assert energy.step(config.model, storage, 10_000).weights == pytest.approx(160 * stored)


def test_experts_touched_by_enumeration():
    # 2 tokens with 2 of 3 experts each: of 9 pairs of choices, the 3 equal ones touch 2 experts, the others all 3.
    assert energy.experts_touched(3, 2, 2) == pytest.approx((3 * 2 + 6 * 3) / 9)
    for experts, top_k, tokens in ((4, 1, 3), (4, 2, 2), (5, 3, 2), (3, 3, 1)):
        choices = list(itertools.combinations(range(experts), top_k))
        sizes = [len(set().union(*drawn)) for drawn in itertools.product(choices, repeat=tokens)]
        assert energy.experts_touched(experts, top_k, tokens) == pytest.approx(sum(sizes) / len(sizes))


def test_experts_touched_at_its_limits():
    assert energy.experts_touched(64, 2, 1) == pytest.approx(2)  # one token
    assert energy.experts_touched(1, 1, 1) == energy.experts_touched(1, 1, 1000) == 1
    assert energy.experts_touched(8, 8, 1) == 8
    assert energy.experts_touched(64, 2, 10**6) == pytest.approx(64)
    # 64 (1 - (62 / 64)^65) = 64 x (1 - 0.12700)
    assert energy.experts_touched(64, 2, 65) == pytest.approx(55.87, abs=0.005)


def test_one_standard_expert_is_a_dense_ffn_with_a_router():
    dense, standard = (
        energy.step(small(kind, num_experts=1, top_k=1).model, Storage()) for kind in ("dense", "standard")
    )
    assert standard.weights - dense.weights == pytest.approx(8 * 4 * 160)
    assert standard.activations - dense.activations == pytest.approx(2 * (8 + 1 + 2 * 8) * 50)
    assert standard.arithmetic - dense.arithmetic == pytest.approx(2 * (8 + 8) * 4.6)


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic_and_activations_grow_with_images_and_weights_by_less(kind):
    config = small(*kind, num_experts=64)
    one, ten = (energy.step(config.model, EIGHT_BIT, images) for images in (1, 10))
    assert ten.arithmetic == pytest.approx(10 * one.arithmetic)
    assert ten.activations == pytest.approx(10 * one.activations)
    assert one.weights <= ten.weights < 10 * one.weights
    assert (kind[0] == "dense") == (one.weights == ten.weights)


def test_weights_grow_with_experts_and_the_butterflys_by_less():
    numbers = (2, 8, 32, 128)
    standard, own = (
        [energy.step(small(kind, num_experts=number).model, EIGHT_BIT, 100).weights for number in numbers]
        for kind in ("standard", "butterfly")
    )
    for line in (standard, own):
        assert line == sorted(set(line))
    savings = [energy.saving(*pair) for pair in zip(standard, own, strict=True)]
    assert savings == sorted(set(savings))


def test_no_images():
    with pytest.raises(ConfigError, match=r"images = 0: it must be at least 1"):
        energy.step(small().model, Storage(), 0)


def test_saving():
    assert energy.saving(200, 50) == 0.75
    assert energy.saving(200, 200) == 0
    assert energy.saving(200, 300) == -0.5
    assert energy.saving(10, 0) == 1


def test_rows_compare_with_the_float32_standard_mixture():
    config = small("butterfly", "tied")
    variants = [Variant("standard", "separate", Storage())] + [Variant(*kind, EIGHT_BIT) for kind in KINDS]
    rows = energy.compare(config, variants, images=3)
    assert [row.variant for row in rows] == [variant.name for variant in variants]
    assert [row.num_experts for row in rows] == [4, 1, 4, 4, 4, 4, 4, 4]
    assert rows[0].saving == rows[0].saving_weights == 0
    standard = energy.step(small("standard").model, Storage(), 3)
    for row, kind in zip(rows[1:], KINDS, strict=True):
        own = energy.step(small(*kind, rank=1).model, EIGHT_BIT, 3)  # a butterfly's rank is the neutral one
        assert (row.weights, row.activations, row.rotations, row.arithmetic) == dataclasses.astuple(own)
        assert (row.total, row.images) == (own.total, 3)
        assert row.saving == pytest.approx(1 - own.total / standard.total)
        assert row.saving_fused == pytest.approx(1 - (own.total - own.rotations) / standard.total)
        assert row.saving_weights == pytest.approx(1 - own.weights / standard.weights)


def test_the_standard_of_comparison_is_float32_whatever_the_variants():
    config = small("standard")
    (row,) = energy.compare(config, [Variant("standard", "separate", Storage(experts="ternary"))])
    # 3 x 244 + 128 bytes against 3 x 1,120 + 128.
    assert row.saving_weights == pytest.approx(1 - 860 / 3488)


def test_the_papers_setting():
    variants = [Variant("standard", "separate", Storage(experts="ternary"))]
    variants += [Variant("butterfly", form, EIGHT_BIT) for form in ("separate", "tied")]
    one, many = (energy.compare(paper_config(), variants, images) for images in (1, 128))
    for row in one[1:]:
        assert 0.997 < row.saving_weights < 0.999
        assert 0.987 < row.saving < 0.989
        assert 0.9915 < row.saving_fused < 0.9935
        assert row.saving_weights > energy.PAPER_SAVING > row.saving_fused > row.saving
    for row in many[1:]:
        assert 0.997 < row.saving_weights < 0.999
        assert 0.61 < row.saving < 0.63
        assert 0.81 < row.saving_fused < 0.82
    assert one[0].saving < one[1].saving
    assert many[1].saving_fused > many[0].saving > many[1].saving
    limit = energy.compare(paper_config(), variants, 10**6)
    assert all(0.42 < row.saving < 0.44 for row in limit[1:])


def test_dram_traffic_dominates_the_standard_mixture_at_one_image():
    standard = energy.step(memory.standard_twin(paper_config()).model, Storage())
    assert standard.weights > 0.97 * standard.total
    # 7 layers x 55.87 of 64 experts x (2 x 256 x 1024 + 1024 + 256) x 4 bytes, and routers of 65,536 bytes.
    expected = 160 * 7 * (64 * (1 - math.pow(62 / 64, 65)) * 525_568 * 4 + 65_536)
    assert standard.weights == pytest.approx(expected)
