"""Curves of bytes against experts, for every family, form and number format, counted from shapes alone."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import numpy as np

from bvit_jax import memory, packing, precision
from bvit_jax.config import Config
from bvit_jax.memory import Ledger
from bvit_jax.model_config import Family, Form
from bvit_jax.storage import Storage


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kind of model and how it is stored.

    Attributes:
        family, form: as in `ModelConfig`.
        storage: number formats.
    """

    family: Family
    form: Form
    storage: Storage

    @property
    def form_name(self) -> str:
        """The form of butterfly experts, `-` for the other families, which have none."""
        return self.form if self.family == "butterfly" else "-"

    @property
    def numbers(self) -> str:
        """What sets variants of one family and form apart: the format of angles, or of stored experts."""
        if self.family == "ternary":
            return "ternary"
        return f"{self.storage.angle_bits}-bit" if self.family == "butterfly" else self.storage.experts

    @property
    def kind(self) -> str:
        """Family and form, for people."""
        return f"{self.family} {self.form}" if self.family == "butterfly" else self.family

    @property
    def name(self) -> str:
        """A name for people."""
        return self.kind if self.kind == self.numbers else f"{self.kind} {self.numbers}"

    def key(self) -> dict[str, Any]:
        """Returns the columns that say which variant it is."""
        return {"family": self.family, "form": self.form_name, "numbers": self.numbers}


@dataclasses.dataclass(frozen=True)
class Point:
    """One variant at one number of experts.

    Attributes:
        variant: the kind of model.
        num_experts: E; 1 for a dense model.
        ledger: its bytes.
        standard: the bytes of the float32 standard mixture of as many experts.
    """

    variant: Variant
    num_experts: int
    ledger: Ledger
    standard: Ledger

    def key(self) -> dict[str, Any]:
        """Returns the columns that say which point it is."""
        return self.variant.key() | {"num_experts": self.num_experts}

    def totals(self) -> dict[str, Any]:
        """Returns the row of a table of totals: bytes, and how many times the standard mixture's they go into."""
        own, standard = self.ledger, self.standard
        row = self.key() | {"params": own.params}
        for name in ("bytes_paper", "bytes_full", "bytes_full_ffn"):
            row[name] = getattr(own, name)
            row[name.replace("bytes", "compression")] = getattr(standard, name) / getattr(own, name)
        return row

    def components(self) -> list[dict[str, Any]]:
        """Returns the rows of a table of components."""
        return [self.key() | dataclasses.asdict(row) for row in self.ledger.rows]


@dataclasses.dataclass(frozen=True)
class Growth:
    """How the bytes of the feed-forward layers (`full`) of one variant grow with the number of experts E.

    Attributes:
        variant: the kind of model.
        exponent: slope of the least-squares line of log bytes on log E, over all points.
        last: slope between the last two points, nearest to the limit of many experts.
        bytes_per_expert: added by each expert between the last two points.
    """

    variant: Variant
    exponent: float
    last: float
    bytes_per_expert: float


def all_variants(rest: Storage) -> list[Variant]:
    """Lists every family and form in all its number formats; what they do not vary is as in `rest`."""
    kinds = [Variant("dense", "separate", dataclasses.replace(rest, experts="float32"))]
    kinds += [standard(rest, experts) for experts in precision.PRECISIONS]
    kinds += [Variant("ternary", "separate", dataclasses.replace(rest, experts="float32"))]
    for form in get_args(Form):
        for bits in packing.ANGLE_BITS:
            kinds.append(Variant("butterfly", form, dataclasses.replace(rest, angle_bits=bits)))
    return kinds


def standard(rest: Storage, experts: precision.Precision) -> Variant:
    """Returns the standard mixture of this format; in float32 its router is too: the mixture all are compared with."""
    router = "float32" if experts == "float32" else rest.router
    return Variant("standard", "separate", dataclasses.replace(rest, experts=experts, router=router))


def points(config: Config, variants: Sequence[Variant], experts: Sequence[int]) -> list[Point]:
    """Counts each variant of a model at each number of experts (a dense one once)."""
    found = []
    for variant in variants:
        for num_experts in experts if variant.family != "dense" else (1,):
            own = with_experts(config, variant, num_experts)
            found.append(Point(variant, num_experts, memory.ledger(own, variant.storage), memory.standard_ledger(own)))
    return found


def with_experts(config: Config, variant: Variant, num_experts: int) -> Config:
    """Returns a run's configuration for another kind of model with that many experts; at most so many are selected."""
    return config.with_experts(variant.family, variant.form, num_experts)


def by_variant(points_: Iterable[Point]) -> dict[Variant, list[Point]]:
    """Groups points into one line a variant, in the order in which they come."""
    lines: dict[Variant, list[Point]] = {}
    for point in points_:
        lines.setdefault(point.variant, []).append(point)
    return lines


def growth(points_: Iterable[Point]) -> list[Growth]:
    """Fits the growth of each variant that has two numbers of experts or more."""
    lines = by_variant(points_).items()
    return [_growth(variant, line) for variant, line in lines if len({p.num_experts for p in line}) > 1]


def _growth(variant: Variant, line: Sequence[Point]) -> Growth:
    ordered = sorted(line, key=lambda point: point.num_experts)
    experts = np.array([point.num_experts for point in ordered], np.float64)
    bytes_ = np.array([point.ledger.bytes_full_ffn for point in ordered], np.float64)
    exponent = np.polyfit(np.log(experts), np.log(bytes_), 1)[0]
    last = np.log(bytes_[-1] / bytes_[-2]) / np.log(experts[-1] / experts[-2])
    per_expert = (bytes_[-1] - bytes_[-2]) / (experts[-1] - experts[-2])
    return Growth(variant, float(exponent), float(last), float(per_expert))
