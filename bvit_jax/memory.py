"""Memory ledger: the bytes of a model, component by component, from its shapes alone. MB are decimal, 10^6 bytes.

Two accountings stand side by side:

- `paper`, the formula of the ButterflyViT paper, for comparison with its figures: the expert matrices of the mixture
  layers alone, 1.58 bits a ternary weight, 4 bytes an angle or a stored weight; router, scales, biases and the dense
  projection of the `reference` form left out.
- `full`, every byte of the model's tensors as stored for inference: ternary weights at 5 a byte (3^5 = 243 <= 256), one
  float32 scale per output row (or tensor), and 4 bytes for every other number; backbone, router and biases included.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, get_args

import jax

from bvit_jax import components, vit
from bvit_jax.model_config import Form, ModelConfig

PAPER_BITS_PER_TRIT = 1.58
TRITS_PER_BYTE = 5
FLOAT_BYTES = 4

_MIXTURE: frozenset[components.Component] = frozenset(
    {"prototype", "angles", "router", "experts", "ffn", "projection", "ffn_bias"}
)
_PAPER_MATRICES: frozenset[components.Component] = frozenset({"experts", "ffn", "angles"})


@dataclasses.dataclass(frozen=True)
class Row:
    """One component of a model.

    Attributes:
        component: a name of `components.COMPONENTS`, or `scales` for the scales of the prototypes.
        params: stored numbers.
        bytes_paper, bytes_full: in the two accountings; `bytes_paper` need not be whole (1.58 bits).
    """

    component: str
    params: int
    bytes_paper: float
    bytes_full: int


@dataclasses.dataclass(frozen=True)
class Ledger:
    """All components of a model.

    Attributes:
        rows: one per component that the model has.
    """

    rows: tuple[Row, ...]

    @property
    def params(self) -> int:
        """Trained numbers: scales are derived from the prototypes, so they are not counted."""
        return sum(row.params for row in self.rows if row.component != "scales")

    @property
    def bytes_paper(self) -> float:
        """Bytes by the paper's formula."""
        return sum(row.bytes_paper for row in self.rows)

    @property
    def bytes_full(self) -> int:
        """Bytes of all tensors of the model as stored for inference."""
        return sum(row.bytes_full for row in self.rows)

    @property
    def bytes_full_ffn(self) -> int:
        """Bytes of the feed-forward layers alone, all counted: matrices, scales, angles, router, biases."""
        return sum(row.bytes_full for row in self.rows if row.component in _MIXTURE | {"scales"})


@functools.lru_cache(maxsize=256)
def ledger(config: ModelConfig) -> Ledger:
    """Counts a model. No array is made, so any number of experts is at once.

    The `paper` accounting counts the mixture layers only; for a dense model, which has none, all its FFNs.
    """
    params: dict[str, int] = {}
    paper: dict[str, float] = {}
    full: dict[str, int] = {}

    def add(component: str, number: int, bytes_paper: float, bytes_full: int) -> None:
        params[component] = params.get(component, 0) + number
        paper[component] = paper.get(component, 0.0) + bytes_paper
        full[component] = full.get(component, 0) + bytes_full

    for key_path, leaf in jax.tree_util.tree_leaves_with_path(vit.param_shapes(config)):
        component = components.component_of(components.path_of(key_path))
        if component == "prototype":
            layers, inputs, outputs = leaf.shape
            scales = outputs if config.ternary_scale == "row" else 1
            add(component, leaf.size, leaf.size * PAPER_BITS_PER_TRIT / 8, layers * packed_bytes(inputs * outputs))
            add("scales", layers * scales, 0.0, layers * scales * FLOAT_BYTES)
            continue
        counted = component in _PAPER_MATRICES and (component != "ffn" or config.family == "dense")
        add(component, leaf.size, float(leaf.size * FLOAT_BYTES) if counted else 0.0, leaf.size * FLOAT_BYTES)
    order = [name for name in (*components.COMPONENTS[:1], "scales", *components.COMPONENTS[1:]) if name in params]
    return Ledger(tuple(Row(name, params[name], paper[name], full[name]) for name in order))


def standard_twin(config: ModelConfig) -> ModelConfig:
    """Returns the standard mixture of equal shape and experts, against which compression is measured."""
    return dataclasses.replace(config, family="standard").canonical()


def packed_bytes(trits: int) -> int:
    """Bytes of that many ternary weights at 5 a byte."""
    return math.ceil(trits / TRITS_PER_BYTE)


def count_params(params: Any) -> int:
    """Number of trained parameters of a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@dataclasses.dataclass(frozen=True)
class ScalingRow:
    """One point of a curve of bytes against experts.

    Attributes:
        family, form: as in `ModelConfig`; the form is `-` for families other than butterfly.
        num_experts: E.
        bytes_paper, bytes_full, bytes_full_ffn: as in `Ledger`.
        compression_paper, compression_full, compression_full_ffn: bytes of the standard mixture over these.
    """

    family: str
    form: str
    num_experts: int
    bytes_paper: float
    bytes_full: int
    bytes_full_ffn: int
    compression_paper: float
    compression_full: float
    compression_full_ffn: float


def scaling(config: ModelConfig, experts: Sequence[int]) -> list[ScalingRow]:
    """Counts the standard mixture and every butterfly form of one shape at each number of experts."""
    rows = []
    kinds: list[dict[str, Any]] = [{"family": "standard"}]
    kinds += [{"family": "butterfly", "form": form} for form in get_args(Form)]
    for kind in kinds:
        for num_experts in experts:
            top_k = min(config.top_k, num_experts)
            own_config = dataclasses.replace(config, num_experts=num_experts, top_k=top_k, **kind).canonical()
            own, standard = ledger(own_config), ledger(standard_twin(own_config))
            rows.append(
                ScalingRow(
                    family=kind["family"],
                    form=kind.get("form", "-"),
                    num_experts=num_experts,
                    bytes_paper=own.bytes_paper,
                    bytes_full=own.bytes_full,
                    bytes_full_ffn=own.bytes_full_ffn,
                    compression_paper=standard.bytes_paper / own.bytes_paper,
                    compression_full=standard.bytes_full / own.bytes_full,
                    compression_full_ffn=standard.bytes_full_ffn / own.bytes_full_ffn,
                )
            )
    return rows
