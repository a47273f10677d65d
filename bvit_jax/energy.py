"""A model of the energy of one inference step in the mixture layers: weights moved, activations moved, arithmetic.

**It is a model, not a measurement**: operations and bytes counted from shapes, each at a price from the literature.

Prices, picojoules in a 45 nm process at 0.9 V:

    float32 add 0.9, multiply 3.7; int8 add 0.03, multiply 0.2; int32 add 0.1, multiply 3.1          [1]
    cache, 64 bits read: 8 KB 10, 32 KB 20, 1 MB 100; DRAM, 64 bits: 1,300 to 2,600                  [1]
    DRAM (LPDDR2), 32 bits: 640; SRAM of 32 KB, 32 bits: 5; float32 and int32 arithmetic as in [1]   [2, Table I]

Taken here: float32 arithmetic; DRAM at 640 pJ / 4 bytes = 160 pJ a byte [2], just under the range of [1], 162.5 to 325,
so that weights and their saving are priced low; on-chip memory at 100 pJ / 8 bytes = 12.5 pJ a byte, the 1 MB of [1],
read or written.

**Counted**, for one step of n images through all mixture layers (of a dense model, which has none, all FFNs):

- Weights: every stored byte that the step touches is read once from DRAM; nothing stays on the chip from step to step.
  Tensors of experts (matrices, scales, biases, angles) count by the expected share of experts touched; prototypes,
  routers, shared biases and the projection count whole. A token's K experts are taken as K distinct ones drawn evenly,
  each token for itself, so of E experts E (1 - (1 - K / E)^tokens) are touched. Real routers are less even.
- Activations: float32, read from and written to on-chip memory. The router reads D and writes E numbers a token; each
  matrix product reads its inputs and writes its outputs; the weighted sum reads K rows and writes one. Of `low_rank`
  experts the shared up product is made once a token, and the thin products, two for each side of a row, add to what
  the shared one has written, which they read.
- Rotations: their activations, apart. Each stage reads and writes both members of a pair and reads its sine and cosine:
  6 numbers an angle. A kernel that keeps rows on chip, as the project's own for TPUs does (`bvit_jax/kernels`), moves
  next to none of them, so the saving is given both ways, with them and (`saving_fused`) without.
- Arithmetic: a weight is a multiply and an add (float32, bfloat16, integers), or for ternary weights one add, zeros
  included. Scales are one multiply an output (of a `tied` prototype run backwards, an input). A pair turned is 4
  multiplies and 2 adds. Router and weighted sum are multiply-adds.

Left out in all families: additions of biases, GELU, softmax, control, leakage, decoding of packed codes. Left out in
butterflies alone: making sines and cosines, once for each expert touched (a table of 256 entries at 8 bits).

**Why it does not give the paper's 99.5 %**, the result of another model. With one image, DRAM traffic is nearly all of
the standard mixture's energy, and its saving is 1 - 1/c, with c the compression of the bytes touched: it rises with the
number of experts and falls with the bits of an angle. Arithmetic and activations shrink far less. With more images a
step, more rows share each weight read, arithmetic and activations weigh more, and the saving falls towards theirs
alone: ternary adds cost 0.9 pJ where multiply-adds cost 4.6, but stages of rotations move several times the activations
of the products. For `configs/paper.py` (64 experts, `tied` or `separate`, 8-bit angles) weights alone save 99.7 to
99.9 %, everything 98.7 to 98.9 % at one image, 62 % at 128, and towards 43 % beyond; fused, 99.3 to 99.4 % at one image
and 82 % at 128. A ternary standard mixture, without rotations, saves less than either at one image, and at 128 more
than the one and less than the other.

References:
    [1] M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014.
    [2] S. Han et al., "EIE: Efficient Inference Engine on Compressed Deep Neural Network", arXiv 1602.01528.
"""

import dataclasses
from collections.abc import Sequence

from bvit_jax import butterfly, memory, reductions, rotated, scaling
from bvit_jax.config import Config
from bvit_jax.model_config import ModelConfig, require
from bvit_jax.storage import Encoding, Storage, StoredParam, expert_precision, layout

FLOAT_ADD = 0.9
"""Picojoules of a float32 addition."""
FLOAT_MULTIPLY = 3.7
"""Picojoules of a float32 multiplication."""
DRAM_BYTE = 640 / 4
"""Picojoules of a byte read from DRAM."""
SRAM_BYTE = 100 / 8
"""Picojoules of a byte read from or written to on-chip memory of 1 MB."""
PAPER_SAVING = 0.995
"""As reported in the paper (arXiv 2603.06746); its model is not public."""

_FLOAT_BYTES = 4
_MULTIPLY_ADD = FLOAT_MULTIPLY + FLOAT_ADD
_TURN = 4 * FLOAT_MULTIPLY + 2 * FLOAT_ADD
_NUMBERS_A_TURN = 6


@dataclasses.dataclass(frozen=True)
class Energy:
    """Energy of one step by this model, picojoules.

    Attributes:
        weights: of reading stored weights from DRAM.
        activations: of moving activations in on-chip memory, but for
        rotations: those between the stages of rotations.
        arithmetic: of additions and multiplications.
    """

    weights: float
    activations: float
    rotations: float
    arithmetic: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.weights + self.activations + self.rotations + self.arithmetic


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One row of a table of energies, picojoules a step.

    Attributes:
        variant: its name.
        num_experts: E.
        images: images a step.
        weights, activations, rotations, arithmetic, total: as in `Energy`.
        saving: share of the float32 standard mixture's total that is saved.
        saving_fused: likewise, if the rotations moved nothing.
        saving_weights: share of the energy of its weights that is saved.
    """

    variant: str
    num_experts: int
    images: int
    weights: float
    activations: float
    rotations: float
    arithmetic: float
    total: float
    saving: float
    saving_fused: float
    saving_weights: float


@dataclasses.dataclass(frozen=True)
class _Work:
    """Float32 numbers moved in on-chip memory, by rotations and otherwise, and picojoules of arithmetic."""

    numbers: float = 0
    arithmetic: float = 0.0
    turned: float = 0

    def __add__(self, other: "_Work") -> "_Work":
        turned = self.turned + other.turned
        return _Work(self.numbers + other.numbers, self.arithmetic + other.arithmetic, turned)

    def __mul__(self, times: int) -> "_Work":
        return _Work(self.numbers * times, self.arithmetic * times, self.turned * times)


def step(model: ModelConfig, storage: Storage, images: int = 1) -> Energy:
    """Returns the energy of one inference step in the mixture layers (module docstring: what is counted).

    Args:
        model: the model.
        storage: how its weights are stored.
        images: images a step.

    Raises:
        ConfigError: for no images.
    """
    require(images >= 1, "images", images, "at least 1")
    rows, columns = model.grid
    tokens = images * (rows * columns + 1)
    layers = model.num_layers if model.family == "dense" else sum(model.is_moe_by_layer)
    require(
        storage.reductions == reductions.NONE,
        "storage.reductions",
        storage.reductions,
        "none: their work is not modelled",
    )
    work = (_per_token(model, storage) + _per_row(model, storage) * model.top_k) * (layers * tokens)
    return Energy(
        weights=DRAM_BYTE * weight_bytes(model, storage, tokens),
        activations=SRAM_BYTE * _FLOAT_BYTES * work.numbers,
        rotations=SRAM_BYTE * _FLOAT_BYTES * work.turned,
        arithmetic=work.arithmetic,
    )


def experts_touched(num_experts: int, top_k: int, tokens: int) -> float:
    """Returns the expected number of experts that any of the tokens chooses, each K distinct ones drawn evenly."""
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


def weight_bytes(model: ModelConfig, storage: Storage, tokens: int) -> float:
    """Returns the expected stored bytes of the mixture layers that a step of so many tokens touches."""
    share = experts_touched(model.num_experts, model.top_k, tokens) / model.num_experts
    return sum(
        sum(tensor.nbytes for tensor in stored.tensors) * (share if _belongs_to_experts(stored, model) else 1)
        for stored in layout(model, storage)
        if memory.in_mixture(stored, model)
    )


def _belongs_to_experts(stored: StoredParam, model: ModelConfig) -> bool:
    """Whether a tensor has an axis of experts that a step reads in part; a router is read whole."""
    if model.family == "low_rank":
        return stored.path.endswith(("_left", "_right"))
    return stored.component in ("experts", "angles") or (model.stores_experts and stored.component == "ffn_bias")


def _per_row(model: ModelConfig, storage: Storage) -> _Work:
    """Returns the work of one token in one of its experts, or in a dense FFN."""
    d_model, d_ff = model.d_model, model.d_ff
    encoding = expert_precision(model, storage)
    if model.family == "low_rank":
        thin = _difference(model, d_model, d_ff, encoding) + _difference(model, d_ff, d_model, encoding)
        return thin + _product(d_ff, d_model, encoding, d_model)
    if model.family != "butterfly":
        return _product(d_model, d_ff, encoding, d_ff) + _product(d_ff, d_model, encoding, d_model)
    one_way = _product(d_model, d_ff, encoding, d_ff) + _turns(model, "D") + _turns(model, "F")
    if model.form == "reference":
        return one_way
    back = _product(d_ff, d_model, encoding, d_ff if model.form == "tied" else d_model)
    return one_way + back + _turns(model, "D") + _turns(model, "F")


def _per_token(model: ModelConfig, storage: Storage) -> _Work:
    """Returns the work of one token outside its experts.

    That is the router and the weighted sum, in `reference` the projection, and of `low_rank` the shared up product.
    """
    if model.family == "dense":
        return _Work()
    reference = model.family == "butterfly" and model.form == "reference"
    width = model.d_ff if reference else model.d_model
    work = _product(model.d_model, model.num_experts, storage.router, model.num_experts)
    work += _Work((model.top_k + 1) * width, model.top_k * width * _MULTIPLY_ADD)
    if model.family == "low_rank":
        work += _product(model.d_model, model.d_ff, storage.experts, model.d_ff)
    return work + _product(width, model.d_model, storage.experts, model.d_model) if reference else work


def _difference(model: ModelConfig, inputs: int, outputs: int, encoding: Encoding) -> _Work:
    """Returns the work of one row times a difference of low rank, added to the outputs of the shared product."""
    thin = _product(inputs, model.rank, encoding, model.rank) + _product(model.rank, outputs, encoding, outputs)
    return thin + _Work(outputs)


def _product(inputs: int, outputs: int, encoding: Encoding, scales: int) -> _Work:
    """Returns the work of one row times a matrix whose stored form needs so many multiplications by scales."""
    per_weight = FLOAT_ADD if encoding == "ternary" else _MULTIPLY_ADD
    scaled = 0 if encoding in ("float32", "bfloat16") else scales
    return _Work(inputs + outputs, inputs * outputs * per_weight + scaled * FLOAT_MULTIPLY)


def _turns(model: ModelConfig, side: str) -> _Work:
    """Returns the work of rotating one row of a side, D or F."""
    angles = butterfly.num_angles(rotated.stages_of(model, side))
    return _Work(0, _TURN, _NUMBERS_A_TURN) * angles


def saving(standard: float, own: float) -> float:
    """Returns the share of the standard mixture's energy that is saved; negative if more is spent."""
    return 1 - own / standard


def compare(config: Config, variants: Sequence[scaling.Variant], images: int = 1) -> list[Comparison]:
    """Compares variants of a model, of as many experts, with its float32 standard twin.

    Args:
        config: the run whose model it is; its family and form are replaced.
        variants: the kinds of model and how they are stored.
        images: images a step.

    Returns:
        A row for each variant.
    """
    standard = step(memory.standard_twin(config).model, Storage(), images)
    return [_compared(config, variant, images, standard) for variant in variants]


def _compared(config: Config, variant: scaling.Variant, images: int, standard: Energy) -> Comparison:
    model = scaling.with_experts(config, variant, config.model.num_experts).model
    own = step(model, variant.storage, images)
    parts = dataclasses.asdict(own) | {"total": own.total}
    savings = {
        "saving": saving(standard.total, own.total),
        "saving_fused": saving(standard.total, own.total - own.rotations),
        "saving_weights": saving(standard.weights, own.weights),
    }
    return Comparison(variant=variant.name, num_experts=model.num_experts, images=images, **parts, **savings)
