"""Flags for the number formats of a stored model, shared by the entry points that store or count one."""

import dataclasses
from typing import Any, get_args

from absl import flags

from bvit_jax import precision
from bvit_jax.model_config import ModelConfig
from bvit_jax.storage import BackbonePrecision, Storage

_ROUTER = flags.DEFINE_enum(
    "router", None, get_args(precision.RouterPrecision), "Format of the router's weights; as trained if left out."
)
_BACKBONE = flags.DEFINE_enum(
    "backbone",
    None,
    get_args(BackbonePrecision),
    "Format of the kernels of attention, patch embedding and head; float32 if left out.",
)
_TRITS = flags.DEFINE_enum(
    "trits", None, get_args(precision.TritPacking), "Packing of ternary weights; base3, five a byte, if left out."
)


def any_given() -> bool:
    """Whether a flag of these is set."""
    return any(flag.value is not None for flag in (_ROUTER, _BACKBONE, _TRITS))


def rest(model: ModelConfig) -> Storage:
    """Returns the formats of router, backbone and trits that the flags ask for, the others at their defaults."""
    formats = {"router": _ROUTER.value, "backbone": _BACKBONE.value, "trits": _TRITS.value}
    given: dict[str, Any] = {name: value for name, value in formats.items() if value is not None}
    return dataclasses.replace(Storage(router=model.router_precision), **given)


def describe(storage: Storage) -> str:
    """Says in a few words what the flags of `rest` set."""
    trits = "5 trits a byte" if storage.trits == "base3" else "2 bits a trit"
    return f"router {storage.router}, backbone {storage.backbone}, {trits}"
