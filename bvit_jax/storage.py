"""How a model is stored for inference: which tensors, in which number formats, and the way there and back.

The layout follows from shapes alone, so that the ledger (`bvit_jax.memory`) counts it without making an array, the file
(`bvit_jax.packed_file`) holds exactly it, and a loaded model (`bvit_jax.packed`) decodes what it says.

Axes: L layers stacked by the scan, E experts, A angles of one rotation, I inputs, O outputs.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from bvit_jax import components, packing, precision, ternary, vit
from bvit_jax.components import Component
from bvit_jax.model_config import ModelConfig, require_choice

Dtype = Literal["F32", "BF16", "U16", "U8"]
BackbonePrecision = Literal["float32", "bfloat16", "int8"]
Encoding = Literal["angles"] | precision.Precision
_OF_EXPERTS: frozenset[Component] = frozenset({"prototype", "experts"})
NUMPY_DTYPE: dict[Dtype, Any] = {"F32": np.float32, "BF16": jnp.bfloat16, "U16": np.uint16, "U8": np.uint8}


@dataclasses.dataclass(frozen=True)
class Storage:
    """Number formats of a stored model. Biases, norms, positions and the class token are always float32.

    Attributes:
        angle_bits: 32 (float32) or a code of fewer bits an angle.
        router: of the routers' weights.
        experts: of the stored experts of the family `standard`, of dense FFNs and the dense projection of the
            `reference` form. What is trained ternary is stored so (`expert_precision`).
        backbone: of the kernels of attention, patch embedding and head.
        trits: five ternary weights a byte, or 2 bits each.
    """

    angle_bits: packing.AngleBits = 32
    router: precision.RouterPrecision = "float32"
    experts: precision.Precision = "float32"
    backbone: BackbonePrecision = "float32"
    trits: precision.TritPacking = "base3"

    def __post_init__(self) -> None:
        for field, choices in {
            "angle_bits": packing.ANGLE_BITS,
            "router": get_args(precision.RouterPrecision),
            "experts": precision.PRECISIONS,
            "backbone": get_args(BackbonePrecision),
            "trits": get_args(precision.TritPacking),
        }.items():
            require_choice(f"storage.{field}", getattr(self, field), choices)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its name, dtype as safetensors spells it, and shape."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * np.dtype(NUMPY_DTYPE[self.dtype]).itemsize


@dataclasses.dataclass(frozen=True)
class StoredParam:
    """One parameter of the model and the tensors that stand for it.

    Attributes:
        path, component: as in `bvit_jax.components`.
        shape: as trained; parameters of layers have L first.
        encoding: `angles` are codes of `angle_bits`; the rest as in `bvit_jax.precision`.
        matrix: (I, O) of the matrices of a packed precision.
        values: the tensor of the numbers or their codes.
        scale: the tensor of the scales, (..., O) or (..., 1), of a packed precision.
    """

    path: str
    component: Component
    shape: tuple[int, ...]
    encoding: Encoding
    matrix: tuple[int, int]
    values: Tensor
    scale: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in the file."""
        return (self.values,) if self.scale is None else (self.values, self.scale)


def as_trained(model: ModelConfig) -> Storage:
    """Returns the storage that keeps a model as it was evaluated in training; no bit more for angles and router."""
    return Storage(angle_bits=model.angle_bits, router=model.router_precision)


def layout(model: ModelConfig, storage: Storage) -> tuple[StoredParam, ...]:
    """Lists the stored parameters of a model in the order of its tree. No array is made."""
    return tuple(_stored(path, shape, model, storage) for path, shape in _shapes(model))


@functools.lru_cache(maxsize=1024)
def _shapes(model: ModelConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    leaves = jax.tree_util.tree_leaves_with_path(vit.param_shapes(model))
    return tuple((components.path_of(path), tuple(leaf.shape)) for path, leaf in leaves)


def _stored(path: str, shape: tuple[int, ...], model: ModelConfig, storage: Storage) -> StoredParam:
    component = components.component_of(path)
    encoding = _encoding(path, component, model, storage)
    if encoding == "angles":
        width = packing.codes_width(shape[-1], storage.angle_bits)
        dtype: Dtype = "U16" if storage.angle_bits == 16 else "U8"
        values = Tensor(f"{path}.codes", dtype, (*shape[:-1], width))
        return StoredParam(path, component, shape, encoding, (0, 0), values, None)
    if not precision.is_packed(encoding):
        values = Tensor(path, "F32" if encoding == "float32" else "BF16", shape)
        return StoredParam(path, component, shape, encoding, (0, 0), values, None)
    lead, (inputs, outputs) = _matrices(path, component, shape)
    width = precision.width(inputs, outputs, encoding, storage.trits)
    scales = 1 if encoding == "ternary" and _scale_kind(component, model) == "tensor" else outputs
    values = Tensor(f"{path}.codes", "U8", (*lead, width))
    return StoredParam(
        path, component, shape, encoding, (inputs, outputs), values, Tensor(f"{path}.scale", "F32", (*lead, scales))
    )


def _encoding(path: str, component: Component, model: ModelConfig, storage: Storage) -> Encoding:
    if component == "angles":
        return "float32" if storage.angle_bits == 32 else "angles"
    if component in _OF_EXPERTS:
        return expert_precision(model, storage)
    if component == "router":
        return storage.router
    if component in ("ffn", "projection"):
        return storage.experts
    return storage.backbone if path.endswith("kernel") else "float32"


def expert_precision(model: ModelConfig, storage: Storage) -> precision.Precision:
    """Returns the format of the matrices of the experts, their own or prototypes; of a dense model's FFNs."""
    if model.has_ternary_experts:
        return "float32" if model.ternary_scale == "none" else "ternary"
    return storage.experts


def _scale_kind(component: Component, model: ModelConfig) -> ternary.ScaleKind:
    """Returns which scales a matrix has if it is stored ternary: where training rounds it, those of training."""
    if component in _OF_EXPERTS and model.has_ternary_experts and model.ternary_scale != "none":
        return model.ternary_scale
    return "row"


def _matrices(path: str, component: Component, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Splits a parameter's shape into leading axes and the (I, O) of its matrices; heads count as channels."""
    if component == "attention":
        layers, *tail = shape
        inputs = math.prod(tail[:2]) if path.endswith("out/kernel") else tail[0]
        return (layers,), (inputs, math.prod(tail) // inputs)
    return shape[:-2], (shape[-2], shape[-1])


def encode(params: Any, model: ModelConfig, storage: Storage) -> dict[str, np.ndarray]:
    """Encodes trained parameters, with what training itself rounds (angles, router) rounded so first.

    Args:
        params: as `vit.init_params`.
        model: the model they belong to.
        storage: the formats wanted.

    Returns:
        Arrays by tensor name, as `layout` lists them.

    Raises:
        ValueError: for a parameter that is missing, unknown, of the wrong shape or not finite.
    """
    leaves = {components.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    _check_shapes({path: tuple(leaf.shape) for path, leaf in leaves.items()}, dict(_shapes(model)))
    arrays: dict[str, np.ndarray] = {}
    for stored in layout(model, storage):
        leaf = jnp.asarray(leaves[stored.path], jnp.float32)
        if not jnp.isfinite(leaf).all():
            raise ValueError(f"parameter {stored.path} is not finite")
        if stored.component == "angles" and storage.angle_bits != model.angle_bits:
            leaf = packing.quantise_angles(leaf, model.angle_bits)
        if stored.component == "router" and storage.router != model.router_precision:
            leaf = precision.quantise(leaf, model.router_precision)
        arrays |= _encode(leaf, stored, model, storage)
    return arrays


def _check_shapes(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for path in sorted(found.keys() | wanted.keys()):
        if found.get(path) != wanted.get(path):
            shapes = found.get(path, "absent"), wanted.get(path, "none")
            raise ValueError(f"parameter {path} is {shapes[0]}; this model has {shapes[1]}")


def _encode(leaf: jax.Array, stored: StoredParam, model: ModelConfig, storage: Storage) -> dict[str, np.ndarray]:
    if stored.encoding == "angles":
        codes = packing.pack_codes(packing.angle_codes(leaf, storage.angle_bits), storage.angle_bits)
        return {stored.values.name: codes}
    if stored.scale is None:
        return {stored.values.name: np.asarray(leaf, NUMPY_DTYPE[stored.values.dtype])}
    matrices = leaf.reshape(*stored.values.shape[:-1], *stored.matrix)
    levels, scale = precision.levels(matrices, stored.encoding, _scale_kind(stored.component, model))
    return {
        stored.values.name: precision.pack(levels, stored.encoding, storage.trits),
        stored.scale.name: np.asarray(scale, np.float32).reshape(stored.scale.shape),
    }


def decode(stored: StoredParam, arrays: Mapping[str, Any], storage: Storage) -> jax.Array:
    """Decodes one parameter to float32; runs inside compiled programs.

    Args:
        stored: which.
        arrays: its tensors by name, whole, or those of one layer alone, without the axis L.
        storage: as the arrays were encoded.

    Returns:
        The parameter, of `stored.shape` or without its first axis.
    """
    values = jnp.asarray(arrays[stored.values.name])
    if stored.encoding == "angles":
        codes = packing.unpack_codes(values, storage.angle_bits, stored.shape[-1])
        return packing.angles_of(codes, storage.angle_bits)
    if stored.scale is None:
        return values.astype(jnp.float32)
    levels = precision.unpack(values, stored.matrix, stored.encoding, storage.trits)
    scale = jnp.asarray(arrays[stored.scale.name])[..., None, :]
    tail = stored.shape[len(stored.values.shape) - 1 :]
    return precision.from_levels(levels, scale, stored.encoding).reshape(*values.shape[:-1], *tail)


def as_stored(params: Any, model: ModelConfig, storage: Storage) -> Any:
    """Returns trained parameters after a round trip through their stored form, for use with `model.deployed()`."""
    arrays = encode(params, model, storage)
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
