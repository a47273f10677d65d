import json
import time

import numpy as np
import pytest

from bvit_jax import memory, memory_report, scaling
from bvit_jax.config import resolve
from bvit_jax.model_config import ConfigError
from bvit_jax.scaling import Variant
from bvit_jax.storage import Storage
from configs import paper
from tests.conftest import make_config

FORMATS = ["float32", "bfloat16", "int8", "int4", "int2", "ternary"]
BITS = [32, 16, 8, 6, 4]


def test_every_family_form_and_format_is_listed_once():
    rest = Storage(router="int8", backbone="bfloat16", trits="2bit")
    variants = scaling.all_variants(rest)
    names = ["dense float32", *[f"standard {name}" for name in FORMATS], "ternary"]
    names += [f"butterfly {form} {bits}-bit" for form in ("separate", "tied", "reference") for bits in BITS]
    assert [variant.name for variant in variants] == names
    for variant in variants:
        router = "float32" if variant.name == "standard float32" else "int8"
        assert (variant.storage.router, variant.storage.backbone, variant.storage.trits) == (router, "bfloat16", "2bit")


def test_points_agree_with_the_ledger():
    config = make_config("butterfly,4,tied")
    variants = [Variant("standard", "separate", Storage(experts="int4")), Variant("butterfly", "reference", Storage(8))]
    found = scaling.points(config, [Variant("dense", "separate", Storage()), *variants], (1, 6))
    places = [("dense", 1), ("standard", 1), ("standard", 6), ("butterfly", 1), ("butterfly", 6)]
    assert [(point.variant.family, point.num_experts) for point in found] == places
    for point in found[1:]:
        v = point.variant
        own = {"num_experts": point.num_experts, "top_k": min(2, point.num_experts), "family": v.family, "form": v.form}
        same = make_config(**{f"model__{name}": value for name, value in own.items()})
        assert point.ledger == memory.ledger(same, v.storage)
        row = point.totals()
        standard = memory.ledger(memory.standard_twin(same), Storage())
        for name in ("paper", "full", "full_ffn"):
            assert row[f"bytes_{name}"] == getattr(point.ledger, f"bytes_{name}")
            assert row[f"compression_{name}"] == pytest.approx(
                getattr(standard, f"bytes_{name}") / row[f"bytes_{name}"]
            )
        parts = point.components()
        assert sum(part["bytes_full"] for part in parts) == row["bytes_full"]
        assert all(part["num_experts"] == point.num_experts and part["family"] == v.family for part in parts)


def test_growth_of_stored_experts_is_linear_and_of_rotated_ones_less():
    config = make_config("butterfly,4", model__num_layers=2)
    standard, butterfly = Variant("standard", "separate", Storage()), Variant("butterfly", "tied", Storage(8))
    points = scaling.points(config, [Variant("dense", "separate", Storage()), standard, butterfly], (1, 2, 4, 8, 4096))
    first, second = scaling.growth(points)
    assert (first.variant, second.variant) == (standard, butterfly)
    assert first.exponent == pytest.approx(1, abs=0.01)
    assert first.last == pytest.approx(1, abs=1e-3)
    # Two layers; an expert has 2 matrices of 64 x 128, 192 biases and 64 router weights, 4 bytes each.
    assert first.bytes_per_expert == 2 * 4 * (2 * 64 * 128 + 192 + 64)
    # Matrices of 8,192 trits are 1,639 bytes, with 192 scales.
    [ternary] = scaling.growth(scaling.points(config, [Variant("ternary", "separate", Storage())], (64, 65)))
    assert ternary.bytes_per_expert == 2 * (2 * 1639 + 4 * (192 + 192 + 64))
    # One pair of rotations: 2 stages x (32 + 64) angles of a byte, and a router column of 64 floats.
    assert second.bytes_per_expert == 2 * (192 + 4 * 64)
    sizes = [point.ledger.bytes_full_ffn for point in points if point.variant == butterfly]
    x, y = np.log([1, 2, 4, 8, 4096]), np.log(sizes)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert second.exponent == pytest.approx(slope)
    assert second.last == pytest.approx((y[-1] - y[-2]) / (x[-1] - x[-2]))
    assert second.exponent < second.last < 1


def test_one_number_of_experts_has_no_growth():
    points = scaling.points(make_config(), [Variant("butterfly", "tied", Storage())], (4,))
    assert scaling.growth(points) == []


def test_curves_reach_thousands_of_experts_at_once():
    # 4,096 stored experts of this shape would be 60 GB: nothing may be made.
    started = time.monotonic()
    config = resolve(paper.get_config("butterfly,64,tied").to_dict())
    points = scaling.points(config, scaling.all_variants(Storage()), [1, 8, 64, 256, 4096])
    assert time.monotonic() - started < 60
    lines = {variant: [p for p in points if p.variant == variant] for variant in scaling.all_variants(Storage())[1:]}
    for line in lines.values():
        for name in ("bytes_paper", "bytes_full", "bytes_full_ffn"):
            sizes = [getattr(point.ledger, name) for point in line]
            assert sizes == sorted(set(sizes))
    # Design section 2, one layer: 0.0927, 0.3795, 1.3625 and 21.02 MB.
    tied = {p.num_experts: p.totals() for p in lines[Variant("butterfly", "tied", Storage())]}
    for number, megabytes, ratio in ((8, 0.0927, 181), (64, 0.3795, 354), (256, 1.3625, 394), (4096, 21.02, 409)):
        assert tied[number]["bytes_paper"] / 7e6 == pytest.approx(megabytes, abs=5e-3 if number == 4096 else 5e-5)
        assert tied[number]["compression_paper"] == pytest.approx(ratio, abs=0.5)


def test_other_families_are_no_start_for_a_report(tmp_path):
    # Their configurations have no stages or scales of their own, and the butterflies counted would not be the user's.
    for family in ("dense", "standard"):
        with pytest.raises(ConfigError, match=f"model.family = '{family}': it must be butterfly"):
            memory_report.write(make_config(f"{family},4"), Storage(), (1,), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_report_of_a_model(tmp_path):
    config = make_config("butterfly,4", model__num_layers=2)
    points = memory_report.write(config, Storage(), (1, 4), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(memory_report.OUTPUTS)
    lines = (tmp_path / "memory_totals.csv").read_text().splitlines()
    assert len(lines) == 1 + len(points) == 1 + 1 + 2 * (6 + 1 + 15)
    assert lines[0].startswith("family,form,numbers,num_experts,params,bytes_paper,compression_paper,bytes_full,")
    assert (tmp_path / "memory.csv").read_text().splitlines()[0] == (
        "family,form,numbers,num_experts,component,params,bytes_paper,bytes_full"
    )
    stored = json.loads((tmp_path / "memory.json").read_text())
    assert [row["bytes_full"] for row in stored["points"]] == [point.ledger.bytes_full for point in points]
    assert len(stored["growth"]) == 22
    assert (tmp_path / "plots" / "memory_vs_experts.png").stat().st_size > 10_000
    memory_report.write_energy(config, Storage(), (1, 2), tmp_path)
    rows = json.loads((tmp_path / "energy.json").read_text())
    assert [row["images"] for row in rows] == [1] * 5 + [2] * 5
    assert rows[0]["variant"] == "standard float32"
    assert rows[0]["saving"] == rows[0]["saving_weights"] == 0
    assert {row["variant"] for row in rows[3:5]} == {"butterfly separate 8-bit", "butterfly tied 8-bit"}
    assert len((tmp_path / "energy.csv").read_text().splitlines()) == 11
    assert memory_report.describe(config) == "2 mixture layers, d_model 64, d_ff 128, 2 stages"
