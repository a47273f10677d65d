"""What compiled steps take, as data: a case is what is compiled, a row adds what came of it."""

import dataclasses
from typing import Any, Literal, get_args

from bvit_jax.model_config import Family

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    *("ragged-all-to-all", "collective-permute", "collective-broadcast"),
)
"""Of collectives, as `bvit_jax.hlo` names them."""
Step = Literal["train", "eval"]
STEPS: tuple[Step, ...] = get_args(Step)
Status = Literal["fits", "does not fit", "failed"]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one compiled step takes; bytes and flops are of one device and one step, None where there is no program.

    Attributes:
        status: `fits`, `does not fit` (into the device's HBM, by the compiler's word) or `failed`.
        data_axis, expert_axis, model_axis: devices along the axes of the mesh.
        argument_bytes, output_bytes: of what goes in and comes out; `alias_bytes` of these share memory.
        temp_bytes: of activations and all else in between.
        peak_bytes: all at once; where it does not fit, what the compiler says that it would need.
        hbm_bytes: what a program may have of the device's memory.
        matmul_flops: of matrix products, two a multiply-add; with empty slots of stored experts, without the further
            rounds that uneven routing takes (`bvit_jax.exchange`), which no figure here holds.
        traffic_bytes: read from and written to HBM.
        open_loops: loops that count once here, as the program does not say how often they run.
        collective_bytes: sum of what goes into collectives (or comes out, if that is more), by kind in `by_kind`.
        by_kind: bytes by kind of collective, such as all-reduce.
        flops_unlooped, accessed_unlooped: the compiler's own figures, which count the body of a loop once.
        compile_seconds: of lowering and compiling, on the machine that did it.
        error: why it failed.
    """

    status: Status
    data_axis: int
    expert_axis: int
    model_axis: int
    hbm_bytes: int
    peak_bytes: int | None = None
    argument_bytes: int | None = None
    output_bytes: int | None = None
    alias_bytes: int | None = None
    temp_bytes: int | None = None
    matmul_flops: int | None = None
    traffic_bytes: int | None = None
    open_loops: int | None = None
    collective_bytes: int | None = None
    by_kind: dict[str, int] = dataclasses.field(default_factory=dict)
    flops_unlooped: float | None = None
    accessed_unlooped: float | None = None
    compile_seconds: float | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile.

    Attributes:
        topology: such as `v5e:4x4`.
        devices: of the topology.
        family, form: of the model; the form is `-` but for butterflies.
        num_experts: 1 for a dense model.
        step: `train` or `eval`.
    """

    topology: str
    devices: int
    family: Family
    form: str
    num_experts: int
    step: Step


@dataclasses.dataclass(frozen=True)
class Row:
    """A case and what came of it."""

    case: Case
    compiled: Compiled

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data without nesting: a row of `compiled.csv`."""
        row = dataclasses.asdict(self.case) | dataclasses.asdict(self.compiled)
        by_kind = row.pop("by_kind")
        fits = self.compiled.status == "fits"
        return row | {_column(kind): by_kind.get(kind, 0) if fits else None for kind in KINDS}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "Row":
        """Undoes `to_dict`."""
        by_kind = {kind: row[_column(kind)] for kind in KINDS if row[_column(kind)]}
        compiled = {field.name: row[field.name] for field in dataclasses.fields(Compiled) if field.name != "by_kind"}
        case = {field.name: row[field.name] for field in dataclasses.fields(Case)}
        return cls(Case(**case), Compiled(by_kind=by_kind, **compiled))


def _column(kind: str) -> str:
    return f"{kind.replace('-', '_')}_bytes"
