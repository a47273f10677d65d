"""What a model is: its shape, the kind of its feed-forward layers, its numerics. Plain data, checked when made."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

from bvit_jax import butterfly, packing, precision

Family = Literal["dense", "standard", "ternary", "butterfly", "low_rank"]
Form = Literal["separate", "tied", "reference"]
ComputeDtype = Literal["float32", "bfloat16"]
TernaryScale = Literal["row", "tensor", "none"]
Dispatch = Literal["auto", "rows", "blocks", "fused"]
Rotations = Literal["all", "outer"]


MAX_LAYERS = 512


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field, its value and what would be right."""


@dataclasses.dataclass(frozen=True)
class VitShape:
    """Shape of a Vision Transformer; sizes in pixels and channels."""

    image_size: int
    patch_size: int
    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int


VARIANTS: dict[str, VitShape] = {
    "tiny": VitShape(image_size=8, patch_size=2, num_layers=2, d_model=64, d_ff=128, num_heads=4),
    "small": VitShape(image_size=32, patch_size=4, num_layers=4, d_model=128, d_ff=512, num_heads=4),
    # The setting in which the ButterflyViT paper reports 939 MB -> 2.6 MB on CIFAR-100.
    "paper": VitShape(image_size=32, patch_size=4, num_layers=7, d_model=256, d_ff=1024, num_heads=4),
    "vit_s16": VitShape(image_size=224, patch_size=16, num_layers=12, d_model=384, d_ff=1536, num_heads=6),
    "vit_b16": VitShape(image_size=224, patch_size=16, num_layers=12, d_model=768, d_ff=3072, num_heads=12),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model in full. A family ignores the fields that are not its own (`canonical` resets them).

    Attributes:
        family: `dense`, one FFN; `standard`, a mixture of stored experts; `ternary`, one of stored experts whose
            matrices are ternary; `butterfly`, one of experts that are rotations of shared ternary matrices;
            `low_rank`, one of experts that are shared matrices and differences of their own, of low rank.
        form: of the butterfly experts; see `bvit_jax.moe.ButterflyMoe`.
        num_experts, top_k: experts of a mixture layer, and how many of them a token uses.
        moe_layers: layers that hold a mixture: `every`, `second` (the 2nd, 4th, ...) or indices such as `1,3,5`; the
            others hold a dense FFN.
        rank: of the differences of `low_rank` experts; see `bvit_jax.low_rank`.
        rotations: which of an expert's rotations there are: `all`, or those of its inputs and outputs alone, `outer`,
            hidden channels being left as the prototypes make them.
        num_stages: depth of the rotations; a side that has fewer stages at full depth stops there.
        stride_order: of the rotations; see `bvit_jax.butterfly`.
        ternary_scale: of the ternary matrices, prototypes or an expert's own: one per output `row` of a matrix or one
            per `tensor`; `none` leaves them floats, not ternary.
        angle_bits: angles are rounded to 2^angle_bits steps of the circle, in training through a straight-through
            estimator; 32 leaves them float32.
        router_precision: likewise, the format that the router's weights are rounded to.
        angle_init: angles start uniform in [-angle_init, angle_init], radians.
        router_noise: standard deviation of the Gaussian noise on the router's logits in training.
        attention_dropout: share of the attention weights that training leaves out.
        stochastic_depth: share of the images for which training skips the last layer's attention, and of those for
            which it skips its FFN; the shares rise evenly from 0 in the first layer, which is never skipped.
        dispatch: how rows meet the rotations of their experts; see `bvit_jax.rotated`. All give the same result.
        compute_dtype: of activations and matrix products; parameters and the router are float32.
        image_size, patch_size, num_layers, d_model, d_ff, num_heads: as in `VitShape`.
        channels, num_classes: of the images and labels.
    """

    family: Family
    form: Form
    num_experts: int
    top_k: int
    moe_layers: str
    rank: int
    rotations: Rotations
    num_stages: int
    stride_order: butterfly.StrideOrder
    ternary_scale: TernaryScale
    angle_bits: packing.AngleBits
    router_precision: precision.RouterPrecision
    angle_init: float
    router_noise: float
    attention_dropout: float
    stochastic_depth: float
    dispatch: Dispatch
    compute_dtype: ComputeDtype
    image_size: int
    patch_size: int
    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    channels: int
    num_classes: int

    def __post_init__(self) -> None:
        for field, choices in {
            "family": get_args(Family),
            "form": get_args(Form),
            "rotations": get_args(Rotations),
            "stride_order": butterfly.STRIDE_ORDERS,
            "ternary_scale": get_args(TernaryScale),
            "angle_bits": packing.ANGLE_BITS,
            "router_precision": get_args(precision.RouterPrecision),
            "dispatch": get_args(Dispatch),
            "compute_dtype": get_args(ComputeDtype),
        }.items():
            require_choice(f"model.{field}", getattr(self, field), choices)
        for field in (
            *("num_experts", "top_k", "rank", "num_stages", "image_size", "patch_size"),
            *("num_layers", "d_model", "d_ff", "num_heads", "channels", "num_classes"),
        ):
            require(getattr(self, field) >= 1, f"model.{field}", getattr(self, field), "at least 1")
        require(self.num_layers <= MAX_LAYERS, "model.num_layers", self.num_layers, f"at most {MAX_LAYERS}")
        enough = self.family == "dense" or self.top_k <= self.num_experts
        require(enough, "model.top_k", self.top_k, f"at most num_experts = {self.num_experts}")
        most = min(self.d_model, self.d_ff)
        possible = self.family != "low_rank" or self.rank <= most
        require(possible, "model.rank", self.rank, f"at most {most}, the smaller of d_model and d_ff")
        require(
            self.image_size % self.patch_size == 0,
            "model.patch_size",
            self.patch_size,
            f"a divisor of image_size = {self.image_size}",
        )
        require(
            self.d_model % self.num_heads == 0,
            "model.num_heads",
            self.num_heads,
            f"a divisor of d_model = {self.d_model}",
        )
        deepest = butterfly.max_stages(max(self.d_model, self.d_ff))
        require(self.num_stages <= deepest, "model.num_stages", self.num_stages, f"at most {deepest} (full depth)")
        for field in ("angle_init", "router_noise"):
            require(getattr(self, field) >= 0, f"model.{field}", getattr(self, field), "0 or more")
        for field in ("attention_dropout", "stochastic_depth"):
            require(0 <= getattr(self, field) < 1, f"model.{field}", getattr(self, field), "0 to under 1")
        moe_layer_indices(self.moe_layers, self.num_layers)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def is_moe_by_layer(self) -> tuple[bool, ...]:
        """For each layer, whether its FFN is a mixture."""
        chosen = () if self.family == "dense" else moe_layer_indices(self.moe_layers, self.num_layers)
        return tuple(layer in chosen for layer in range(self.num_layers))

    @property
    def stores_experts(self) -> bool:
        """Whether each expert has matrices of its own."""
        return self.family in ("standard", "ternary")

    @property
    def keeps_tokens(self) -> bool:
        """Whether every device holds all experts, as what is their own is small: tokens stay where they are."""
        return self.family in ("butterfly", "low_rank")

    @property
    def has_ternary_experts(self) -> bool:
        """Whether `ternary_scale` is its own: experts have ternary matrices or are rotations of such."""
        return self.family in ("ternary", "butterfly")

    def deployed(self) -> "ModelConfig":
        """Returns the model whose ternary matrices, angles and router are rounded already: it uses them as they are."""
        return dataclasses.replace(self, ternary_scale="none", angle_bits=32, router_precision="float32")

    def canonical(self) -> "ModelConfig":
        """Resets the fields that the family ignores, so that equal models have equal configurations."""
        mixture: dict[str, Any] = {}
        if self.family != "butterfly":
            mixture = {
                "form": "separate",
                "rotations": "all",
                "num_stages": 1,
                "stride_order": "descending",
                "angle_bits": 32,
                "angle_init": 0.0,
                "dispatch": "auto",
            }
        if not self.has_ternary_experts:
            mixture["ternary_scale"] = "row"
        if self.family != "low_rank":
            mixture["rank"] = 1
        layers = moe_layer_indices(self.moe_layers, self.num_layers)
        named = ("every", tuple(range(self.num_layers))), ("second", tuple(range(1, self.num_layers, 2)))
        spelling = next((name for name, meant in named if meant == layers), ",".join(map(str, layers)))
        router: dict[str, Any] = {"moe_layers": spelling}
        if self.family == "dense":
            router = {
                "num_experts": 1,
                "top_k": 1,
                "moe_layers": "every",
                "router_noise": 0.0,
                "router_precision": "float32",
            }
        return dataclasses.replace(self, **mixture, **router)


def moe_layer_indices(moe_layers: str, num_layers: int) -> tuple[int, ...]:
    """Reads `ModelConfig.moe_layers`; the indices come back sorted.

    Raises:
        ConfigError: if it is none of `every`, `second` and distinct indices from 0 to num_layers - 1.
    """
    if moe_layers == "every":
        return tuple(range(num_layers))
    if moe_layers == "second" and num_layers > 1:
        return tuple(range(1, num_layers, 2))
    try:
        indices = tuple(sorted(int(part) for part in moe_layers.split(",")))
    except ValueError:
        indices = ()
    valid = bool(indices) and len(set(indices)) == len(indices) and all(0 <= i < num_layers for i in indices)
    names = "every, second" if num_layers > 1 else "every"
    require(valid, "model.moe_layers", moe_layers, f"{names} or indices of 0 to {num_layers - 1}, comma between")
    return indices


def require(condition: bool, field: str, value: object, wanted: str) -> None:
    """Raises ConfigError naming `field`, its `value` and what is `wanted`, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{field} = {value!r}: it must be {wanted}")


def require_choice(field: str, value: object, choices: Sequence[object]) -> None:
    """Raises ConfigError unless `value` is one of `choices`, and of their type: neither 8.0 nor True is an integer."""
    valid = value in choices and type(value) is type(choices[0])
    require(valid, field, value, " or ".join(map(str, choices)))
