"""Compiles the training and evaluation step of a model for TPU slices, without a TPU, and says what they take.

    python -m experiments.compile_tpu --config=configs/paper.py --topology=v5e:4x4 --experts=1,4,16,64 --out=runs/tpu

The compiler is the real one (libtpu), so bytes on a chip, traffic between chips, and whether it fits are measured; run
time is not. Started again, it goes on; more experts, families and topologies can be added to the same directory.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from bvit_jax import compile_report, config
from bvit_jax.compiled import Row
from bvit_jax.model_config import Family, require_choice
from experiments import entry, mesh_flags, number_flags, tables

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration file, e.g. configs/paper.py.")
_TOPOLOGY = flags.DEFINE_list("topology", ["v5e:4x4"], "Slices, comma between, such as v5e:4x4,v5p:2x2x1.")
_EXPERTS = flags.DEFINE_list("experts", [str(4**power) for power in range(7)], "Numbers of experts, comma between.")
_FAMILIES = flags.DEFINE_list(
    "families",
    ["butterfly", "standard", "dense"],
    "Of butterfly or low_rank, whichever the configuration is of, ternary, standard, dense; comma between.",
)
flags.adopt_module_key_flags(mesh_flags)
_OUT = flags.DEFINE_string("out", None, "The directory to write to; made if absent, gone on with if not.")


def main(argv: Sequence[str]) -> None:
    """Compiles, writes the report and prints its tables."""
    del argv
    jax.config.update("jax_platforms", "cpu")  # the compiler alone: a TPU, if there is one, is left to others
    resolved = config.resolve(entry.read_config(_CONFIG))
    experts = number_flags.numbers("experts", _EXPERTS.value)
    families: list[Any] = _FAMILIES.value or [""]
    for family in families:
        require_choice("families", family, get_args(Family))
    cases = compile_report.cases(resolved, _TOPOLOGY.value or [""], families, experts)
    print(f"{compile_report.describe(resolved)}: {len(cases)} programs")
    out = Path(str(_OUT.value))
    rows = compile_report.write(resolved, mesh_flags.layout(), cases, out, _say)
    print(compile_report.LEGEND)
    for name in dict.fromkeys(case.topology for case in cases):
        here = [row for row in rows if row.case.topology == name]
        print(f"\n{name}, {here[0].case.devices} devices")
        _show(here)
    print("\n".join(compile_report.limits(rows)))
    print(f"report: config.json, {', '.join(compile_report.OUTPUTS)} in {out}")


def _name(row: Row) -> str:
    case = row.case
    kind = case.family if case.form == "-" else f"{case.family} {case.form}"
    return f"{case.step} {kind} {case.num_experts}"


def _say(row: Row) -> None:
    found = compile_report.cells(row)
    peak = f"peak {found['peak GB']} GB" if found["peak GB"] else row.compiled.error
    tqdm.write(f"{row.case.topology} {_name(row)}: {found['status']}, {peak}")


def _show(rows: Sequence[Row]) -> None:
    made = tables.table(*compile_report.cells(rows[0]))
    for row in rows:
        made.add_row(_name(row), *compile_report.cells(row).values())
    tables.show(made)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "out"])
    entry.run(main, resumes=True)
