import dataclasses
from typing import Any

import numpy as np
import pytest

from bvit_jax import calibration, compress, compress_source
from bvit_jax.calibration import LinearMap, Seen
from bvit_jax.compensation import Moments
from bvit_jax.compress_request import Request
from bvit_jax.compress_source import Source
from bvit_jax.storage import as_trained
from tests.conftest import make_model
from tests.test_calibration import images_of, random_params

SMALL: dict[str, Any] = {"patch_size": 4, "num_layers": 2, "d_model": 8, "d_ff": 12, "num_heads": 2, "num_experts": 3}
IMAGES = 40
"""Rows of five tokens an image; more than one block of images."""


def source(family: str, count: int = IMAGES, **changes: Any) -> Source:
    model = make_model(**SMALL | changes, family=family)
    return Source(model, random_params(model), images_of(model, count))


def test_places_by_hand() -> None:
    # Expert 0 gets rows 0 and 3, expert 1 all, expert 2 none; a map of two inputs is to see four rows.
    chosen = np.array([[0, 1], [1, 1], [1, 1], [0, 1], [1, 1], [1, 1]])
    seen = Seen({"ffn": np.zeros((6, 2))}, chosen)

    def found(expert: int | None, inputs: int) -> list[int] | None:
        rows = compress_source.places(seen, LinearMap(0, "ffn/up_kernel", 0, expert, (inputs, 5), "ffn"))
        return None if rows is None else rows.tolist()

    assert found(None, 2) is None
    assert found(1, 2) == [0, 1, 2, 3, 4, 5]
    assert found(0, 1) == [0, 3]
    # Of the others, 1, 2, 4 and 5, the first and the last.
    assert found(0, 2) == [0, 3, 1, 5]
    assert found(2, 2) == [0, 1, 3, 5]
    assert found(2, 50) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("family", ["dense", "standard"])
def test_moments_are_those_of_the_rows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress_source, "_BLOCK", 64)
    of = source(family)
    walk = calibration.Walk(of.model, of.used, of.images)
    for layer in calibration.layers(of.model):
        seen = walk.see(layer)
        for wanted in calibration.maps_of(of.model, layer):
            x_nxI = seen.inputs(wanted, of.used, compress_source.places(seen, wanted)).astype(np.float64)
            np.testing.assert_allclose(of.moments[wanted], x_nxI.T @ x_nxI, rtol=1e-9, atol=1e-9)
        walk.step(layer)


@pytest.mark.parametrize("family", ["dense", "standard"])
def test_front_to_back_shows_each_map_what_the_changed_ones_before_it_give(family: str) -> None:
    of = source(family, moe_layers="1" if family == "standard" else "every")
    seen: dict[LinearMap, Moments] = {}

    def halve(wanted: LinearMap, moments: Moments) -> np.ndarray:
        seen[wanted] = moments
        return wanted.of(of.used) / 2

    of.front_to_back(as_trained(of.model), halve)
    assert list(seen) == sorted(of.maps, key=lambda wanted: wanted.layer)
    halved = {path: leaf.copy() for path, leaf in of.used.items()}
    for wanted in of.maps:
        wanted.put(halved, wanted.of(of.used) / 2)
    # A map sees nothing of itself and of what comes behind it, so that all may be halved already.
    walk, original = (calibration.Walk(of.model, params, of.images) for params in (halved, of.used))
    for layer in calibration.layers(of.model):
        own, before = walk.see(layer), original.see(layer)
        for wanted in calibration.maps_of(of.model, layer):
            rows = compress_source.places(own, wanted)
            own_nxI = own.inputs(wanted, halved, rows).astype(np.float64)
            x_nxI = before.inputs(wanted, of.used, rows).astype(np.float64)
            np.testing.assert_allclose(seen[wanted].own_IxI, own_nxI.T @ own_nxI, rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(seen[wanted].cross_IxI, own_nxI.T @ x_nxI, rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(seen[wanted].original_IxI, x_nxI.T @ x_nxI, rtol=1e-5, atol=1e-4)
        walk.step(layer)
        original.step(layer)
    first, last = of.maps[0], of.maps[-1]
    np.testing.assert_array_equal(seen[first].own_IxI, seen[first].original_IxI)
    assert not np.allclose(seen[last].own_IxI, seen[last].original_IxI, rtol=0.1)


def test_what_is_no_map_is_rounded_before_the_walk() -> None:
    of = source("low_rank")
    formats = dataclasses.replace(as_trained(of.model), experts="int2", backbone="int2", ends="int2")
    seen: list[Moments] = []

    def keep(wanted: LinearMap, moments: Moments) -> np.ndarray:
        seen.append(moments)
        return wanted.of(of.used)

    of.front_to_back(formats, keep)
    # Already the first map sees what the rounded patch embedding gives.
    assert not np.allclose(seen[0].own_IxI, seen[0].original_IxI, rtol=0.01)
    seen.clear()
    of.front_to_back(as_trained(of.model), keep)
    for moments in seen:
        np.testing.assert_array_equal(moments.own_IxI, moments.original_IxI)


def test_time_is_that_of_the_method_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(compress_source.time, "perf_counter", lambda: next(clock))
    of = source("dense")
    seconds = {}
    for method in ("activation_aware", "mixed", "svd"):
        _, seconds[method] = compress.compress(of, Request(method, 0.6, 32, IMAGES))  # type: ignore[arg-type]
    # Readings are a second apart. A part is two readings, and so is the report; a method's own time is what else passes
    # between its first reading and its last, of which each part takes one second and the gap before it one more.
    assert of.shared_seconds == {"moments": 1, "aware_spectra": 1, "plain_spectra": 1, "report": 1}
    assert seconds["activation_aware"] == 7 - 3 + 2
    assert seconds["mixed"] == 3 - 1 + 2
    assert seconds["svd"] == 5 - 2 + 1
