import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from bvit_jax import calibration, compress, compress_request, compress_source, encoding, factors, storage, vit
from bvit_jax.compress_request import STEPS, Request
from bvit_jax.compress_source import Compressed, Source
from bvit_jax.model_config import ConfigError
from tests.conftest import long_but, make_model
from tests.test_calibration import images_of, random_params

SMALL: dict[str, Any] = {"patch_size": 4, "num_layers": 2, "d_model": 8, "d_ff": 12, "num_heads": 2, "num_experts": 4}
IMAGES = 60
FAMILIES = ["dense", "standard"]


@functools.cache
def source(family: str, **changes: Any) -> Source:
    model = make_model(**SMALL | changes, family=family)
    return Source(model, random_params(model), images_of(model, IMAGES))


@functools.cache
def compressed(family: str, method: Any, keep: float = 1.0, bits: Any = 32) -> Compressed:
    return compress.compress(source(family), Request(method, keep, bits, IMAGES))[0]


def changed_paths(found: Compressed, of: Source) -> set[str]:
    return {path for path, leaf in calibration.flat(found.params).items() if not np.array_equal(leaf, of.trained[path])}


def stored(found: Compressed, of: Source) -> tuple[storage.StoredParam, ...]:
    return storage.layout(of.model, found.storage)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "keep", "bits"),
    [*((method, 0.6, 32) for method in ("prune", *STEPS)), *(("quantise", 1.0, bits) for bits in (8, 4, 2))],
)
def test_only_linear_maps_change_and_the_budget_holds(family: str, method: Any, keep: float, bits: Any) -> None:
    of, found = source(family), compressed(family, method, keep, bits)
    assert changed_paths(found, of) == {one.path for one in of.maps}
    numbers = sum(one.numbers for one in stored(found, of))
    whole = compress_request.numbers(of.model)
    assert numbers <= keep * whole
    assert numbers > keep * whole - 20  # one more rank of the smallest map would be 16 or 20
    assert sum(row.numbers for row in found.maps) == numbers - (whole - sum(w.shape[0] * w.shape[1] for w in of.maps))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", STEPS)
def test_maps_have_the_ranks_that_are_reported(family: str, method: Any) -> None:
    of, found = source(family), compressed(family, method, 0.6)
    params = calibration.flat(found.params)
    for wanted, row in zip(of.maps, found.maps, strict=True):
        assert (row.path, row.layer, row.expert) == (wanted.path, wanted.layer, wanted.expert)
        assert np.linalg.matrix_rank(wanted.of(params), tol=1e-4) <= row.rank
        whole = row.rank == min(wanted.shape)
        assert row.numbers == (np.prod(wanted.shape) if whole else row.rank * sum(wanted.shape))


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_those_of_the_outputs_on_calibration_images(family: str) -> None:
    of, found = source(family), compressed(family, "activation_aware", 0.6)
    params, walk, rows = (
        calibration.flat(found.params),
        calibration.Walk(of.model, of.used, of.images),
        iter(found.maps),
    )
    for layer in calibration.layers(of.model):
        seen = walk.see(layer)
        for wanted in calibration.maps_of(of.model, layer):
            x_nxI = seen.inputs(wanted, of.used, compress_source.places(seen, wanted)).astype(np.float64)
            y_nxO, approx_nxO = x_nxI @ wanted.of(of.used), x_nxI @ wanted.of(params)
            error = np.linalg.norm(approx_nxO - y_nxO) / np.linalg.norm(y_nxO)
            assert next(rows).output_error == pytest.approx(error, rel=1e-5)
        walk.step(layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_aware_is_never_worse_than_plain_svd_on_any_map(family: str) -> None:
    plain, aware = compressed(family, "svd", 0.6), compressed(family, "activation_aware", 0.6)
    for before, row in zip(plain.maps, aware.maps, strict=True):
        assert row.rank == before.rank
        assert row.output_error <= before.output_error * (1 + 1e-6)
    assert any(row.output_error < 0.9 * before.output_error for before, row in zip(plain.maps, aware.maps, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_ranks_lose_less_energy_in_all(family: str) -> None:
    equal, mixed = (
        sum(row.output_error**2 for row in compressed(family, method, 0.6).maps)
        for method in ("activation_aware", "mixed")
    )
    assert mixed <= equal


def end_error(found: Compressed, of: Source) -> float:
    """Returns how far the last layer's FFN is from what it sees in the model as trained, on calibration images."""
    outputs = []
    for params in (of.used, calibration.flat(found.params)):
        walk = calibration.Walk(of.model, params, of.images)
        *first, last = calibration.layers(of.model)
        for layer in first:
            walk.step(layer)
        outputs.append(walk.see(last).rows["ffn"])
    return float(np.linalg.norm(outputs[1] - outputs[0]) / np.linalg.norm(outputs[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_compensation_brings_the_compressed_model_nearer(family: str) -> None:
    of = source(family)
    mixed, compensated = (compressed(family, method, 0.6) for method in ("mixed", "mixed_rank"))
    assert [row.rank for row in mixed.maps] == [row.rank for row in compensated.maps]
    assert end_error(compensated, of) < end_error(mixed, of)


def test_the_first_maps_have_nothing_to_make_good() -> None:
    # What comes before them is not compressed, so that the best factors are those of the step before.
    mixed, compensated = (compressed("dense", method, 0.6) for method in ("mixed", "mixed_rank"))
    for before, row in list(zip(mixed.maps, compensated.maps, strict=True))[:3]:
        assert row.output_error == pytest.approx(before.output_error, rel=1e-3)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_calibration_makes_rounding_better(bits: Any) -> None:
    nearest, calibrated = (compressed("dense", method, 1.0, bits) for method in ("rounding", "quantise"))
    # The first three see the inputs of the model as trained: there, map by map; then on the whole.
    for before, row in list(zip(nearest.maps, calibrated.maps, strict=True))[:3]:
        assert row.output_error <= before.output_error
    of = source("dense")
    assert end_error(calibrated, of) < end_error(nearest, of)


@pytest.mark.parametrize("family", [*FAMILIES, "butterfly", *long_but([], ["ternary", "low_rank"])])
@pytest.mark.parametrize("bits", [8, 2])
def test_rounded_weights_are_stored_to_the_bit(family: str, bits: Any) -> None:
    of = source(family)
    found = compress.compress(of, Request("quantise", bits=bits, calibration_images=IMAGES))[0]
    arrays = encoding.encode(found.params, of.model, found.storage, found.scales)
    params = calibration.flat(found.params)
    for one in stored(found, of):
        if one.path in found.scales:
            decoded = np.asarray(encoding.decode(one, arrays, found.storage))
            np.testing.assert_array_equal(decoded, params[one.path])
            assert one.encoding == f"int{bits}"
    formats = {one.component: one.encoding for one in stored(found, of)}
    assert formats["attention"] != "float32"
    assert formats["head"] in ("float32", "int8")  # its bias, and its kernel
    if family in ("ternary", "butterfly"):
        assert formats.get("experts", formats.get("prototype")) == "ternary"
    if family == "butterfly":
        assert formats["angles"] == "angles"
    if family != "dense":
        assert formats["router"] == "int8"


def test_formats_are_no_finer_than_those_of_training() -> None:
    model = make_model(**SMALL, family="butterfly", angle_bits=4, router_precision="int4")
    of = Source(model, random_params(model), images_of(model, IMAGES))
    found = compress.compress(of, Request("rounding", bits=8, calibration_images=IMAGES))[0].storage
    assert (found.angle_bits, found.router) == (4, "int4")


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_keeps_the_largest_weights_of_all_maps(family: str) -> None:
    of, found = source(family), compressed(family, "prune", 0.6)
    params = calibration.flat(found.params)
    paths = {wanted.path for wanted in of.maps}
    kept = np.concatenate([of.trained[path][params[path] != 0] for path in sorted(paths)])
    gone = np.concatenate([of.trained[path][params[path] == 0] for path in sorted(paths)])
    assert np.abs(kept).min() >= np.abs(gone).max()
    for path in paths:
        np.testing.assert_array_equal(params[path][params[path] != 0], of.trained[path][params[path] != 0])


def test_merged_experts_are_equal_within_their_groups() -> None:
    of = source("standard")
    found = compress.compress(of, Request("merge", 0.75, calibration_images=IMAGES))[0]
    experts = compress_request.experts(of.model, 0.75)
    assert 1 < experts < 4
    ((ffn, by_layer),) = found.storage.reductions.groups
    params = calibration.flat(found.params)
    for layer, groups in enumerate(by_layer):
        assert len(set(groups)) == experts
        for name in ("up_kernel", "up_bias", "down_kernel", "down_bias"):
            leaf = params[f"{ffn}/{name}"][layer]
            assert len({leaf[expert].tobytes() for expert in range(4)}) == experts
    assert changed_paths(found, of) <= {
        f"{ffn}/{name}" for name in ("up_kernel", "up_bias", "down_kernel", "down_bias")
    }
    assert sum(one.numbers for one in stored(found, of)) <= 0.75 * compress_request.numbers(of.model)
    assert found.maps == ()


def test_equal_experts_are_merged_without_loss() -> None:
    model = make_model(**SMALL, family="standard")
    params = random_params(model)
    ffn = params["segment_0"]["block_0"]["ffn"]
    for name in ("up_kernel", "up_bias", "down_kernel", "down_bias"):
        ffn[name][:, 2], ffn[name][:, 3] = ffn[name][:, 0], ffn[name][:, 1]
    of = Source(model, params, images_of(model, IMAGES))
    keep = next(keep for keep in np.arange(0.3, 1, 0.01) if _experts(model, keep) == 2)
    found = compress.compress(of, Request("merge", float(keep), calibration_images=IMAGES))[0]
    assert found.storage.reductions.groups == (("segment_0/block_0/ffn", ((0, 1, 0, 1), (0, 1, 0, 1))),)
    images = images_of(model, 8)
    apply = jax.jit(vit.apply, static_argnums=0)
    before, after = (apply(model, tree, images)[0] for tree in (params, found.params))
    np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


def _experts(model: Any, keep: float) -> int:
    try:
        return compress_request.experts(model, keep)
    except ConfigError:
        return 0


def test_experts_without_tokens_are_calibrated_on_those_of_others() -> None:
    model = make_model(**SMALL, family="standard", top_k=1)
    params = random_params(model)
    router = params["segment_0"]["block_0"]["ffn"]["router"]["kernel"]
    router[:, :, 1:] = router[:, :, :1] * 0 - 50 * np.sign(router[:, :, :1])  # hardly anything but expert 0
    of = Source(model, params, images_of(model, IMAGES))
    walk, idle = calibration.Walk(model, of.used, of.images), 0
    for layer in calibration.layers(model):
        seen = walk.see(layer)
        idle += sum(len(seen.places(expert)) == 0 for expert in range(4))
        walk.step(layer)
    assert idle > 0
    for wanted, c_IxI in of.moments.items():
        assert np.linalg.matrix_rank(c_IxI) == wanted.shape[0]
    for method in STEPS:
        found = compress.compress(of, Request(method, 0.6, calibration_images=IMAGES))[0]
        assert all(np.isfinite(row.output_error) for row in found.maps)


def test_the_same_input_gives_the_same_result() -> None:
    model = make_model(**SMALL, family="standard")
    first, second = (
        compress.compress(
            Source(model, random_params(model), images_of(model, IMAGES)),
            Request("mixed_rank", 0.6, calibration_images=IMAGES),
        )[0]
        for _ in range(2)
    )
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert (first.storage, first.maps) == (second.storage, second.maps)


def test_what_is_compressed_is_left_as_it_was() -> None:
    of = source("dense")
    before = {path: leaf.copy() for path, leaf in of.trained.items()}
    compress.compress(of, Request("mixed_rank", 0.5, calibration_images=IMAGES))
    for path, leaf in before.items():
        np.testing.assert_array_equal(of.trained[path], leaf)
        np.testing.assert_array_equal(of.used[path], leaf)


def test_factors_may_be_rounded_besides() -> None:
    of = source("dense")
    plain, rounded = (compressed("dense", "mixed_rank", 0.6, bits) for bits in (32, 8))
    assert plain.storage.reductions == rounded.storage.reductions
    two = compressed("dense", "mixed_rank", 0.6, 2)
    params = of.stored(two.params, two.storage)
    for wanted, before, row in zip(of.maps, plain.maps, two.maps, strict=True):
        w_IxO, approx_IxO = (wanted.of(found).astype(np.float64) for found in (of.used, params))
        assert row.output_error == pytest.approx(factors.output_error(w_IxO, approx_IxO, of.moments[wanted]))
        assert row.output_error > before.output_error
    assert rounded.storage == dataclasses.replace(
        plain.storage, angle_bits=8, router="int8", experts="int8", backbone="int8", ends="int8"
    )
    small, large = (
        sum(tensor.nbytes for one in stored(found, of) for tensor in one.tensors) for found in (rounded, plain)
    )
    # Of 3,240 bytes of this tiny model 1,152 are biases, norms and positions, which stay; scales come on top.
    assert small < 0.7 * large


def test_a_spectrum_for_every_map() -> None:
    of = source("standard")
    for wanted, plain, aware in zip(of.maps, of.plain_spectra, of.aware_spectra, strict=True):
        assert plain.shape == aware.shape == wanted.shape
        expected = np.linalg.svd(wanted.of(of.used).astype(np.float64), compute_uv=False)
        np.testing.assert_allclose(plain.values, expected, rtol=1e-9)
        rank = factors.break_even(*wanted.shape)
        measured = factors.output_error(wanted.of(of.used).astype(np.float64), aware.matrix(rank), of.moments[wanted])
        assert measured == pytest.approx(aware.output_error(rank), abs=1e-5)


def test_refused_before_any_work() -> None:
    of = source("butterfly")
    with pytest.raises(ConfigError, match="it must be dense or standard for svd"):
        compress.compress(of, Request("svd", 0.5, calibration_images=IMAGES))
