"""What the benchmark compares, as data: a case is one program, a row adds what came of it.

Cases of one job, size and top-k make a group and are compared with each other. Combinations that say little are left
out (`LEFT_OUT`).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self, get_args

from bvit_jax import butterfly
from bvit_jax.model_config import VARIANTS, Dispatch, Family, Form

Job = Literal["layer forward", "layer forward+backward", "train step"]
JOBS: tuple[Job, ...] = get_args(Job)
Group = tuple[Job, str, int]
"""Job, size and top-k."""
FORMS: tuple[Form, ...] = ("separate", "tied")
DISPATCHES: tuple[Dispatch, ...] = ("rows", "blocks", "fused", "auto")
MANY_EXPERTS = 64
"""Most experts of a training step: with 256 stored ones its state alone would take 11 GB at the size `paper`."""
LEFT_OUT = (
    "ternary mixtures, whose products are those of standard; low_rank ones; dense x k for k = 1, which is dense; "
    "mixtures of fewer experts than a token uses; fused where there is no TPU, as it would be interpreted; training "
    f"steps of more than {MANY_EXPERTS} experts, as the state of the stored ones outgrows common machines; and but at "
    "the last size and the largest top-k: training steps, the form tied (its rotations and products are those of "
    f"separate), and rotations of full depth (of up to {MANY_EXPERTS} experts)"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
        job: what it does; `layer forward+backward` also returns the gradients of parameters and input.
        size: name in `model_config.VARIANTS`.
        top_k: of the group; of a mixture, experts a token.
        family: of the layers.
        num_experts: 1 of a dense layer.
        form, dispatch, stages: of butterflies, as in `ModelConfig`; None for others.
        copies: times the group's tokens that a dense layer takes: k for what top-k costs without any routing.
    """

    job: Job
    size: str
    top_k: int
    family: Family
    num_experts: int = 1
    form: Form | None = None
    dispatch: Dispatch | None = None
    stages: int | None = None
    copies: int = 1

    @property
    def group(self) -> Group:
        """Cases of one group are compared with each other."""
        return self.job, self.size, self.top_k

    @property
    def name(self) -> str:
        """What it is but for the number of experts and the depth."""
        if self.copies > 1:
            return f"dense x {self.copies}"
        return " ".join(part for part in (self.family, self.dispatch, self.form) if part)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to time: all combinations that say something; if `brief`, neither `tied` nor full depth."""

    jobs: tuple[Job, ...]
    sizes: tuple[str, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    brief: bool = False

    def cases(self, stages: int) -> list[Case]:
        """Lists the cases group by group, with rotations of so many stages but where full depth is compared."""
        groups = [(job, size, top_k) for job in self.jobs for size in self.sizes for top_k in self.top_k]
        return [case for group in groups for case in self._group(*group, stages)]

    def _group(self, job: Job, size: str, top_k: int, stages: int) -> Iterator[Case]:
        case = functools.partial(Case, job, size, top_k)
        last, train = (size, top_k) == (self.sizes[-1], self.top_k[-1]), job == "train step"
        experts = [number for number in self.experts if number >= top_k and not (train and number > MANY_EXPERTS)]
        if not experts or (train and not last):
            return
        yield case("dense")
        if top_k > 1:
            yield case("dense", copies=top_k)
        yield from (case("standard", number) for number in experts)
        kinds = [
            (form, dispatch) for form in (FORMS if last and not self.brief else FORMS[:1]) for dispatch in DISPATCHES
        ]
        yield from (case("butterfly", number, *kind, stages) for kind in kinds for number in experts)
        few = [number for number in experts if number <= MANY_EXPERTS]
        if few and last and not train and not self.brief:
            shape = VARIANTS[size]
            deepest = butterfly.max_stages(max(shape.d_model, shape.d_ff))
            yield from (case("butterfly", few[-1], *kind, deepest) for kind in kinds)


@dataclasses.dataclass(frozen=True)
class OfCase:
    """What came of a case."""

    case: Case

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data without nesting: a row of a CSV file."""
        row = dataclasses.asdict(self)
        return row.pop("case") | {"name": self.case.name} | row

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Self:
        """Undoes `to_dict`."""
        case = Case(**{field.name: row[field.name] for field in dataclasses.fields(Case)})
        own = {field.name: row[field.name] for field in dataclasses.fields(cls) if field.name != "case"}
        return cls(case, **own)


@dataclasses.dataclass(frozen=True)
class Row(OfCase):
    """A case as timed; None where it did not run.

    Attributes:
        tokens: that go in, over all images.
        status: `ok`, `not on CPU` (of a kernel that would be interpreted there), `out of memory` or `failed`.
        error: why it did not run.
        rounds: times that it was timed.
        median_ms, lower_ms, upper_ms: median and quartiles over the rounds.
        relative: median over that of the group's dense program.
        temp_bytes: what the program holds beside inputs and outputs, by the compiler's account.
        flops: by the compiler's account, which counts the body of a loop once.
    """

    tokens: int
    status: str
    error: str = ""
    rounds: int = 0
    median_ms: float | None = None
    lower_ms: float | None = None
    upper_ms: float | None = None
    relative: float | None = None
    temp_bytes: int | None = None
    flops: float | None = None


def title(group: Group) -> str:
    """Names a group."""
    job, size, top_k = group
    return f"{job}, {size}, top-{top_k}"


FULL_DEPTH = ", full depth"


def lines(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Splits a group's rows by name, those of deeper rotations with `FULL_DEPTH`, and by number of experts."""
    little = min((row.case.stages for row in rows if row.case.stages), default=None)
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        name = row.case.name + ("" if row.case.stages in (None, little) else FULL_DEPTH)
        found.setdefault(name, {})[row.case.num_experts] = row
    return found
