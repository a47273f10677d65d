"""The configuration of one training run: frozen dataclasses, checked when made, with a digest that names the run.

Experiments write configurations as nested mappings (`configs/`, ml_collections); `resolve` turns one into `Config`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, get_type_hints

from bvit_jax.data_config import AugmentConfig, DataConfig, with_fixed
from bvit_jax.model_config import VARIANTS, ConfigError, Family, Form, ModelConfig, VitShape, require

LARGEST_INTEGER = 2**53
"""Bound of all numbers in a configuration: up to here integers are floats too, exactly. No NaN passes it."""
WANTED_NUMBER: dict[type, str] = {int: "an integer", float: "a finite number"}
EXPERT_MULTIPLIERS: dict[Family, float] = {
    "dense": 1.0,
    "standard": 1.0,
    "ternary": 3.0,
    "butterfly": 3.0,
    "low_rank": 1.0,
}
"""What `OptimizerConfig.expert_multiplier` is where a configuration leaves it None: a sweep varies the family alone."""


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
    """AdamW with linear warm-up and cosine decay.

    Attributes:
        learning_rate: peak.
        final_learning_rate: of the last step, the peak at most.
        warmup_steps: steps of linear warm-up, fewer than the run has.
        weight_decay: on matrices only (`bvit_jax.components.decay_mask`).
        clip_norm: largest global norm of the gradient.
        ema_decay: of the moving average of the parameters that is evaluated and exported in their place; 0: none is.
        expert_multiplier: of the learning rate of the experts' matrices, stored or shared (`EXPERT_MULTIPLIERS`).
        angle_multiplier, router_multiplier: likewise, of these components.
    """

    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    ema_decay: float
    expert_multiplier: float
    angle_multiplier: float
    router_multiplier: float

    def __post_init__(self) -> None:
        for field in ("learning_rate", "clip_norm"):
            require(getattr(self, field) > 0, f"optimizer.{field}", getattr(self, field), "above 0")
        multipliers = ("expert_multiplier", "angle_multiplier", "router_multiplier")
        for field in ("warmup_steps", "weight_decay", *multipliers):
            require(getattr(self, field) >= 0, f"optimizer.{field}", getattr(self, field), "0 or more")
        peak, final = self.learning_rate, self.final_learning_rate
        require(0 <= final <= peak, "optimizer.final_learning_rate", final, f"0 to learning_rate = {peak}")
        require(0 <= self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "0 to under 1")


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
        start_from: directory of a finished run of a dense model of equal shape, whose best parameters this one starts
            from (`bvit_jax.upcycling`); empty for none.
    """

    seed: int
    total_steps: int
    batch_size: int
    log_every: int
    eval_every: int
    keep_every: int
    max_skipped_steps: int
    start_from: str
    data: DataConfig
    augment: AugmentConfig
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
        size, shift = self.data.image_size, self.augment.max_shift
        require(shift < size, "augment.max_shift", shift, f"under image_size = {size}")
        cut = self.augment.crop == "resized" or self.data.stored_size == size
        require(cut, "augment.crop", self.augment.crop, f"resized, as stored_size is not image_size = {size}")

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def with_experts(self, family: Family, form: Form, num_experts: int) -> "Config":
        """Returns the same run of another kind of model with that many experts; at most so many are selected."""
        top_k = min(self.model.top_k, num_experts)
        model = dataclasses.replace(self.model, family=family, form=form, num_experts=num_experts, top_k=top_k)
        return dataclasses.replace(self, model=model.canonical()).canonical()

    def canonical(self) -> "Config":
        """Resets the multipliers of parameters that the family lacks, so that equal runs have equal ones."""
        lacking: dict[Family, tuple[str, ...]] = {
            "dense": ("expert_multiplier", "angle_multiplier", "router_multiplier"),
            **dict.fromkeys(("standard", "ternary", "low_rank"), ("angle_multiplier",)),
        }
        neutral: dict[str, Any] = dict.fromkeys(lacking.get(self.model.family, ()), 1.0)
        return dataclasses.replace(self, optimizer=dataclasses.replace(self.optimizer, **neutral))

    def without_seeds(self) -> "Config":
        """Returns the same run with both seeds, its own and that of the images, 0: equal for runs of one kind."""
        return dataclasses.replace(self, seed=0, data=dataclasses.replace(self.data, seed=0))

    def digest(self) -> str:
        """Returns 12 hexadecimal digits that name this configuration."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


_SECTIONS: dict[str, type[Any]] = {
    "data": DataConfig,
    "augment": AugmentConfig,
    "model": ModelConfig,
    "loss": LossConfig,
    "optimizer": OptimizerConfig,
}


def resolve(raw: Mapping[str, Any]) -> Config:
    """Builds a `Config` from nested mappings as found in `configs/`.

    `raw["model"]` names a `variant` (`bvit_jax.model_config.VARIANTS`); a field of its shape that is present and not
    None replaces the variant's. Channels, classes and, where none is given, the image size come from the data, whose
    fixed properties are filled in here; a `seed` of the data of -1 is that of the run. An `expert_multiplier` of the
    optimiser that is None is that of the family.

    Raises:
        ConfigError: for a field that is unknown, missing, of the wrong type or impossible.
    """
    sections = dict(raw)
    raw_data = with_fixed(_section(sections, "data"))
    if raw_data.get("seed") == -1:
        raw_data["seed"] = sections.get("seed")
    data = _build(DataConfig, "data", raw_data)
    model = _section(sections, "model")
    variant = model.pop("variant", None)
    require(isinstance(variant, str) and variant in VARIANTS, "model.variant", variant, " or ".join(VARIANTS))
    shape_fields = [field.name for field in dataclasses.fields(VitShape)]
    given = {name: model[name] for name in shape_fields if model.get(name) is not None}
    shape = dataclasses.asdict(VARIANTS[variant]) | {"image_size": data.image_size} | given
    model = {name: value for name, value in model.items() if name not in shape_fields}
    derived = {"channels": data.channels, "num_classes": data.num_classes}
    optimizer = _section(sections, "optimizer")
    built: dict[str, Any] = {
        "data": data,
        "augment": _build(AugmentConfig, "augment", _section(sections, "augment")).canonical(),
        "model": _build(ModelConfig, "model", model | shape | derived).canonical(),
        "loss": _build(LossConfig, "loss", _section(sections, "loss")),
    }
    if optimizer.get("expert_multiplier", 1.0) is None:
        optimizer["expert_multiplier"] = EXPERT_MULTIPLIERS[built["model"].family]
    built["optimizer"] = _build(OptimizerConfig, "optimizer", optimizer)
    scalars = {name: value for name, value in sections.items() if name not in built}
    config: Config = _build(Config, "", scalars | built)
    return config.canonical()


def from_dict(stored: Mapping[str, Any]) -> Config:
    """Rebuilds a configuration from `Config.to_dict`.

    Raises:
        ConfigError: as `resolve`.
    """
    require(isinstance(stored, Mapping), "configuration", stored, "sections and fields")
    sections = dict(stored)
    built = {name: _build(cls, name, _section(sections, name)) for name, cls in _SECTIONS.items()}
    return _build(Config, "", sections | built)


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
