"""The configuration of one training run: frozen dataclasses, checked when made, with a digest that names the run.

Experiments write configurations as nested mappings (`configs/`, ml_collections); `resolve` turns one into `Config`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_type_hints

from bvit_jax.model_config import VARIANTS, ConfigError, Family, Form, ModelConfig, VitShape, require, require_choice

DataName = Literal["digits", "procedural"]
LARGEST_INTEGER = 2**53
"""Bound of all numbers in a configuration: up to here integers are floats too, exactly. No NaN passes it."""
WANTED_NUMBER: dict[type, str] = {int: "an integer", float: "a finite number"}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Images and their augmentation.

    Attributes:
        name: `digits` (scikit-learn's, embedded) or `procedural` (drawn from the seed, any size).
        max_shift: training images move by up to this many pixels each way, edges filled with zeros.
        shift_probability: share of the training images that move.
        noise: standard deviation of the Gaussian noise added to training images, in units of the pixel range 0 to 1.
        image_size, channels, num_classes, num_train, num_validation, num_test, seed: of the `procedural` set; `digits`
            has its own.
    """

    name: DataName
    max_shift: int
    shift_probability: float
    noise: float
    image_size: int
    channels: int
    num_classes: int
    num_train: int
    num_validation: int
    num_test: int
    seed: int

    def __post_init__(self) -> None:
        require_choice("data.name", self.name, get_args(DataName))
        for field in ("image_size", "channels", "num_classes", "num_train", "num_validation", "num_test"):
            require(getattr(self, field) >= 1, f"data.{field}", getattr(self, field), "at least 1")
        for field in ("max_shift", "noise", "seed"):
            require(getattr(self, field) >= 0, f"data.{field}", getattr(self, field), "0 or more")
        require(0 <= self.shift_probability <= 1, "data.shift_probability", self.shift_probability, "0 to 1")
        require(self.max_shift < self.image_size, "data.max_shift", self.max_shift, f"under {self.image_size}")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses; the weighted sum is formed in `bvit_jax.train_step.total_loss` alone.

    Attributes:
        label_smoothing: probability mass spread over all classes, 0 to under 1.
        load_balance, router_z, smoothness: weights of the router's losses, each averaged over the mixture layers.
    """

    label_smoothing: float
    load_balance: float
    router_z: float
    smoothness: float

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "0 to under 1")
        for field in ("load_balance", "router_z", "smoothness"):
            require(getattr(self, field) >= 0, f"loss.{field}", getattr(self, field), "0 or more")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to zero.

    Attributes:
        learning_rate: peak.
        warmup_steps: steps of linear warm-up, fewer than the run has.
        weight_decay: on matrices only (`bvit_jax.components.decay_mask`).
        clip_norm: largest global norm of the gradient.
        prototype_multiplier, angle_multiplier, router_multiplier: of the learning rate of these components.
    """

    learning_rate: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    prototype_multiplier: float
    angle_multiplier: float
    router_multiplier: float

    def __post_init__(self) -> None:
        for field in ("learning_rate", "clip_norm"):
            require(getattr(self, field) > 0, f"optimizer.{field}", getattr(self, field), "above 0")
        multipliers = ("prototype_multiplier", "angle_multiplier", "router_multiplier")
        for field in ("warmup_steps", "weight_decay", *multipliers):
            require(getattr(self, field) >= 0, f"optimizer.{field}", getattr(self, field), "0 or more")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run in full; on equal devices and library versions, equal configurations give equal numbers.

    Attributes:
        seed: of parameters, data order, augmentation and noise.
        total_steps: optimiser steps.
        batch_size: images a step, over all devices.
        log_every, eval_every: steps between rows of training metrics, and between evaluations with a checkpoint.
        keep_every: every so many evaluations the checkpoint is kept for good, beside the newest two and the best; 0:
            none is.
        max_skipped_steps: steps whose loss or gradient is not finite that may be left out; one more ends the run.
    """

    seed: int
    total_steps: int
    batch_size: int
    log_every: int
    eval_every: int
    keep_every: int
    max_skipped_steps: int
    data: DataConfig
    model: ModelConfig
    loss: LossConfig
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32 - 1")
        for field in ("total_steps", "batch_size", "log_every", "eval_every"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "at least 1")
        for field in ("keep_every", "max_skipped_steps"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        warmup = self.optimizer.warmup_steps
        require(warmup < self.total_steps, "optimizer.warmup_steps", warmup, f"under total_steps = {self.total_steps}")
        require(
            self.model.image_size == self.data.image_size,
            "model.image_size",
            self.model.image_size,
            f"that of the {self.data.name} images, {self.data.image_size}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def with_experts(self, family: Family, form: Form, num_experts: int) -> "Config":
        """Returns the same run of another kind of model with that many experts; at most so many are selected."""
        top_k = min(self.model.top_k, num_experts)
        model = dataclasses.replace(self.model, family=family, form=form, num_experts=num_experts, top_k=top_k)
        return dataclasses.replace(self, model=model.canonical())

    def digest(self) -> str:
        """Returns 12 hexadecimal digits that name this configuration."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def resolve(raw: Mapping[str, Any]) -> Config:
    """Builds a `Config` from nested mappings as found in `configs/`.

    `raw["model"]` names a `variant` (`bvit_jax.model_config.VARIANTS`); a field of its shape that is present and not
    None replaces the variant's. Channels and classes come from the data, whose fixed properties are filled in here.

    Raises:
        ConfigError: for a field that is unknown, missing, of the wrong type or impossible.
    """
    sections = dict(raw)
    data = _build(DataConfig, "data", _fixed_data(_section(sections, "data")))
    model = _section(sections, "model")
    variant = model.pop("variant", None)
    require(isinstance(variant, str) and variant in VARIANTS, "model.variant", variant, " or ".join(VARIANTS))
    shape_fields = [field.name for field in dataclasses.fields(VitShape)]
    shape = dataclasses.asdict(VARIANTS[variant]) | {
        name: model.pop(name) for name in shape_fields if model.get(name) is not None
    }
    model = {name: value for name, value in model.items() if name not in shape_fields}
    derived = {"channels": data.channels, "num_classes": data.num_classes}
    built = {
        "data": data,
        "model": _build(ModelConfig, "model", model | shape | derived).canonical(),
        "loss": _build(LossConfig, "loss", _section(sections, "loss")),
        "optimizer": _build(OptimizerConfig, "optimizer", _section(sections, "optimizer")),
    }
    scalars = {name: value for name, value in sections.items() if name not in built}
    return _build(Config, "", scalars | built)


def from_dict(stored: Mapping[str, Any]) -> Config:
    """Rebuilds a configuration from `Config.to_dict`.

    Raises:
        ConfigError: as `resolve`.
    """
    require(isinstance(stored, Mapping), "configuration", stored, "sections and fields")
    sections = dict(stored)
    classes = {"data": DataConfig, "model": ModelConfig, "loss": LossConfig, "optimizer": OptimizerConfig}
    built = {name: _build(cls, name, _section(sections, name)) for name, cls in classes.items()}
    return _build(Config, "", sections | built)


def _fixed_data(data: dict[str, Any]) -> dict[str, Any]:
    """Fills in what an embedded set fixes, so that equal data have equal configurations."""
    if data.get("name") != "digits":
        return data
    fixed = {"image_size": 8, "channels": 1, "num_classes": 10}
    fixed |= {"num_train": 1200, "num_validation": 197, "num_test": 400, "seed": 0}
    for field, value in fixed.items():
        require(data.get(field, value) == value, f"data.{field}", data.get(field), f"{value}, which digits fix")
    return data | fixed


def _section(sections: Mapping[str, Any], name: str) -> dict[str, Any]:
    require(isinstance(sections.get(name), Mapping), name, sections.get(name), "a section of fields")
    return dict(sections[name])


def _build(cls: type[Any], section: str, fields: dict[str, Any]) -> Any:
    """Makes a frozen dataclass, checking names and types of its fields; ints pass for floats."""
    prefix = f"{section}." if section else ""
    hints = get_type_hints(cls)
    unknown, missing = sorted(fields.keys() - hints.keys()), sorted(hints.keys() - fields.keys())
    if unknown or missing:
        names = ", ".join(prefix + name for name in (unknown or missing))
        raise ConfigError(f"{'unknown' if unknown else 'missing'} configuration field: {names}")
    checked = {}
    for name, value in fields.items():
        kind = hints[name]
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST_INTEGER:
            value = float(value)
        if kind is float and isinstance(value, float):
            value += 0.0  # -0.0 becomes 0.0, which it equals but is not spelt like
        if kind in (int, float):
            valid = isinstance(value, kind) and not isinstance(value, bool)
            require(valid and abs(value) < LARGEST_INTEGER, prefix + name, value, WANTED_NUMBER[kind])
        elif kind is str:
            require(isinstance(value, str), prefix + name, value, "text")
        checked[name] = value
    return cls(**checked)
