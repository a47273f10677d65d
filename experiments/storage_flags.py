"""Flags for the number formats of a stored model, shared by the entry points that store or count one."""

import dataclasses
from typing import Any, get_args

from absl import flags

from bvit_jax import precision
from bvit_jax.model_config import ModelConfig
from bvit_jax.storage import BackbonePrecision, Storage, expert_precision


def _define(name: str, of: str, choices: Any, default: str) -> flags.FlagHolder[str | None]:
    return flags.DEFINE_string(name, None, f"Format of {of}: {', '.join(get_args(choices))}; {default} if left out.")


# By field of `Storage`; `Storage` itself checks the values.
_FORMATS = {
    "router": _define("router", "the router's weights", precision.RouterPrecision, "as trained"),
    "backbone": _define("backbone", "the kernels of attention, patches and head", BackbonePrecision, "float32"),
    "ends": _define("ends", "the kernels of patches and head", BackbonePrecision, "as the backbone"),
    "experts": _define(
        "experts_format",
        "stored experts, dense FFNs and the projection of the reference form, where there are such",
        precision.Precision,
        "float32",
    ),
    "trits": _define("trits", "ternary weights, five a byte or 2 bits each", precision.TritPacking, "base3"),
}


def any_given() -> bool:
    """Whether a flag of these is set."""
    return any(flag.value is not None for flag in _FORMATS.values())


def given(model: ModelConfig) -> Storage:
    """Returns the formats that the flags ask for, all but that of the angles.

    Raises:
        ConfigError: for a format that there is not.
    """
    values: dict[str, Any] = {name: flag.value for name, flag in _FORMATS.items() if flag.value is not None}
    return dataclasses.replace(Storage(router=model.router_precision), **values)


def describe(storage: Storage, model: ModelConfig) -> str:
    """Says in a few words how a model is stored; most defaults go unsaid."""
    rotates = model.family == "butterfly"
    parts = [f"{storage.angle_bits}-bit angles" if rotates else f"experts {expert_precision(model, storage)}"]
    parts += [f"router {storage.router}"] if model.family != "dense" else []
    aside = model.has_ternary_experts and storage.experts != "float32"
    parts += [f"dense matrices {storage.experts}"] if aside else []
    parts += [f"backbone {storage.backbone}"] if storage.backbone != "float32" else []
    parts += [f"patches and head {storage.ends}"] if storage.ends not in (None, storage.backbone) else []
    reduced = storage.reductions
    named = {"maps as factors": reduced.ranks, "pruned": reduced.kept, "experts merged": reduced.groups}
    parts += [name for name, found in named.items() if found]
    return ", ".join(parts + (["2 bits a trit"] if storage.trits != "base3" else []))
