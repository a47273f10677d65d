import re
from typing import Any

import pytest

from bvit_jax import calibration, compress_request, vit
from bvit_jax.compress_request import Request
from bvit_jax.memory import count_params
from bvit_jax.model_config import ConfigError
from tests.conftest import make_model

SMALL: dict[str, Any] = {"patch_size": 4, "num_layers": 2, "d_model": 8, "d_ff": 12, "num_heads": 2, "num_experts": 4}


def fails(message: str, **fields: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        compress_request.from_dict(fields)


def test_what_is_left_out() -> None:
    assert compress_request.from_dict({"method": "svd", "keep": 0.5}) == Request("svd", 0.5, 32, 256)
    assert compress_request.from_dict({"method": "quantise"}) == Request("quantise", 1.0, 8, 256)
    assert compress_request.from_dict({"method": "rounding", "bits": 2}) == Request("rounding", 1.0, 2, 256)


def test_names_tell_requests_apart() -> None:
    assert Request("mixed_rank", 0.4).name == "mixed_rank_0.4"
    assert Request("mixed_rank", 0.4, 8).name == "mixed_rank_0.4_8bit"
    assert Request("quantise", bits=4).name == "quantise_4bit"
    assert Request("prune", 0.125).name == "prune_0.125"


def test_impossible_requests() -> None:
    fails("method = 'magic': it must be rounding or quantise or prune or svd or", method="magic")
    fails("compress = {'keep': 0.5}: it must be with a method", keep=0.5)
    fails("compress = 'rank': it must be method or keep or bits or calibration_images", method="svd", rank=3)
    for keep in (1.0, 0.0, -0.1, 1.5, float("nan")):
        fails(f"keep = {keep!r}: it must be above 0 and under 1", method="mixed", keep=keep)
    fails("keep = 0.5: it must be 1, as quantise keeps all numbers", method="quantise", keep=0.5)
    fails("keep = None: it must be given for svd, above 0 and under 1", method="svd")
    fails("bits = 32: it must be 8 or 4 or 2", method="rounding", bits=32)
    fails("bits = 8: it must be 32", method="prune", keep=0.5, bits=8)
    fails("bits = 16: it must be 32 or 8 or 4 or 2", method="svd", keep=0.5, bits=16)
    fails("keep = '0.5': it must be a number", method="svd", keep="0.5")
    fails("calibration_images = 2.5: it must be an integer", method="quantise", calibration_images=2.5)
    fails("calibration_images = 0: it must be at least 1", method="quantise", calibration_images=0)


def checks(message: str, request: Request, num_train: int = 1000, **model: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        compress_request.check(make_model(**SMALL | model), request, num_train)


@pytest.mark.parametrize("method", ["prune", "svd", "activation_aware", "mixed", "mixed_rank"])
@pytest.mark.parametrize("family", ["ternary", "butterfly", "low_rank"])
def test_families_without_float_matrices_of_their_own(method: Any, family: str) -> None:
    wanted = f"model.family = '{family}': it must be dense or standard for {method}, which works on float matrices"
    checks(wanted, Request(method, 0.5), family=family)
    compress_request.check(make_model(**SMALL, family="standard"), Request(method, 0.5), 1000)


@pytest.mark.parametrize("family", ["dense", "ternary", "butterfly", "low_rank"])
def test_only_stored_float_experts_are_merged(family: str) -> None:
    checks(f"model.family = '{family}': it must be standard for merge", Request("merge", 0.5), family=family)


@pytest.mark.parametrize("family", ["dense", "standard", "ternary", "butterfly", "low_rank"])
@pytest.mark.parametrize("method", ["rounding", "quantise"])
def test_every_family_can_be_rounded(family: str, method: Any) -> None:
    compress_request.check(make_model(**SMALL, family=family), Request(method, bits=4), 1000)


def test_calibration_images() -> None:
    # Four patches and a class token; the widest map has d_ff = 12 inputs, for which three images are enough.
    wanted = "calibration_images = 2: it must be at least 3: an image has 5 tokens, and the widest map 12 inputs"
    checks(wanted, Request("svd", 0.5, calibration_images=2), family="dense")
    compress_request.check(make_model(**SMALL, family="dense"), Request("svd", 0.5, calibration_images=3), 3)
    wanted = "calibration_images = 256: it must be at most 255, the images of the training split"
    checks(wanted, Request("svd", 0.5), num_train=255, family="dense")


@pytest.mark.parametrize("family", ["dense", "standard", "butterfly", "low_rank"])
def test_numbers_are_all_of_the_model(family: str) -> None:
    model = make_model(**SMALL, family=family)
    assert compress_request.numbers(model) == count_params(vit.param_shapes(model))


def test_budget_by_hand() -> None:
    model = make_model(**SMALL, family="dense")
    # Maps of a layer: 4 (8 x 8) + 2 (8 x 12) = 448; of both 896. Biases 4 x 8 + 12 + 8 = 52, norms 4 x 8 = 32: 168.
    # Patches 16 x 8 + 8 = 136, class token 8, positions 5 x 8 = 40, last norm 16, head 8 x 10 + 10 = 90: 290.
    assert compress_request.numbers(model) == 896 + 168 + 290 == 1354
    # Half of them are 677, of which 458 lie elsewhere.
    assert compress_request.budget(model, Request("mixed", 0.5)) == 677 - 458
    # Factors of rank 1: 2 (4 x 16 + 2 x 20) = 208; with the 458, 666 of 1354 = 0.4919.
    checks("keep = 0.49: it must be at least 0.492: 666 of 1,354 numbers", Request("svd", 0.49), family="dense")
    assert compress_request.budget(model, Request("svd", 0.492)) == 208
    # Pruning may leave none: 458 of 1354 = 0.3383.
    checks("keep = 0.33: it must be at least 0.339: 458 of 1,354 numbers", Request("prune", 0.33), family="dense")
    assert compress_request.budget(model, Request("prune", 0.339)) == 1


def test_experts_by_hand() -> None:
    model = make_model(**SMALL, family="standard", moe_layers="1")
    # An expert has 2 x 8 x 12 + 12 + 8 = 212 numbers. Of the dense model's 1354, 212 give way to 4 x 212 and a
    # router of 8 x 4: 2022, of which 1174 are not the experts'.
    assert compress_request.numbers(model) == 1354 - 212 + 4 * 212 + 32 == 2022
    # 0.9 x 2022 = 1819, 645 for experts: three of 212. 0.8: 1617, 443: two.
    assert compress_request.experts(model, 0.9) == 3
    assert compress_request.experts(model, 0.8) == 2
    # One is 1386 of 2022 = 0.6855.
    assert compress_request.experts(model, 0.686) == 1
    checks(
        "keep = 0.685: it must be at least 0.686: 1,386 of 2,022 numbers",
        Request("merge", 0.685),
        family="standard",
        moe_layers="1",
    )


def test_what_is_possible_is_possible() -> None:
    for family, method in (("dense", "svd"), ("standard", "svd"), ("dense", "prune"), ("standard", "merge")):
        model, request = make_model(**SMALL, family=family), Request(method, 0.001)  # type: ignore[arg-type]
        with pytest.raises(ConfigError) as error:
            compress_request.check(model, request, 1000)
        least = float(re.findall(r"at least ([0-9.]+):", str(error.value))[0])
        compress_request.check(model, Request(method, least), 1000)  # type: ignore[arg-type]


def test_maps_are_fewer_numbers_than_the_model() -> None:
    model = make_model(**SMALL, family="standard")
    in_maps = sum(inputs * outputs for inputs, outputs in (found.shape for found in calibration.maps(model)))
    assert 0 < in_maps < compress_request.numbers(model)
