"""Encoding of trained parameters as a file stores them (`bvit_jax.storage`), and the way back.

Axes: L layers stacked by the scan, I inputs, O outputs.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bvit_jax import components, packing, precision, pruning
from bvit_jax.model_config import ModelConfig
from bvit_jax.reductions import Factors, Merged, Pruned
from bvit_jax.storage import Storage, StoredParam, layout, param_shapes, scale_kind
from bvit_jax.tensors import NUMPY_DTYPE

Scales = Mapping[str, np.ndarray]


def encode(params: Any, model: ModelConfig, storage: Storage, scales: Scales | None = None) -> dict[str, np.ndarray]:
    """Encodes trained parameters, with what training itself rounds (angles, router) rounded so first.

    Args:
        params: as `vit.init_params`.
        model: the model they belong to.
        storage: the formats wanted; parameters that it reduces are given reduced, matrices of these ranks at most, so
            many weights that are not 0, experts of a group equal.
        scales: of parameters that were rounded to integers already, by path, (..., O); the others get those of
            `precision.levels`.

    Returns:
        Arrays by tensor name, as `layout` lists them.

    Raises:
        ValueError: for a parameter that is missing, unknown, of the wrong shape, not finite or not reduced as said.
    """
    leaves = {components.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    _check_shapes({path: tuple(leaf.shape) for path, leaf in leaves.items()}, dict(param_shapes(model)))
    arrays: dict[str, np.ndarray] = {}
    scales = dict(scales or {})
    for stored in layout(model, storage):
        leaf = jnp.asarray(leaves[stored.path], jnp.float32)
        if not jnp.isfinite(leaf).all():
            raise ValueError(f"parameter {stored.path} is not finite")
        if stored.component == "angles" and storage.angle_bits != model.angle_bits:
            leaf = packing.quantise_angles(leaf, model.angle_bits)
        if stored.component == "router" and storage.router != model.router_precision:
            leaf = precision.quantise(leaf, model.router_precision)
        try:
            scale = None if stored.scale is None or _is_flat(stored) else scales.pop(stored.path, None)
            arrays |= _encode(leaf, stored, model, storage, scale)
        except ValueError as error:
            raise ValueError(f"parameter {stored.path}: {error}") from None
    if scales:
        raise ValueError(f"scales of {min(scales)} were given, which is not stored as integers one by one")
    return arrays


def _is_flat(stored: StoredParam) -> bool:
    return isinstance(stored.reduction, Factors | Pruned)


def _check_shapes(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for path in sorted(found.keys() | wanted.keys()):
        if found.get(path) != wanted.get(path):
            shapes = found.get(path, "absent"), wanted.get(path, "none")
            raise ValueError(f"parameter {path} is {shapes[0]}; this model has {shapes[1]}")


def _encode(
    leaf: jax.Array, stored: StoredParam, model: ModelConfig, storage: Storage, scale: np.ndarray | None
) -> dict[str, np.ndarray]:
    if stored.encoding == "angles":
        codes = packing.pack_codes(packing.angle_codes(leaf, storage.angle_bits), storage.angle_bits)
        return {stored.values.name: codes}
    if isinstance(stored.reduction, Pruned):
        return _encode_pruned(np.asarray(leaf), stored)
    if isinstance(stored.reduction, Factors):
        parts = stored.reduction.split(np.asarray(leaf).reshape(-1, *stored.matrix))
        return _flat([_encode_part(part, stored, storage) for part in parts])
    if isinstance(stored.reduction, Merged):
        leaf = jnp.asarray(stored.reduction.gathered(np.asarray(leaf)))
    if stored.scale is None:
        return {stored.values.name: np.asarray(leaf, NUMPY_DTYPE[stored.values.dtype])}
    matrices = leaf.reshape(*stored.values.shape[:-1], *stored.matrix)
    if scale is None:
        levels, found = precision.levels(matrices, stored.encoding, scale_kind(stored.component, model))
    else:
        if scale.shape != stored.scale.shape:
            raise ValueError(f"scales of shape {scale.shape} were given; they have {stored.scale.shape}")
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError("scales were given that are not finite or not above 0")
        found = jnp.asarray(scale, jnp.float32)[..., None, :]
        levels = precision.levels_at(matrices, found, stored.encoding)
    return {
        stored.values.name: precision.pack(levels, stored.encoding, storage.trits),
        stored.scale.name: np.asarray(found, np.float32).reshape(stored.scale.shape),
    }


def _encode_pruned(leaf: np.ndarray, stored: StoredParam) -> dict[str, np.ndarray]:
    mask = leaf != 0
    if stored.index is None or mask.sum() != stored.numbers:
        raise ValueError(f"{mask.sum()} weights are not 0; {stored.numbers} are to be kept")
    return {
        stored.values.name: leaf[mask].astype(NUMPY_DTYPE[stored.values.dtype]),
        stored.index.name: pruning.pack_mask(mask),
    }


def _encode_part(part_IxO: np.ndarray, stored: StoredParam, storage: Storage) -> dict[str, np.ndarray]:
    """Encodes one factor; a factor of no columns has no numbers."""
    if stored.scale is None:
        return {stored.values.name: part_IxO.astype(NUMPY_DTYPE[stored.values.dtype])}
    if not part_IxO.size:
        return {stored.scale.name: np.zeros(part_IxO.shape[1], np.float32)}
    packed: Any = stored.encoding  # never that of angles
    # Few shapes mean few compilations, however many ranks there are, and zeros change no maximum, but they do a mean.
    inputs, outputs = part_IxO.shape
    rows, columns = (1 << (size - 1).bit_length() for size in part_IxO.shape)
    padded = np.zeros((inputs if packed == "ternary" else rows, columns), np.float32)
    padded[:inputs, :outputs] = part_IxO
    levels, scale = (np.asarray(array) for array in precision.levels(jnp.asarray(padded), packed))
    return {
        stored.values.name: precision.pack(levels[:inputs, :outputs], packed, storage.trits),
        stored.scale.name: scale[0, :outputs],
    }


def _flat(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: np.concatenate([part[name].ravel() for part in parts if name in part]) for name in names}


def decode(stored: StoredParam, arrays: Mapping[str, Any], storage: Storage) -> jax.Array:
    """Decodes one parameter to float32; runs inside compiled programs, but for reduced ones.

    Args:
        stored: which.
        arrays: its tensors by name, whole; of one that is not reduced, also those of one layer, without the axis L.
        storage: as the arrays were encoded.

    Returns:
        The parameter, of `stored.shape` or without its first axis.
    """
    if stored.reduction is not None:
        return jnp.asarray(_decode_reduced(stored, arrays, storage))
    return _decode_plain(stored, stored.shape, arrays, storage)


def _decode_plain(
    stored: StoredParam, shape: tuple[int, ...], arrays: Mapping[str, Any], storage: Storage
) -> jax.Array:
    values = jnp.asarray(arrays[stored.values.name])
    if stored.encoding == "angles":
        codes = packing.unpack_codes(values, storage.angle_bits, shape[-1])
        return packing.angles_of(codes, storage.angle_bits)
    if stored.scale is None:
        return values.astype(jnp.float32)
    levels = precision.unpack(values, stored.matrix, stored.encoding, storage.trits)
    scale = jnp.asarray(arrays[stored.scale.name])[..., None, :]
    tail = shape[len(stored.values.shape) - 1 :]
    return precision.from_levels(levels, scale, stored.encoding).reshape(*values.shape[:-1], *tail)


def _decode_reduced(stored: StoredParam, arrays: Mapping[str, Any], storage: Storage) -> np.ndarray:
    if isinstance(stored.reduction, Merged):
        kept: np.ndarray = stored.reduction.spread(_decode_plain(stored, stored.stored_shape, arrays, storage))
        return kept
    values = np.asarray(arrays[stored.values.name])
    if stored.index is not None:
        leaf = np.zeros(stored.shape, np.float32)
        leaf[pruning.unpack_mask(arrays[stored.index.name], leaf.size).reshape(stored.shape)] = values
        return leaf
    assert isinstance(stored.reduction, Factors)
    scale = None if stored.scale is None else np.asarray(arrays[stored.scale.name])
    parts = list(_parts(stored, stored.reduction.shapes(stored.matrix), values, scale, storage))
    return np.stack(list(stored.reduction.joined(parts, stored.matrix))).reshape(stored.shape)


def _parts(
    stored: StoredParam,
    shapes: Sequence[tuple[int, int]],
    values: np.ndarray,
    scale: np.ndarray | None,
    storage: Storage,
) -> Iterator[np.ndarray]:
    """Yields the factors of these shapes out of flat tensors, float32."""
    packed: Any = stored.encoding  # never that of angles
    widths = [
        inputs * outputs if scale is None else precision.width(inputs, outputs, packed, storage.trits)
        for inputs, outputs in shapes
    ]
    starts = itertools.accumulate(widths, initial=0)
    scales = itertools.accumulate((outputs for _, outputs in shapes), initial=0)
    each = 1 if scale is None else precision.numbers_a_byte(packed, storage.trits)
    numbers = values if scale is None else _levels(values, packed, storage.trits)
    for (inputs, outputs), start, first in zip(shapes, starts, scales, strict=False):
        part_IxO = numbers[each * start : each * start + inputs * outputs].reshape(inputs, outputs)
        if scale is None:
            yield part_IxO.astype(np.float32)
        else:
            yield precision.from_levels(part_IxO, scale[None, first : first + outputs], packed)


def _levels(values: np.ndarray, packed: precision.Precision, trits: precision.TritPacking) -> np.ndarray:
    """Returns all integers of flat codes, filling ones with them."""
    # Few lengths, so few compilations.
    padded = np.zeros(1 << max(len(values) - 1, 0).bit_length(), np.uint8)
    padded[: len(values)] = values
    return np.asarray(_unpacked(padded, packed, trits))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _unpacked(values: jax.Array, packed: precision.Precision, trits: precision.TritPacking) -> jax.Array:
    count = values.shape[0] * precision.numbers_a_byte(packed, trits)
    return precision.unpack(values, (1, count), packed, trits)[0]


def as_stored(params: Any, model: ModelConfig, storage: Storage, scales: Scales | None = None) -> Any:
    """Returns trained parameters after a round trip through their stored form, for use with `model.deployed()`."""
    return decode_all(encode(params, model, storage, scales), model, storage)


def decode_all(arrays: Mapping[str, Any], model: ModelConfig, storage: Storage) -> Any:
    """Returns the parameters, as `vit.init_params`, that the arrays of `encode` stand for."""
    return nest((stored.path, decode(stored, arrays, storage)) for stored in layout(model, storage))


def nest(leaves: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    """Makes nested dicts of leaves by their slash-separated paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return tree
