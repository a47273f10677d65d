"""Times dense, standard and butterfly layers and training steps side by side, and reads them from the TPU compiler.

    python -m experiments.bench --out=runs/bench
    python -m experiments.bench --out=runs/bench_quick --quick

Writes bench.csv, bench.json, compiled.csv, compiled.json, summary.md and plots/bench.png. All that is compared is timed
in turn in one process; times are given relative to the dense layer. Started again, it goes on. The table of the TPU
compiler needs no TPU, but libtpu (pip install -r requirements-tpu.txt); --notpu leaves it out.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from bvit_jax import bench_cases, bench_compiled, bench_report, config, topology
from bvit_jax.bench_cases import Case, Plan
from bvit_jax.bench_report import Sheet
from bvit_jax.config import Config
from bvit_jax.model_config import VARIANTS, ComputeDtype, ConfigError, require, require_choice
from configs import paper
from experiments import entry, number_flags, tables

DEFAULTS: dict[str, Any] = {
    "jobs": bench_cases.JOBS,
    "sizes": ("tiny", "small", "paper"),
    "experts": ("1", "8", "64", "256"),
    "top_k": ("1", "2"),
    "repetitions": 5,
    "tpu_sizes": ("paper", "vit_b16"),
}
QUICK: dict[str, Any] = {
    "jobs": ("layer forward",),
    "sizes": ("tiny",),
    "experts": ("4", "16"),
    "top_k": ("2",),
    "repetitions": 3,
    "tpu_sizes": ("paper",),
}


def _help(text: str, name: str) -> str:
    shown = [value if isinstance(value, int) else ",".join(value) for value in (DEFAULTS[name], QUICK[name])]
    return f"{text} {shown[0]} if left out; {shown[1]} with --quick."


_JOBS = flags.DEFINE_list("jobs", None, _help(f"Of {', '.join(bench_cases.JOBS)}; comma between.", "jobs"))
_SIZES = flags.DEFINE_list("sizes", None, _help(f"Shapes to time, of {', '.join(VARIANTS)}, comma between.", "sizes"))
_EXPERTS = flags.DEFINE_list("experts", None, _help("Numbers of experts, comma between.", "experts"))
_TOP_K = flags.DEFINE_list("top_k", None, _help("Experts a token, comma between.", "top_k"))
_REPETITIONS = flags.DEFINE_integer("repetitions", None, _help("Times that each is timed.", "repetitions"))
_TPU = flags.DEFINE_bool("tpu", True, "Add the table of the TPU compiler.")
_TPU_SIZES = flags.DEFINE_list("tpu_sizes", None, _help("Shapes to compile for a TPU, comma between.", "tpu_sizes"))
_QUICK = flags.DEFINE_bool("quick", False, "Do little: for a first look.")
_OUT = flags.DEFINE_string("out", None, "The directory to write to; made if absent, gone on with if not.")


def main(argv: Sequence[str]) -> None:
    """Times, compiles, writes the report and prints its tables."""
    del argv
    base = _base()
    plan = Plan(
        jobs=_chosen("jobs", _given(_JOBS), bench_cases.JOBS),
        sizes=_chosen("sizes", _given(_SIZES), tuple(VARIANTS)),
        experts=number_flags.numbers("experts", _given(_EXPERTS)),
        top_k=number_flags.numbers("top_k", _given(_TOP_K)),
        brief=_QUICK.value,
    )
    repetitions = _given(_REPETITIONS)
    require(repetitions >= 1, "repetitions", repetitions, "at least 1")
    timed = plan.cases(base.model.num_stages)
    require(bool(timed), "top_k", ",".join(map(str, plan.top_k)), f"at most the experts, {plan.experts[-1]}")
    compiled = _to_compile(base, plan)
    out = Path(str(_OUT.value))
    where = bench_report.describe(bench_report.machine())
    print(f"{where}, {base.model.compute_dtype}: {len(timed)} cases, and {len(compiled)} programs for a TPU")
    rows, found = bench_report.write(base, timed, compiled, repetitions, out)
    print(bench_report.LEGEND)
    for sheet in bench_report.sheets(rows):
        _show(sheet)
    print("\n".join(bench_report.facts(rows)))
    if found:
        print(f"\n{bench_report.COMPILED_LEGEND}")
    for sheet in bench_report.compiled_sheets(found):
        _show(sheet)
    print(f"report: config.json, {', '.join(bench_report.OUTPUTS)} in {out}")


def _base() -> Config:
    """Returns the run of configs/paper.py without rounding but of prototypes, in the dtype that suits the device."""
    dtype: ComputeDtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    resolved = config.resolve(paper.get_config("butterfly,64,separate").to_dict())
    model = dataclasses.replace(resolved.model, angle_bits=32, router_precision="float32", compute_dtype=dtype)
    return dataclasses.replace(resolved, model=model)


def _given(flag: Any) -> Any:
    return (QUICK if _QUICK.value else DEFAULTS)[flag.name] if flag.value is None else flag.value


def _chosen(flag: str, values: Sequence[str], choices: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the choices that are named, in their own order."""
    for value in values or [""]:
        require_choice(flag, value, choices)
    return tuple(choice for choice in choices if choice in values)


def _to_compile(base: Config, plan: Plan) -> list[Case]:
    sizes = _chosen("tpu_sizes", _given(_TPU_SIZES), tuple(VARIANTS))
    if not _TPU.value:
        return []
    try:
        topology.devices_of(bench_compiled.TOPOLOGY)
    except ConfigError as error:
        print(f"no table of the TPU compiler: {error}")
        return []
    experts, forms = (plan.experts[-1:], bench_cases.FORMS[:1]) if _QUICK.value else (plan.experts, bench_cases.FORMS)
    return bench_compiled.cases(plan.jobs, sizes, experts, base.model.num_stages, forms)


def _show(sheet: Sheet) -> None:
    print(f"\n{sheet.title}")
    made = tables.table(*sheet.heads[1:])
    for line in sheet.lines:
        made.add_row(*line)
    tables.show(made)


if __name__ == "__main__":
    flags.mark_flag_as_required("out")
    entry.run(main, resumes=True)
