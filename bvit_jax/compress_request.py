"""What a compression is asked for, and whether a model can give it: known from shapes alone, before any work.

A budget is a share of all numbers that a model has. What is compressed are its linear maps (`bvit_jax.calibration`);
embeddings, head, router, biases and norms are kept, and count.

    rounding          integers, one scale an output channel, to nearest
    quantise          integers likewise, scales searched and weights rounded by calibration (`bvit_jax.rounding`)
    prune             the weights of least magnitude, over all maps, are 0 and not stored (`bvit_jax.pruning`)
    svd               every map as factors of its plain SVD, the same share of each (`bvit_jax.factors`)
    activation_aware  factors that keep most of the outputs on calibration images, the same share of each map
    mixed             likewise, ranks by what the maps lose
    mixed_rank        likewise, and a part of each rank is a residual fitted front to back (`bvit_jax.compensation`)
    merge             experts that do alike are merged, in each mixture as many (`bvit_jax.merging`)

References:
    "Memory-efficient vision transformers: an activation-aware mixed-rank compression strategy", arXiv 2402.06004; what
    its abstract leaves open is a reconstruction of our own.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from bvit_jax import calibration, storage
from bvit_jax.model_config import ModelConfig, require, require_choice

Method = Literal["rounding", "quantise", "prune", "svd", "activation_aware", "mixed", "mixed_rank", "merge"]
Bits = Literal[32, 8, 4, 2]
STEPS: tuple[Method, ...] = ("svd", "activation_aware", "mixed", "mixed_rank")
"""The method of the paper, built up step by step."""
ROUNDS: tuple[Method, ...] = ("rounding", "quantise")
"""Those that keep all numbers, in fewer bits."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        method: one of `Method`.
        keep: share of the model's numbers that are kept, under 1; 1 for `rounding` and `quantise`.
        bits: a weight; those two take 8, 4 or 2, the others keep floats, 32, and factors and merged experts may be
            rounded to nearest besides. Under 32, patch embedding, head and router have 8, angles 8 at most.
        calibration_images: of the training split; by them every method also reports the errors of the maps.

    Raises:
        ConfigError: for a value that there is not.
    """

    method: Method
    keep: float = 1.0
    bits: Bits = 32
    calibration_images: int = 256

    def __post_init__(self) -> None:
        number = isinstance(self.keep, int | float) and not isinstance(self.keep, bool)
        require(number, "keep", self.keep, "a number")
        whole = type(self.calibration_images) is int
        require(whole, "calibration_images", self.calibration_images, "an integer")
        require_choice("method", self.method, get_args(Method))
        require_choice("bits", self.bits, _bits_of(self.method))
        require(self.calibration_images >= 1, "calibration_images", self.calibration_images, "at least 1")
        if self.method in ROUNDS:
            require(self.keep == 1, "keep", self.keep, f"1, as {self.method} keeps all numbers")
        else:
            require(0 < self.keep < 1, "keep", self.keep, "above 0 and under 1")

    @property
    def name(self) -> str:
        """A short name for people and directories."""
        kept = "" if self.keep == 1 else f"_{self.keep:g}"
        return f"{self.method}{kept}" + ("" if self.bits == 32 else f"_{self.bits}bit")


def _bits_of(method: Method) -> tuple[Bits, ...]:
    if method == "prune":
        return (32,)
    return (8, 4, 2) if method in ROUNDS else (32, 8, 4, 2)


def from_dict(fields: Mapping[str, Any]) -> Request:
    """Builds a request from plain data; `bits` may be left out, then weights are floats, or 8 bits where rounded.

    Raises:
        ConfigError: for a field that there is not, or as `Request`.
    """
    known = [field.name for field in dataclasses.fields(Request)]
    for name in fields:
        require(name in known, "compress", name, " or ".join(known))
    require("method" in fields, "compress", dict(fields), "with a method")
    bits: Any = 8 if fields["method"] in ROUNDS else 32
    needed = "keep" in fields or fields["method"] in ROUNDS or fields["method"] not in get_args(Method)
    require(needed, "keep", None, f"given for {fields['method']}, above 0 and under 1")
    return Request(**{"bits": bits, **fields})


def check(model: ModelConfig, request: Request, num_train: int) -> None:
    """Checks that a model can be compressed as asked, from shapes alone.

    Args:
        model: as trained.
        request: what is asked for.
        num_train: images of the training split.

    Raises:
        ConfigError: if the method does not suit the family, the budget cannot be met, or the calibration images are
            more than there are, or too few: with fewer tokens than the widest map has inputs, they leave some
            directions of its inputs out.
    """
    families = {"rounding": None, "quantise": None, "merge": ("standard",)}.get(request.method, ("dense", "standard"))
    if families is not None:
        wanted = f"{' or '.join(families)} for {request.method}, which works on float matrices of its own"
        require(model.family in families, "model.family", model.family, wanted)
    tokens, widest = model.grid[0] * model.grid[1] + 1, max(model.d_model, model.d_ff)
    least = -(-widest // tokens)
    wanted = f"at least {least}: an image has {tokens} tokens, and the widest map {widest} inputs"
    require(request.calibration_images >= least, "calibration_images", request.calibration_images, wanted)
    wanted = f"at most {num_train}, the images of the training split"
    require(request.calibration_images <= num_train, "calibration_images", request.calibration_images, wanted)
    if request.method == "merge":
        experts(model, request.keep)
    elif request.keep < 1:
        budget(model, request)


def numbers(model: ModelConfig) -> int:
    """Counts the numbers of a model."""
    return sum(math.prod(shape) for _, shape in storage.param_shapes(model))


def budget(model: ModelConfig, request: Request) -> int:
    """Returns how many numbers the linear maps may have.

    Raises:
        ConfigError: if that is less than factors of rank 1 take; for pruning, less than none.
    """
    shapes = [found.shape for found in calibration.maps(model)]
    every, in_maps = numbers(model), sum(map(math.prod, shapes))
    least = 0 if request.method == "prune" else sum(min(sum(shape), math.prod(shape)) for shape in shapes)
    left = math.floor(request.keep * every) - (every - in_maps)
    require(left >= least, "keep", request.keep, _possible(every - in_maps + least, every))
    return left


def experts(model: ModelConfig, keep: float) -> int:
    """Returns how many experts each mixture may have.

    Raises:
        ConfigError: if that is none.
    """
    mixtures = sum(model.is_moe_by_layer)
    of_one_each = mixtures * (2 * model.d_model * model.d_ff + model.d_model + model.d_ff)
    every = numbers(model)
    rest = every - model.num_experts * of_one_each
    found = (math.floor(keep * every) - rest) // of_one_each
    require(found >= 1, "keep", keep, _possible(rest + of_one_each, every))
    return found


def _possible(least: int, every: int) -> str:
    return f"at least {math.ceil(1000 * least / every) / 1000:g}: {least:,} of {every:,} numbers cannot be saved"
