"""The methods of compression, each from a trained model to one that can be stored (`bvit_jax.compress_request`).

Axes: I inputs, O outputs, R rank of a residual, E experts, N rows of calibration inputs.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bvit_jax import calibration, compensation, compress_request, encoding, factors, merging, pruning, rounding, storage
from bvit_jax.calibration import FlatParams, LinearMap
from bvit_jax.compensation import Moments
from bvit_jax.compress_request import Bits, Method, Request
from bvit_jax.compress_source import Compressed, Source
from bvit_jax.model_config import ModelConfig
from bvit_jax.precision import Precision, RouterPrecision
from bvit_jax.reductions import NONE, OF_EXPERTS, Reductions
from bvit_jax.storage import Storage

RESIDUAL_SHARE = 0.8
"""Of each rank, the part that is fitted to the inputs of the compressed model; the best of 0.2, 0.35, 0.5 and 0.8 on
validation images (docs/rivals.md). The paper's residual is said to be small."""
_INTEGERS: dict[Bits, Any] = {8: "int8", 4: "int4", 2: "int2"}
_MERGING_ROWS = 1024
"""Calibration rows by whose outputs experts are compared."""


def compress(source: Source, request: Request) -> tuple[Compressed, float]:
    """Compresses a model; the same input gives the same result.

    Returns:
        The model, and the seconds that the method takes alone: parts that it shares with others count, even if they
        were there; the errors that are reported do not.

    Raises:
        ConfigError: as `compress_request.check`.
    """
    compress_request.check(source.model, request, len(source.images))
    start, aside = time.perf_counter(), source.aside_seconds
    work, shared = _METHODS[request.method]
    made = work(source, request)
    seconds = time.perf_counter() - start - (source.aside_seconds - aside)
    return made, seconds + sum(source.shared_seconds[part] for part in shared)


def _formats(model: ModelConfig, bits: Bits, reductions: Reductions = NONE) -> Storage:
    as_trained = dataclasses.replace(storage.as_trained(model), reductions=reductions)
    if bits == 32:
        return as_trained
    angles: Any = min(8, as_trained.angle_bits)
    router: RouterPrecision = "int4" if model.router_precision == "int4" else "int8"
    integers = _INTEGERS[bits]
    return dataclasses.replace(
        as_trained, angle_bits=angles, router=router, experts=integers, backbone=integers, ends="int8"
    )


def _round(source: Source, request: Request) -> Compressed:
    changed, scales = source.copy(), dict[str, np.ndarray]()
    for wanted in source.maps:
        _take(wanted, rounding.nearest(wanted.of(source.used), _INTEGERS[request.bits]), changed, scales)
    return source.finished(changed, _formats(source.model, request.bits), scales=scales)


def _quantise(source: Source, request: Request) -> Compressed:
    changed, scales = source.copy(), dict[str, np.ndarray]()
    integers: Precision = _INTEGERS[request.bits]
    formats = _formats(source.model, request.bits)

    def fit(wanted: LinearMap, moments: Moments) -> np.ndarray:
        rounded = rounding.calibrated(wanted.of(source.used), moments.own_IxI, integers)
        _take(wanted, rounded, changed, scales)
        return rounded.matrix

    source.front_to_back(formats, fit)
    return source.finished(changed, formats, scales=scales)


def _take(wanted: LinearMap, rounded: rounding.Rounded, params: FlatParams, scales: dict[str, np.ndarray]) -> None:
    """Puts a rounded matrix and its scales in their places."""
    wanted.put(params, rounded.matrix)
    lead = params[wanted.path].shape[: 1 if wanted.expert is None else 2]
    place = scales.setdefault(wanted.path, np.ones((*lead, wanted.shape[1]), np.float32))[wanted.repeat]
    (place if wanted.expert is None else place[wanted.expert])[...] = rounded.scale_1xO[0]


def _prune(source: Source, request: Request) -> Compressed:
    changed = source.copy()
    paths = list(dict.fromkeys(wanted.path for wanted in source.maps))
    masks = pruning.masks([changed[path] for path in paths], compress_request.budget(source.model, request))
    for path, mask in zip(paths, masks, strict=True):
        changed[path] *= mask
    kept = Reductions(kept=tuple((path, int(np.count_nonzero(changed[path]))) for path in paths))
    of_maps = [int(np.count_nonzero(wanted.of(changed))) for wanted in source.maps]
    return source.finished(changed, _formats(source.model, request.bits, kept), kept=of_maps)


def _factorise(source: Source, request: Request) -> Compressed:
    spectra = source.plain_spectra if request.method == "svd" else source.aware_spectra
    choose = factors.equal_ranks if request.method in ("svd", "activation_aware") else factors.mixed_ranks
    ranks = choose(spectra, compress_request.budget(source.model, request))
    changed = source.copy()
    chosen = dict(zip(source.maps, zip(spectra, ranks, strict=True), strict=True))
    if request.method == "mixed_rank":
        formats = _formats(source.model, request.bits)
        source.front_to_back(
            formats, lambda wanted, moments: _put(wanted, changed, _compensated(*chosen[wanted], moments))
        )
    else:
        for wanted, (spectrum, rank) in chosen.items():
            wanted.put(changed, spectrum.matrix(rank))
    by_path: dict[str, list[int]] = {}
    for wanted, rank in zip(source.maps, ranks, strict=True):
        by_path.setdefault(wanted.path, []).append(rank)
    reductions = Reductions(ranks=tuple((path, tuple(found)) for path, found in by_path.items()))
    kept = [spectrum.cost(rank) for spectrum, rank in zip(spectra, ranks, strict=True)]
    return source.finished(changed, _formats(source.model, request.bits, reductions), ranks, kept)


def _put(wanted: LinearMap, params: FlatParams, w_IxO: np.ndarray) -> np.ndarray:
    wanted.put(params, w_IxO)
    return w_IxO


def _compensated(spectrum: factors.Spectrum, rank: int, moments: Moments) -> np.ndarray:
    """Returns a map of this rank, the last part of it fitted to the inputs of the compressed model."""
    if rank > spectrum.break_even:
        return spectrum.matrix(rank)
    fitted = min(math.ceil(RESIDUAL_SHARE * rank), rank - 1)
    base_IxO = spectrum.matrix(rank - fitted)
    q_RxO = spectrum.right_OxM[:, rank - fitted : rank].T
    p_IxR, q_RxO = compensation.residual(moments, spectrum.w_IxO, base_IxO, q_RxO)
    matrix_IxO: np.ndarray = base_IxO + p_IxR @ q_RxO
    return matrix_IxO


def _merge(source: Source, request: Request) -> Compressed:
    grouped = _groups(source, compress_request.experts(source.model, request.keep))
    changed = source.copy()
    by_path: dict[str, list[tuple[int, ...]]] = {}
    for (ffn, repeat), (group_E, weight_E) in grouped.items():
        own = {name: changed[f"{ffn}/{name}"][repeat] for name in OF_EXPERTS}
        for name, leaf in merging.merged(own, group_E, weight_E).items():
            own[name][...] = leaf[group_E]
        by_path.setdefault(ffn, []).append(tuple(group_E.tolist()))
    reductions = Reductions(groups=tuple((ffn, tuple(found)) for ffn, found in by_path.items()))
    formats = _formats(source.model, request.bits, reductions)
    return Compressed(encoding.nest(iter(changed.items())), formats, {}, ())


def _groups(source: Source, number: int) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """Returns for every mixture, by path and place, the groups of its experts and how many rows each gets."""
    walk = calibration.Walk(source.model, source.used, source.images)
    found = {}
    for layer in calibration.layers(source.model):
        if layer.is_moe:
            seen, ffn = walk.see(layer), f"{layer.segment}/{layer.block}/ffn"
            own = {name: source.used[f"{ffn}/{name}"][layer.repeat] for name in OF_EXPERTS}
            rows = np.linspace(0, len(seen.rows["ffn"]) - 1, _MERGING_ROWS).astype(int)
            x_NxD = seen.rows["ffn"][np.unique(rows)]
            h_ExNxF = calibration.gelu(x_NxD @ own["up_kernel"] + own["up_bias"][:, None])
            outputs_ExNxD = h_ExNxF @ own["down_kernel"] + own["down_bias"][:, None]
            weight_E = np.array([len(seen.places(expert)) for expert in range(source.model.num_experts)])
            found[ffn, layer.repeat] = (merging.groups(outputs_ExNxD, number), weight_E)
        walk.step(layer)
    return found


_AWARE = ("moments", "aware_spectra")
_METHODS: dict[Method, tuple[Callable[[Source, Request], Compressed], tuple[str, ...]]] = {
    "rounding": (_round, ()),
    "quantise": (_quantise, ()),
    "prune": (_prune, ()),
    "svd": (_factorise, ("plain_spectra",)),
    **dict.fromkeys(("activation_aware", "mixed", "mixed_rank"), (_factorise, _AWARE)),
    "merge": (_merge, ()),
}
"""What does it, and which parts of the source it rests on."""
