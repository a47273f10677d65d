"""The benchmark's report: rows kept as they come, tables to read, and what follows from them.

- `bench.csv`, `bench.json`: a row a case (`bvit_jax.bench`); the JSON file also says on what machine.
- `compiled.csv`, `compiled.json`: a row a program compiled for a TPU (`bvit_jax.bench_compiled`).
- `summary.md`: both, to read; `plots/bench.png`: time against experts.
- `config.json`: of what, and where; a directory that holds another benchmark is refused.

A call that finds finished groups and programs goes on from there.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from tqdm import tqdm

from bvit_jax import bench, bench_cases, bench_compiled, files, plots, workdir
from bvit_jax.bench_cases import Case, Group, Row
from bvit_jax.bench_compiled import CompiledRow
from bvit_jax.config import Config
from bvit_jax.model_config import VARIANTS, ConfigError

OUTPUTS = ("bench.csv", "bench.json", "compiled.csv", "compiled.json", "summary.md", "plots")
LOCK_PATIENCE_SECONDS = 1.0
AnyRow = TypeVar("AnyRow", Row, CompiledRow)


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table to read; the first of `heads` is that of the names."""

    title: str
    heads: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def machine() -> dict[str, Any]:
    """Says what the benchmark runs on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"device_kind": jax.devices()[0].device_kind, "cores": cores, "jax": jax.__version__}


def write(
    base: Config, timed: Sequence[Case], compiled: Sequence[Case], repetitions: int, directory: Path
) -> tuple[list[Row], list[CompiledRow]]:
    """Times and compiles what is not there yet, and writes the report.

    Args:
        base: what the cases leave open.
        timed: what to time.
        compiled: what to compile for a TPU.
        repetitions: times that each case is timed.
        directory: where to; made if absent.

    Returns:
        The rows of `timed` and those of `compiled`.

    Raises:
        ConfigError: before anything is timed, if a case cannot be configured or the directory is another's.
    """
    for case in timed:
        bench.config_of(base, case)
    where = machine()
    identity = {"config": base.to_dict(), "machine": where, "repetitions": repetitions}
    workdir.claim(directory, "config.json", identity, OUTPUTS, flag="out")
    with workdir.locked(directory, LOCK_PATIENCE_SECONDS, flag="out"):
        rows = _time(base, timed, repetitions, directory, where)
        found = _compile(base, compiled, directory)
        every = sorted(rows.values(), key=lambda row: _place(row.case))
        built = sorted(found.values(), key=lambda row: (*_place(row.case)[:2], row.case.num_experts))
        files.write_text(directory / "summary.md", to_markdown(where, every, built))
        plots.bench_plot(every, describe(where), directory / "plots" / "bench.png")
    return [rows[case] for case in timed], [found[case] for case in compiled]


def _time(
    base: Config, wanted: Sequence[Case], repetitions: int, directory: Path, where: dict[str, Any]
) -> dict[Case, Row]:
    rows = {row.case: row for row in _read(directory / "bench.json", Row.from_dict)}
    # A group in which a case is missing is timed anew, with all that it had: ratios are of one run.
    missing = list(dict.fromkeys(case.group for case in wanted if case not in rows))
    anew = [case for case in dict.fromkeys((*rows, *wanted)) if case.group in missing]
    steps = (1 + repetitions) * sum(not bench.unfit(case) for case in anew)
    with tqdm(total=steps, unit="run", disable=None, leave=False) as bar:
        for group in missing:
            bar.set_description(bench_cases.title(group))
            cases = list(dict.fromkeys(case for case in (*rows, *wanted) if case.group == group))
            measured = bench.measure(base, cases, repetitions, bar.update)
            rows = {case: row for case, row in rows.items() if case.group != group}
            rows |= {row.case: row for row in measured}
            _write(directory / "bench.csv", rows.values(), where)
    return rows


def _compile(base: Config, wanted: Sequence[Case], directory: Path) -> dict[Case, CompiledRow]:
    path = directory / "compiled.csv"
    where = bench_compiled.compiler() if wanted else None
    rows = {row.case: row for row in _read(path.with_suffix(".json"), CompiledRow.from_dict, where)}
    missing = [case for case in wanted if case not in rows or rows[case].status == "failed"]
    for case in tqdm(missing, unit="program", disable=None, leave=False):
        rows[case] = bench_compiled.compile_case(base, case)
        _write(path, rows.values(), where)
    return rows


def _write(path: Path, rows: Iterable[Row | CompiledRow], where: dict[str, Any] | None) -> None:
    plain = [row.to_dict() for row in rows]
    files.write_text(path, files.to_csv(plain))
    files.write_json(path.with_suffix(".json"), {"machine": where, "rows": plain})


def _read(
    path: Path, from_dict: Callable[[dict[str, Any]], AnyRow], where: dict[str, Any] | None = None
) -> list[AnyRow]:
    """Reads rows, if there are any; of another machine than `where`, if that is given, none."""
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_text())
        rows = [from_dict(row) for row in stored["rows"]]
        return rows if where in (None, stored["machine"]) else []
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); restore it or choose another out") from None


def _place(case: Case) -> tuple[int, int, int]:
    """Sorts groups; cases added later come to where they belong."""
    return bench_cases.JOBS.index(case.job), list(VARIANTS).index(case.size), case.top_k


def describe(where: dict[str, Any]) -> str:
    """Says in a line what the benchmark ran on."""
    return f"{where['device_kind']}, cores: {where['cores']}, jax {where['jax']}"


def sheets(rows: Sequence[Row]) -> list[Sheet]:
    """Formats a table a group: time over that of the dense layer, and milliseconds, by number of experts."""
    return [_sheet(group, here) for group, here in _by_group(rows).items()]


def _sheet(group: Group, rows: Sequence[Row]) -> Sheet:
    shape = VARIANTS[group[1]]
    experts = sorted({row.case.num_experts for row in rows if row.case.family != "dense"})
    lines = []
    for name, line in bench_cases.lines(rows).items():
        # A dense layer has no experts: its one figure stands under every number.
        dense = all(row.case.family == "dense" for row in line.values())
        cells = [_cell(line.get(1 if dense else number)) for number in experts]
        spread = max((_spread(row) for row in line.values()), default=0)
        held = max(row.temp_bytes or 0 for row in line.values())
        ran = any(row.median_ms for row in line.values())
        lines.append((name, *cells, *((f"{100 * spread:.0f}", f"{held / 1e6:,.1f}") if ran else ("", ""))))
    size = f"d_model {shape.d_model}, d_ff {shape.d_ff}, {min(row.tokens for row in rows):,} tokens"
    heads = ("", *[_experts(number) for number in experts], "spread %", "temp MB")
    return Sheet(f"{bench_cases.title(group)}: {size}", heads, tuple(lines))


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return row.status if row.median_ms is None else f"{_number(row.relative)} ({_number(row.median_ms)})"


def _spread(row: Row) -> float:
    """Distance between the quartiles over the median."""
    return ((row.upper_ms or 0) - (row.lower_ms or 0)) / (row.median_ms or 1)


def facts(rows: Sequence[Row]) -> list[str]:
    """Says, group by group, what many experts cost over few, butterflies over stored experts, full depth over little.

    Few are the smallest number above 1: one expert is no mixture.
    """
    said = []
    for group, here in _by_group(rows).items():
        lines = {name: line for name, line in bench_cases.lines(here).items() if not name.startswith("dense")}
        little = {name: line for name, line in lines.items() if not name.endswith(bench_cases.FULL_DEPTH)}
        several = sorted({number for line in little.values() for number in line if number > 1})
        if len(several) > 1:
            few, many = several[0], several[-1]
            ratios = {name: _ratio(line.get(many), line.get(few)) for name, line in little.items()}
            said.append((group, f"{many} experts over {few}", ratios))
        stored = lines.get("standard", {})
        for number in several:
            ratios = {name: _ratio(line.get(number), stored.get(number)) for name, line in little.items()}
            said.append((group, f"butterfly over standard, {number} experts", ratios | {"standard": None}))
        ratios = {}
        for name, line in little.items():
            for number, row in lines.get(name + bench_cases.FULL_DEPTH, {}).items():
                ratios[name] = _ratio(row, line.get(number))
        said.append((group, "full depth over little", ratios))
    shown = [(group, what, _listed(ratios)) for group, what, ratios in said]
    return [f"{bench_cases.title(group)}, time of {what}: {ratios}" for group, what, ratios in shown if ratios]


def _ratio(one: Row | None, other: Row | None) -> float | None:
    if one is None or other is None or one.median_ms is None or other.median_ms is None:
        return None
    return one.median_ms / other.median_ms


def _listed(ratios: dict[str, float | None]) -> str:
    known = {name.removeprefix("butterfly "): ratio for name, ratio in ratios.items() if ratio is not None}
    return ", ".join(f"{name} {_number(ratio)}" for name, ratio in known.items())


def compiled_sheets(rows: Sequence[CompiledRow]) -> list[Sheet]:
    """Formats a table a job and size of what was compiled for a TPU."""
    made = []
    for job, size in dict.fromkeys((row.case.job, row.case.size) for row in rows):
        here = [row for row in rows if (row.case.job, row.case.size) == (job, size)]
        dense = next((row for row in here if row.case.family == "dense"), None)
        shape = VARIANTS[size]
        heads = (
            "",
            "experts",
            "HBM MB",
            "x",
            "accessed MB",
            "kernels MB",
            "GFLOP",
            "temp MB",
            "x",
            "peak MB",
            "status",
        )
        lines = tuple(_compiled_cells(row, dense) for row in here)
        made.append(
            Sheet(f"{job}, {size}: d_model {shape.d_model}, d_ff {shape.d_ff}, {here[0].rows:,} rows", heads, lines)
        )
    return made


def _compiled_cells(row: CompiledRow, dense: CompiledRow | None) -> tuple[str, ...]:
    def over(field: str) -> float | None:
        value, level = getattr(row, field), getattr(dense, field, None)
        return value / level if value is not None and level else None

    return (
        *(row.case.name, str(row.case.num_experts)),
        *(_number(row.hbm_bytes, 1e6), _number(over("hbm_bytes")), _number(row.accessed_bytes, 1e6)),
        *(_number(row.kernel_bytes, 1e6), _number(row.matmul_flops, 1e9)),
        *(_number(row.temp_bytes, 1e6), _number(over("temp_bytes")), _number(row.peak_bytes, 1e6), row.status),
    )


LEGEND = (
    "Time over that of the dense layer of the same table, and median milliseconds in brackets. dense x k: the dense "
    "layer on k times the tokens, which is top-k work without any routing; of a training step, the whole model on k "
    "times the images. spread: the largest distance between quartiles, over the median. temp: what the program holds "
    "beside inputs and outputs, at most, by the compiler's account. Not timed: "
    f"{bench_cases.LEFT_OUT}."
)
COMPILED_LEGEND = (
    f"One chip of {bench_compiled.TOPOLOGY}, bfloat16, by the TPU compiler (libtpu); nothing ran. rows: tokens times "
    "experts a token. HBM: read and written, as the program has it, the loops of blocks as often as they may run at "
    "most; accessed: the compiler's own figure, which counts the body of a loop once; kernels: what Pallas kernels say "
    "that they move, the fused ones by their block specs where rows fall evenly on experts, those of the standard "
    "mixture (Megablox) by their own estimate. x: over the dense program of as many rows."
)


def to_markdown(where: dict[str, Any], rows: Sequence[Row], compiled: Sequence[CompiledRow]) -> str:
    """Formats all tables, and what follows from them."""
    parts = [f"Timed on {describe(where)}.", LEGEND, *map(_markdown, sheets(rows))]
    parts.append("\n".join(f"- {fact}" for fact in facts(rows)))
    if compiled:
        parts += [COMPILED_LEGEND, *map(_markdown, compiled_sheets(compiled))]
    broken = [(row.case, row.error) for row in rows] + [(row.case, row.error) for row in compiled]
    errors = dict.fromkeys(f"- {case.job}, {case.size}, {case.name}: {error}" for case, error in broken if error)
    parts.append("\n".join(errors))
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(sheet: Sheet) -> str:
    table = [sheet.heads, ("---",) * len(sheet.heads), *sheet.lines]
    return "\n".join([f"### {sheet.title}", "", *["| " + " | ".join(cells) + " |" for cells in table]])


def _by_group(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case.group, []).append(row)
    return groups


def _experts(number: int) -> str:
    return "1 expert" if number == 1 else f"{number:,} experts"


def _number(value: float | None, unit: float = 1) -> str:
    """Formats to three figures, and thousands whole."""
    if value is None:
        return ""
    return f"{value / unit:,.0f}" if value >= 1000 * unit else f"{value / unit:.3g}"
