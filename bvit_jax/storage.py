"""How a model is stored for inference: which tensors, in which number formats.

The layout follows from shapes alone, so that the ledger (`bvit_jax.memory`) counts it without making an array, the file
(`bvit_jax.packed_file`) holds exactly it, and a loaded model (`bvit_jax.packed`) decodes what it says
(`bvit_jax.encoding`).

Axes: L layers stacked by the scan, E experts, A angles of one rotation, I inputs, O outputs.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax

from bvit_jax import components, packing, precision, reductions, ternary, vit
from bvit_jax.components import Component
from bvit_jax.model_config import ModelConfig, require, require_choice
from bvit_jax.reductions import Factors, Merged, Pruned, Reduction, Reductions
from bvit_jax.tensors import Dtype, Tensor

BackbonePrecision = Literal["float32", "bfloat16", "int8", "int4", "int2"]
Encoding = Literal["angles"] | precision.Precision
_OF_EXPERTS: frozenset[Component] = frozenset({"prototype", "experts"})


@dataclasses.dataclass(frozen=True)
class Storage:
    """Number formats of a stored model. Biases, norms, positions and the class token are always float32.

    Attributes:
        angle_bits: 32 (float32) or a code of fewer bits an angle.
        router: of the routers' weights.
        experts: of the stored experts of the family `standard`, of the shared matrices and differences of `low_rank`,
            of dense FFNs and the dense projection of the `reference` form. What is trained ternary is stored so
            (`expert_precision`).
        backbone: of the kernels of attention, patch embedding and head.
        trits: five ternary weights a byte, or 2 bits each.
        ends: of the kernels of patch embedding and head, where another than that of the backbone; None: the same.
        reductions: parameters of which fewer numbers are stored than the model has.
    """

    angle_bits: packing.AngleBits = 32
    router: precision.RouterPrecision = "float32"
    experts: precision.Precision = "float32"
    backbone: BackbonePrecision = "float32"
    trits: precision.TritPacking = "base3"
    ends: BackbonePrecision | None = None
    reductions: Reductions = reductions.NONE

    def __post_init__(self) -> None:
        for field, choices in {
            "angle_bits": packing.ANGLE_BITS,
            "router": get_args(precision.RouterPrecision),
            "experts": precision.PRECISIONS,
            "backbone": get_args(BackbonePrecision),
            "trits": get_args(precision.TritPacking),
        }.items():
            require_choice(f"storage.{field}", getattr(self, field), choices)
        if self.ends is not None:
            require_choice("storage.ends", self.ends, get_args(BackbonePrecision))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"reductions": self.reductions.to_dict()}


def from_dict(stored: Mapping[str, Any]) -> Storage:
    """Rebuilds a storage from `Storage.to_dict`.

    Raises:
        ConfigError, TypeError, AttributeError, KeyError: if this is no such thing.
    """
    return Storage(**(dict(stored) | {"reductions": reductions.from_dict(stored["reductions"])}))


@dataclasses.dataclass(frozen=True)
class StoredParam:
    """One parameter of the model and the tensors that stand for it.

    Attributes:
        path, component: as in `bvit_jax.components`.
        shape: as trained; parameters of layers have L first.
        encoding: `angles` are codes of `angle_bits`; the rest as in `bvit_jax.precision`.
        matrix: (I, O) of the matrices of a packed precision or of factors.
        values: the tensor of the numbers or their codes.
        scale: the tensor of the scales, (..., O) or (..., 1), of a packed precision.
        index: the tensor of the bits of a pruned parameter.
        reduction: what makes it fewer numbers; the tensors of factors and of pruned parameters are flat.
    """

    path: str
    component: Component
    shape: tuple[int, ...]
    encoding: Encoding
    matrix: tuple[int, int]
    values: Tensor
    scale: Tensor | None = None
    index: Tensor | None = None
    reduction: Reduction | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in the file."""
        return tuple(tensor for tensor in (self.values, self.scale, self.index) if tensor is not None)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape with the stored experts alone, M in place of E."""
        if isinstance(self.reduction, Merged):
            return (self.shape[0], self.reduction.stored, *self.shape[2:])
        return self.shape

    @property
    def numbers(self) -> int:
        """Numbers that are stored, scales and index aside."""
        if isinstance(self.reduction, Factors):
            return sum(map(math.prod, self.reduction.shapes(self.matrix)))
        return self.reduction.kept if isinstance(self.reduction, Pruned) else math.prod(self.stored_shape)


def as_trained(model: ModelConfig) -> Storage:
    """Returns the storage that keeps a model as it was evaluated in training; no bit more for angles and router."""
    return Storage(angle_bits=model.angle_bits, router=model.router_precision)


def layout(model: ModelConfig, storage: Storage) -> tuple[StoredParam, ...]:
    """Lists the stored parameters of a model in the order of its tree. No array is made.

    Raises:
        ConfigError: if the reductions are not such as its parameters can have.
    """
    shapes = param_shapes(model)
    _check_paths(storage.reductions, [path for path, _ in shapes], model.stores_experts)
    return tuple(_stored(path, shape, model, storage) for path, shape in shapes)


def _check_paths(found: Reductions, paths: Sequence[str], stores_experts: bool) -> None:
    kernels = [path for path in paths if path.startswith("segment_") and path.endswith("kernel")]
    mixtures = [path.removesuffix("/up_kernel") for path in kernels if stores_experts and path.endswith("/up_kernel")]
    alone = [path for path, _ in (*found.ranks, *found.kept)]
    for path in alone:
        require(path in kernels, "storage.reductions", path, "a kernel of a layer of the model")
    for path, _ in found.groups:
        require(path in mixtures, "storage.reductions", path, "a mixture of stored experts of the model")
    reduced = alone + [f"{path}/{name}" for path, _ in found.groups for name in reductions.OF_EXPERTS]
    for path in reduced:
        require(reduced.count(path) == 1, "storage.reductions", path, "reduced in one way")


@functools.lru_cache(maxsize=1024)
def param_shapes(model: ModelConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Lists the parameters of a model in the order of its tree: path and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(vit.param_shapes(model))
    return tuple((components.path_of(path), tuple(leaf.shape)) for path, leaf in leaves)


def _stored(path: str, shape: tuple[int, ...], model: ModelConfig, storage: Storage) -> StoredParam:
    component = components.component_of(path)
    encoding = _encoding(path, component, model, storage)
    reduction = reductions.of_param(path, storage.reductions)
    stored = StoredParam(path, component, shape, encoding, (0, 0), Tensor(path, "F32", shape), reduction=reduction)
    if encoding == "angles":
        width = packing.codes_width(shape[-1], storage.angle_bits)
        dtype: Dtype = "U16" if storage.angle_bits == 16 else "U8"
        return dataclasses.replace(stored, values=Tensor(f"{path}.codes", dtype, (*shape[:-1], width)))
    if isinstance(reduction, Merged):
        reductions.check_merged(path, reduction, shape[0], shape[1])
    elif reduction is not None:
        lead, matrix = _matrices(path, component, shape)
        reductions.check(path, reduction, math.prod(lead), matrix, precision.is_packed(encoding))
        return _reduced(dataclasses.replace(stored, matrix=matrix), reduction, encoding, storage)
    if not precision.is_packed(encoding):
        dtype = "F32" if encoding == "float32" else "BF16"
        return dataclasses.replace(stored, values=Tensor(path, dtype, stored.stored_shape))
    lead, (inputs, outputs) = _matrices(path, component, stored.stored_shape)
    width = precision.width(inputs, outputs, encoding, storage.trits)
    scales = 1 if encoding == "ternary" and scale_kind(component, model) == "tensor" else outputs
    values, scale = Tensor(f"{path}.codes", "U8", (*lead, width)), Tensor(f"{path}.scale", "F32", (*lead, scales))
    return dataclasses.replace(stored, matrix=(inputs, outputs), values=values, scale=scale)


def _reduced(
    stored: StoredParam, reduction: Factors | Pruned, encoding: precision.Precision, storage: Storage
) -> StoredParam:
    path = stored.path
    dtype: Dtype = "BF16" if encoding == "bfloat16" else "F32"
    if isinstance(reduction, Pruned):
        index = Tensor(f"{path}.index", "U8", (reduction.mask_bytes(stored.shape),))
        return dataclasses.replace(stored, values=Tensor(f"{path}.kept", dtype, (reduction.kept,)), index=index)
    if not precision.is_packed(encoding):
        return dataclasses.replace(stored, values=Tensor(f"{path}.factors", dtype, (stored.numbers,)))
    shapes = reduction.shapes(stored.matrix)
    width = sum(precision.width(*shape, encoding, storage.trits) for shape in shapes)
    values = Tensor(f"{path}.codes", "U8", (width,))
    return dataclasses.replace(
        stored, values=values, scale=Tensor(f"{path}.scale", "F32", (sum(outputs for _, outputs in shapes),))
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
    if not path.endswith("kernel"):
        return "float32"
    return storage.backbone if component == "attention" or storage.ends is None else storage.ends


def expert_precision(model: ModelConfig, storage: Storage) -> precision.Precision:
    """Returns the format of the matrices of the experts, their own or prototypes; of a dense model's FFNs."""
    if model.has_ternary_experts:
        return "float32" if model.ternary_scale == "none" else "ternary"
    return storage.experts


def scale_kind(component: Component, model: ModelConfig) -> ternary.ScaleKind:
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
