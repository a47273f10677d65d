import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from bvit_jax import compile_report, topology
from bvit_jax.compiled import KINDS, STEPS, Case, Compiled, Row
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError
from bvit_jax.sharding import DEFAULT, Layout
from tests.conftest import make_config

FITS = Compiled(
    status="fits",
    data_axis=4,
    expert_axis=1,
    model_axis=1,
    hbm_bytes=16 * 10**9,
    peak_bytes=4 * 10**9,
    argument_bytes=10**9,
    output_bytes=5 * 10**8,
    alias_bytes=5 * 10**8,
    temp_bytes=3 * 10**9,
    matmul_flops=2 * 10**12,
    traffic_bytes=7 * 10**9,
    open_loops=0,
    collective_bytes=12 * 10**6,
    by_kind={"all-reduce": 9 * 10**6, "all-to-all": 2 * 10**6, "collective-permute": 10**6},
    flops_unlooped=1e12,
    accessed_unlooped=3e9,
    compile_seconds=12.5,
)
TOO_LARGE = Compiled("does not fit", 1, 4, 1, hbm_bytes=16 * 10**9, peak_bytes=40 * 10**9, compile_seconds=1.0)
FAILED = Compiled("failed", 1, 4, 1, hbm_bytes=16 * 10**9, compile_seconds=1.0, error="INTERNAL: no")


def staged(config: Config, name: str, step: str, layout: Layout) -> Compiled:
    """A compiler for which standard mixtures of more than 4 experts do not fit to be trained."""
    large = config.model.family == "standard" and config.model.num_experts > 4 and step == "train"
    return TOO_LARGE if large else FITS


class Compiler:
    """Counts what is compiled."""

    def __init__(self, compile_step: Any = staged) -> None:
        self.asked: list[tuple[str, str, int, str]] = []
        self.compile_step = compile_step

    def __call__(self, config: Config, name: str, step: str, layout: Layout) -> Compiled:
        self.asked.append((name, config.model.family, config.model.num_experts, step))
        return self.compile_step(config, name, step, layout)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(topology, "compile_step", made)
    return made


def config() -> Config:
    return make_config("butterfly,8", batch_size=16)


def all_cases(experts: tuple[int, ...] = (2, 4, 8)) -> list[Case]:
    return compile_report.cases(config(), ["v5e:2x2", "v5p:2x2x1"], ["butterfly", "standard", "dense"], experts)


def write(directory: Path, cases: list[Case], layout: Layout = DEFAULT) -> list[Row]:
    return compile_report.write(config(), layout, cases, directory, lambda row: None)


def test_cases_are_every_family_number_and_step_and_a_dense_model_once():
    found = all_cases((2, 4))
    assert len(found) == len(set(found)) == 2 * 5 * 2
    here = [(c.family, c.form, c.num_experts, c.step) for c in found if c.topology == "v5e:2x2"]
    kinds = [("butterfly", "separate", 2), ("butterfly", "separate", 4), ("standard", "-", 2), ("standard", "-", 4)]
    assert here == [(*kind, step) for kind in [*kinds, ("dense", "-", 1)] for step in STEPS]
    assert {c.devices for c in found} == {4}


@pytest.mark.parametrize("compiled", [FITS, TOO_LARGE, FAILED])
def test_a_row_goes_to_plain_data_and_back(compiled):
    row = Row(Case("v5e:2x2", 4, "standard", "-", 8, "train"), compiled)
    flat = json.loads(json.dumps(row.to_dict()))
    assert Row.from_dict(flat) == row
    assert not any(isinstance(value, dict | list) for value in flat.values())
    assert flat["all_reduce_bytes"] == (9 * 10**6 if compiled is FITS else None)
    assert flat["all_gather_bytes"] == (0 if compiled is FITS else None)


def test_everything_asked_for_is_written(tmp_path, compiler):
    rows = write(tmp_path, all_cases())
    assert [row.case for row in rows] == all_cases()
    assert len(compiler.asked) == len(rows) == 2 * 7 * 2
    listed = list(csv.DictReader(io.StringIO((tmp_path / "compiled.csv").read_text())))
    stored = json.loads((tmp_path / "compiled.json").read_text())
    assert sorted(map(repr, rows)) == sorted(repr(Row.from_dict(row)) for row in stored)
    assert [(row["topology"], row["step"]) for row in stored[:7]] == [("v5e:2x2", "train")] * 7
    assert [row["peak_bytes"] for row in listed] == [str(row["peak_bytes"]) for row in stored]
    assert {f"{kind.replace('-', '_')}_bytes" for kind in KINDS} <= listed[0].keys()
    assert (tmp_path / "plots" / "compiled.png").stat().st_size > 10_000
    told = (tmp_path / "summary.md").read_text()
    assert "v5e:2x2, train, standard: fits with 4 experts, does not fit with 8" in told
    assert "v5p:2x2x1, eval, standard: fits with 8 experts\n" in told
    assert "v5e:2x2, train, dense: fits\n" in told


def test_what_is_there_is_not_compiled_again_and_more_can_be_added(tmp_path, compiler):
    write(tmp_path, all_cases((2, 4)))
    before = len(compiler.asked)
    rows = write(tmp_path, all_cases((2, 4, 8)))
    assert {(family, number) for _, family, number, _ in compiler.asked[before:]} == {("butterfly", 8), ("standard", 8)}
    assert len(rows) == 28
    assert write(tmp_path, all_cases((2,))) == [row for row in rows if row.case.num_experts < 4]
    assert len(json.loads((tmp_path / "compiled.json").read_text())) == 28
    assert (
        "v5p:2x2x1, train, standard: fits with 4 experts, does not fit with 8" in (tmp_path / "summary.md").read_text()
    )


def test_an_interrupted_report_goes_on_where_it_was(tmp_path, monkeypatch):
    def cut(*arguments: Any) -> Compiled:
        if len(compiler.asked) == 4:
            raise KeyboardInterrupt
        return staged(*arguments)

    compiler = Compiler(cut)
    monkeypatch.setattr(topology, "compile_step", compiler)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, all_cases())
    assert len(compile_report.read(tmp_path)) == 3
    again = Compiler()
    monkeypatch.setattr(topology, "compile_step", again)
    write(tmp_path, all_cases())
    assert len(again.asked) == len(all_cases()) - 3


def test_what_failed_is_told_and_tried_again(tmp_path, monkeypatch, compiler):
    monkeypatch.setattr(topology, "compile_step", Compiler(lambda *_: FAILED))
    (row,) = write(tmp_path, all_cases()[:1])
    assert "v5e:2x2, train, butterfly: failed with 2 (INTERNAL: no)" in (tmp_path / "summary.md").read_text()
    assert row.compiled.error == "INTERNAL: no"
    monkeypatch.setattr(topology, "compile_step", compiler)
    assert write(tmp_path, all_cases()[:1])[0].compiled == FITS


def test_what_failed_earlier_stays_until_it_is_asked_for_again(tmp_path, monkeypatch, compiler):
    monkeypatch.setattr(topology, "compile_step", Compiler(lambda *_: FAILED))
    dense = [case for case in all_cases() if case.family == "dense" and case.step == "train"]
    write(tmp_path, dense)
    assert "train, dense: failed with 1 (INTERNAL: no)" in (tmp_path / "summary.md").read_text()
    monkeypatch.setattr(topology, "compile_step", compiler)
    write(tmp_path, all_cases()[:1])
    assert [row.case for row in compile_report.read(tmp_path) if row.compiled == FAILED] == dense


def test_the_directory_of_another_model_or_layout_is_refused_and_left_alone(tmp_path, compiler):
    write(tmp_path, all_cases((2,)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = dataclasses.replace(config(), batch_size=32)
    with pytest.raises(ConfigError, match=r"out = .*another configuration; choose another out.*batch_size: 16 != 32"):
        compile_report.write(other, DEFAULT, all_cases((2,)), tmp_path, lambda row: None)
    with pytest.raises(ConfigError, match=r"layout\.fsdp: False != True"):
        write(tmp_path, all_cases((2,)), Layout(fsdp=True))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_damaged_report_is_named(tmp_path, compiler):
    write(tmp_path, all_cases((2,)))
    for text in ("[{", '[{"topology": "v5e:2x2"}]', "{}x", "[3]"):
        (tmp_path / "compiled.json").write_text(text)
        with pytest.raises(ConfigError, match=r"compiled\.json is damaged"):
            write(tmp_path, all_cases((2,)))


def test_what_does_not_divide_is_refused_before_anything_is_compiled_or_written(tmp_path, compiler):
    with pytest.raises(ConfigError, match=r"standard, 2 experts on v5e:2x2: expert_axis = 4: .*num_experts = 2"):
        write(tmp_path / "out", all_cases(), Layout(expert=4))
    assert not compiler.asked
    assert not (tmp_path / "out").exists()


def test_a_butterfly_cannot_be_made_of_another_family():
    with pytest.raises(ConfigError, match="model.family = 'standard': it must be butterfly"):
        compile_report.cases(make_config("standard,4"), ["v5e:2x2"], ["butterfly"], [4])
    assert len(compile_report.cases(make_config("standard,4"), ["v5e:2x2"], ["standard", "dense"], [4])) == 4


def test_a_ternary_mixture_is_one_of_the_families():
    found = compile_report.cases(make_config("butterfly,4"), ["v5e:2x2"], ["ternary"], [4, 8])
    kinds = [("ternary", "-", number, step) for number in (4, 8) for step in STEPS]
    assert [(c.family, c.form, c.num_experts, c.step) for c in found] == kinds
    with pytest.raises(ConfigError, match="model.family = 'standard': it must be ternary or butterfly"):
        compile_report.cases(make_config("standard,4"), ["v5e:2x2"], ["ternary"], [4])
    with pytest.raises(ConfigError, match="model.family = 'butterfly': it must be low_rank, to compile one"):
        compile_report.cases(make_config("butterfly,4"), ["v5e:2x2"], ["low_rank"], [4])


def test_cells_by_hand():
    case = Case("v5e:2x2", 4, "standard", "-", 8, "train")
    found = compile_report.cells(Row(case, FITS))
    assert found == {
        "mesh": "4x1x1",
        "status": "fits",
        "state GB": "1",
        "temp GB": "3",
        "peak GB": "4",
        "of HBM %": "25.0",
        "GFLOP": "2,000",
        "HBM GB": "7",
        "all-reduce MB": "9",
        "all-gather MB": "0",
        "reduce-scatter MB": "0",
        "all-to-all MB": "2",
        "other MB": "1",
        "compile s": "12.5",
    }
    large = compile_report.cells(Row(case, TOO_LARGE))
    assert (large["peak GB"], large["of HBM %"], large["GFLOP"], large["all-reduce MB"]) == ("40", "250.0", "", "")
