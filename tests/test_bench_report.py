import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bvit_jax import bench, bench_compiled, bench_report, plots
from bvit_jax.bench_cases import Case, Plan, Row
from bvit_jax.bench_compiled import CompiledRow
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError
from tests.conftest import make_config
from tests.test_plots import check_picture, has_colour

BASE = make_config("butterfly,4")
SMALL = Plan(("layer forward",), ("tiny", "small"), (2, 8), (2,))
TO_COMPILE = bench_compiled.cases(("layer forward",), ("tiny",), (8,), 2)


def milliseconds(case: Case) -> float:
    """Made up: dense 2, stored experts 3 each, butterflies 10 (tied 8), at full depth four times as much."""
    if case.family == "dense":
        return 2.0 * case.copies
    if case.family == "standard":
        return 3.0 * case.num_experts
    return (8.0 if case.form == "tied" else 10.0) * (1 if case.stages == 2 else 4)


def row_of(case: Case) -> Row:
    if case.dispatch == "fused":
        return Row(case, 2040, "not on CPU")
    ms = milliseconds(case)
    return Row(case, 2040 * case.copies, "ok", "", 5, ms, 0.9 * ms, 1.2 * ms, ms / 2, 3 * 10**6, 1e9)


class Machine:
    """Counts what is timed and compiled."""

    def __init__(self, cut_at: int = 99) -> None:
        self.timed: list[Case] = []
        self.compiled: list[Case] = []
        self.groups = 0
        self.cut_at = cut_at

    def measure(self, base: Config, group: Sequence[Case], repetitions: int, on_step: Callable[[], Any]) -> list[Row]:
        if self.groups == self.cut_at:
            raise KeyboardInterrupt
        self.groups += 1
        self.timed += group
        return [row_of(case) for case in group]

    def compile_case(self, base: Config, case: Case) -> CompiledRow:
        self.compiled.append(case)
        if case.dispatch == "blocks":
            return CompiledRow(case, 16400, "failed", error="NotImplementedError: no")
        hbm = 10**6 if case.family == "dense" else 5 * 10**6
        return CompiledRow(case, 16400, "ok", hbm, 2e6, 0, 3 * 10**9, 4 * 10**6, 5 * 10**6, 1.5)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return use(monkeypatch, Machine())


def use(monkeypatch: pytest.MonkeyPatch, made: Machine) -> Machine:
    monkeypatch.setattr(bench, "measure", made.measure)
    monkeypatch.setattr(bench_compiled, "compile_case", made.compile_case)
    return made


def write(directory: Path, plan: Plan = SMALL, compiled: Sequence[Case] = TO_COMPILE, repetitions: int = 5) -> Any:
    return bench_report.write(BASE, plan.cases(2), compiled, repetitions, directory)


def test_everything_is_written(tmp_path, machine):
    rows, found = write(tmp_path)
    assert [row.case for row in rows] == SMALL.cases(2) == machine.timed
    assert [row.case for row in found] == TO_COMPILE == machine.compiled
    for name, from_dict, written in (("bench", Row.from_dict, rows), ("compiled", CompiledRow.from_dict, found)):
        stored = json.loads((tmp_path / f"{name}.json").read_text())
        assert [from_dict(row) for row in stored["rows"]] == written
        listed = list(csv.DictReader(io.StringIO((tmp_path / f"{name}.csv").read_text())))
        assert [row["name"] for row in listed] == [row.case.name for row in written]
    where = json.loads((tmp_path / "bench.json").read_text())["machine"]
    assert where.keys() == {"device_kind", "cores", "jax"}
    assert where["cores"] >= 1
    assert "libtpu" in json.loads((tmp_path / "compiled.json").read_text())["machine"]
    check_picture(tmp_path / "plots" / "bench.png")
    assert set(bench_report.OUTPUTS) <= {path.name for path in tmp_path.iterdir()}


def test_the_summary_has_ratios_and_what_follows_from_them(tmp_path, machine):
    write(tmp_path)
    told = (tmp_path / "summary.md").read_text().splitlines()
    assert "### layer forward, small, top-2: d_model 128, d_ff 512, 2,040 tokens" in told
    assert "|  | 2 experts | 8 experts | spread % | temp MB |" in told
    # A spread of (1.2 - 0.9) of each median.
    assert "| dense | 1 (2) | 1 (2) | 30 | 3.0 |" in told
    assert "| dense x 2 | 2 (4) | 2 (4) | 30 | 3.0 |" in told
    assert "| standard | 3 (6) | 12 (24) | 30 | 3.0 |" in told
    assert "| butterfly rows tied, full depth |  | 16 (32) | 30 | 3.0 |" in told
    assert "| butterfly fused separate | not on CPU | not on CPU |  |  |" in told
    group = "- layer forward, tiny, top-2, time of"
    same = "rows separate 1, blocks separate 1, auto separate 1"
    assert f"{group} 8 experts over 2: standard 4, {same}" in told
    assert f"{group} butterfly over standard, 8 experts: {same.replace(' 1', ' 0.417')}" in told
    deep = [line for line in told if "full depth over little" in line]
    assert len(deep) == 1
    assert "layer forward, small, top-2" in deep[0]
    assert deep[0].count(" 4") == 6
    assert "| dense | 1 | 1 | 1 | 2 | 0 | 3 | 4 | 1 | 5 | ok |" in told
    assert "| butterfly rows separate | 8 | 5 | 5 | 2 | 0 | 3 | 4 | 1 | 5 | ok |" in told
    assert "| butterfly blocks separate | 8 |  |  |  |  |  |  |  |  | failed |" in told
    assert "- layer forward, tiny, butterfly blocks tied: NotImplementedError: no" in told


def test_finished_groups_and_programs_are_kept_and_others_timed_whole(tmp_path, machine):
    first, _ = write(tmp_path)
    asked = len(machine.timed)
    assert write(tmp_path)[0] == first
    assert len(machine.timed) == asked
    assert write(tmp_path, dataclasses.replace(SMALL, sizes=("small",)), [])[0] == [
        row for row in first if row.case.size == "small"
    ]
    more = dataclasses.replace(SMALL, sizes=("small",), experts=(2, 8, 16))
    write(tmp_path, more, bench_compiled.cases(("layer forward",), ("tiny",), (8, 16), 2))
    # A group in which something is new is timed anew, with all that it had.
    had = [case for case in SMALL.cases(2) if case.size == "small"]
    assert set(machine.timed[asked:]) == {*had, *more.cases(2)}
    fewer = dataclasses.replace(more, experts=(4,))
    write(tmp_path, fewer, [])
    stored = json.loads((tmp_path / "bench.json").read_text())["rows"]
    small = {row["num_experts"] for row in stored if row["size"] == "small" and row["family"] == "standard"}
    assert small == {2, 4, 8, 16}
    again = [case for case in machine.compiled[len(TO_COMPILE) :] if case.dispatch != "blocks"]
    assert {case.num_experts for case in again} == {16}
    stored = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {row["size"] for row in stored} == {"tiny", "small"}
    told = (tmp_path / "summary.md").read_text()
    assert 0 < told.index("### layer forward, tiny, top-2") < told.index("### layer forward, small")


def test_an_interrupted_benchmark_goes_on_where_it_was(tmp_path, monkeypatch):
    use(monkeypatch, Machine(cut_at=1))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    again = use(monkeypatch, Machine())
    rows, _ = write(tmp_path)
    assert {case.size for case in again.timed} == {"small"}
    assert len(rows) == len(SMALL.cases(2))


def test_what_failed_to_compile_is_tried_again(tmp_path, machine):
    write(tmp_path)
    failed = [case for case in TO_COMPILE if case.dispatch == "blocks"]
    write(tmp_path)
    assert machine.compiled == [*TO_COMPILE, *failed]


def test_another_benchmark_or_machine_is_refused_and_left_alone(tmp_path, machine, monkeypatch):
    write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"out = .*another configuration.*repetitions: 5 != 3"):
        write(tmp_path, repetitions=3)
    monkeypatch.setattr(bench_report, "machine", lambda: {"device_kind": "other", "cores": 1, "jax": "0"})
    with pytest.raises(ConfigError, match="machine.device_kind: 'cpu' != 'other'"):
        write(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_programs_of_another_compiler_are_compiled_anew(tmp_path, machine, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(bench_compiled, "compiler", lambda: {"libtpu": "0"})
    write(tmp_path)
    assert machine.compiled == [*TO_COMPILE, *TO_COMPILE]


@pytest.mark.parametrize("text", ["[{", "[]", '{"rows": [{"job": "layer forward"}]}', '{"rows": [3]}', "{}"])
def test_a_damaged_report_is_named(tmp_path, machine, text):
    write(tmp_path)
    for name in ("compiled", "bench"):
        (tmp_path / f"{name}.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"{name}\.json is damaged"):
            write(tmp_path)


def test_the_picture_shows_every_path_that_ran(tmp_path):
    rows = [row_of(case) for case in SMALL.cases(2)]
    picture = check_picture(plots.bench_plot(rows, "title", tmp_path / "all.png"))
    # Standard, rows, blocks, fused (which did not run), auto.
    assert [has_colour(picture, colour) for colour in plots.COLOURS[1:6]] == [True, True, True, False, True]
    slower = [dataclasses.replace(row, relative=3.0) if row.case.copies > 1 else row for row in rows]
    other = plots.bench_plot(slower, "title", tmp_path / "other.png")
    assert other.read_bytes() != (tmp_path / "all.png").read_bytes()


def test_a_picture_of_nothing_but_failures_can_be_drawn(tmp_path):
    rows = [Row(case, 34, "failed", "no") for case in SMALL.cases(2)]
    assert plots.bench_plot(rows, "title", tmp_path / "bench.png").exists()
