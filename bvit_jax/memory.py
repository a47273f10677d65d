"""Memory ledger: the bytes of a model, component by component, from its shapes alone. MB are decimal, 10^6 bytes.

Two accountings stand side by side:

- `paper`, the formula of the ButterflyViT paper, for comparison with its figures: the expert matrices of the mixture
  layers alone, 1.58 bits a ternary weight, the stored bits of an angle or a weight; router, scales, biases, the index
  of pruned weights and the dense projection of the `reference` form left out.
- `full`, every byte of the exported file (`bvit_jax.packed_file`), its header included.
"""

import dataclasses
import functools
import re
from typing import Any

import jax

from bvit_jax import components, file_format
from bvit_jax.config import Config
from bvit_jax.model_config import ModelConfig
from bvit_jax.precision import PAPER_BITS
from bvit_jax.storage import Storage, StoredParam, as_trained, layout

_MATRICES: frozenset[str] = frozenset({"prototype", "experts", "ffn", "projection"})
"""Components whose scales stand in a row of their own; elsewhere they count as the component's."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One component of a model.

    Attributes:
        component: a name of `components.COMPONENTS`; `scales`, of the matrices of the feed-forward layers; `index`,
            which weights of pruned parameters are kept; or `header`, the bytes of the file before its tensors.
        params: numbers of the model that are stored; none for scales, index and header.
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
        bytes_full_ffn: bytes of the mixture layers' tensors, all counted: matrices, scales, angles, router, biases; of
            a dense model, which has none, those of its FFNs.
    """

    rows: tuple[Row, ...]
    bytes_full_ffn: int

    @property
    def params(self) -> int:
        """Numbers of the model that are stored: all that were trained, unless it is reduced."""
        return sum(row.params for row in self.rows)

    @property
    def bytes_paper(self) -> float:
        """Bytes by the paper's formula."""
        return sum(row.bytes_paper for row in self.rows)

    @property
    def bytes_full(self) -> int:
        """Bytes of the exported file."""
        return sum(row.bytes_full for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON: the rows and their sums."""
        sums = {name: getattr(self, name) for name in ("params", "bytes_paper", "bytes_full", "bytes_full_ffn")}
        return {"components": [dataclasses.asdict(row) for row in self.rows], **sums}


@functools.lru_cache(maxsize=1024)
def ledger(config: Config, storage: Storage | None = None) -> Ledger:
    """Counts the exported file of a model. No array is made, so any number of experts is at once.

    The `paper` accounting counts the mixture layers only; for a dense model, which has none, all its FFNs.

    Args:
        config: the run whose model it is; the file's header holds it, but for `start_from`.
        storage: number formats; by default those that the model is trained with.
    """
    storage = storage or as_trained(config.model)
    params = layout(config.model, storage)
    rows: dict[str, Row] = {}
    for stored in params:
        scale_bytes = 0 if stored.scale is None else stored.scale.nbytes
        paper = _paper_bytes(stored, config, storage)
        if stored.component in _MATRICES and scale_bytes:
            _add(rows, Row("scales", 0, 0.0, scale_bytes))
            scale_bytes = 0
        if stored.index is not None:
            _add(rows, Row("index", 0, 0.0, stored.index.nbytes))
        _add(rows, Row(stored.component, stored.numbers, paper, stored.values.nbytes + scale_bytes))
    names = (*components.COMPONENTS[:1], "scales", "index", *components.COMPONENTS[1:])
    return _with_header(tuple(rows[name] for name in names if name in rows), params, config, storage)


def _paper_bytes(stored: StoredParam, config: Config, storage: Storage) -> float:
    if stored.component == "angles":
        return stored.numbers * storage.angle_bits / 8
    in_formula = {"prototype", "experts"} if config.model.family != "dense" else {"ffn"}
    if stored.component not in in_formula or stored.encoding == "angles":
        return 0.0
    return stored.numbers * PAPER_BITS[stored.encoding] / 8


def _add(rows: dict[str, Row], row: Row) -> None:
    so_far = rows.get(row.component, Row(row.component, 0, 0.0, 0))
    rows[row.component] = Row(
        row.component,
        so_far.params + row.params,
        so_far.bytes_paper + row.bytes_paper,
        so_far.bytes_full + row.bytes_full,
    )


def _with_header(rows: tuple[Row, ...], params: tuple[StoredParam, ...], config: Config, storage: Storage) -> Ledger:
    """Adds the header's row. The header states its own size, so the size is raised until it is the one stated."""
    tensors = [tensor for stored in params for tensor in stored.tensors]
    of_mixtures = [stored for stored in params if in_mixture(stored, config.model)]
    bytes_full_ffn = sum(tensor.nbytes for stored in of_mixtures for tensor in stored.tensors)
    size = 0
    while True:
        found = Ledger((*rows, Row("header", 0, 0.0, size)), bytes_full_ffn)
        needed = file_format.header_bytes(tensors, metadata(config, storage, found))
        if needed == size:
            return found
        size = needed


def in_mixture(stored: StoredParam, model: ModelConfig) -> bool:
    """Whether a parameter belongs to a mixture layer or, in a dense model, to an FFN."""
    of_dense_layer = re.search(r"/ffn/(up|down)/", stored.path) is not None
    return "/ffn/" in stored.path and of_dense_layer == (model.family == "dense")


def metadata(config: Config, storage: Storage, ledger_: Ledger, digest: str = file_format.NO_DIGEST) -> str:
    """Returns the JSON text in the header of a model's file."""
    named = dataclasses.replace(config, start_from="").to_dict()  # a path means nothing elsewhere
    return file_format.metadata_text(named, storage.to_dict(), ledger_.to_dict(), digest)


def standard_ledger(config: Config) -> Ledger:
    """Counts the float32 standard mixture of equal shape and experts, against which compression is measured."""
    return ledger(standard_twin(config), Storage())


def standard_twin(config: Config) -> Config:
    """Returns the standard mixture of equal shape and experts."""
    model = dataclasses.replace(config.model, family="standard").canonical()
    return dataclasses.replace(config, model=model).canonical()


def count_params(params: Any) -> int:
    """Number of trained parameters of a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
