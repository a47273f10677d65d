"""What a model takes on TPU slices, as it grows with its experts: tables and a picture from compiled programs.

- `compiled.csv`, `compiled.json`: a row for each topology, family, number of experts and step.
- `summary.md`: the same, to read; `plots/compiled.png`: memory and traffic between chips against experts.
- `config.json`: of what; a directory that holds another model is refused.

Rows are kept as they come, and a call that finds them goes on from there.
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bvit_jax import files, plots, sharding, topology, workdir
from bvit_jax.compiled import KINDS, STEPS, Case, Row
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError, Family, require
from bvit_jax.sharding import Layout

OUTPUTS = ("compiled.csv", "compiled.json", "summary.md", "plots")
LOCK_PATIENCE_SECONDS = 1.0


def cases(config: Config, topologies: Sequence[str], families: Sequence[Family], experts: Sequence[int]) -> list[Case]:
    """Lists what to compile; a dense model comes once a topology.

    Raises:
        ConfigError: for a topology that does not exist, or a configuration without the fields of a family wanted.
    """
    if "butterfly" in families:
        require(config.model.family == "butterfly", "model.family", config.model.family, "butterfly, to compile one")
    if "low_rank" in families:
        require(config.model.family == "low_rank", "model.family", config.model.family, "low_rank, to compile one")
    if "ternary" in families:
        has_scale = config.model.has_ternary_experts
        require(has_scale, "model.family", config.model.family, "ternary or butterfly, to compile a ternary one")
    found = []
    for name in dict.fromkeys(topologies):
        devices = len(topology.devices_of(name))
        for family in dict.fromkeys(families):
            form = config.model.form if family == "butterfly" else "-"
            numbers = experts if family != "dense" else (1,)
            found += [Case(name, devices, family, form, number, step) for number in numbers for step in STEPS]
    return found


def write(
    config: Config, layout: Layout, wanted: Sequence[Case], directory: Path, on_row: Callable[[Row], None]
) -> list[Row]:
    """Compiles what is not there yet and writes the report.

    Args:
        config: the model; its family and number of experts are those of each case.
        layout: of the mesh.
        wanted: what to compile.
        directory: where to; made if absent.
        on_row: called with each row when it is compiled.

    Returns:
        The rows of `wanted`.

    Raises:
        ConfigError: before anything is compiled, if a model does not divide over a mesh or the directory is another's.
    """
    for case in wanted:
        model = _config_of(config, case).model
        try:
            sharding.mesh_shape(model, config.batch_size, layout, case.devices)
        except ConfigError as error:
            raise ConfigError(f"{case.family}, {case.num_experts} experts on {case.topology}: {error}") from None
    workdir.claim(directory, "config.json", _identity(config, layout), OUTPUTS, flag="out")
    with workdir.locked(directory, LOCK_PATIENCE_SECONDS, flag="out"):
        rows = {row.case: row for row in read(directory)}
        missing = [case for case in wanted if case not in rows or rows[case].compiled.status == "failed"]
        for case in tqdm(missing, unit="program", disable=None, leave=False):
            compiled = topology.compile_step(_config_of(config, case), case.topology, case.step, layout)
            rows[case] = Row(case, compiled)
            files.write_rows(directory / "compiled.csv", [row.to_dict() for row in rows.values()])
            on_row(rows[case])
        every = sorted(rows.values(), key=_order)
        files.write_rows(directory / "compiled.csv", [row.to_dict() for row in every])
        files.write_text(directory / "summary.md", to_markdown(every))
        plots.compile_plot(every, describe(config), directory / "plots" / "compiled.png")
    return [rows[case] for case in wanted]


def read(directory: Path) -> list[Row]:
    """Reads the rows of a report; none if there is none.

    Raises:
        ConfigError: if the file is damaged.
    """
    path = directory / "compiled.json"
    if not path.exists():
        return []
    try:
        return [Row.from_dict(row) for row in json.loads(path.read_text())]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); restore it or choose another out") from None


def _order(row: Row) -> tuple[Any, ...]:
    case = row.case
    return case.topology, STEPS.index(case.step), case.family, case.num_experts


def describe(config: Config) -> str:
    """Says in a line what is compiled."""
    m = config.model
    sizes = f"{m.num_layers} layers, d_model {m.d_model}, d_ff {m.d_ff}, {m.image_size} x {m.image_size} pixels"
    return f"{sizes}, top-{m.top_k}, {m.compute_dtype}, {config.batch_size} images a step"


def cells(row: Row) -> dict[str, str]:
    """Formats what a row says of one device and one step, for people; empty where there is no program."""
    found = row.compiled
    share = "" if found.peak_bytes is None else f"{100 * found.peak_bytes / found.hbm_bytes:.1f}"
    by_kind = found.by_kind if found.status == "fits" else None
    moved = {kind: None if by_kind is None else by_kind.get(kind, 0) for kind in KINDS}
    other = None if by_kind is None else sum(by_kind.values()) - sum(by_kind.get(k, 0) for k in _SHOWN)
    return {
        "mesh": f"{found.data_axis}x{found.expert_axis}x{found.model_axis}",
        "status": found.status,
        "state GB": _number(found.argument_bytes, 1e9),
        "temp GB": _number(found.temp_bytes, 1e9),
        "peak GB": _number(found.peak_bytes, 1e9),
        "of HBM %": share,
        "GFLOP": _number(found.matmul_flops, 1e9),
        "HBM GB": _number(found.traffic_bytes, 1e9),
        **{f"{kind} MB": _number(moved[kind], 1e6) for kind in _SHOWN},
        "other MB": _number(other, 1e6),
        "compile s": _number(found.compile_seconds, 1),
    }


_SHOWN = KINDS[:4]


def limits(rows: Iterable[Row]) -> list[str]:
    """Says for each topology, step and family up to how many experts the model fits, and from how many on not."""
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.case.topology, row.case.step, row.case.family), []).append(row)
    said = []
    for (name, step, family), line in lines.items():
        fitting = [row.case.num_experts for row in line if row.compiled.status == "fits"]
        too_many = [row.case.num_experts for row in line if row.compiled.status == "does not fit"]
        failed = [row for row in line if row.compiled.status == "failed"]
        parts = [f"fits with {max(fitting):,} experts"] if fitting else []
        parts += [f"does not fit with {min(too_many):,}"] if too_many else []
        if family == "dense":
            parts = ["fits"] * len(fitting) + ["does not fit"] * len(too_many)
        parts += [f"failed with {row.case.num_experts:,} ({row.compiled.error})" for row in failed]
        said.append(f"{name}, {step}, {family}: {', '.join(parts)}")
    return said


def to_markdown(rows: Sequence[Row]) -> str:
    """Formats a table of all rows, and the limits."""
    heads = ["topology", "step", "family", "form", "experts", *cells(rows[0])]
    lines = [LEGEND, "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        case = row.case
        key = (case.topology, case.step, case.family, case.form, f"{case.num_experts:,}")
        lines.append("| " + " | ".join((*key, *cells(row).values())) + " |")
    return "\n".join([*lines, "", *[f"- {line}" for line in limits(rows)], ""])


LEGEND = (
    "Of one device and one step, as the TPU compiler laid it out; GB are 10^9 bytes. state: what goes in, parameters, "
    "optimiser and images. peak: all at once; where it does not fit, what it would need. GFLOP: matrix products. HBM: "
    "read and written. Then bytes through collectives, by kind. Loops count as often as they run; stored experts as "
    "routing in balance has it, empty slots included. mesh: data x expert x model."
)


def _number(value: float | None, unit: float) -> str:
    """Formats to three figures, and thousands whole."""
    if value is None:
        return ""
    return f"{value / unit:,.0f}" if value >= 1000 * unit else f"{value / unit:.3g}"


def _config_of(config: Config, case: Case) -> Config:
    return config.with_experts(case.family, config.model.form, case.num_experts)


def _identity(config: Config, layout: Layout) -> dict[str, Any]:
    stored = config.to_dict()
    del stored["model"]["num_experts"]  # of each case its own
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return {"config": stored, "layout": dataclasses.asdict(layout), "versions": versions}
